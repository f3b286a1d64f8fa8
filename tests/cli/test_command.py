"""How a command ends: what is refused in one line, everything else with its traceback; and what a failure leaves."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tqdm
from conftest import DEVICE, prune_model, random_windows, tiny_decoder, tiny_model
from test_commands import run

import main as pruning
from lib import parallel
from lib.cli import command, flags
from lib.errors import InvalidInput, NoRoom
from lib.evaluation import perplexity as perplexity_module
from lib.gradients import walk
from lib.models import block_order, checks, config, memory
from lib.models.decoder import Decoder
from lib.models.files import hub
from lib.pruning import prune as prune_module
from lib.pruning.masks import Sparsity
from lib.results import record

FAULT = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
OUT = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


@pytest.fixture
def wanda(saved_model, documents, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return [
        "main.py", "--model", saved_model, "--dataset", text, "--eval_dataset", text, "--nsamples", 4, "--seq_length", 16,
        "--cache_dir", tmp_path, "--prune_method", "wanda", "--sparsity_ratio", 0.5, "--save", tmp_path / "out",
    ]  # fmt: skip


def raising(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "defect", [lambda: list(zip([1], [], strict=True)), lambda: int("x"), lambda: Path("/no/such/file").read_text()]
)
def test_a_defect_of_ours_is_not_taken_for_bad_input(defect):
    with pytest.raises((ValueError, FileNotFoundError)):
        command.run(lambda: None, lambda args: defect())
    with pytest.raises(SystemExit, match="error: nothing: do this"):
        command.run(lambda: None, lambda args: raising(InvalidInput("nothing: do this"))())


@pytest.mark.parametrize("error", [FAULT, *OUT.values()], ids=["fault", *OUT])
def test_faults_of_a_device_are_not_the_models(error, monkeypatch):
    decoder = tiny_decoder()
    monkeypatch.setattr(Decoder, "tail", raising(error))
    with pytest.raises(type(error)) as stop:
        checks.require_runs_alone(decoder)
    assert stop.value is error
    monkeypatch.setattr(block_order, "_follow", raising(error))
    with pytest.raises(type(error)) as stop:
        Decoder(tiny_model(), DEVICE)
    assert stop.value is error or error is OUT["python"]


def test_the_cause_is_shown_of_a_model_that_cannot_be_run(monkeypatch):
    decoder = tiny_decoder()
    monkeypatch.setattr(Decoder, "tail", raising(KeyError("position_ids")))
    with pytest.raises(InvalidInput, match=r"cannot be run one by one on text: KeyError: 'position_ids'"):
        checks.require_runs_alone(decoder)


def test_a_defect_of_ours_is_not_taken_for_a_damaged_file():
    with pytest.raises(AttributeError), config.reading("model", "its weights", "download them again"):
        checks.dense_shares(None)  # raised inside lib/
    with (
        pytest.raises(InvalidInput, match=r"model: its weights cannot be read \(JSONDecodeError: Expecting.*\): download"),
        config.reading("model", "its weights", "download them again"),
    ):
        json.loads("{")


@pytest.mark.parametrize("where", OUT)
@pytest.mark.parametrize("streamed", [False, True])
def test_out_of_memory_says_what_was_held_and_what_would_need_less(where, streamed):
    plan = memory.Plan(streamed, 4, bytes={"weights": 13 * 10**9, "Hessians": 2 * 10**9, "solver": 0})
    with pytest.raises(NoRoom) as stop, memory.watched(plan, torch.device("cpu")):
        raise OUT[where]
    said = str(stop.value)
    assert "weights 13.0 GB, Hessians 2.0 GB" in said and "solver" not in said and "fewer --nsamples" in said
    assert ("--memory streamed" in said) != streamed and "--activation_memory" in said and "\n" not in said
    with pytest.raises(RuntimeError, match="shapes"), memory.watched(plan, torch.device("cpu")):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.parametrize("phase", ["prune", "perplexity"])
def test_a_run_that_is_out_of_memory_ends_in_one_line(wanda, monkeypatch, phase):
    monkeypatch.setattr(pruning, phase, raising(OUT["host"]))
    with pytest.raises(NoRoom, match=r"out of memory.*weights \d"):
        run(*wanda)


def test_writing_results_does_not_hide_the_first_error(wanda, monkeypatch, caplog):
    perplexity, calls = pruning.perplexity, []

    def measured(*args, **kwargs):
        calls.append(args)
        return perplexity(*args, **kwargs) if len(calls) == 1 else raising(ArithmeticError("the first"))()

    def write(folder, results, plots, original=record.write):
        return original(folder, results, plots) if "measured:" not in results["status"] else raising(OSError("the second"))()

    monkeypatch.setattr(pruning, "perplexity", measured)
    monkeypatch.setattr(record, "write", write)
    with pytest.raises(ArithmeticError, match="the first"):
        run(*wanda)
    assert "the second" in caplog.text


def test_the_log_says_complete_only_at_the_end(wanda, monkeypatch, tmp_path):
    """Nobody takes a run whose pruned model was not measured for a finished one, nor an earlier run's log for this one's."""
    run(*wanda)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["status"] == "complete"
    assert (tmp_path / "out" / "log.txt").exists()
    perplexity, calls = pruning.perplexity, []

    def measured(*args, **kwargs):
        calls.append(args)
        return perplexity(*args, **kwargs) if len(calls) == 1 else raising(ArithmeticError())()

    monkeypatch.setattr(pruning, "perplexity", measured)
    with pytest.raises(ArithmeticError):
        run(*wanda, "--no_cache")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["status"].startswith("pruned; the perplexity could not")
    assert not (tmp_path / "out" / "log.txt").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_several_shows_a_bar(rank, monkeypatch):
    shown = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, disable, **kwargs):
            shown.append(disable)
            super().__init__(*args, disable=True, **kwargs)

    for module in (prune_module, walk, perplexity_module):
        monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "share", lambda samples: samples)
    decoder, windows = tiny_decoder(), random_windows(2)
    perplexity_module.perplexity(decoder, windows)
    list(walk.gradient_norms(tiny_decoder(), windows))
    prune_model(decoder, windows, method="wanda", sparsity=Sparsity(0.5))
    assert shown == [True if rank else None] * 3  # None: where standard error is a terminal


def test_a_process_keeps_its_number_after_the_group_is_left(monkeypatch):
    group = SimpleNamespace(is_initialized=lambda: group.open, get_rank=lambda: 3, barrier=lambda: None, open=True)
    group.destroy_process_group = lambda: setattr(group, "open", False)
    monkeypatch.setattr(parallel, "dist", group)
    monkeypatch.setattr(parallel, "_rank_before", 0)
    parallel.stop()
    assert not group.open and parallel.rank() == 3


def test_the_hub_has_as_long_as_its_library_gives_it():
    assert hub.PATIENCE == hub.constants.HF_HUB_ETAG_TIMEOUT == 10


def test_flags_are_not_abbreviated(capsys, tmp_path):
    with pytest.raises(SystemExit):
        pruning.parse(["--model", str(tmp_path), "--prune", "wanda", "--sparsity_type", "2:4"])
    parser, groups = flags.parser_of("A command.\n\nexample")
    flags.add_common_flags(groups)
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "m", "--nsamp", "3"])
    assert "--nsamp" in capsys.readouterr().err
