"""What runs leave behind: whole or not at all, and never in place of something else in silence."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gradient_computation
import main as pruning
from lib import atomic
from lib.gradients.folder import GradientNorms
from lib.models import fingerprint
from lib.results import card, figures, record
from lib.results.read import COMPLETE


def pruned(*arguments) -> None:
    pruning.main(pruning.parse([str(argument) for argument in arguments]))


def computed(*arguments) -> None:
    gradient_computation.main(gradient_computation.parse([str(argument) for argument in arguments]))


@pytest.fixture
def flags(saved_model, documents, tmp_path) -> list:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    model = shutil.copytree(saved_model, tmp_path / "tiny")
    return [
        "--model", model, "--dataset", text, "--nsamples", 2, "--seq_length", 16, "--cache_dir", tmp_path / "cache",
        "--dtype", "float32",
    ]  # fmt: skip


@pytest.fixture
def wanda(flags, tmp_path) -> list:
    return [*flags, "--prune_method", "wanda", "--sparsity_ratio", 0.5, "--eval_dataset", flags[3], "--save", tmp_path / "out"]


RESULTS = {
    "status": COMPLETE,
    "flags": {"seq_length": 16, "model": "owner/name", "prune_method": "wanda", "sparsity_type": "2:4"},
    "perplexity": {"dataset": "wikitext2", "windows": 148, "dense": 5.0, "pruned": 6.25},
    "sparsity": 0.5,
    "sparsity_by_block": {"0": {"mlp.up_proj": 0.5}},
    "errors_by_block": {},
    "phases": {"prune": {"seconds": 12.5, "peak_host_gb": 1.5}},
}


class Died(BaseException):
    """As SIGKILL: no handler of the program's own runs."""


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("step", range(6))
def test_a_folder_is_the_old_one_or_the_new_one_whenever_the_process_dies(step, earlier, tmp_path, monkeypatch):
    folder, partial = tmp_path / "g", tmp_path / "g.partial"
    for path, content in ((folder, "old"), (partial, "new")):
        path.mkdir()
        (path / "a").write_text(content)
    if not earlier:
        shutil.rmtree(folder)
    left = [step]

    def dying(operation):
        def maybe(*args, **kwargs):
            if not left[0]:
                raise Died
            left[0] -= 1
            return operation(*args, **kwargs)

        return maybe

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        try:
            atomic.replace_folder(partial, folder)
        except Died:
            pass
    atomic.settle(folder)
    if earlier or step > 1:
        assert (folder / "a").read_text() == ("new" if not partial.exists() else "old")
    assert {path.name for path in tmp_path.iterdir()} <= {"g", "g.partial"}


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "a").write_text("old")

    def half(path: Path) -> None:
        path.write_text("ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        atomic.replace_file(tmp_path / "a", half)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_gradients_that_fail_leave_the_earlier_ones(flags, tmp_path, monkeypatch):
    computed(*flags, "--output_dir", tmp_path)
    folder = tmp_path / "llama2" / "gradients_aggregrate_norm_l2_model_tiny"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    of_block = fingerprint.of_block
    monkeypatch.setattr(fingerprint, "of_block", lambda decoder, i: of_block(decoder, i) if i else 1 / 0)
    monkeypatch.setattr(fingerprint, "checksum", lambda decoder: "")
    monkeypatch.setattr(gradient_computation, "point_out_earlier", lambda *args: None)
    with pytest.raises(ZeroDivisionError):  # at the last block
        computed(*flags, "--output_dir", tmp_path, "--seed", 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert GradientNorms(folder).index["seed"] == 0


def test_results_say_when_the_pruned_perplexity_is_missing(wanda, tmp_path, monkeypatch):
    pruned(*wanda)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["status"] == "complete"
    values, seen = [5.0, None], []

    def perplexity(*args, **more):
        if (value := values.pop(0)) is None:
            seen.append(json.loads((tmp_path / "out" / "results.json").read_text()))
            raise RuntimeError("out of memory")
        return value

    monkeypatch.setattr(pruning, "perplexity", perplexity)
    with pytest.raises(RuntimeError):
        pruned(*wanda, "--no_cache", "--seed", 1, "--save_model", tmp_path / "model")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert seen[0]["status"] == "pruned; the perplexity is being measured" and seen[0]["flags"]["seed"] == 1
    assert results["status"] == "pruned; the perplexity could not be measured: RuntimeError('out of memory')"
    assert results["perplexity"]["dense"] == 5.0 and results["perplexity"]["pruned"] is None
    assert results["sparsity"] == pytest.approx(0.5)
    assert not (tmp_path / "out" / "log.txt").exists()  # of the run before, whose perplexity is not this model's
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_results_are_json_whatever_the_perplexity(wanda, tmp_path, monkeypatch):
    values = [5.0, math.inf]
    monkeypatch.setattr(pruning, "perplexity", lambda *args, **more: values.pop(0))
    pruned(*wanda)
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert float(results["perplexity"]["pruned"]) == math.inf


def test_figures_that_cannot_be_drawn_are_a_warning(tmp_path, monkeypatch, caplog):
    def full(*args, **more):
        raise OSError("No space left on device")

    monkeypatch.setattr(figures, "save", full)
    record.write(str(tmp_path), RESULTS)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    assert (tmp_path / "log.txt").read_text() == "actual_sparsity\tppl\n0.5000\t6.2500\n"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "log.txt"}
    assert [(line.levelname, line.getMessage()) for line in caplog.records] == [
        ("WARNING", f"figures in {tmp_path} could not be drawn (OSError: No space left on device)")
    ]


def test_there_is_a_log_txt_only_of_a_run_that_is_complete(tmp_path):
    unfinished = RESULTS | {"status": "pruned; the zero-shot tasks are being scored"}
    for results in (unfinished, RESULTS, unfinished, RESULTS | {"sparsity": 0.25}):
        record.write(str(tmp_path), results)
        assert (tmp_path / "log.txt").exists() == (results["status"] == COMPLETE)
        assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "log.txt").read_text() == "actual_sparsity\tppl\n0.2500\t6.2500\n"


def test_results_and_the_card_name_the_gpu_and_the_version_of_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 number {device.index}")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    facts = {"versions": record.versions(), "device": record.name_of(torch.device("cuda", 1)), "dtype": "float16"}
    assert facts["versions"]["cuda"] == "12.8" and facts["device"] == "NVIDIA H100 number 1"
    text = card.body(RESULTS | facts, "python main.py", calibrated=True, updated=False)
    assert "cuda 12.8; computed in float16 on NVIDIA H100 number 1." in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" not in record.versions() and set(record.versions()) == set(record.PACKAGES)
    assert record.name_of(torch.device("cpu")) == "cpu"


def test_earlier_results_are_pointed_out_before_they_are_replaced(wanda, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    wanda += ["--save_model", tmp_path / "model"]
    pruned(*wanda)
    assert "overwritten" not in caplog.text
    pruned(*wanda)
    assert f"the result in {tmp_path}/out/results.json, of a run with the same settings, will be overwritten" in caplog.text
    caplog.clear()
    pruned(*wanda, "--sparsity_ratio", 0.25, "--seed", 3)
    assert "sparsity_ratio was 0.5 and is now 0.25" in caplog.text and "seed was 0 and is now 3" in caplog.text
    assert f"the pruned checkpoint in {tmp_path}/model will be overwritten" in caplog.text
    assert "nsamples" not in caplog.text and "weights was" not in caplog.text
    caplog.clear()
    change_a_weight(tmp_path / "tiny")
    pruned(*wanda, "--sparsity_ratio", 0.25, "--seed", 3)
    [said] = [line for line in caplog.text.splitlines() if "the earlier result in" in line]
    assert "WARNING" in said and "weights was" in said and "seed" not in said


def test_earlier_gradients_are_pointed_out_before_they_are_replaced(flags, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags += ["--output_dir", tmp_path, "--norms", "l2"]
    computed(*flags)
    assert "overwritten" not in caplog.text
    computed(*flags)
    assert "of a run with the same settings, will be overwritten when this run finishes" in caplog.text
    caplog.clear()
    shutil.copytree(tmp_path / "tiny", tmp_path / "elsewhere" / "tiny")
    change_a_weight(tmp_path / "elsewhere" / "tiny")
    computed(*flags, "--model", tmp_path / "elsewhere" / "tiny", "--nsamples", 3)
    [said] = [line for line in caplog.text.splitlines() if "the earlier result in" in line]
    assert "WARNING" in said and "nsamples was 2 and is now 3" in said
    assert 'weights was "another model\'s" and is now "this model\'s"' in said


def test_earlier_results_that_do_not_tell_what_made_them(wanda, flags, tmp_path, caplog):
    """Of the published code, or damaged."""
    folder = tmp_path / "llama2" / "gradients_aggregrate_norm_l2_model_tiny"
    for place in (tmp_path / "out", folder):
        place.mkdir(parents=True)
    (tmp_path / "out" / "log.txt").write_text("actual_sparsity\tppl\n0.5\t7.1\n")
    (folder / "block_000.safetensors").write_bytes(b"")
    pruned(*wanda)
    computed(*flags, "--output_dir", tmp_path, "--norms", "l2")
    for path in (tmp_path / "out" / "log.txt", folder):
        assert f"{path}, which does not tell what made it, will be overwritten" in caplog.text
    caplog.clear()
    (tmp_path / "out" / "results.json").write_text("{")
    (folder / "index.json").write_text("{")
    pruned(*wanda)
    computed(*flags, "--output_dir", tmp_path, "--norms", "l2")
    for path in (tmp_path / "out" / "results.json", tmp_path / "out" / "log.txt", folder):
        assert f"{path}, which does not tell what made it, will be overwritten" in caplog.text


def test_unfinished_sums_are_not_deleted_in_silence(flags, tmp_path, caplog, monkeypatch):
    stop = gradient_computation.GradientWork.commit

    def stopped(work, done, missing):
        stop(work, done, missing)
        raise KeyboardInterrupt

    flags += ["--output_dir", tmp_path, "--memory", "streamed", "--activation_memory", 1e-6]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gradient_computation.GradientWork, "commit", stopped)
        computed(*flags)
    work = tmp_path / "llama2" / "gradients_aggregrate_norm_work_model_tiny.rank0"
    assert {path.name for path in work.iterdir()} == {"state.json", "samples_00001"}  # what --resume needs, and no more
    assert not list(work.parent.glob("*.partial")) and not list(work.parent.glob("*.lock"))
    computed(*flags)
    assert f"the unfinished sums in {work} are deleted: --resume would have continued with them" in caplog.text


def test_more_positions_than_a_rotary_model_was_made_for(flags, tmp_path, caplog, documents):
    text = tmp_path / "long.txt"
    text.write_text(" ".join(documents))
    computed(*flags, "--dataset", text, "--seq_length", 65, "--nsamples", 1, "--output_dir", tmp_path)
    assert "--seq_length 65 is beyond the 64 positions" in caplog.text
    caplog.clear()
    computed(*flags, "--dataset", text, "--seq_length", 64, "--nsamples", 1, "--output_dir", tmp_path)
    assert "beyond the 64 positions" not in caplog.text


def test_differences():
    assert record.differences({"a": 1, "b": 2}, {"b": 3, "a": 1, "c": 4}) == "b was 2 and is now 3, c was None and is now 4"
    assert record.differences({"a": 1}, {"a": 1}) == ""


def change_a_weight(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight.neg_()
    loaded.save_pretrained(model)
