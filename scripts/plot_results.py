"""Figures of results, as PNG and PDF: perplexity against sparsity and alpha; time.

    python scripts/plot_results.py out/ docs/results/demo.jsonl

Results are results.json of main.py, the .jsonl of scripts/table.py, or folders
of them. Of results.json, the seconds of each phase and the values of each block
are drawn as well. The script says which figures it leaves out. Points are means
over seeds, and bars are their standard deviation.
"""

import argparse
import logging
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.errors import InvalidInput
from lib.results import figures, read
from lib.results.errors_left import defined
from lib.results.read import Run

logger = logging.getLogger("plot_results")
LONGEST_VALUE = 40  # characters of a setting in a legend
LONGEST = 100  # characters of what a file's name says of a run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders, results.json files or .jsonl files")
    parser.add_argument(
        "--output", type=Path, default=Path("out/figures"), metavar="DIR", help="folder for the figures (default: %(default)s)"
    )
    parser.add_argument("--dark", action="store_true", help="write NAME-dark.png and NAME-dark.pdf as well, for dark pages")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Draw whatever the results can show."""
    command.set_up_logging()
    runs = read.read(args.results)
    args.output.mkdir(parents=True, exist_ok=True)
    drawn = 0
    measured = _measured(runs)
    for draw in (sparsity_curve, alpha_curve, seconds, values_per_block):
        for name, size, drawing in draw(measured if draw in (sparsity_curve, alpha_curve) else runs):
            themes = ["light", *["dark"] * args.dark]
            drawn += len(paths := figures.save(drawing, args.output / name, size, themes))
            print(*paths, sep="\n")
    if not drawn:
        raise InvalidInput(
            "these results show nothing that can be drawn: give runs of several sparsities or alphas, or results.json"
        )


def sparsity_curve(runs: list[Run]):
    """Perplexity against sparsity: a line for each method that has several sparsities."""
    curves = _curves([run for run in runs if run.settings["pattern"] == "unstructured"], "ratio", scale=100)
    if not curves:
        print("perplexity against sparsity is left out: it takes two sparsities of a method")
        return
    level = _dense(runs, curves)

    def draw(figure):
        figures.perplexity_lines(figure, curves, "weights removed (%)", level=level)

    yield "sparsity", (figures.COLUMN, 2.6), draw


def alpha_curve(runs: list[Run]):
    """Perplexity against alpha: a panel for each pattern and ratio, in which Wanda with the same settings is a horizontal line."""
    panels = {}
    runs = [run for run in runs if run.settings["alpha"] != "auto"]
    with_alpha = [run for run in runs if run.settings["alpha"]]
    for pattern, ratio in dict.fromkeys((run.settings["pattern"], run.settings["ratio"]) for run in with_alpha):
        of_panel = [run for run in runs if (run.settings["pattern"], run.settings["ratio"]) == (pattern, ratio)]
        curves = _curves([run for run in of_panel if run.settings["alpha"]], "alpha")
        if curves:
            wanda = read.by_settings(run for run in of_panel if run.settings["method"] == "wanda")
            names = _names([group[0] for group in wanda], set())
            level = {name: _mean(group) for name, group in zip(names, wanda, strict=True)}
            title = pattern if pattern != "unstructured" else f"{100 * ratio:g} % unstructured"
            panels[title] = curves, level
    if not panels:
        print("the alpha curve is left out: it takes two alphas of gblm")
        return

    def draw(figure):
        figures.perplexity_panels(figure, panels, "alpha")

    yield "alpha", (min(figures.PAGE, figures.COLUMN * len(panels)), 2.4), draw


def values_per_block(runs: list[Run]):
    """Values along the blocks: a figure for each results.json and each quantity that it has for every block."""
    of_main = [run for run in runs if run.by_block]  # rows of scripts/table.py have none
    for name, run in zip(_file_names(_names(of_main, set())), of_main, strict=True):
        for quantity, by_block in defined(run.by_block, run.source).items():
            label = {"sparsity": "share of zeros"}.get(quantity, quantity.replace("_", " "))

            def draw(figure, by_block=by_block, label=label):
                figures.blocks(figure, by_block, label)

            suffix = f"-{name}" if len(of_main) > 1 else ""
            yield f"{quantity}_by_block{suffix}", (figures.PAGE, 2.6), draw


def seconds(runs: list[Run]):
    """Seconds of each phase: a bar for each results.json."""
    of_main = [run for run in runs if run.by_block]
    if not of_main:
        print("seconds and values per block are left out: they take results.json")
        return
    bars = {name: run.seconds for name, run in zip(_names(of_main, set()), of_main, strict=True)}

    def draw(figure):
        figures.phases(figure, bars)

    yield "seconds", (figures.PAGE, 1.1 + 0.3 * len(bars)), draw


def _curves(runs: list[Run], along: str, scale: float = 1) -> dict[str, figures.Line]:
    """{name: points (x, mean, standard deviation)} of runs that only differ in the setting `along` and in their seeds; a point
    that would be alone is left out."""
    curves: dict[str, list[list[Run]]] = {}
    for group in read.by_settings(runs):
        other_settings = {name: value for name, value in group[0].settings.items() if name != along}
        curves.setdefault(repr(other_settings), []).append(group)
    several = [groups for groups in curves.values() if len(groups) > 1]
    names = _names([groups[0][0] for groups in several], {along})
    return {
        name: sorted((scale * group[0].settings[along], _mean(group), _spread(group)) for group in groups)
        for name, groups in zip(names, several, strict=True)
    }


def _names(runs: list[Run], without: set[str]) -> list[str]:
    """A name for each run: its method and the settings in which runs differ but for `without`, as "gblm, 2:4, nsamples 64"."""
    differing = [name for name in read.varying(runs) if name not in {"method", *without}]
    names: list[str] = []
    for run in runs:
        values = {name: run.settings[name] for name in differing if run.settings.get(name) is not None}
        name = ", ".join(
            [run.settings["method"], *(_short(v if isinstance(v, str) else f"{k} {v}") for k, v in values.items())]
        )
        name = name if name not in names else f"{name}, seed {run.seed}"
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def _short(text: str) -> str:
    """A text with its middle left out where it is too long for a legend, such as the shares of all blocks."""
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE // 2]}…{text[-LONGEST_VALUE // 2 :]}"


def _file_names(names: list[str]) -> list[str]:
    """Parts of file names, each of another run: safe on every file system, and different where capitals do not count."""
    safe: list[str] = []
    for name in names:
        short = re.sub(r"[^A-Za-z0-9.+_-]+", "-", name.replace(", ", "-").replace(" ", "_"))[:LONGEST]
        taken, number = {earlier.casefold() for earlier in safe}, 1
        while (numbered := short if number == 1 else f"{short}-{number}").casefold() in taken:
            number += 1
        safe.append(numbered)
    return safe


def _measured(runs: list[Run]) -> list[Run]:
    """The runs whose perplexity is a number; the log names the others."""
    for run in runs:
        if not math.isfinite(run.perplexity):
            logger.warning("%s: the perplexity is %s, and left out of the curves", run.source, run.perplexity)
    return [run for run in runs if math.isfinite(run.perplexity)]


def _dense(runs: list[Run], curves) -> dict[str, float]:
    """{"dense": the dense perplexity}; empty unless all runs agree on it."""
    perplexities = {round(run.dense, 2) for run in runs if run.dense and math.isfinite(run.dense)} | {
        round(run.perplexity, 2) for run in runs if run.settings["method"] == "dense"
    }
    return {"dense": perplexities.pop()} if len(perplexities) == 1 else {}


def _mean(group: list[Run]) -> float:
    return statistics.mean(run.perplexity for run in group)


def _spread(group: list[Run]) -> float:
    return statistics.stdev(run.perplexity for run in group) if len(group) > 1 else 0.0


if __name__ == "__main__":
    command.run(parse, main)
