"""Figures of many runs, and of errors that are not defined: what is drawn, what is left out, in which files."""

import json
import re

import plot_results
import pytest
from conftest import ROOT
from test_collect_results import write
from test_record import RESULTS

from lib.results import figures, read, record


@pytest.fixture
def drawn(monkeypatch):
    """What the scripts draw: {name: [(drawing, arguments)]} instead of files."""
    found = {}
    for name in ("perplexity_lines", "perplexity_panels", "blocks", "phases"):
        monkeypatch.setattr(figures, name, lambda figure, *args, name=name, **more: found.setdefault(name, (args, more)))
    return found


def test_results_become_curves(tmp_path, drawn, capsys):
    for ratio in (0.3, 0.5):
        for seed in (0, 1):
            write(tmp_path, f"gblm{ratio}{seed}", 30 + 100 * ratio + seed, ratio, seed=seed)
        write(tmp_path, f"wanda{ratio}", 30 + 100 * ratio, ratio, prune_method="wanda", alpha=None, gradient_path=None)
    write(tmp_path, "alpha", 77.0, alpha=1000.0)
    plot_results.main(plot_results.parse([str(tmp_path), "--output", str(tmp_path / "f")]))
    (lines, _), more = drawn["perplexity_lines"]
    assert lines == {
        "gblm": [(30, 60.5, pytest.approx(0.5**0.5)), (50, 80.5, pytest.approx(0.5**0.5))],
        "wanda": [(30, 60, 0), (50, 80, 0)],
    }
    assert more["level"] == {"dense": 20.0}
    ((panels, _), _) = drawn["perplexity_panels"]
    curves, level = panels["50 % unstructured"]
    assert curves["gblm"] == [(100, 80.5, pytest.approx(0.5**0.5)), (1000, 77.0, 0)] and level == {"wanda": 80.0}
    ((seconds,), _) = drawn["phases"]
    assert len(seconds) == 7 and all(bar["prune"] == 3.0 for bar in seconds.values())


def test_what_cannot_be_drawn_is_said(tmp_path, capsys):
    write(tmp_path, "one")
    plot_results.main(plot_results.parse([str(tmp_path), "--output", str(tmp_path / "f")]))
    printed = capsys.readouterr().out
    assert "perplexity against sparsity is left out" in printed and "the alpha curve is left out" in printed
    assert {path.name for path in (tmp_path / "f").glob("*.png")} == {"seconds.png", "sparsity_by_block.png"}
    row = json.loads((ROOT / "docs" / "results" / "smollm2-135m-c4.jsonl").read_text().splitlines()[0])
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="show nothing that can be drawn"):
        plot_results.main(plot_results.parse([str(tmp_path / "row.jsonl"), "--output", str(tmp_path / "g")]))


def test_runs_that_differ_in_any_text_have_files_of_their_own(tmp_path):
    """Paths, patterns, the shares of a file, what is long, and names that are equal once they are safe."""
    shares = [" ".join(f"{block}={share}" for block in range(40)) + end for share in (0.3, 0.4) for end in ("", " 40=0.1")]
    datasets = [
        "txt/one.jsonl",
        "txt/two.jsonl",
        "txt-two.jsonl",
        "TXT/two.jsonl",
        "..",
        "a\\b*?<>|",
        "x" * 300,
        "x" * 301,
        "ü",
        *shares,
    ]
    for k, dataset in enumerate(datasets):
        write(tmp_path, f"{k}", dataset=dataset, include=["*.o_proj"] if k else [])
    plot_results.main(plot_results.parse([str(tmp_path), "--output", str(tmp_path / "f")]))
    names = [path.name for path in (tmp_path / "f").rglob("sparsity_by_block-*.png")]
    assert len({name.casefold() for name in names}) == len(datasets)
    assert all(re.fullmatch(r"[A-Za-z0-9.+_-]{1,200}", name) for name in names)
    assert {path.parent.name for path in (tmp_path / "f").rglob("*")} == {"f"}


ERRORS = {"masked": 0.5, "updated": 0.25, "updated_held_out": 0.125}
UNDEFINED = {"masked": "nan", "updated": "nan", "updated_held_out": "inf"}


def test_errors_that_are_not_defined_are_left_out_of_figures_and_said(tmp_path, drawn, caplog):
    """As results.json has them, where outputs are all zero: "nan" is no tick of an axis, and a block of them is no block."""
    path = write(tmp_path, "one")
    undefined = {"linears": {"up": UNDEFINED, "down": UNDEFINED}, "output": {"before": "nan", "after": "nan"}}
    errors = {"0": {"linears": {"up": ERRORS, "down": UNDEFINED}, "output": {"before": 0.3, "after": 0.2}}, "1": undefined}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"errors_by_block": errors}))
    (run,) = read.read([tmp_path])
    by_quantity = {name: drawing for name, _, drawing in plot_results.values_per_block([run])}
    by_quantity["error_by_block"](None)
    assert drawn["blocks"][0][0] == {"0": {"up": 0.25, "output": 0.2}}
    assert f"{path}: the error of block 0 down, block 1 up, block 1 down, block 1 output is not defined" in caplog.text
    for block in errors.values():
        block["linears"] = {"up": UNDEFINED}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"errors_by_block": errors}))
    (run,) = read.read([tmp_path])
    quantities = [name for name, _, _ in plot_results.values_per_block([run])]
    assert quantities == ["sparsity_by_block", "error_by_block"]  # of a quantity that is nowhere defined there is no figure


def test_means_of_a_block_are_of_errors_that_are_defined(tmp_path, drawn, caplog):
    """In a run's own figures: of two experts one has outputs that are all zero."""
    nan = float("nan")
    errors = {0: {"experts.0.up": (0.5, 0.25), "experts.1.up": (nan, nan), "": (0.3, 0.2)}, 1: {"experts.0.up": (nan, nan)}}
    results = RESULTS | {"errors_by_block": record.errors_by_linear(errors), "sparsity_by_block": {}}
    with pytest.MonkeyPatch.context() as patch:
        saved = {}
        patch.setattr(figures, "save", lambda draw, path, *args, **more: saved.setdefault(path.name, draw))
        record.write(str(tmp_path), results)
    saved["errors"](None)
    (_, more) = drawn["blocks"]
    (block,) = more["by_block"].values()
    assert set(block.values()) == {0.25, 0.2} and "block 0 experts.1.up, block 1 experts.0.up is not defined" in caplog.text


def test_a_perplexity_that_is_no_number_is_no_point_of_a_curve(tmp_path, drawn, caplog):
    for ratio in (0.3, 0.5, 0.7):
        write(tmp_path, f"{ratio}", "nan" if ratio == 0.7 else 100 * ratio, ratio)
    plot_results.main(plot_results.parse([str(tmp_path), "--output", str(tmp_path / "f")]))
    (lines, _), _ = drawn["perplexity_lines"]
    assert lines == {"gblm": [(30, 30, 0), (50, 50, 0)]}
    assert "0.7/results.json: the perplexity is nan, and left out of the curves" in caplog.text
