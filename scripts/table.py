"""Perplexity of every method x pattern x ratio x alpha x recipe on a model.

    python scripts/table.py --model meta-llama/Llama-2-7b-hf --gradient_path \\
        gradients/llama2/gradients_aggregrate_norm_l2_model_Llama-2-7b-hf

The model is loaded anew for every row, and the dense perplexity is measured
once. A row is appended to --output as soon as it is done, with the settings
that it was made with, so that a run that was stopped can go on where it was.
"""

import argparse
import gc
import json
import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.cli.open import check_vocabulary, compare_samples, load_weights, open_model, read_calibration, read_evaluation
from lib.data import sources
from lib.errors import InvalidInput, Refusal
from lib.evaluation.perplexity import perplexity
from lib.gradients.folder import GradientNorms
from lib.models.decoder import Decoder
from lib.pruning import targets
from lib.pruning.masks import Sparsity
from lib.pruning.methods import MAX_ALPHA, METHODS, PAPER_ALPHA, Settings
from lib.pruning.outcome import share_of_zeros
from lib.pruning.prune import prune
from lib.pruning.updates.recipe import PUBLISHED, RECIPES
from lib.results.phases import Phases

# Two rows that are equal in these are the same.
IDENTITY = ("method", "pattern", "ratio", "alpha", "settings", "recipe", "steps", "layer_ratios")


class Row(NamedTuple):
    """What a row of the table measures; that of the dense model has only a method."""

    method: str
    pattern: str = ""
    sparsity: Sparsity | None = None
    alpha: float | None = None
    recipe: str = "none"
    slope: float = 0.0  # of --layer_ratios line; 0 is equal shares

    def record(self, common: dict) -> dict:
        """The row as --output has it, without results; `common` are the settings of all rows."""
        ratio = self.sparsity and self.sparsity.ratio
        row = {"method": self.method, "pattern": self.pattern, "ratio": ratio, "alpha": self.alpha, "settings": common}
        if self.recipe != "none":  # with its steps, which a later version may change
            row |= {"recipe": self.recipe, "steps": asdict(RECIPES[self.recipe])}
        return row | ({"layer_ratios": f"{targets.LINE}:{self.slope:g}"} if self.slope else {})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded. Adds `sparsities`, [(pattern, Sparsity)], and `done`, the earlier rows."""
    parser, groups = flags.parser_of(__doc__)
    flags.add_common_flags(groups)
    declare(groups)
    args = parser.parse_args(argv)
    flags.check_common_flags(parser, args)
    if args.gradient_path is None and any(METHODS[name].gradients for name in args.methods if name != "dense"):
        parser.error("gradient and gblm need --gradient_path, a folder that gradient_computation.py wrote")
    try:
        args.sparsities = [
            (pattern, Sparsity.parse(pattern, ratio))
            for pattern in args.patterns
            for ratio in (args.ratios if pattern == "unstructured" else [None])
        ]
        args.layer_ratios = list(dict.fromkeys(args.layer_ratios))
        if any(args.layer_ratios):
            for ratio in args.ratios:
                targets.check_line(ratio)
        sources.check_source(args.eval_dataset, args.data_dir, "evaluation")
        args.done = rows_of(args.output)
        flags.check_writable("--output", args.output.parent)
    except Refusal as error:
        parser.error(str(error))
    return args


def declare(groups: flags.Groups) -> None:
    """The flags that only this script has."""
    add = groups.data.add_argument
    text = "text to measure perplexity on: wikitext2, c4 or a file (default: %(default)s)"
    add("--eval_dataset", default="wikitext2", metavar="TEXT", help=text)
    add("--windows", type=flags.at_least(1), metavar="N", help="measure on the first N windows only (default: all)")
    methods = ["dense", *METHODS]
    add_list = partial(groups.method.add_argument, nargs="+")
    add_list(
        "--methods",
        choices=methods,
        default=methods,
        metavar="METHOD",
        help=f"methods to measure, some of {', '.join(methods)} (default: all)",
    )
    add_list(
        "--patterns",
        default=["unstructured", "4:8", "2:4"],
        metavar="PATTERN",
        help="unstructured, or N:M, which removes N of every M inputs (default: unstructured 4:8 2:4)",
    )
    add_list(
        "--ratios",
        type=float,
        default=[0.5],
        metavar="SHARE",
        help="shares of the weights to remove where unstructured, a row for each (default: 0.5)",
    )
    add_list(
        "--alphas",
        type=flags.number_above(0, True, MAX_ALPHA),
        default=[PAPER_ALPHA],
        metavar="ALPHA",
        help="weights of gblm's gradient term, a row for each (default: 100)",
    )
    add_list(
        "--recipes",
        choices=["none", *RECIPES],
        default=["none"],
        metavar="RECIPE",
        help=f"how surviving weights are updated, a row for each: none, {', '.join(RECIPES)} (default: none)",
    )
    add_list(
        "--layer_ratios",
        type=_slope,
        default=[0.0],
        metavar="SHARES",
        help="how unstructured ratios are spread over the blocks, a row for each: equal, line:SLOPE (default: equal)",
    )
    groups.method.add_argument("--gradient_path", metavar="PATH", help="as for main.py; required by gblm and gradient")
    groups.output.add_argument(
        "--output",
        type=Path,
        default=Path("out/table.jsonl"),
        metavar="FILE",
        help="file for the rows, a line of JSON for each (default: %(default)s)",
    )


def _slope(text: str) -> float:
    """An argparse type: the slope in "line:SLOPE", or 0 for "equal"."""
    try:
        slope = targets.slope_of(text) if targets.is_line(text) else 0.0 if text == targets.EQUAL else None
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if slope is None:
        raise argparse.ArgumentTypeError(
            f"{text} is neither {targets.EQUAL} nor {targets.LINE}:SLOPE, such as {targets.LINE}:0.3"
        )
    return slope


def rows_of(output: Path) -> list[dict]:
    """The rows that an earlier run has written.

    Raises:
        InvalidInput: the file holds something else.
    """
    if output.is_dir():
        raise InvalidInput(f"--output {output} is a folder: name a file in it")
    try:
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        if not all("method" in row and "settings" in row for row in rows):
            raise InvalidInput("rows have a method and settings")
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"--output {output} is not a table of this script ({error}): choose another file") from error
    return rows


def rows_for(args: argparse.Namespace) -> list[Row]:
    """The rows that the flags ask for."""
    rows = [Row("dense")] if "dense" in args.methods else []
    for (pattern, sparsity), method in product(args.sparsities, args.methods):
        if method != "dense":
            alphas = args.alphas if method == "gblm" else [None]
            slopes = args.layer_ratios if pattern == "unstructured" else [0.0]
            rows += [Row(method, pattern, sparsity, *more) for more in product(alphas, args.recipes, slopes)]
    return rows


def main(args: argparse.Namespace) -> None:
    """Read text and gradients once, then load, prune and measure a model for every row."""
    device = command.start(args.device, args.nsamples)
    gradients = GradientNorms(args.gradient_path) if args.gradient_path else None
    args.output.parent.mkdir(parents=True, exist_ok=True)

    outline = open_model(args)
    calibration = read_calibration(args, outline)
    evaluation = read_evaluation(args, outline, args.eval_dataset)[: args.windows]
    check_vocabulary(args, outline, calibration, evaluation)
    if gradients:
        compare_samples(args, outline, gradients)

    checked = False
    of_rows = ("methods", "patterns", "ratios", "alphas", "recipes", "layer_ratios", "output", "sparsities", "done")
    common = {name: value for name, value in (vars(args) | {"bos": outline.bos}).items() if name not in of_rows}
    for row in rows_for(args):
        record = row.record(common)
        if any(all(record.get(name) == earlier.get(name) for name in IDENTITY) for earlier in args.done):
            print(f"{row.method} {row.pattern} {record['ratio']} is in {args.output} already")
            continue
        decoder = load_weights(args, device, outline)
        if gradients and not checked:
            gradients.check(decoder)
            checked = True
        record |= measure(row, decoder, calibration, evaluation, gradients)
        with args.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        del decoder
        gc.collect()


def measure(
    row: Row, decoder: Decoder, calibration: torch.Tensor, evaluation: torch.Tensor, gradients: GradientNorms | None
) -> dict:
    """Prune a dense model as a row says; returns its sparsity, perplexity, and seconds and memory by phase."""
    phases, results = Phases(decoder.device), {}
    if row.method != "dense":
        with phases("prune"):
            shares = targets.line_of(decoder, row.slope, row.sparsity.ratio) if row.slope else None
            settings = Settings(
                row.method,
                targets.select(decoder, row.sparsity, ratios=shares),
                row.alpha / gradients.scale if row.alpha is not None else 1.0,
                recipe=RECIPES.get(row.recipe, PUBLISHED),
            )
            norms = gradients.block if gradients else None
            zeros = {block.index: block.zeros for block in prune(decoder, calibration, settings, gradients=norms)}
        results["sparsity"] = round(share_of_zeros(zeros), 4)
    with phases("perplexity"):
        results["perplexity"] = round(perplexity(decoder, evaluation), 4)
    return results | {"windows": len(evaluation), "phases": phases.record}


if __name__ == "__main__":
    command.run(parse, main)
