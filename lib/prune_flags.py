"""The flags of main.py beside the shared ones, and what of them contradicts each other."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from lib import files, flags
from lib.data import sources
from lib.evaluation import zero_shot
from lib.pruning import ratios, scores, selection
from lib.pruning.masks import Sparsity
from lib.pruning.methods import MAX_ALPHA, METHODS, PAPER_ALPHA
from lib.pruning.update import RECIPES, UPDATES, Recipe

AUTO = "auto"  # of --alpha
HOPELESS = 1000.0  # a dense perplexity beyond it says that model, tokenizer and text do not belong together


def declare(groups: flags.Groups) -> None:
    """The flags, shared ones included, in the groups that --help shows."""
    flags.add_common_flags(groups)
    flags.add_memory_flags(groups)
    groups.model.add_argument(
        "--force", action="store_true", help=f"go on where the dense perplexity is beyond {HOPELESS:g} or not finite"
    )

    add = groups.method.add_argument
    add(
        "--prune_method",
        required=True,
        choices=METHODS,
        metavar="METHOD",
        help=f"{', '.join(METHODS)}: how weights are scored; gblm is the paper's, from activations and gradients",
    )
    add(
        "--sparsity_ratio",
        type=flags.number_above(0, including=True),
        metavar="SHARE",
        help="of the weights to remove, such as 0.5; implied by N:M",
    )
    add(
        "--sparsity_type",
        default="unstructured",
        metavar="PATTERN",
        help="unstructured, or N:M: N REMOVED of every M inputs, such as 2:4 or 4:8 (default: %(default)s)",
    )
    add(
        "--gradient_path",
        metavar="PATH",
        help="folder from gradient_computation.py, or a published .pth file; for gblm and gradient",
    )
    add(
        "--alpha",
        type=_alpha,
        help="weight of the gradient term of gblm; auto: the one of several that does best on calibration text left out "
        f"(default: {PAPER_ALPHA:g}, as in the paper)",
    )
    add("--gradient_inv", action="store_true", help="divide by the gradient norm instead of multiplying")
    add("--use_variant", action="store_true", help="Wanda's variant: per row an equal share of the score's total")
    flags.add_selection_flags(groups.method)
    add("--layer_no", type=flags.at_least(), default=-1, metavar="BLOCK", help="prune this block only (default: all)")
    add(
        "--layer_ratios",
        metavar="SHARES",
        help="line:0.3, shares that rise by 0.3 from the first block to the last; line, that slope is chosen on calibration "
        'text left out; or a JSON file, by block or name: {"0": 0.3, "*.down_proj": "4:8", "*.o_proj": "dense"}, the last '
        "match counts",
    )
    add("--grad_norm", metavar="NORM", help="no effect, as in the published code: the norm is that of --gradient_path")
    add("--grad_exponent", action="store_true", help="no effect, as in the published code")
    declare_updates(groups)
    declare_evaluation(groups)

    groups.memory.add_argument(
        "--batch_size",
        type=flags.at_least(1),
        default=1,
        metavar="N",
        help="windows of the perplexity, or requests of tasks, in one forward pass (default: %(default)s)",
    )
    groups.output.add_argument("--save", metavar="DIR", help="folder for log.txt, results.json and sparsity.png")
    groups.output.add_argument("--plots", action="store_true", help="also sparsity and seconds as PNG and PDF, to --save")
    groups.output.add_argument("--save_model", metavar="DIR", help="folder for the pruned checkpoint")


def declare_updates(groups: flags.Groups) -> None:
    """The flags about what becomes of the weights that stay."""
    add = groups.method.add_argument
    add(
        "--recipe",
        choices=RECIPES,
        help="presets of updates and reconstruction, fast, best and max in the order of time and worth; set the flags below, "
        "each of which may be given as well",
    )
    add(
        "--update",
        choices=UPDATES,
        help="of the weights that stay: none, as published; obs, SparseGPT's; lsq, least squares (default: none)",
    )
    add(
        "--stages",
        type=flags.at_least(1),
        metavar="K",
        help="choose the mask in so many stages, with an update after each (default: 1)",
    )
    add(
        "--asymmetric",
        type=flags.number_above(0, True, 1),
        metavar="SHARE",
        help="of what pruning earlier blocks has changed in a linear's inputs, that its update makes up for (default: 0)",
    )
    add(
        "--reconstruct",
        type=flags.at_least(0),
        metavar="EPOCHS",
        help="train what stays of each block towards the dense block's output (default: 0)",
    )
    add(
        "--reconstruct_lr",
        type=flags.number_above(0),
        metavar="RATE",
        help=f"its learning rate at the start, in units of a matrix' root mean square (default: {Recipe.rate:g})",
    )
    add(
        "--held_out",
        type=flags.at_least(1),
        metavar="N",
        help="windows, drawn after those of activations and gradients, on which errors of updated linears are measured too, and "
        "a flag's values compared where one is to be chosen (default: none, or an eighth of --nsamples, 8 at least)",
    )


def declare_evaluation(groups: flags.Groups) -> None:
    """The flags about what is measured."""
    add = groups.evaluation.add_argument
    add(
        "--eval_dataset",
        nargs="+",
        default=["wikitext2"],
        metavar="TEXT",
        help="text for the perplexity, one or several: wikitext2, c4 or files (default: wikitext2)",
    )
    add("--no_cache", action="store_true", help="measure the dense perplexity anew, even if an earlier run has kept it")
    add("--eval_zero_shot", action="store_true", help="accuracy of the pruned model on tasks of lm-evaluation-harness")
    add("--eval_dense", action="store_true", help="and of the dense model")
    add(
        "--tasks",
        nargs="+",
        default=zero_shot.TASKS,
        metavar="TASK",
        help="of the harness, or of files in --include_path (default: the paper's seven)",
    )
    add(
        "--num_fewshot",
        type=flags.at_least(0),
        metavar="K",
        help="examples before each question (default: the task's own, or 0)",
    )
    add(
        "--limit",
        type=flags.number_above(0),
        metavar="N",
        help="questions of each task; below 1 a share of them (default: all)",
    )
    add("--include_path", metavar="DIR", help="folder with tasks of your own, in the harness' YAML")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if flags contradict each other; `sparsity`, `ratios` and `steps` join `args`, parsed."""
    check_method(parser, args)
    check_recipe(parser, args)
    check_evaluation(parser, args)
    check_output(parser, args)


def check_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if the flags of the method contradict each other."""
    method = METHODS[args.prune_method]
    if method.gradients and args.gradient_path is None:
        parser.error(f"--prune_method {args.prune_method} needs --gradient_path, a folder that gradient_computation.py wrote")
    if args.gradient_inv and method.inverse is None:
        parser.error(f"--gradient_inv changes the gradient term, which {args.prune_method} does not have: leave it out")
    if args.alpha is not None and (method.score is not scores.gblm or args.gradient_inv):
        parser.error("--alpha is the weight of the gradient term that gblm adds: leave it out")
    args.alpha = PAPER_ALPHA if args.alpha is None else args.alpha
    if args.use_variant and not method.variant:
        parser.error(
            f"--use_variant is for {', '.join(name for name in METHODS if METHODS[name].variant)}, not {args.prune_method}"
        )
    try:
        if ratios.is_line(args.layer_ratios) and (slope := ratios.slope_of(args.layer_ratios)) is not None:
            args.layer_ratios = f"{ratios.LINE}:{slope:g}" if slope else None
        line = ratios.is_line(args.layer_ratios)
        args.ratios = selection.read_ratios(args.layer_ratios) if args.layer_ratios and not line else None
        named_only = args.ratios and args.sparsity_type == "unstructured" and args.sparsity_ratio is None
        args.sparsity = None if named_only else Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
        if method.gradients:
            files.settle(Path(args.gradient_path))
            if not os.path.exists(args.gradient_path):
                raise FileNotFoundError(
                    f"--gradient_path {args.gradient_path} does not exist: run gradient_computation.py first"
                )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if line and args.sparsity_type != "unstructured":
        parser.error(f"--layer_ratios {args.layer_ratios} gives every block its own share, {args.sparsity_type} is one for all")
    if line and (args.include or args.exclude or args.layer_no != -1):
        parser.error(f"--layer_ratios {args.layer_ratios} balances whole blocks: leave --include, --exclude, --layer_no out")
    if line:
        try:
            ratios.check(args.sparsity.ratio)
        except ValueError as error:
            parser.error(str(error))
    if args.layer_no < -1:
        parser.error(f"--layer_no {args.layer_no} is neither a block nor -1 (all)")
    if args.use_variant and args.sparsity_type != "unstructured":
        parser.error(f"--use_variant sets a share per row and {args.sparsity_type} a number per group: choose one")


def _alpha(text: str) -> float | str:
    return text if text == AUTO else flags.number_above(0, True, MAX_ALPHA)(text)


def check_recipe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the flags that --recipe sets and that are not given, or their defaults; `steps`, a Recipe, joins the result."""
    names = {
        "update": "update", "stages": "stages", "asymmetric": "asymmetric", "reconstruct": "epochs", "reconstruct_lr": "rate"
    }  # fmt: skip
    given = {name: getattr(args, flag) for flag, name in names.items() if getattr(args, flag) is not None}
    try:
        args.steps = replace(RECIPES[args.recipe] if args.recipe else Recipe(), **given)
    except ValueError as error:
        parser.error(str(error))
    if args.held_out and args.steps.update == "none" and not has_choice(args):
        parser.error("--held_out is for the errors of weights that are updated: add --update lsq or obs")
    if args.reconstruct_lr is not None and not args.steps.epochs:
        parser.error("--reconstruct_lr is the learning rate of --reconstruct EPOCHS: add it")
    for flag, name in names.items():
        setattr(args, flag, getattr(args.steps, name))


def has_choice(args: argparse.Namespace) -> bool:
    """Whether the value of a flag is to be chosen on windows held out."""
    return args.alpha == AUTO or args.layer_ratios == ratios.LINE


def check_evaluation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if a text cannot be read, or zero-shot tasks are asked for in vain."""
    args.eval_dataset = list(dict.fromkeys(args.eval_dataset))
    args.tasks = [name for names in args.tasks for name in names.split(",") if name]
    optional = ("eval_dense", "num_fewshot", "limit", "include_path")
    needless = [flag for flag in optional if getattr(args, flag) is not None and getattr(args, flag) is not False]
    needless += ["tasks"] if args.tasks != zero_shot.TASKS else []
    if needless and not args.eval_zero_shot:
        parser.error(f"--{needless[0]} is about the tasks of --eval_zero_shot: add it")
    if args.include_path and not Path(args.include_path).is_dir():
        parser.error(f"--include_path {args.include_path} is not a folder: give the one that holds the tasks' YAML files")
    try:
        for source in args.eval_dataset:
            sources.check_source(source, args.data_dir, "evaluation")
        if args.eval_zero_shot:
            zero_shot.require()
    except (ValueError, OSError) as error:
        parser.error(str(error))


def check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if results cannot be written, or would replace what is not this project's."""
    if args.plots and not args.save:
        parser.error("--plots go to the folder of --save: add it")
    flags.check_save_model(parser, args)
    try:
        if args.save:
            files.check_writable(args.save)
    except OSError as error:
        parser.error(f"--save cannot be written: {error}: choose another folder")
