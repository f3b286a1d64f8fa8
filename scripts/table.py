"""Perplexity of every method x pattern x ratio x alpha x recipe on a model.

    python scripts/table.py --model meta-llama/Llama-2-7b-hf --gradient_path \\
        gradients/llama2/gradients_aggregrate_norm_l2_model_Llama-2-7b-hf

The model is loaded anew for every row, the dense perplexity measured once. Rows
are appended to --output as they are done, each with the settings it was made
with, so a run that was stopped goes on where it was.
"""

import argparse
import gc
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.cli.open import (
    check_vocabulary,
    compare_samples,
    load_weights,
    open_model,
    read_calibration,
    read_evaluation,
)
from lib.data import sources
from lib.errors import InvalidInput, Refusal
from lib.evaluation.perplexity import perplexity
from lib.gradients.folder import GradientNorms
from lib.pruning import targets
from lib.pruning.masks import Sparsity
from lib.pruning.methods import MAX_ALPHA, METHODS, PAPER_ALPHA, Settings
from lib.pruning.outcome import share_of_zeros
from lib.pruning.prune import prune
from lib.pruning.updates.recipe import PUBLISHED, RECIPES
from lib.results.phases import Phases

# What makes two rows one; "steps" are the recipe's, which may be others one day.
IDENTITY = ("method", "pattern", "ratio", "alpha", "settings", "recipe", "steps", "layer_ratios")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded. `sparsities` joins, [(pattern, Sparsity)], and `done`, the rows there are."""
    parser, groups = flags.parser_of(__doc__)
    flags.add_common_flags(groups)
    methods = ["dense", *METHODS]
    groups.data.add_argument(
        "--eval_dataset",
        default="wikitext2",
        metavar="TEXT",
        help="text for the perplexity: wikitext2, c4 or a file (default: %(default)s)",
    )
    groups.data.add_argument(
        "--windows", type=flags.at_least(1), metavar="N", help="evaluate on the first N windows only (default: all)"
    )
    add = groups.method.add_argument
    add(
        "--methods",
        nargs="+",
        choices=methods,
        default=methods,
        metavar="METHOD",
        help=f"some of {', '.join(methods)} (default: all)",
    )
    add(
        "--patterns",
        nargs="+",
        default=["unstructured", "4:8", "2:4"],
        metavar="PATTERN",
        help="N:M, N removed of every M, or unstructured (default: unstructured 4:8 2:4)",
    )
    add(
        "--ratios",
        nargs="+",
        type=float,
        default=[0.5],
        metavar="SHARE",
        help="to remove if unstructured, a row each (default: 0.5)",
    )
    add(
        "--alphas",
        nargs="+",
        type=flags.number_above(0, True, MAX_ALPHA),
        default=[PAPER_ALPHA],
        metavar="ALPHA",
        help="of gblm, a row each (default: 100)",
    )
    add(
        "--recipes",
        nargs="+",
        choices=["none", *RECIPES],
        default=["none"],
        metavar="RECIPE",
        help=f"what follows the mask, a row each: none, {', '.join(RECIPES)} (default: none)",
    )
    add(
        "--layer_ratios",
        nargs="+",
        type=_slope,
        default=[0.0],
        metavar="SHARES",
        help="of blocks where unstructured, a row each: equal, line:SLOPE (default: equal)",
    )
    add("--gradient_path", metavar="PATH", help="as of main.py; for gblm and gradient")
    groups.output.add_argument(
        "--output",
        type=Path,
        default=Path("out/table.jsonl"),
        metavar="FILE",
        help="JSON, a line for each row (default: %(default)s)",
    )
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


def _slope(text: str) -> float:
    try:
        if text == targets.EQUAL or targets.is_line(text):
            slope = 0.0 if text == targets.EQUAL else targets.slope_of(text)
            if slope is not None:
                return slope
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    raise argparse.ArgumentTypeError(f"{text} is neither {targets.EQUAL} nor {targets.LINE}:SLOPE, such as {targets.LINE}:0.3")


def rows_of(output: Path) -> list[dict]:
    """The rows that an earlier run has appended.

    Raises:
        ValueError: the file holds something else.
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


def main(args: argparse.Namespace) -> None:
    """Text and gradients once, then a model for every row."""
    device, done = command.start(args.device, args.nsamples), args.done
    gradients = GradientNorms(args.gradient_path) if args.gradient_path else None
    args.output.parent.mkdir(parents=True, exist_ok=True)

    outline = open_model(args)
    calibration = read_calibration(args, outline)
    evaluation = read_evaluation(args, outline, args.eval_dataset)[: args.windows]
    check_vocabulary(args, outline, calibration, evaluation)
    if gradients:
        compare_samples(args, outline, gradients)
    rows = [("dense", "", None, None, "none", 0.0)] if "dense" in args.methods else []
    for (pattern, sparsity), method in product(args.sparsities, args.methods):
        if method != "dense":
            alphas = args.alphas if method == "gblm" else [None]
            slopes = args.layer_ratios if pattern == "unstructured" else [0.0]
            rows += [(method, pattern, sparsity, *more) for more in product(alphas, args.recipes, slopes)]

    checked = False
    apart = ("methods", "patterns", "ratios", "alphas", "recipes", "layer_ratios", "output", "sparsities", "done")
    common = {name: value for name, value in (vars(args) | {"bos": outline.bos}).items() if name not in apart}
    for method, pattern, sparsity, alpha, recipe, slope in rows:
        row = {"method": method, "pattern": pattern, "ratio": sparsity and sparsity.ratio, "alpha": alpha, "settings": common}
        row |= {"recipe": recipe, "steps": asdict(RECIPES[recipe])} if recipe != "none" else {}
        row |= {"layer_ratios": f"{targets.LINE}:{slope:g}"} if slope else {}
        if any(all(row.get(name) == earlier.get(name) for name in IDENTITY) for earlier in done):
            print(f"{method} {pattern} {row['ratio']} is in {args.output} already")
            continue
        decoder = load_weights(args, device, outline)
        if gradients and not checked:
            gradients.check(decoder)
            checked = True
        phases = Phases(decoder.device)
        if method != "dense":
            with phases("prune"):
                shares = targets.line_of(decoder, slope, sparsity.ratio) if slope else None
                settings = Settings(
                    method,
                    targets.select(decoder, sparsity, ratios=shares),
                    alpha / gradients.scale if alpha is not None else 1.0,
                    recipe=RECIPES.get(recipe, PUBLISHED),
                )
                norms = gradients.block if gradients else None
                zeros = {block.index: block.zeros for block in prune(decoder, calibration, settings, gradients=norms)}
            row["sparsity"] = round(share_of_zeros(zeros), 4)
        with phases("perplexity"):
            row["perplexity"] = round(perplexity(decoder, evaluation), 4)
        row |= {"windows": len(evaluation), "phases": phases.record}
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        del decoder
        gc.collect()


if __name__ == "__main__":
    command.run(parse, main)
