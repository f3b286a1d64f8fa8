"""The flags of main.py beside the shared ones: their names, types and help."""

from collections.abc import Callable

from lib.cli import flags
from lib.evaluation import zero_shot
from lib.evaluation.perplexity import HOPELESS
from lib.pruning.methods import MAX_ALPHA, METHODS, PAPER_ALPHA
from lib.pruning.updates.recipe import RECIPES, UPDATES, Recipe

AUTO = "auto"  # of --alpha


def declare(groups: flags.Groups) -> None:
    """The flags, shared ones included, in the groups that --help shows."""
    flags.add_common_flags(groups)
    flags.add_memory_flags(groups)
    _declare_published(groups.published.add_argument, groups.output.add_argument)
    _declare_method(groups)
    _declare_updates(groups.beyond.add_argument)
    _declare_evaluation(groups.evaluation.add_argument)
    groups.model.add_argument(
        "--force", action="store_true", help=f"go on where the dense perplexity is beyond {HOPELESS:g} or not finite"
    )
    groups.memory.add_argument(
        "--batch_size",
        type=flags.at_least(1),
        default=1,
        metavar="N",
        help="evaluation windows, or questions of tasks, in one forward pass (default: %(default)s)",
    )


def _declare_published(add: Callable, add_output: Callable) -> None:
    """The flags of the published main.py, with their names and meaning."""
    add(
        "--prune_method",
        required=True,
        choices=METHODS,
        metavar="METHOD",
        help=f"how weights are scored: {', '.join(METHODS)}; gblm is the paper's, from activations and gradients",
    )
    add(
        "--sparsity_ratio",
        type=flags.number_above(0, including=True),
        metavar="SHARE",
        help="share of the weights to remove, such as 0.5; N:M implies it",
    )
    add(
        "--sparsity_type",
        default="unstructured",
        metavar="PATTERN",
        help="unstructured, or N:M, which REMOVES N of every M inputs, such as 2:4 or 4:8 (default: %(default)s)",
    )
    add(
        "--gradient_path",
        metavar="PATH",
        help="gradient norms, for gblm and gradient: a folder that gradient_computation.py wrote, or a published .pth file",
    )
    add("--gradient_inv", action="store_true", help="divide by the gradient norm instead of multiplying with it")
    add(
        "--use_variant",
        action="store_true",
        help="in each row remove the lowest scores that add up to the same share of the row's total (Wanda's variant)",
    )
    add("--layer_no", type=flags.at_least(), default=-1, metavar="BLOCK", help="prune only this block (default: all)")
    add("--grad_norm", metavar="NORM", help="no effect, as in the published code: --gradient_path decides which norm is used")
    add("--grad_exponent", action="store_true", help="no effect, as in the published code")
    add("--save", metavar="DIR", help="folder for log.txt, results.json and sparsity.png")
    add("--save_model", metavar="DIR", help="folder for the pruned checkpoint")
    add_output("--plots", action="store_true", help="write figures of sparsity and seconds, as PNG and PDF, to --save as well")


def _declare_method(groups: flags.Groups) -> None:
    """What is scored how, beside the published flags."""
    add = groups.method.add_argument
    add(
        "--alpha",
        type=_alpha,
        help="weight of gblm's gradient term; auto: try several values, and take the one that does best on calibration text that "
        f"is held out (default: {PAPER_ALPHA:g}, as in the paper)",
    )
    flags.add_selection_flags(groups.method)
    add(
        "--layer_ratios",
        metavar="SHARES",
        help="line:0.3: the share to remove rises by 0.3 from the first block to the last; line: try several slopes, and take the "
        "one that does best on calibration text that is held out; or a JSON file of shares by block or name: "
        '{"0": 0.3, "*.down_proj": "4:8", "*.o_proj": "dense"}, of which the last match counts',
    )


def _declare_updates(add: Callable) -> None:
    """What becomes of the weights that stay."""
    add(
        "--recipe",
        choices=RECIPES,
        help="preset for the flags below, each of which still overrides it: fast, best, max, each slower and better than the one "
        "before",
    )
    add(
        "--update",
        choices=UPDATES,
        help="how the weights that stay are updated: none, as published; obs, as by SparseGPT; lsq, by least squares (default: none)",
    )
    add(
        "--stages",
        type=flags.at_least(1),
        metavar="K",
        help="choose the mask in K stages, with an update after each (default: 1)",
    )
    add(
        "--asymmetric",
        type=flags.number_above(0, True, 1),
        metavar="SHARE",
        help="share (0 to 1) of the error that pruning earlier blocks puts into a layer's inputs that its update corrects "
        "(default: 0)",
    )
    add(
        "--reconstruct",
        type=flags.at_least(0),
        metavar="EPOCHS",
        help="train the weights that stay in each block towards the dense block's output, for so many epochs (default: 0)",
    )
    add(
        "--reconstruct_lr",
        type=flags.number_above(0),
        metavar="RATE",
        help="learning rate that this training starts with, in units of the root mean square of a matrix' weights "
        f"(default: {Recipe.rate:g})",
    )
    add(
        "--held_out",
        type=flags.at_least(1),
        metavar="N",
        help="N extra calibration windows, used only for measuring: errors of updated layers, and the search of a flag's value "
        "(default: none; for a search an eighth of --nsamples, at least 8)",
    )


def _declare_evaluation(add: Callable) -> None:
    """What is measured."""
    add(
        "--eval_dataset",
        nargs="+",
        default=["wikitext2"],
        metavar="TEXT",
        help="text to measure perplexity on, one or several: wikitext2, c4 or files (default: wikitext2)",
    )
    add("--no_cache", action="store_true", help="measure the dense perplexity anew, even if an earlier run has kept it")
    add("--eval_zero_shot", action="store_true", help="measure the pruned model's accuracy on tasks of lm-evaluation-harness")
    add("--eval_dense", action="store_true", help="with --eval_zero_shot, measure the dense model's accuracy as well")
    add(
        "--tasks",
        nargs="+",
        default=zero_shot.TASKS,
        metavar="TASK",
        help="tasks of the harness, or of files in --include_path (default: the paper's seven)",
    )
    add(
        "--num_fewshot",
        type=flags.at_least(0),
        metavar="K",
        help="examples shown before each question (default: the task's own number, or 0)",
    )
    add(
        "--limit",
        type=flags.number_above(0),
        metavar="N",
        help="ask only N questions of each task; below 1, that share of them (default: all)",
    )
    add("--include_path", metavar="DIR", help="folder with tasks of your own, in the harness' YAML format")


def _alpha(text: str) -> float | str:
    return text if text == AUTO else flags.number_above(0, True, MAX_ALPHA)(text)
