"""Tasks of lm-evaluation-harness on a model in memory: the harness' own results on the same checkpoint, to the bit."""

import copy
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import own_task
import pytest
import torch
from conftest import DEVICE, ROOT, tiny_model
from own_task import NAME, needs_harness
from test_commands import run
from test_record import RESULTS
from transformers import AutoModelForCausalLM

import main as pruning
from lib.evaluation import zero_shot
from lib.models import loading
from lib.results import card, tables


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder for --include_path."""
    return own_task.write(tmp_path_factory.mktemp("task"), own_task.questions_of_words())


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(documents))
    return path


@pytest.fixture
def command(saved_model, text, tasks, tmp_path):
    return [
        "--model", saved_model, "--dataset", text, "--eval_dataset", text, "--nsamples", 4, "--seq_length", 16, "--dtype", "float32",
        "--cache_dir", tmp_path / "cache", "--prune_method", "magnitude", "--sparsity_ratio", 0.5,
        "--eval_zero_shot", "--tasks", NAME, "--include_path", tasks,
    ]  # fmt: skip


def harness_on(checkpoint, tasks, **settings) -> dict:
    """What the harness itself makes of a checkpoint, loading it its own way."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(checkpoint), "dtype": "float32"}, device="cpu",
        tasks=[NAME], task_manager=manager, log_samples=False, **settings,
    )  # fmt: skip
    return results["results"][NAME]


def agree(ours: dict, theirs: dict) -> bool:
    metrics = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "brier_score")
    return all(ours[metric] == theirs[f"{metric},none"] for metric in metrics)


@needs_harness
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the harness' own run is on the CPU")
@pytest.mark.parametrize("memory, shots", [("resident", None), ("streamed", 2)])
def test_it_is_the_harness_own_result_on_the_saved_checkpoint(command, tasks, tmp_path, saved_model, memory, shots):
    more = [] if shots is None else ["--num_fewshot", shots]
    printed = run(
        "main.py", *command, *more, "--eval_dense", "--memory", memory, "--save", tmp_path, "--save_model", tmp_path / "model"
    )
    found = json.loads((tmp_path / "results.json").read_text())["zero_shot"]
    dense, pruned = found["dense"]["tasks"][NAME], found["pruned"]["tasks"][NAME]
    assert agree(pruned, harness_on(tmp_path / "model", tasks, num_fewshot=shots))
    assert agree(dense, harness_on(saved_model, tasks, num_fewshot=shots))
    assert dense["brier_score"] != pruned["brier_score"]
    assert pruned["documents"] == own_task.COUNT and pruned["num_fewshot"] == (shots or 0)
    assert found["pruned"]["mean"] == pruned["acc"] and found["pruned"]["harness"]
    assert f"{pruned['acc']:.4f} ± {pruned['acc_stderr']:.4f}" in printed
    assert printed.splitlines()[-4].startswith("sparsity 0.5")
    assert f"{pruned['brier_score']:.4f}" in (tmp_path / "model" / "README.md").read_text()


@needs_harness
def test_of_several_processes_each_answers_its_share(command, tmp_path):
    one = [*command, "--device", "cpu", "--save", tmp_path / "one"]
    run("main.py", *one)
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "main.py", *map(str, one[:-1])]
    done = subprocess.run([*two, str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert found[1]["processes"] == 2
    scored = [result["zero_shot"]["pruned"]["tasks"][NAME] for result in found]
    brier = [task.pop("brier_score") for task in scored]  # a mean, in another order
    assert scored[0] == scored[1] and brier[0] == pytest.approx(brier[1], rel=1e-9)
    done = subprocess.run([*two, str(tmp_path / "two"), "--limit", "1"], cwd=ROOT, capture_output=True, text=True)
    assert f"1 documents of {NAME} for 2 processes" in done.stderr


@needs_harness
def test_the_model_and_its_tokenizer_stay_what_they_are(tmp_path, tasks, tokenizer):
    """The harness ties what a config calls tied, and sets a token for padding."""
    model = tiny_model("llama-gqa-tied").cpu()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    model.save_pretrained(tmp_path, state_dict=dict(model.state_dict()))
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    decoder = loading.load(str(tmp_path), dtype="float32", device="cpu")
    assert not torch.equal(decoder.model.lm_head.weight, decoder.model.model.embed_tokens.weight)
    before = copy.deepcopy(decoder.model.state_dict())
    asked = zero_shot.load([NAME], include_path=str(tasks), limit=3)
    first = zero_shot.evaluate(decoder, own, asked)
    assert first == zero_shot.evaluate(decoder, own, asked)
    assert first["tasks"][NAME]["documents"] == 3
    assert own.pad_token is None
    assert all(torch.equal(value, before[name]) for name, value in decoder.model.state_dict().items())


@needs_harness
def test_tasks_that_cannot_be_loaded_end_the_run_before_the_work(command, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"--tasks own_choice is not a task of lm_eval .* perhaps {NAME}"):
        run("main.py", *command, "--tasks", "own_choice")
    broken = own_task.write(tmp_path / "broken", name="lost")
    (tmp_path / "broken" / "lost.jsonl").unlink()
    with pytest.raises(ValueError, match=r"--tasks lost cannot be loaded \(.*--include_path names$"):
        run("main.py", *command, "--include_path", broken, "--tasks", "lost")
    assert "dense perplexity" not in capsys.readouterr().out


def test_the_harness_is_asked_for_before_anything_is_loaded(command, monkeypatch, capsys):
    def missing(package):
        raise PackageNotFoundError(package)

    for found, said in ((missing, "found none"), (lambda package: "0.4.5", "found 0.4.5")):
        monkeypatch.setattr(zero_shot, "version", found)
        with pytest.raises(SystemExit):
            pruning.parse([str(argument) for argument in command])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert said in line and "pip install -r requirements-eval.txt" in line


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--eval_dense", "--eval_dense is about the tasks of --eval_zero_shot"),
        ("--tasks boolq", "--tasks is about"),
        ("--num_fewshot 0", "--num_fewshot is about"),
        ("--limit 5", "--limit is about"),
        ("--include_path .", "--include_path is about"),
        ("--eval_zero_shot --include_path nowhere", "nowhere is not a folder"),
        ("--eval_zero_shot --limit 0", "not above 0"),
        ("--eval_zero_shot --num_fewshot -1", "not above -1"),
    ],
)
def test_flags_without_a_use_are_refused(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(zero_shot, "version", lambda package: zero_shot.OLDEST)
    with pytest.raises(SystemExit):
        pruning.parse(["--model", "m", "--prune_method", "magnitude", "--sparsity_ratio", "0.5", *flags.split()])
    assert message in capsys.readouterr().err


def test_tasks_may_be_joined_with_commas(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_shot, "version", lambda package: zero_shot.OLDEST)
    args = pruning.parse(
        ["--model", "m", "--prune_method", "magnitude", "--sparsity_ratio", "0.5", "--eval_zero_shot", "--tasks", "a,b", "c"]
    )
    assert args.tasks == ["a", "b", "c"]


def test_the_mean_is_over_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(zero_shot, "version", lambda package: "1.2")
    found = zero_shot._summary(
        {
            "group_subtasks": {"group": ["inner", "other"]},
            "results": {
                "group": {"name": "group", "sample_len": 30, "acc,none": 0.5, "acc_stderr,none": 0.125},
                "inner": {"sample_len": 10, "acc,none": 0.9, "acc_stderr,none": 0.1},
                "other": {"sample_len": 20, "acc,none": 0.3, "acc_stderr,none": 0.2},
                "alone": {"sample_len": 4, "acc,none": 0.25, "acc_stderr,none": "N/A", "acc_norm,none": 0.75},
                "answers": {"sample_len": 4, "exact_match,strict": 1.0, "exact_match_stderr,strict": 0.0},
            },
            "n-shot": {"inner": 0, "other": 0, "alone": 3, "answers": 5},
        }
    )
    assert found["mean"] == (0.5 + 0.25) / 2
    assert found["tasks"]["alone"] == {
        "acc": 0.25, "acc_stderr": None, "acc_norm": 0.75, "documents": 4, "num_fewshot": 3
    }  # fmt: skip
    assert found["tasks"]["answers"]["exact_match,strict"] == 1.0
    assert found["harness"] == "1.2"


def test_every_metric_of_every_filter_has_its_row(monkeypatch):
    """As of gsm8k, whose answers are picked out by two filters, and of a metric that has no error."""
    monkeypatch.setattr(zero_shot, "version", lambda package: "1.2")
    filters = {"strict-match": 0.25, "flexible-extract": 0.5}
    metrics = {f"exact_match,{name}": value for name, value in filters.items()}
    metrics |= {f"exact_match_stderr,{name}": value / 10 for name, value in filters.items()}
    gsm8k = {"alias": "gsm8k", "sample_len": 8, **metrics, "own,none": 3.0, "bits,none": "N/A"}
    scored = zero_shot._summary({"group_subtasks": {}, "results": {"gsm8k": gsm8k}, "n-shot": {"gsm8k": 5}})
    results = {"zero_shot": {"dense": scored, "pruned": scored}}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.zero_shot(results).splitlines()]
    assert lines[2:] == [
        ["gsm8k", "exact_match,strict-match", "5", "8", *["0.2500 ± 0.0250"] * 2],
        ["gsm8k", "exact_match,flexible-extract", "5", "8", *["0.5000 ± 0.0500"] * 2],
        ["gsm8k", "own", "5", "8", *["3.0000"] * 2],
        ["gsm8k", "bits", "5", "8", "", ""],
    ]
    facts = {"versions": {}, "dtype": "float32", "device": "cpu"}
    text = card.body(RESULTS | facts | results, "python main.py", calibrated=False, updated=False)
    assert tables.zero_shot(results) in text


def test_a_streamed_model_runs_as_a_whole(tmp_path):
    model = tiny_model("gemma2").cpu()
    model.save_pretrained(tmp_path)
    decoder = loading.load(str(tmp_path), dtype="float32", device="cpu", streamed=True)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad(), decoder.whole() as whole:
        found = whole(tokens).logits
    assert torch.equal(found, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits)
    assert all(parameter.is_meta for block in decoder.blocks for parameter in block.parameters())
    assert not any("forward" in vars(block) for block in decoder.blocks)
