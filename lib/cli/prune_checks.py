"""What of main.py's flags contradicts each other, and what those mean that are not given: before anything is loaded."""

import argparse
from dataclasses import replace
from pathlib import Path

from lib import atomic
from lib.cli import flags
from lib.cli.prune_flags import AUTO
from lib.data import sources
from lib.errors import InvalidInput, MissingInput, Refusal
from lib.evaluation import zero_shot
from lib.pruning import targets
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS, PAPER_ALPHA
from lib.pruning.updates.recipe import RECIPES, Recipe

# flag -> what it is called in a Recipe
PARTS = {"update": "update", "stages": "stages", "asymmetric": "asymmetric", "reconstruct": "epochs", "reconstruct_lr": "rate"}


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """End with `parser.error` if flags contradict each other; returns them with what a flag that is not given means."""
    try:
        _check_method(args)
        _check_layer_ratios(args)
        _check_recipe(args)
        _check_evaluation(args)
        _check_output(args)
    except Refusal as error:
        parser.error(str(error))
    recipe = recipe_of(args)
    return argparse.Namespace(
        **vars(args)
        | {flag: getattr(recipe, name) for flag, name in PARTS.items()}
        | {
            "alpha": PAPER_ALPHA if args.alpha is None else args.alpha,
            "layer_ratios": _without_needless_digits(args.layer_ratios),
            "eval_dataset": list(dict.fromkeys(args.eval_dataset)),
            "tasks": _tasks_of(args),
        }
    )


def sparsity_of(args: argparse.Namespace) -> Sparsity | None:
    """How much to remove where no --layer_ratios says otherwise; None if only those say it.

    Raises:
        InvalidInput: see `Sparsity.parse`.
    """
    line = targets.is_line(args.layer_ratios)
    if args.layer_ratios and not line and args.sparsity_type == "unstructured" and args.sparsity_ratio is None:
        return None
    return Sparsity.parse(args.sparsity_type, args.sparsity_ratio)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What --recipe sets, with the flags that override it.

    Raises:
        InvalidInput: see `Recipe`.
    """
    overriding = {name: getattr(args, flag) for flag, name in PARTS.items() if getattr(args, flag) is not None}
    return replace(RECIPES[args.recipe] if args.recipe else Recipe(), **overriding)


def has_search(args: argparse.Namespace) -> bool:
    """Whether the value of a flag is to be searched for."""
    return args.alpha == AUTO or args.layer_ratios == targets.LINE


def _check_method(args: argparse.Namespace) -> None:
    """Refuse flags of the method that contradict each other."""
    method = METHODS[args.prune_method]
    if method.gradients and args.gradient_path is None:
        raise InvalidInput(
            f"--prune_method {args.prune_method} needs --gradient_path, a folder that gradient_computation.py wrote"
        )
    if args.gradient_inv and method.inverse is None:
        raise InvalidInput(f"--gradient_inv changes the gradient term, which {args.prune_method} does not have: leave it out")
    if args.alpha is not None and (not method.alpha or args.gradient_inv):
        raise InvalidInput("--alpha is the weight of the gradient term that gblm adds: leave it out")
    if args.use_variant and not method.variant:
        names = ", ".join(name for name in METHODS if METHODS[name].variant)
        raise InvalidInput(f"--use_variant is for {names}, not {args.prune_method}")
    if args.use_variant and args.sparsity_type != "unstructured":
        raise InvalidInput(f"--use_variant sets a share per row and {args.sparsity_type} a number per group: choose one")
    if args.layer_no < -1:
        raise InvalidInput(f"--layer_no {args.layer_no} is neither a block nor -1 (all)")
    sparsity_of(args)
    if method.gradients:
        try:
            atomic.settle(Path(args.gradient_path))
            there = Path(args.gradient_path).exists()
        except OSError as error:
            raise MissingInput(f"--gradient_path {args.gradient_path} cannot be read: {error}") from error
        if not there:
            raise MissingInput(f"--gradient_path {args.gradient_path} does not exist: run gradient_computation.py first")


def _check_layer_ratios(args: argparse.Namespace) -> None:
    """Refuse shares of blocks that cannot be read, or do not go with the other flags."""
    line = args.layer_ratios
    if not targets.is_line(line):
        if line:
            targets.read_ratios(line)
        return
    if not targets.slope_of(line) and line != targets.LINE:  # line:0 is no line
        return
    if args.sparsity_type != "unstructured":
        raise InvalidInput(f"--layer_ratios {line} gives every block its own share, {args.sparsity_type} is one for all")
    if args.include or args.exclude or args.layer_no != -1:
        raise InvalidInput(f"--layer_ratios {line} balances whole blocks: leave --include, --exclude, --layer_no out")
    targets.check_line(sparsity_of(args).ratio)


def _without_needless_digits(layer_ratios: str | None) -> str | None:
    """A --layer_ratios as results.json has it: "line:0.30" is "line:0.3", and "line:0" is none."""
    if targets.is_line(layer_ratios) and (slope := targets.slope_of(layer_ratios)) is not None:
        return f"{targets.LINE}:{slope:g}" if slope else None
    return layer_ratios


def _check_recipe(args: argparse.Namespace) -> None:
    """Refuse parts of a recipe that have no effect."""
    recipe = recipe_of(args)
    if args.held_out and recipe.update == "none" and not has_search(args):
        raise InvalidInput("--held_out is for the errors of weights that are updated: add --update lsq or obs")
    if args.reconstruct_lr is not None and not recipe.epochs:
        raise InvalidInput("--reconstruct_lr is the learning rate of --reconstruct EPOCHS: add it")


def _tasks_of(args: argparse.Namespace) -> list[str]:
    return [name for names in args.tasks for name in names.split(",") if name]


def _check_evaluation(args: argparse.Namespace) -> None:
    """Refuse a text that cannot be read, or zero-shot tasks that are asked for in vain."""
    optional = ("eval_dense", "num_fewshot", "limit", "include_path")
    needless = [flag for flag in optional if getattr(args, flag) is not None and getattr(args, flag) is not False]
    needless += ["tasks"] if _tasks_of(args) != zero_shot.TASKS else []
    if needless and not args.eval_zero_shot:
        raise InvalidInput(f"--{needless[0]} is about the tasks of --eval_zero_shot: add it")
    if args.include_path and not Path(args.include_path).is_dir():
        raise InvalidInput(f"--include_path {args.include_path} is not a folder: give the one that holds the tasks' YAML files")
    for source in args.eval_dataset:
        sources.check_source(source, args.data_dir, "evaluation")
    if args.eval_zero_shot:
        zero_shot.require()


def _check_output(args: argparse.Namespace) -> None:
    """Refuse results that cannot be written."""
    if args.plots and not args.save:
        raise InvalidInput("--plots go to the folder of --save: add it")
    flags.check_save_model(args)
    if args.save:
        flags.check_writable("--save", args.save)
