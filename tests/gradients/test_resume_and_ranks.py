"""Runs that are killed and go on, and runs of several processes."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import DEVICE, ROOT, free_port, prune_model, random_windows, tiny_decoder
from safetensors.torch import load_file
from test_commands import run
from test_walk import SCALE, largest_difference, ours

from lib import parallel
from lib.gradients import resume as work_module
from lib.gradients.folder import GradientNorms
from lib.gradients.resume import GradientWork
from lib.gradients.walk import gradient_norms
from lib.models import loading
from lib.pruning.masks import Sparsity


@pytest.mark.parametrize("keep_graph", [True, False])
def test_sums_go_on_where_they_were_committed(tmp_path, keep_graph, monkeypatch):
    monkeypatch.setattr(work_module, "SAVED_AFTER", 0)
    monkeypatch.setattr(work_module, "SAVING_SHARE", math.inf)
    windows, options = random_windows(7), {"scale": SCALE, "keep_graph": keep_graph, "group": 2}
    expected = {i: sums.result("l1") for i, sums in gradient_norms(tiny_decoder(), windows, **options)}
    settings = {"norms": ["l1", "l2"], "scale": SCALE, "seed": 0}
    work = GradientWork(tmp_path / "work", settings, DEVICE)
    commit, commits = work.commit, []

    def die_at_the_third(done, missing):
        commits.append(done)
        if len(commits) == 3:
            raise KeyboardInterrupt
        commit(done, missing)

    work.commit = die_at_the_third
    with pytest.raises(KeyboardInterrupt):
        list(gradient_norms(tiny_decoder(), windows, work=work, **options))
    if keep_graph:
        assert commits == [1, 2, 3]
    else:
        assert commits == [2, 4, 6]
    with pytest.raises(ValueError, match=r"another run has its sums in .*work: .*another --output_dir"):
        GradientWork(tmp_path / "work", settings, DEVICE, resume=True)
    work.lock.release()  # as when its process dies
    again = GradientWork(tmp_path / "work", settings, DEVICE, resume=True)
    assert again.done == commits[1] and sorted(again) == [0, 1, 2]
    resumed = {i: sums.result("l1") for i, sums in gradient_norms(tiny_decoder(), windows, work=again, **options)}
    assert all(torch.equal(expected[i][name], resumed[i][name]) for i in expected for name in expected[i])
    again.lock.release()
    with pytest.raises(ValueError, match=r"seed was 0 and is now 1.*without --resume"):
        GradientWork(tmp_path / "work", {**settings, "seed": 1}, DEVICE, resume=True)
    assert GradientWork(tmp_path / "work", settings, DEVICE).done == 0  # without resume: from the start


def test_sums_in_memory_are_saved_when_much_work_could_be_lost_and_not_more_often_than_it_is_worth(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(work_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    work = GradientWork(tmp_path / "work", {"norms": ["l2"], "scale": 1.0}, DEVICE)
    due = []
    monkeypatch.setattr(work, "commit", lambda done, missing: clock.__setitem__(0, clock[0] + 20))  # saving takes 20 seconds
    for second in range(600):
        clock[0] += 1
        if work.due():
            due.append(second)
            work.save({}, second, {})
    assert due == [59, 259, 459]


@pytest.fixture
def command(saved_model, documents, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    # On the CPU: two processes need a GPU each, and no other process knows the stand-in.
    return [
        "gradient_computation.py", "--model", saved_model, "--dataset", text, "--nsamples", 24, "--seq_length", 16, "--cache_dir", tmp_path,
        "--dtype", "float32", "--device", "cpu", "--memory", "streamed", "--activation_memory", 1e-6, "--norms", "l2", "--output_dir",
    ]  # fmt: skip


def wait_for(condition, process, seconds: float = 300):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()[1]
        time.sleep(0.002)


def samples_done(output: Path) -> int:
    state = output / "llama2" / "gradients_aggregrate_norm_work_model_tiny-llama.rank0" / "state.json"
    return json.loads(state.read_text())["done"] if state.exists() else 0


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_killed_run_resumes_to_the_same_bytes(command, tmp_path, caplog):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*command, whole)
    process = start(*command, killed)
    wait_for(lambda: samples_done(killed) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(killed.rglob("index.json"))
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        run(*command, killed, "--resume", "--seed", 1)
    caplog.set_level(logging.INFO)
    run(*command, killed, "--resume")
    assert "continuing after" in caplog.text
    assert contents(killed) == contents(whole)


def of_one_rank(rank, world, port, folder):
    """What each of `world` processes does: gradients, then wanda, on its share of five windows."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    parallel.start(torch.device("cpu"))
    windows = random_windows(5)
    norms = ours(tiny_decoder(), parallel.share(windows))
    pruned = {}
    for method in ("wanda", "sparsegpt"):
        decoder = tiny_decoder()
        prune_model(decoder, windows, method=method, sparsity=Sparsity.parse("2:4"))
        pruned[method] = decoder.model.state_dict()
    torch.save((norms, pruned), f"{folder}/rank{rank}.pt")
    parallel.stop()


@pytest.mark.two_processes
def test_two_processes_give_the_sums_and_weights_of_one(tmp_path):
    torch.multiprocessing.spawn(of_one_rank, (2, free_port(), str(tmp_path)), nprocs=2)
    norms = ours(tiny_decoder(), random_windows(5))
    (one, pruned), (two, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert not one["l1"].keys() & two["l1"].keys()  # the sums of a block are in one process
    assert largest_difference({norm: one[norm] | two[norm] for norm in norms}, norms) < 1e-6
    assert one["l1"].keys() | two["l1"].keys() == norms["l1"].keys()
    for method, weights in pruned.items():
        assert all(torch.equal(weights[name], others[method][name]) for name in weights)  # all ranks end alike
        alone = tiny_decoder()
        prune_model(alone, random_windows(5), method=method, sparsity=Sparsity.parse("2:4"))
        expected = alone.model.state_dict()  # sums in another order: a near tie may fall the other way
        differing = sum(((weights[name] == 0) != (expected[name] == 0)).sum().item() for name in weights)
        assert differing / sum(weight.numel() for weight in weights.values()) < 1e-3


@pytest.mark.parametrize("pattern", [["--sparsity_type", "2:4"], ["--sparsity_ratio", 0.5, "--layer_ratios", "line"]])
def test_main_with_two_processes(saved_model, documents, tmp_path, pattern):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    command = [
        "main.py", "--model", saved_model, "--dataset", text, "--eval_dataset", text, "--nsamples", 5, "--seq_length", 16,
        "--cache_dir", tmp_path, "--dtype", "float32", "--device", "cpu", "--prune_method", "wanda", *pattern,
    ]  # fmt: skip
    saved = ["--memory", "streamed", "--save", tmp_path / "two", "--save_model", tmp_path / "two" / "model"]
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, *saved)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    run(*command, "--save", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["perplexity"]["dense"] == pytest.approx(one["perplexity"]["dense"], rel=1e-6)
    assert two["perplexity"]["pruned"] == pytest.approx(one["perplexity"]["pruned"], rel=1e-3)  # a near tie may differ
    assert printed.count("pruned perplexity") == 1
    if "line" in pattern:
        assert two["tried"]["layer_ratios"] == pytest.approx(one["tried"]["layer_ratios"], rel=1e-2)
        assert printed.count("chosen") == 1 and sorted(two["layer_ratios"]) == ["0", "1", "2"]
    saved = load_file(tmp_path / "two" / "model" / "model.safetensors")
    shares = {f"layers.{i}.": share for i, share in (two["layer_ratios"] or dict.fromkeys("012", 0.5)).items()}
    for name, weight in saved.items():
        if name.endswith("proj.weight"):
            asked = next(share for block, share in shares.items() if block in name)
            assert ((weight == 0).sum(1) == int(weight.shape[1] * asked)).all()


@pytest.mark.parametrize("memory", ["streamed", "resident"])
def test_gradients_of_two_processes_are_one_folder(command, tmp_path, memory):
    one, two = tmp_path / "one", tmp_path / "two"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(*launch, *command, two, "--memory", memory, "--norms", "l1", "l2")
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    run(*command, one, "--memory", memory, "--norms", "l1", "l2")
    assert contents(one).keys() == contents(two).keys()
    for norm in ("l1", "l2"):
        assert printed.count(f"{norm} gradient norms saved") == 1
        name = f"llama2/gradients_aggregrate_norm_{norm}_model_tiny-llama"
        a, b = GradientNorms(one / name), GradientNorms(two / name)
        decoder = loading.load(a.index["model"], dtype="float32", device="cpu")
        b.check(decoder)
        assert a.fingerprint == b.fingerprint and (a.index["processes"], b.index["processes"]) == (1, 2)
        assert abs(a.index["stored_zero"] - b.index["stored_zero"]) <= 2  # one may be at the edge of float16
        for i in range(len(decoder)):
            for linear, expected in a.block(i).items():
                assert torch.allclose(b.block(i)[linear].float(), expected.float(), rtol=2**-10, atol=1e-6)


def test_a_rank_that_dies_ends_the_run(command, tmp_path):
    folder = tmp_path / "gradients"
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, folder)
    wait_for(lambda: samples_done(folder), process)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "gradient_computation.py" in " ".join(child.cmdline())
    ]
    ranks[-1].kill()
    assert process.wait(timeout=300) != 0
    assert not list(folder.rglob("index.json"))


def test_more_processes_than_samples(command, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 25)
    with pytest.raises(ValueError, match="--nsamples 24 for 25 processes"):
        run(*command, tmp_path / "gradients")
