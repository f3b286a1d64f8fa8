"""All results below a folder as one table, Markdown and CSV; means over seeds.

    python scripts/collect_results.py out/
    python scripts/collect_results.py out/ --where pattern=2:4 method=gblm,wanda
    python scripts/collect_results.py --fill MODEL_ZOO.md

Results are results.json of main.py and the .jsonl of scripts/table.py. --fill
makes the tables of a page anew. Each stands between two lines such as

    <!-- table docs/results/demo.jsonl --each --where seed=0 -->
    <!-- end of table -->
"""

import argparse
import csv
import math
import re
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.errors import InvalidInput
from lib.results import read
from lib.results.read import Run

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"^(<!-- table ([^\n]+) -->)$.*?^(<!-- end of table -->)$", re.DOTALL | re.MULTILINE)
MEASURED = ("seeds", "dense", "perplexity", "rho", "sparsity", "seconds", "memory")
# Phases whose seconds are those of pruning; earlier versions called a search "choose ...".
PRUNING = {"prune", *(f"{verb} {flag}" for verb in ("search", "choose") for flag in ("alpha", "layer_ratios"))}
TITLES = {"seconds": "seconds: pruning + perplexity", "memory": "peak memory, GB"}  # of columns that are not called as they are


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="folders, results.json files or .jsonl files")
    parser.add_argument("--each", action="store_true", help="make a row for each run, without means over seeds")
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="take only runs with these settings, such as seed=0, method=gblm,wanda or alpha=,100",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="columns of the table (default: the settings in which runs differ, and all that was measured)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/results"),
        metavar="NAME",
        help="where to write NAME.md and NAME.csv (default: %(default)s)",
    )
    parser.add_argument("--fill", nargs="+", type=Path, default=[], metavar="PAGE", help="make the tables of these pages anew")
    args = parser.parse_args(argv)
    if bool(args.results) == bool(args.fill):
        parser.error("give either RESULTS, such as out/, or --fill and a page with tables")
    if wrong := [text for text in args.where if "=" not in text]:
        parser.error(f"--where {wrong[0]} is not NAME=VALUE, such as seed=0")
    return args


def main(args: argparse.Namespace) -> None:
    """Write the table, or fill the pages."""
    command.set_up_logging()
    for page in args.fill:
        page.write_text(filled(page.read_text()))
        print(f"tables of {page} made anew")
    if args.fill:
        return
    groups = groups_of(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = markdown_of(groups, args.columns)
    markdown, table = (args.output.with_suffix(end) for end in (".md", ".csv"))
    markdown.write_text("\n".join(lines) + "\n")
    write_csv(table, groups, args.columns)
    print(*lines, sep="\n")
    print(f"\n{sum(map(len, groups))} runs in {len(groups)} rows, saved in {markdown} and {table}")


def filled(page: str) -> str:
    """A page with its tables made anew, each by the flags in the line above it; paths are relative to the repository."""

    def table(match: re.Match) -> str:
        args = parse(shlex.split(match[2]))
        args.results = [ROOT / place for place in args.results]
        return "\n".join([match[1], "", *markdown_of(groups_of(args), args.columns), "", match[3]])

    return TABLE.sub(table, page)


def groups_of(args: argparse.Namespace) -> list[list[Run]]:
    """The runs of each row of a table: those that differ only in their seeds, or with --each a single one.

    Raises:
        InvalidInput: --where leaves no run, or names a setting that no run has; or see `read.read`.
        MissingInput: see `read.read`.
    """
    runs = read.read(args.results)
    for name, _, values in (text.partition("=") for text in args.where):
        if not any(name == "seed" or name in run.settings for run in runs):
            raise InvalidInput(f"--where {name}: the runs have no such setting, but {', '.join(runs[0].settings)} and seed")
        runs = [run for run in runs if setting(run, name) in values.split(",")]
    if not runs:
        raise InvalidInput(f"no run has {' '.join(args.where)}")
    return [[run] for run in runs] if args.each else read.by_settings(runs)


def setting(run: Run, name: str) -> str:
    """The value of a setting, or of the seed, as tables and --where write it; empty if the run does not have it."""
    value = run.seed if name == "seed" else run.settings.get(name)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def columns_of(groups: list[list[Run]], columns: list[str] | None) -> list[str]:
    """The columns that are asked for; else the method, the settings in which runs differ, and whatever was measured of any run.

    Raises:
        InvalidInput: a column that there is not.
    """
    runs = [run for group in groups for run in group]
    if columns is None:
        measured = [name for name in MEASURED if any(cell(group, name) for group in groups)]
        return list(dict.fromkeys(["method", "pattern", "ratio", *read.varying(runs), *measured]))
    known = {"seed", *MEASURED, *(name for run in runs for name in run.settings)}
    if unknown := [name for name in columns if name not in known]:
        raise InvalidInput(f"--columns {unknown[0]} is not one of {', '.join(sorted(known))}")
    return columns


def cell(group: list[Run], name: str) -> str:
    """The text of a cell: what a group of runs has in a column; empty if that is not known."""
    first = group[0]
    if name == "seeds":
        return ", ".join(str(run.seed) for run in group)
    if name in ("dense", "perplexity", "rho", "sparsity"):
        values = [getattr(run, name) for run in group if getattr(run, name) is not None]
        places = 4 if name == "sparsity" else 2
        deviation = spread_of(values) if name == "perplexity" else None
        spread = "" if deviation is None else f" ± {deviation:.{places}f}"
        return f"{statistics.mean(values):.{places}f}{spread}" if values else ""
    if name == "seconds":
        return " + ".join(f"{value:.0f}" if value is not None else "-" for value in seconds_of(group).values())
    if name == "memory":
        peaks = [run.peak_gb for run in group if run.peak_gb is not None]
        return f"{max(peaks):.2f}" if peaks else ""
    return setting(first, name)


def spread_of(values: list[float]) -> float | None:
    """The standard deviation of perplexities; None of a single one, or where one of them is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def seconds_of(group: list[Run]) -> dict[str, float | None]:
    """Mean seconds of pruning and of the pruned model's perplexity; of a dense model, those of its perplexity alone."""
    names = {"prune": PRUNING, "perplexity": {"pruned perplexity", "perplexity"}}
    if group[0].settings["method"] == "dense":
        del names["prune"]
    seconds = {
        name: [sum(run.seconds.get(key, 0) for key in keys) for run in group if run.seconds.keys() & keys]
        for name, keys in names.items()
    }
    return {name: statistics.mean(values) if values else None for name, values in seconds.items()}


def markdown_of(groups: list[list[Run]], columns: list[str] | None) -> list[str]:
    """The lines of a Markdown table, a row for each group of runs."""
    columns = columns_of(groups, columns)
    rows = [[TITLES.get(name, name) for name in columns], *([cell(group, name) for name in columns] for group in groups)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def write_csv(path: Path, groups: list[list[Run]], columns: list[str] | None) -> None:
    """Write the same rows as CSV, with numbers that are not rounded; the spread and the seconds of each phase are columns, too."""
    settings = [name for name in columns_of(groups, columns) if name not in MEASURED]
    rows = []
    for group in groups:
        values, rhos = [run.perplexity for run in group], [run.rho for run in group if run.rho is not None]
        row = {name: setting(group[0], name) for name in settings}
        row |= {
            "seeds": " ".join(str(run.seed) for run in group),
            "dense": group[0].dense,
            "perplexity": statistics.mean(values),
            "rho": statistics.mean(rhos) if rhos else None,
        }
        row |= {"perplexity_std": spread_of(values), "sparsity": group[0].sparsity}
        row |= {f"seconds_{name}": value for name, value in seconds_of(group).items()}
        rows.append(row | {"peak_gb": max((run.peak_gb or 0 for run in group), default=None)})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    command.run(parse, main)
