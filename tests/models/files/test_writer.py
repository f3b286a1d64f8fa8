"""What pruned blocks are written to: what is measured is what is saved, and what has no room is known before the work."""

import errno
import json
import shutil
import tempfile
from types import SimpleNamespace

import pytest
from conftest import tiny_model
from safetensors import SafetensorError
from test_commands import run

import main as pruning
from lib.errors import NoRoom
from lib.models.files import pruned_checkpoint, writer


@pytest.fixture
def flags(tokenizer, documents, tmp_path):
    """Of a run in float32 on weights that are stored in float16."""
    tiny_model(noise=0).half().cpu().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return [
        "--model", tmp_path / "dense", "--dataset", text, "--eval_dataset", text, "--nsamples", 9, "--seq_length", 16, "--force",
        "--cache_dir", tmp_path, "--dtype", "float32", "--sparsity_type", "2:4", "--prune_method", "wanda",
    ]  # fmt: skip


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_perplexity_is_that_of_the_weights_as_they_are_saved(flags, memory, tmp_path):
    """Updated weights, which are rounded to the files' dtype."""
    pruned = [*flags, "--memory", memory, "--update", "lsq"]
    again = [*flags, "--prune_method", "magnitude", "--sparsity_type", "unstructured", "--sparsity_ratio", 0]
    run("main.py", *pruned, "--save", tmp_path / "first", "--save_model", tmp_path / "pruned")
    run("main.py", *pruned, "--save", tmp_path / "unsaved")
    again[again.index("--model") + 1] = tmp_path / "pruned"
    run("main.py", *again, "--save", tmp_path / "second")
    first, second, unsaved = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second", "unsaved")
    )
    assert first["perplexity"]["pruned"] == pytest.approx(second["perplexity"]["dense"], rel=1e-9)
    assert unsaved["perplexity"]["pruned"] != pytest.approx(first["perplexity"]["pruned"], rel=1e-9)
    assert unsaved["errors_by_block"] == first["errors_by_block"]


def room(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EFBIG, "File too large"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


def test_temporary_files_without_room_are_known_before_the_work(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "prune", lambda *args, **how: pytest.fail("the work has begun"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room(monkeypatch, 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) * 4 - 1)
    with pytest.raises(NoRoom, match=rf"{tmp_path} needs 0\.0 GB, its disk has .* set TMPDIR .*--save_model"):
        run("main.py", *flags, "--memory", "streamed")


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_temporary_folder_that_fills_up_is_one_line(flags, error, tmp_path, monkeypatch):
    def full(*args, **how):
        raise error

    monkeypatch.setattr(writer, "save_file", full)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(NoRoom, match=rf"{tmp_path}/temporary/.* has no room .*: set TMPDIR .*--save_model"):
        run("main.py", *flags, "--memory", "streamed")
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_one_line(flags, error, tmp_path, monkeypatch):
    def full(*args, **how):
        raise error

    monkeypatch.setattr(pruned_checkpoint.SafetensorsFile, "write", full)
    with pytest.raises(NoRoom, match=r"pruned\.partial has no room .*: choose another --save_model"):
        run("main.py", *flags, "--save_model", tmp_path / "out" / "pruned")
    assert not (tmp_path / "out" / "pruned").exists() and not (tmp_path / "out" / "pruned.partial").exists()
