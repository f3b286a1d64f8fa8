"""Results read back, as a table and in pages: lib/results/read.py and scripts/collect_results.py."""

import csv
import json
import statistics

import collect_results
import pytest
from conftest import ROOT

from lib.errors import InvalidInput
from lib.results import read

FLAGS = {
    "model": "models/tiny", "prune_method": "gblm", "sparsity_type": "unstructured", "sparsity_ratio": 0.5, "alpha": 100.0,
    "nsamples": 4, "seq_length": 16, "seed": 0, "dataset": "text", "eval_dataset": "text", "save": "out/a", "use_variant": False,
    "gradient_path": "g/llama2/gradients_aggregrate_norm_l2_model_tiny", "gradient_inv": False, "pack": False,
}  # fmt: skip


def write(folder, name: str, perplexity: float | None = 40.0, ratio: float = 0.5, **flags):
    """A results.json as main.py writes it."""
    path = folder / name / "results.json"
    path.parent.mkdir(parents=True)
    phases = {
        "prune": {"seconds": 3.0, "peak_host_gb": 1.0},
        "dense perplexity": {"seconds": 5.0, "peak_host_gb": 0.5},
        "pruned perplexity": {"seconds": 4.0, "peak_host_gb": 2.0},
    }
    path.write_text(
        json.dumps(
            {
                "flags": FLAGS | flags,
                "dtype": "float32",
                "perplexity": {"dense": 20.0, "pruned": perplexity},
                "sparsity": ratio,
                "sparsity_asked": ratio,
                "sparsity_by_block": {"0": {"mlp": ratio}},
                "phases": phases,
            }
        )
    )
    return path


def collect(*arguments) -> list[dict[str, str]]:
    """The rows of the CSV that the script writes, and of the Markdown under "markdown"."""
    args = collect_results.parse([str(argument) for argument in arguments])
    collect_results.main(args)
    with args.output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = args.output.with_suffix(".md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert len(cells) == len(rows) + 2
    for row, values in zip(rows, cells[2:], strict=True):
        row["markdown"] = dict(zip(cells[0], values, strict=True))
    return rows


def test_seeds_become_mean_and_spread(tmp_path):
    values = {0: 40.0, 1: 41.0, 2: 45.0}
    for seed, value in values.items():
        write(tmp_path, f"s{seed}", value, seed=seed, save=f"out/s{seed}", gradient_path=f"g{seed}_norm_l2_model")
    write(tmp_path, "other", 50.0, nsamples=8)
    several, other = sorted(collect(tmp_path, "--output", tmp_path / "table"), key=lambda row: row["nsamples"])
    mean, spread = statistics.mean(values.values()), statistics.stdev(values.values())
    assert float(several["perplexity"]) == mean and float(several["perplexity_std"]) == pytest.approx(spread)
    assert several["seeds"] == "0 1 2" and other["seeds"] == "0" and other["perplexity_std"] == ""
    assert several["markdown"]["perplexity"] == f"{mean:.2f} ± {spread:.2f}" and other["markdown"]["perplexity"] == "50.00"
    assert several["markdown"]["seconds: pruning + perplexity"] == "3 + 4" and several["markdown"]["peak memory, GB"] == "2.00"
    assert several["markdown"]["dense"] == "20.00" and "dataset" not in several["markdown"]


def test_rho_compares_with_sparsegpt_on_the_same_samples(tmp_path):
    """(40 - 20) / (30 - 20), and nothing where SparseGPT has seen other samples or removed another share."""
    recipe = {"recipe": "best", "update": "lsq", "stages": 8}
    write(tmp_path, "own", 40.0, prune_method="wanda", held_out=4, **recipe)
    write(tmp_path, "reference", 30.0, prune_method="sparsegpt", update="none", stages=1)
    write(tmp_path, "samples", 40.0, prune_method="wanda", nsamples=8)
    write(tmp_path, "share", 40.0, ratio=0.6, prune_method="wanda", sparsity_ratio=0.6)
    write(tmp_path, "seed", 40.0, prune_method="wanda", seed=1)
    write(tmp_path, "a", 25.0, prune_method="sparsegpt", update="lsq", stages=4)  # not the published one
    write(tmp_path, "b", 24.0, prune_method="sparsegpt", layer_ratios="line:0.3")
    rows = collect(tmp_path, "--output", tmp_path / "table", "--each")
    found = {(row["method"], row["nsamples"], row["ratio"], row["seeds"]): row for row in rows}
    own = found.pop(("wanda best", "4", "0.5", "0"))
    (reference,) = [row for row in rows if row["method"] == "sparsegpt" and row["perplexity"] == "30.0"]
    del found["sparsegpt", "4", "0.5", "0"]
    assert float(own["rho"]) == 2 and own["markdown"]["rho"] == "2.00" and float(reference["rho"]) == 1
    assert len(found) == 3 and all(row["rho"] == "" for row in found.values())


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 10.0},
        {"nsamples": 8},
        {"gradient_inv": True},
        {"use_variant": True},
        {"pack": True},
        {"dataset": "other"},
        {"eval_dataset": "other"},
        {"model": "models/other"},
        {"gradient_path": "g/llama2/gradients_aggregrate_norm_l1_model_tiny"},
        {"recipe": "best"},
        {"a_flag_that_is_new": 3},
    ],
    ids=str,
)
def test_runs_of_other_settings_are_not_averaged(change, tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", seed=1, **change)
    first, second = read.by_settings(read.read([tmp_path]))
    assert len(first) == len(second) == 1
    assert read.varying([*first, *second])


@pytest.mark.parametrize(
    "change",
    [
        {"save": "x"}, {"batch_size": 4}, {"device": "cuda"}, {"exclude": []}, {"data_dir": "d"}, {"layer_no": -1}, {"stages": 1},
        {"update": "none"}, {"asymmetric": 0.0}, {"reconstruct": 0}, {"reconstruct_lr": 0.01}, {"bos": "first"},
        {"eval_dataset": ["text", "c4"]}, {"held_out": 4},
    ],
    ids=str,
)  # fmt: skip
def test_places_and_flags_that_are_off_make_no_difference(change, tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", seed=1, **change)
    assert len(read.by_settings(read.read([tmp_path]))) == 1


def test_a_perplexity_that_is_no_number_has_no_spread(tmp_path):
    write(tmp_path, "a", 40.0)
    write(tmp_path, "b", "nan", seed=1)
    (row,) = collect(tmp_path, "--output", tmp_path / "table")
    assert row["perplexity"] == "nan" and row["perplexity_std"] == "" and row["markdown"]["perplexity"] == "nan"


def test_lines_of_table_py_and_results_of_main_py_are_one(tmp_path):
    write(tmp_path, "a", 40.0)
    settings = {
        name: value
        for name, value in FLAGS.items()
        if name not in ("prune_method", "sparsity_type", "sparsity_ratio", "alpha", "save")
    }
    row = {"method": "gblm", "pattern": "unstructured", "ratio": 0.5, "alpha": 100, "settings": settings | {"seed": 1, "dtype": "float32"},
           "perplexity": 42.0, "phases": {"prune": {"seconds": 1, "peak_host_gb": 1}}}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    ((one, other),) = read.by_settings(read.read([tmp_path]))
    assert {one.perplexity, other.perplexity} == {40.0, 42.0}


def test_unfinished_runs_are_left_out_and_said(tmp_path, caplog):
    write(tmp_path, "a")
    write(tmp_path, "b", None, nsamples=8)
    write(tmp_path, "c", "NaN", nsamples=16)
    runs = read.read([tmp_path])
    assert [run.settings["nsamples"] for run in runs] == [4, 16] and runs[1].perplexity != runs[1].perplexity
    assert "b/results.json is of a run that has not ended" in caplog.text


def test_a_run_is_finished_when_its_status_says_so(tmp_path, caplog):
    """That its pruned perplexity is known is not enough; results of older versions have no status."""
    statuses = {"scoring": "pruned; the zero-shot tasks are being scored", "complete": read.COMPLETE, "older": None}
    for nsamples, (name, status) in enumerate(statuses.items(), 1):
        path = write(tmp_path, name, nsamples=nsamples)
        if status is not None:
            path.write_text(json.dumps({"status": status, **json.loads(path.read_text())}))
    assert [run.settings["nsamples"] for run in read.read([tmp_path])] == [2, 3]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'scoring' / 'results.json'} is of a run that has not ended, and is left out"
    ]
    with pytest.raises(InvalidInput, match="no finished run"):
        read.read([tmp_path / "scoring"])


@pytest.mark.parametrize("phase", ["search alpha", "search layer_ratios", "choose alpha", "choose layer_ratios"])
def test_the_seconds_of_a_search_are_seconds_of_pruning(phase, tmp_path):
    path = write(tmp_path, "a")
    results = json.loads(path.read_text())
    results["phases"][phase] = {"seconds": 20.0, "peak_host_gb": 1.0}
    path.write_text(json.dumps(results))
    (row,) = collect(tmp_path, "--output", tmp_path / "table")
    assert row["markdown"]["seconds: pruning + perplexity"] == "23 + 4"


def test_the_same_run_twice_counts_once(tmp_path, caplog):
    write(tmp_path, "a", 40.0)
    write(tmp_path, "b", 41.0)
    (run,) = read.read([tmp_path])
    assert run.perplexity == 41.0 and "a/results.json, which is left out" in caplog.text


def test_where_chooses(tmp_path):
    for name, flags in {"a": {}, "b": {"prune_method": "wanda"}, "c": {"alpha": 10.0}, "d": {"seed": 3}}.items():
        write(tmp_path, name, **flags)
    output = "--output", tmp_path / "t"
    assert [row["method"] for row in collect(tmp_path, *output, "--where", "method=wanda")] == ["wanda"]
    assert len(collect(tmp_path, *output, "--where", "alpha=,100", "--each")) == 3
    assert [row["seeds"] for row in collect(tmp_path, *output, "--where", "seed=3")] == ["3"]
    for wrong, message in (("colour=red", "no such setting"), ("seed=9", "no run has seed=9")):
        with pytest.raises(ValueError, match=message):
            collect(tmp_path, *output, "--where", wrong)
    with pytest.raises(ValueError, match="colour is not one of"):
        collect(tmp_path, *output, "--columns", "colour")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"flags": {}}', "3"])
def test_other_json_is_named(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json holds no results"):
        read.read([tmp_path])


def test_places_without_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read.read([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no finished run"):
        read.read([tmp_path])


def test_a_stale_table_of_a_page_is_noticed_and_made_anew():
    page = (ROOT / "MODEL_ZOO.md").read_text()
    assert collect_results.filled(page) == page
    stale = page.replace("| 49.77 |", "| 48.77 |")
    assert stale != page and collect_results.filled(stale) == page


def test_filling_changes_nothing_but_tables(tmp_path):
    data = "docs/results/smollm2-135m-c4.jsonl"
    page = (
        f"before\n<!-- table {data} --where method=dense --columns method perplexity -->\nold\n<!-- end of table -->\nafter\n"
    )
    file = tmp_path / "page.md"
    file.write_text(page)
    collect_results.main(collect_results.parse(["--fill", str(file)]))
    lines = file.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines and "| dense | 21.62 |" in lines


@pytest.mark.parametrize("arguments", [[], ["out", "--fill", "page"], ["out", "--where", "seed"]])
def test_wrong_flags_are_parser_errors(arguments):
    with pytest.raises(SystemExit) as stop:
        collect_results.parse(arguments)
    assert stop.value.code == 2
