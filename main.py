"""Prune a causal language model in one shot; print perplexity before and after.

    python main.py --model meta-llama/Llama-2-7b-hf \\
        --prune_method gblm --sparsity_ratio 0.5 --gradient_path \\
        gradients/llama2/gradients_aggregrate_norm_l2_model_Llama-2-7b-hf

The gradients come from gradient_computation.py; wanda, magnitude and sparsegpt
need none. Every flag is explained in docs/flags.md.
"""

import argparse
import contextlib
import gc
import logging
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib import card, entry, flags, inputs, parallel, prune_flags, report, tables
from lib.evaluation import kept, zero_shot
from lib.evaluation.perplexity import perplexity
from lib.gradients.folder import GradientNorms
from lib.models import checks, fingerprint, loading, memory, store
from lib.models.decoder import Decoder
from lib.pruning import ratios, selection
from lib.pruning.methods import METHODS
from lib.pruning.prune import Errors, NotFinite, Zeros, needs_windows, prune, share_of_zeros

logger = logging.getLogger("main")

ALPHAS = (0.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # that --alpha auto tries; 0 is Wanda's score
LINES = [f"{ratios.LINE}:{slope:g}" for slope in ratios.SLOPES]  # that --layer_ratios line tries
PAPER_NSAMPLES = 128  # of gradients that do not say
HELD_OUT = 8  # windows on which they are compared, at least; an eighth of --nsamples where that is more


def main(args: argparse.Namespace) -> None:
    """Prepare, measure the dense model, prune it, measure it again, report."""
    run = prepare(args)
    measure_dense(run)
    if args.eval_dense:
        score_tasks(run, "dense")
    if args.alpha == prune_flags.AUTO:
        choose(run, "alpha", ALPHAS)
    if args.layer_ratios == ratios.LINE:
        choose(run, "layer_ratios", LINES)
    run.zeros = prune_model(run)
    keep_results(run, "pruned; the perplexity is being measured")
    try:
        measure_pruned(run)
        if run.tasks:
            keep_results(run, "pruned; the zero-shot tasks are being scored")
            score_tasks(run, "pruned")
    except BaseException as error:
        what = "the zero-shot accuracy" if run.pruned else "the perplexity"
        keep_results(run, f"pruned; {what} could not be measured: {error!r}")
        raise
    finish(run)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded. `sparsity`, `ratios` and `steps` join the result, parsed."""
    parser, groups = flags.parser_of(__doc__, "--model MODEL --prune_method METHOD")
    prune_flags.declare(groups)
    args = parser.parse_args(argv)
    flags.check_common_flags(parser, args)
    prune_flags.check(parser, args)
    return args


@dataclass
class Run:
    """What `prepare` hands to the other steps, and what they find."""

    args: argparse.Namespace
    decoder: Decoder
    plan: memory.Plan
    tokenizer: Any
    targets: selection.Targets
    share: float  # of zeros, that the targets ask for
    gradients: GradientNorms | None
    calibration: torch.Tensor | None  # (n, T); None where neither method nor recipe looks at activations
    held_out: torch.Tensor | None  # (m, T), drawn after them and those of the gradients; flags may be chosen on them
    evaluation: dict[str, torch.Tensor]  # text -> (m, T)
    tasks: zero_shot.Tasks | None
    phases: report.Phases
    weights: str  # which the dense model's are, a checksum
    errors: dict[int, Errors] = field(default_factory=dict)  # of the blocks whose surviving weights change
    scratch: tempfile.TemporaryDirectory | None = None  # of pruned blocks that no checkpoint keeps; deleted with the run

    dense: dict[str, float] = field(default_factory=dict)  # text -> perplexity
    reused: set[str] = field(default_factory=set)  # texts whose dense perplexity an earlier run has measured
    zeros: Zeros = field(default_factory=dict)
    pruned: dict[str, float] = field(default_factory=dict)
    tried: dict[str, dict] = field(default_factory=dict)  # flag -> {value: perplexity on the windows held out}
    asked: dict[str, str] = field(default_factory=dict)  # flag -> what it was, before `args` had what was chosen
    accuracy: dict[str, dict] = field(default_factory=dict)  # "dense", "pruned" -> zero-shot results

    @property
    def settings(self) -> dict:
        """What the results depend on, as results.json has it: flags, the weights, versions."""
        unflagged = ("sparsity", "ratios", "folder", "steps")
        flags = {name: value for name, value in (vars(self.args) | self.asked).items() if name not in unflagged}
        if len(self.evaluation) == 1:
            flags["eval_dataset"] = self.args.eval_dataset[0]  # as it was before there could be several
        return {"flags": flags, "layer_ratios": self.args.ratios, "weights": self.weights, "versions": report.versions()}

    def text(self, source: str) -> str:
        """What a perplexity of this run was measured on."""
        windows, length = self.evaluation[source].shape
        return f"on {source}, {windows} windows of {length} tokens"


def prepare(args: argparse.Namespace) -> Run:
    """Read all that the run needs, the model last; refuse what does not belong together."""
    device = entry.start(args)
    method = METHODS[args.prune_method]
    for flag, ignored in {
        "--grad_norm": args.grad_norm,
        "--grad_exponent": args.grad_exponent,
        "--gradient_path": args.gradient_path and not method.gradients,
    }.items():
        if ignored:
            logger.warning("%s has no effect with %s", flag, args.prune_method)
    outline, tokenizer = inputs.open_model(args)
    targets = targets_of(args, outline)
    gradients = GradientNorms(args.gradient_path) if method.gradients else None
    inputs.settle_bos(args, outline, tokenizer)
    evaluation = {source: inputs.read_evaluation(args, tokenizer, source) for source in args.eval_dataset}
    needed, calibration, held_out = needs_windows(args.prune_method, args.steps), None, None
    if args.held_out or prune_flags.has_choice(args):
        first = max(args.nsamples, gradients.index.get("nsamples", PAPER_NSAMPLES) if gradients else 0)
        count = args.held_out or max(HELD_OUT, args.nsamples // 8)
        drawn = inputs.read_calibration(args, tokenizer, first - args.nsamples + count)
        calibration, held_out = drawn[: args.nsamples] if needed else None, drawn[first:]
    elif needed:
        calibration = inputs.read_calibration(args, tokenizer)
    inputs.check_vocabulary(args, outline, tokenizer, *evaluation.values(), calibration, held_out)
    tasks = None
    if args.eval_zero_shot:
        tasks = zero_shot.load(args.tasks, include_path=args.include_path, num_fewshot=args.num_fewshot, limit=args.limit)
    streams = (calibration is not None) + args.steps.follows_dense
    hidden_states = args.nsamples * streams + (args.held_out or 0) * (args.steps.update != "none")
    decoder, plan = inputs.load(args, device, outline, hidden_states=hidden_states)
    phases = report.Phases(decoder.device)
    if decoder.skipped:  # only now known
        targets = targets_of(args, decoder)
    share = selection.total_ratio(decoder, targets)
    logger.info(
        "pruning %d of %d linears, to a sparsity of %.4f over all of them",
        sum(map(len, targets.values())), sum(len(decoder.linears(i)) for i in range(len(decoder))), share,
    )  # fmt: skip
    if dense := checks.dense_shares(decoder):
        shown = ", ".join(f"{name} {share:.1%}" for name, share in dense.items())
        logger.info(
            "no matrix products, or routers: %.1f %% of the blocks' weights stay dense: %s", 100 * sum(dense.values()), shown
        )
    if gradients:
        with phases("check gradients"):
            gradients.check(decoder)
        if calibration is not None:
            inputs.compare_samples(args, gradients)
    run = Run(
        args,
        decoder,
        plan,
        tokenizer,
        targets,
        share,
        gradients,
        calibration,
        held_out,
        evaluation,
        tasks,
        phases,
        fingerprint.checksum(decoder)[:16],
    )
    if parallel.rank() == 0:
        point_out_earlier(run)
        texts = "; ".join(map(run.text, evaluation))
        print(f"tokenizer {type(tokenizer).__name__} of {len(tokenizer)} tokens, perplexity {texts}", flush=True)
    return run


def targets_of(args: argparse.Namespace, decoder: Decoder) -> selection.Targets:
    """What the flags select of a model. `args.ratios` become the shares of a line, of which a slope that is open is 0."""
    if ratios.is_line(args.layer_ratios):
        slope = ratios.slope_of(args.layer_ratios) or 0.0
        args.ratios = ratios.of_blocks(decoder, slope, args.sparsity.ratio)
    return selection.select(
        decoder, args.sparsity, include=args.include, exclude=args.exclude, layer=args.layer_no, ratios=args.ratios
    )


def point_out_earlier(run: Run) -> None:
    """Say which earlier results are replaced, and how this run differs from the one that made them."""
    save, model = run.args.save, run.args.save_model
    if save and (earlier := report.read(save)):
        now, shown = run.settings, ["weights", "versions"]
        if not ratios.is_line(run.args.layer_ratios):  # whose shares follow from the flag
            shown.append("layer_ratios")
        before = {**earlier.get("flags", {}), **{key: earlier.get(key) for key in shown}}
        now = {
            key: value for key, value in {**now["flags"], **now}.items() if key in before and key not in ("save", "save_model")
        }
        report.point_out_earlier(Path(save, report.RESULTS), {key: before[key] for key in now}, now)
    elif save:
        for file in (report.RESULTS, "log.txt"):
            report.point_out_unknown(Path(save, file))
    if model and any(Path(model).glob("*.safetensors")):
        configs = [report.read(folder, "config.json") for folder in (model, run.args.folder)]
        changed = report.differences(*configs) or "of the same architecture"
        logger.warning("the earlier pruned checkpoint in %s is replaced when this run has its own: %s", model, changed)


def measure_dense(run: Run) -> None:
    """The dense perplexities, from an earlier run where it has kept them; see `refuse_hopeless`."""
    place, first = kept.folder(run.args.cache_dir), parallel.rank() == 0
    with run.phases("dense perplexity"):
        conditions = kept.conditions(run.decoder) if first else {}
        for source, windows in run.evaluation.items():
            earlier = kept.find(place, conditions, windows) if first and not run.args.no_cache else None
            earlier = parallel.gather(earlier)[0]  # all or none
            if earlier is None:
                run.dense[source] = measure(run, source, "dense perplexity")
            else:
                run.dense[source] = earlier
                run.reused.add(source)
                logger.info("the dense perplexity %s is an earlier run's, --no_cache measures it anew", run.text(source))
            if first:
                print(f"dense perplexity {run.dense[source]:.4f} {run.text(source)}", flush=True)
            refuse_hopeless(run, source)
            if first and earlier is None:
                kept.keep(place, conditions, windows, run.dense[source], run.text(source))


def measure_pruned(run: Run) -> None:
    """The perplexities of the pruned model."""
    with run.phases("pruned perplexity"):
        run.pruned = {source: measure(run, source, "pruned perplexity") for source in run.evaluation}


def measure(run: Run, source: str, name: str) -> float:
    """The perplexity on one text of the model as it is now."""
    return measure_windows(run, run.evaluation[source], name if len(run.evaluation) == 1 else f"{name} on {source}")


def measure_windows(run: Run, windows: torch.Tensor, progress: str) -> float:
    """The perplexity on windows (m, T) of the model as it is now."""
    group = run.plan.group(len(windows), 1) if run.plan.streamed else 1
    return perplexity(run.decoder, windows, batch=run.args.batch_size, group=group, progress=progress)


def score_tasks(run: Run, name: str) -> None:
    """The zero-shot accuracies of the model as it is now, "dense" or "pruned"."""
    with run.phases(f"{name} zero-shot"):
        run.accuracy[name] = zero_shot.evaluate(run.decoder, run.tokenizer, run.tasks, run.args.batch_size)


def refuse_hopeless(run: Run, source: str) -> None:
    """Raise ValueError if a dense perplexity says that nothing measured from here on would mean anything."""
    dense = run.dense[source]
    if dense <= prune_flags.HOPELESS or run.args.force:
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
        f"the dense perplexity is {dense:.4g} {run.text(source)}, beyond {prune_flags.HOPELESS:.0f}: {reasons}. Nothing was pruned; "
        "--force goes on all the same"
    )


def choose(run: Run, flag: str, values: Sequence) -> None:
    """Settle a flag: prune with each of its values, and keep the one whose model is best on the windows held out.

    Neither activations nor gradients have seen those windows. The dense weights are read anew after every trial.
    """
    args, phase, tried = run.args, f"choose {flag}", run.tried.setdefault(flag, {})
    if args.save_model and parallel.rank() == 0:  # which ends here if there is no room for it, not after the trials
        store.Store(args.save_model, loading.dense_tensors(args.folder, run.decoder)).discard()
    for value in values:
        run.args = argparse.Namespace(**vars(args) | {flag: value})
        run.targets = targets_of(run.args, run.decoder)
        try:
            prune_model(run, phase, trial=True)
            with run.phases(phase):
                tried[value] = measure_windows(run, run.held_out, f"{flag} {value}")
        except NotFinite as error:  # in every process alike
            logger.warning("--%s %s: %s", flag, value, error)
            tried[value] = math.inf
        with run.phases(phase):
            run.decoder = None  # before there is another
            gc.collect()
            if run.scratch:
                run.scratch.cleanup()
            run.decoder = inputs.load_weights(args, run.phases.device, run.plan.streamed)
        logger.info("--%s %s: perplexity %.4f on %d windows held out", flag, value, tried[value], len(run.held_out))
    finite = {value: perplexity for value, perplexity in tried.items() if math.isfinite(perplexity)}
    if not finite:
        raise ValueError(f"no value of --{flag} that was tried gives a finite perplexity: give one, or use --dtype float32")
    run.asked[flag] = getattr(args, flag)
    setattr(args, flag, min(finite, key=finite.get))
    run.args, run.targets = args, targets_of(args, run.decoder)
    if parallel.rank() == 0:
        shown = ", ".join(f"{value} {perplexity:.2f}" for value, perplexity in tried.items())
        print(
            f"--{flag} {getattr(args, flag)} chosen, by perplexity on {len(run.held_out)} windows held out: {shown}", flush=True
        )


def prune_model(run: Run, phase: str = "prune", trial: bool = False) -> Zeros:
    """Prune, and write the checkpoint where one is asked for, unless it is a trial; a streamed model is read from there
    afterwards."""
    args, decoder, method = run.args, run.decoder, METHODS[run.args.prune_method]
    run.errors.clear()
    written: store.Store | store.Scratch | None = None
    with contextlib.ExitStack() as unfinished:
        if args.save_model and not trial and parallel.rank() == 0:
            updated = method.score is None or args.steps.changes_survivors
            dense = loading.dense_tensors(args.folder, decoder)
            written = store.Store(args.save_model, dense, updated=updated)
            unfinished.callback(written.discard)
        elif run.plan.streamed:  # pruned blocks have to go somewhere
            beside = Path(args.save_model).resolve().parent if args.save_model else None
            run.scratch = tempfile.TemporaryDirectory(dir=beside if beside and beside.is_dir() else None)
            written = store.Scratch(run.scratch.name, decoder.source)

        def finished(i: int, block: torch.nn.Module) -> None:
            if written and i in run.targets:
                matrices = decoder.linears(i) | decoder.routers(i)
                written.write_block(decoder.prefixes[i], block, {matrices[name].tensor_name for name in run.targets[i]})

        with run.phases(phase):
            zeros = prune(
                decoder,
                run.calibration,
                method=args.prune_method,
                sparsity=run.targets,
                gradients=run.gradients and run.gradients.block,
                alpha=args.alpha / run.gradients.scale if run.gradients else 1.0,  # stored norms have their scale baked in
                use_variant=args.use_variant,
                gradient_inv=args.gradient_inv,
                recipe=args.steps,
                hidden_states=run.plan.samples,
                held_out=run.held_out if args.held_out and not trial else None,
                finished=finished,
                measured=run.errors.__setitem__,
            )
        if isinstance(written, store.Store):
            written.finish()
    if run.plan.streamed:
        decoder.source = written.tensors()
    return zeros


def keep_results(run: Run, status: str) -> dict:
    """Write what there is so far to results.json and beside it, if that is asked for; returns it as it is written."""
    args, decoder = run.args, run.decoder
    perplexities = [
        {
            "dense": run.dense[source],
            "pruned": run.pruned.get(source),
            "dataset": source,
            "windows": len(windows),
            "dense_reused": source in run.reused,
        }
        for source, windows in run.evaluation.items()
    ]
    results = {
        "status": status,
        **run.settings,
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "device": str(decoder.device),
        "streamed": run.plan.streamed,
        "skipped_blocks": sorted(decoder.skipped),
        "processes": parallel.world(),
        "perplexity": perplexities[0],
        **({"perplexities": perplexities} if len(perplexities) > 1 else {}),
        **({"zero_shot": run.accuracy} if run.accuracy else {}),
        **({"chosen": {flag: getattr(args, flag) for flag in run.tried}, "tried": run.tried} if run.tried else {}),
        "sparsity": share_of_zeros(run.zeros),
        "sparsity_asked": run.share,
        "sparsity_by_block": report.by_linear(run.zeros),
        "errors_by_block": report.errors_by_linear(run.errors),
        "dense": checks.dense_shares(decoder),
        "took_no_part": [
            f"{decoder.prefixes[i]}{name}" for i, names in run.targets.items() for name in names if not run.zeros[i][name][0]
        ],
        "phases": run.phases.record,
    }
    if args.save and parallel.rank() == 0:
        report.write(args.save, results, args.plots)
    return results


def finish(run: Run) -> None:
    """Write and print the end of the run; its last lines are the result."""
    args, first = run.args, parallel.rank() == 0
    results = keep_results(run, "complete")
    parallel.stop()
    if not first:
        return
    if args.save_model and run.targets:  # else the folder is the dense one, its own card included
        card.write(
            Path(args.save_model), results, f"python {shlex.join(sys.argv)}", run.calibration is not None or bool(run.tried)
        )
    saved = [f"log.txt, results.json and sparsity.png saved in {args.save}"] if args.save else []
    saved += [f"pruned checkpoint saved in {args.save_model}"] if args.save_model else []
    logger.info("summary\n%s", tables.summary(results, saved))
    if len(run.evaluation) > 1:
        print(tables.perplexities(results))
    if run.accuracy:
        print(tables.zero_shot(results))
    text = args.eval_dataset[0]
    print(f"sparsity {results['sparsity']:.4f}")
    print(f"pruned perplexity {run.pruned[text]:.4f} (dense {run.dense[text]:.4f}) {run.text(text)}")
    for line in saved:
        print(line)


if __name__ == "__main__":
    entry.run(parse, main)
