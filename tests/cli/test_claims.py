"""Two runs that write to the same folder: the second is refused before it loads anything, and changes nothing."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import DEVICE, ROOT
from test_commands import run

import main as pruning
from lib.atomic import claimed
from lib.cli import run as run_module
from lib.cli.command import run as run_command


@pytest.fixture
def flags(saved_model, documents, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return [
        "--model", saved_model, "--prune_method", "magnitude", "--sparsity_type", "2:4", "--eval_dataset", text, "--seq_length", 16,
        "--cache_dir", tmp_path, "--dtype", "float32", "--force",
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["--save_model", "--save"])
def test_the_second_run_is_refused(flags, flag, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "folder"
    code = f"import time; from lib.atomic import claimed\nwith claimed({str(folder)!r}, {flag!r}): print(flush=True); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    partial = folder.with_name("folder.partial")
    try:
        first.stdout.readline()
        partial.mkdir()
        monkeypatch.setattr(run_module, "open_model", lambda args: pytest.fail("something was loaded"))
        arguments = [str(argument) for argument in (*flags, flag, folder, "--device", DEVICE)]
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: pruning.parse(arguments), pruning.main)
        assert str(ended.value.code).endswith(
            f"error: another run has its results in {folder}: let it finish, or use another {flag}"
        )
        assert partial.is_dir()
    finally:
        first.kill()
        first.wait()
    monkeypatch.undo()
    run("main.py", *flags, flag, folder)
    assert [path.name for path in folder.parent.iterdir() if path != partial] == ["folder"]


@pytest.mark.parametrize(("save", "save_model"), [("out", "out"), ("out", "out/model"), ("out/results", "out")])
def test_a_run_does_not_refuse_itself(flags, save, save_model, tmp_path):
    run("main.py", *flags, "--save", tmp_path / save, "--save_model", tmp_path / "." / save_model)
    assert (tmp_path / save / "results.json").is_file() and (tmp_path / save_model / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.claim"))


def test_claims_are_no_part_of_a_dense_folder(flags, saved_model, tmp_path):
    """--save_model may lie in the folder of --model."""
    dense = shutil.copytree(saved_model, tmp_path / "dense")
    flags[1] = dense
    with claimed(dense / "another", "--save"):
        run("main.py", *flags, "--save_model", dense / "pruned")
    assert not list((dense / "pruned").rglob("*.claim"))
