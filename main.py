"""Prune a causal language model in one shot; print perplexity before and after.

    python main.py --model meta-llama/Llama-2-7b-hf \\
        --prune_method gblm --sparsity_ratio 0.5 --gradient_path \\
        gradients/llama2/gradients_aggregrate_norm_l2_model_Llama-2-7b-hf

The gradients come from gradient_computation.py; wanda, magnitude and sparsegpt
need none. Every flag is explained in docs/flags.md.
"""

import argparse
import contextlib
import logging
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib import cli, files, parallel, report
from lib.data import sources
from lib.evaluation.perplexity import perplexity
from lib.gradients.folder import GradientNorms
from lib.models import loading, memory, store
from lib.models.decoder import Decoder
from lib.pruning import scores, selection
from lib.pruning.masks import Sparsity
from lib.pruning.prune import MAX_ALPHA, METHODS, PAPER_ALPHA, Zeros, prune, share_of_zeros

logger = logging.getLogger("main")

HOPELESS = 1000.0  # a dense perplexity beyond it says that model, tokenizer and text do not belong together


def main(args: argparse.Namespace) -> None:
    """Prepare, measure the dense model, prune it, measure it again, report."""
    run = prepare(args)
    dense = measure(run, "dense perplexity")
    refuse_hopeless(run, dense)
    zeros = prune_model(run)
    keep_results(run, zeros, dense, None, "pruned; the perplexity is being measured")
    try:
        pruned = measure(run, "pruned perplexity")
    except BaseException as error:
        keep_results(run, zeros, dense, None, f"pruned; the perplexity could not be measured: {error!r}")
        raise
    keep_results(run, zeros, dense, pruned)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded. `sparsity` and `ratios` join the result, parsed."""
    parser, groups = cli.parser_of(__doc__, "--model MODEL --prune_method METHOD")
    declare(groups)
    args = parser.parse_args(argv)
    cli.check_common_flags(parser, args)
    check_method(parser, args)
    check_output(parser, args)
    return args


def declare(groups: cli.Groups) -> None:
    """The flags, in the groups that --help shows."""
    cli.add_common_flags(groups)
    cli.add_memory_flags(groups)
    groups.data.add_argument(
        "--eval_dataset",
        default="wikitext2",
        metavar="TEXT",
        help="text for the perplexity: wikitext2, c4 or files (default: %(default)s)",
    )
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
        type=cli.number_above(0, including=True),
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
        type=cli.number_above(0, True, MAX_ALPHA),
        help=f"weight of the gradient term of gblm (default: {PAPER_ALPHA:g}, as in the paper)",
    )
    add("--gradient_inv", action="store_true", help="divide by the gradient norm instead of multiplying")
    add("--use_variant", action="store_true", help="Wanda's variant: per row an equal share of the score's total")
    cli.add_selection_flags(groups.method)
    add("--layer_no", type=cli.at_least(), default=-1, metavar="BLOCK", help="prune this block only (default: all)")
    add(
        "--layer_ratios",
        metavar="FILE",
        help='JSON, by block or name: {"0": 0.3, "*.down_proj": "4:8", "*.o_proj": "dense"}, the last match counts',
    )
    add("--grad_norm", metavar="NORM", help="no effect, as in the published code: the norm is that of --gradient_path")
    add("--grad_exponent", action="store_true", help="no effect, as in the published code")

    groups.memory.add_argument(
        "--batch_size",
        type=cli.at_least(1),
        default=1,
        metavar="N",
        help="windows of the perplexity in one forward pass (default: %(default)s)",
    )
    groups.output.add_argument("--save", metavar="DIR", help="folder for log.txt, results.json and sparsity.png")
    groups.output.add_argument("--plots", action="store_true", help="also sparsity and seconds as PNG and PDF, to --save")
    groups.output.add_argument("--save_model", metavar="DIR", help="folder for the pruned checkpoint")


def check_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if the flags of the method contradict each other."""
    method = METHODS[args.prune_method]
    if method.gradients and args.gradient_path is None:
        parser.error(f"--prune_method {args.prune_method} needs --gradient_path, a folder that gradient_computation.py wrote")
    if args.gradient_inv and not method.gradients:
        parser.error(f"--gradient_inv changes the gradient term, which {args.prune_method} does not have: leave it out")
    if args.alpha is not None and (method.score is not scores.gblm or args.gradient_inv):
        parser.error("--alpha is the weight of the gradient term that gblm adds: leave it out")
    args.alpha = PAPER_ALPHA if args.alpha is None else args.alpha
    if args.use_variant and not method.variant:
        parser.error(
            f"--use_variant is for {', '.join(name for name in METHODS if METHODS[name].variant)}, not {args.prune_method}"
        )
    try:
        args.ratios = selection.read_ratios(args.layer_ratios) if args.layer_ratios else None
        named_only = args.ratios and args.sparsity_type == "unstructured" and args.sparsity_ratio is None
        args.sparsity = None if named_only else Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
        sources.check_source(args.eval_dataset, args.data_dir, "evaluation")
        if method.gradients:
            files.settle(Path(args.gradient_path))
            if not os.path.exists(args.gradient_path):
                raise FileNotFoundError(
                    f"--gradient_path {args.gradient_path} does not exist: run gradient_computation.py first"
                )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.layer_no < -1:
        parser.error(f"--layer_no {args.layer_no} is neither a block nor -1 (all)")
    if args.use_variant and args.sparsity_type != "unstructured":
        parser.error(f"--use_variant sets a share per row and {args.sparsity_type} a number per group: choose one")


def check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if results cannot be written, or would replace what is not this project's."""
    if args.plots and not args.save:
        parser.error("--plots go to the folder of --save: add it")
    cli.check_save_model(parser, args)
    try:
        if args.save:
            files.check_writable(args.save)
    except OSError as error:
        parser.error(f"--save cannot be written: {error}: choose another folder")


@dataclass
class Run:
    """What `prepare` hands to the other steps."""

    args: argparse.Namespace
    decoder: Decoder
    plan: memory.Plan
    tokenizer: Any
    targets: selection.Targets
    asked: float  # the share of zeros that the targets ask for
    gradients: GradientNorms | None
    calibration: torch.Tensor | None  # (n, T); None for a method that does not look at activations
    evaluation: torch.Tensor  # (m, T)
    phases: report.Phases
    weights: str  # which the dense model's are, a checksum
    scratch: tempfile.TemporaryDirectory | None = None  # of pruned blocks that no checkpoint keeps; deleted with the run

    @property
    def settings(self) -> dict:
        """What the results depend on, as results.json has it: flags, the weights, versions."""
        flags = {name: value for name, value in vars(self.args).items() if name not in ("sparsity", "ratios", "folder")}
        return {"flags": flags, "layer_ratios": self.args.ratios, "weights": self.weights, "versions": report.versions()}

    @property
    def text(self) -> str:
        """What a perplexity of this run was measured on."""
        windows, length = self.evaluation.shape
        return f"on {self.args.eval_dataset}, {windows} windows of {length} tokens"


def prepare(args: argparse.Namespace) -> Run:
    """Read all that the run needs, the model last; refuse what does not belong together."""
    device = cli.start(args)
    method = METHODS[args.prune_method]
    for flag, ignored in {
        "--grad_norm": args.grad_norm,
        "--grad_exponent": args.grad_exponent,
        "--gradient_path": args.gradient_path and not method.gradients,
    }.items():
        if ignored:
            logger.warning("%s has no effect with %s", flag, args.prune_method)
    outline, tokenizer = cli.open_model(args)
    targets = selection.select(
        outline, args.sparsity, include=args.include, exclude=args.exclude, layer=args.layer_no, ratios=args.ratios
    )
    gradients = GradientNorms(args.gradient_path) if method.gradients else None
    cli.settle_bos(args, outline, tokenizer)
    evaluation = cli.read_evaluation(args, tokenizer)
    calibration = cli.read_calibration(args, tokenizer) if method.statistic else None
    cli.check_vocabulary(args, outline, tokenizer, evaluation, calibration)
    decoder, plan = cli.load(args, device, outline, hidden_states=args.nsamples if method.statistic else 0)
    asked = selection.total_ratio(outline, targets)
    logger.info(
        "pruning %d of %d linears, to a sparsity of %.4f over all of them",
        sum(map(len, targets.values())), sum(len(decoder.linears(i)) for i in range(len(decoder))), asked,
    )  # fmt: skip
    phases = report.Phases(decoder.device)
    if gradients:
        with phases("check gradients"):
            gradients.check(len(decoder), decoder.shapes, decoder.fingerprint)
        if method.statistic:
            cli.compare_samples(args, gradients)
    run = Run(
        args, decoder, plan, tokenizer, targets, asked, gradients, calibration, evaluation, phases, decoder.checksum()[:16]
    )
    if parallel.rank() == 0:
        point_out_earlier(run)
        print(f"tokenizer {type(tokenizer).__name__} of {len(tokenizer)} tokens, perplexity {run.text}", flush=True)
    return run


def point_out_earlier(run: Run) -> None:
    """Say which earlier results are replaced, and how this run differs from the one that made them."""
    save, model = run.args.save, run.args.save_model
    if save and (earlier := report.read(save)):
        now, shown = run.settings, ("layer_ratios", "weights", "versions")
        before = {**earlier.get("flags", {}), **{key: earlier.get(key) for key in shown}}
        now = {
            key: value for key, value in {**now["flags"], **now}.items() if key in before and key not in ("save", "save_model")
        }
        report.point_out_earlier(Path(save, report.RESULTS), {key: before[key] for key in now}, now)
    if model and any(Path(model).glob("*.safetensors")):
        configs = [report.read(folder, "config.json") for folder in (model, run.args.folder)]
        changed = report.differences(*configs) or "of the same architecture"
        logger.warning("the earlier pruned checkpoint in %s is replaced when this run has its own: %s", model, changed)


def measure(run: Run, name: str) -> float:
    """The perplexity of the model as it is now; `name` is that of the phase."""
    group = run.plan.group(len(run.evaluation), 1) if run.plan.streamed else 1
    with run.phases(name):
        value = perplexity(run.decoder, run.evaluation, batch=run.args.batch_size, group=group, progress=name)
    if parallel.rank() == 0 and name.startswith("dense"):
        print(f"{name} {value:.4f} {run.text}", flush=True)
    return value


def refuse_hopeless(run: Run, dense: float) -> None:
    """Raise ValueError if the dense perplexity says that nothing measured from here on would mean anything."""
    if dense <= HOPELESS or run.args.force:
        return
    reasons = (
        f"{type(run.tokenizer).__name__} of {len(run.tokenizer)} tokens may not be this model's tokenizer, the text not in a "
        f"language it knows, or {run.args.model} not a trained model"
    )
    if not math.isfinite(dense):
        dtype = str(run.decoder.model.dtype).removeprefix("torch.")
        overflow = (
            "where numbers beyond 65504 overflow: use --dtype bfloat16 or float32"
            if dtype == "float16"
            else "use --dtype float32"
        )
        if dtype == "float32":
            overflow = "which is hardly too small for it: weights may be NaN or infinite"
        reasons = f"it was computed in {dtype}, {overflow}. Otherwise, {reasons}"
    raise ValueError(
        f"the dense perplexity is {dense:.4g} {run.text}, beyond {HOPELESS:.0f}: {reasons}. Nothing was pruned; "
        "--force goes on all the same"
    )


def prune_model(run: Run) -> Zeros:
    """Prune, and write the checkpoint where one is asked for; a streamed model is read from there afterwards."""
    args, decoder, method = run.args, run.decoder, METHODS[run.args.prune_method]
    written: store.Store | store.Scratch | None = None
    with contextlib.ExitStack() as unfinished:
        if args.save_model and parallel.rank() == 0:
            dense = loading.dense_tensors(args.folder, decoder)
            written = store.Store(args.save_model, dense, updated=method.score is None)
            unfinished.callback(written.discard)
        elif run.plan.streamed:  # pruned blocks have to go somewhere
            run.scratch = tempfile.TemporaryDirectory()
            written = store.Scratch(run.scratch.name, decoder.source)

        def finished(i: int, block: torch.nn.Module) -> None:
            if written and i in run.targets:
                matrices = decoder.linears(i) | decoder.routers(i)
                written.write_block(decoder.prefixes[i], block, {matrices[name].tensor_name for name in run.targets[i]})

        with run.phases("prune"):
            zeros = prune(
                decoder,
                run.calibration,
                method=args.prune_method,
                sparsity=run.targets,
                gradients=run.gradients and run.gradients.block,
                alpha=args.alpha / run.gradients.scale if run.gradients else 1.0,  # stored norms have their scale baked in
                use_variant=args.use_variant,
                gradient_inv=args.gradient_inv,
                hidden_states=run.plan.hidden_states,
                finished=finished,
            )
        if isinstance(written, store.Store):
            written.finish()
    if run.plan.streamed:
        decoder.source = written.tensors()
    return zeros


def keep_results(run: Run, zeros: Zeros, dense: float, pruned: float | None, status: str = "complete") -> None:
    """Write results.json and print the end of the run; without the pruned perplexity, keep what there is so far."""
    args, decoder = run.args, run.decoder
    processes, first = parallel.world(), parallel.rank() == 0
    if pruned is not None:
        parallel.stop()
    if not first:
        return
    sparsity = share_of_zeros(zeros)
    if args.save:
        results = {
            "status": status,
            **run.settings,
            "dtype": str(decoder.model.dtype).removeprefix("torch."),
            "device": str(decoder.device),
            "streamed": run.plan.streamed,
            "processes": processes,
            "perplexity": {"dense": dense, "pruned": pruned, "dataset": args.eval_dataset, "windows": len(run.evaluation)},
            "sparsity": sparsity,
            "sparsity_asked": run.asked,
            "sparsity_by_block": report.by_linear(zeros),
            "phases": run.phases.record,
        }
        report.write(args.save, results, args.plots)
    if pruned is None:
        return
    print(f"sparsity {sparsity:.4f}")
    print(f"pruned perplexity {pruned:.4f} (dense {dense:.4f}) {run.text}")
    if args.save:
        print(f"log.txt, results.json and sparsity.png saved in {args.save}")
    if args.save_model:
        print(f"pruned checkpoint saved in {args.save_model}")


if __name__ == "__main__":
    cli.run(parse, main)
