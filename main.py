"""Prune a causal language model in one shot; print perplexity before and after.

    python main.py --model meta-llama/Llama-2-7b-hf \\
        --prune_method gblm --sparsity_ratio 0.5 --gradient_path \\
        gradients/llama2/gradients_aggregrate_norm_l2_model_Llama-2-7b-hf

The gradients come from gradient_computation.py; wanda, magnitude and sparsegpt
need none. Every flag is explained in docs/flags.md.
"""

import argparse
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from lib import parallel
from lib.cli import command, flags, prune_checks, prune_flags
from lib.cli.run import Run, announce, open_run, outputs_claimed
from lib.evaluation import zero_shot
from lib.evaluation.dense_cache import DenseCache
from lib.evaluation.perplexity import perplexity, require_sensible
from lib.models import loading, memory
from lib.models.files.writer import round_as_saved, writer
from lib.pruning.outcome import NotFinite
from lib.pruning.prune import prune
from lib.pruning.search import search
from lib.results import card, record, tables
from lib.results.phases import Phases
from lib.results.read import COMPLETE
from lib.results.record import Outcome

logger = logging.getLogger("main")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser, groups = flags.parser_of(__doc__, "--model MODEL --prune_method METHOD")
    prune_flags.declare(groups)
    args = parser.parse_args(argv)
    flags.check_common_flags(parser, args)
    return prune_checks.check(parser, args)


def main(args: argparse.Namespace) -> None:
    """Open what the flags name, measure the dense model, prune it, measure it again, report."""
    device = command.start(args.device, args.nsamples)
    with outputs_claimed(args):
        phases = Phases(device)
        run = open_run(args, device, phases)
        announce(args, run)
        with memory.watched(run.plan, device):
            outcome = measure_dense(args, run, phases)
            outcome = search_flags(args, run, phases, outcome)
            with phases("prune"):
                outcome = prune_model(args, run, outcome)
            report(args, run, phases, outcome, "pruned; the perplexity is being measured")
            try:
                outcome = measure_pruned(args, run, phases, outcome)
                if run.tasks:
                    report(args, run, phases, outcome, "pruned; the zero-shot tasks are being scored")
                    outcome = score_tasks(args, run, phases, outcome, "pruned")
            except BaseException as error:
                what = "the zero-shot accuracy" if outcome.pruned else "the perplexity"
                with command.beside(error):
                    report(args, run, phases, outcome, f"pruned; {what} could not be measured: {error!r}")
                raise
        finish(args, run, phases, outcome)


def measure_dense(args: argparse.Namespace, run: Run, phases: Phases) -> Outcome:
    """The dense perplexities, an earlier run's where it has kept them; and accuracies, if they are asked for."""
    dense, reused = {}, set()
    with phases("dense perplexity"):
        cache = DenseCache.of(run.decoder, args.cache_dir)
        for source, windows in run.evaluation.items():
            earlier = None if args.no_cache else cache.find(windows)
            if earlier is None:
                dense[source] = measure(args, run, windows, run.progress("dense perplexity", source))
            else:
                dense[source] = earlier
                reused.add(source)
                logger.info("the dense perplexity %s is an earlier run's; --no_cache measures it anew", run.text(source))
            if parallel.rank() == 0:
                print(f"dense perplexity {dense[source]:.4f} {run.text(source)}", flush=True)
            if not args.force:
                require_sensible(dense[source], run.decoder, run.outline.tokenizer, run.text(source), args.model)
            if earlier is None:
                cache.keep(windows, dense[source], run.text(source))
    outcome = Outcome(dense, frozenset(reused))
    return score_tasks(args, run, phases, outcome, "dense") if args.eval_dense else outcome


def search_flags(args: argparse.Namespace, run: Run, phases: Phases, outcome: Outcome) -> Outcome:
    """Values for --alpha auto and --layer_ratios line: those whose models are best on windows that nothing was fitted to."""
    for flag, values in run.searches.items():

        def perplexity_with(value, flag=flag, outcome=outcome) -> float:
            try:
                prune_model(args, run, replace(outcome, best=outcome.best | {flag: value}), trial=True)
                measured = measure(args, run, run.held_out, f"{flag} {value}")
            except NotFinite:  # of this value; a run that ends restores nothing
                loading.restore(run.outline.folder, run.decoder)
                raise
            loading.restore(run.outline.folder, run.decoder)
            return measured

        with phases(f"search {flag}"):
            best, tried = search(flag, values, perplexity_with)
        outcome = replace(outcome, best=outcome.best | {flag: best}, tried=outcome.tried | {flag: tried})
        if parallel.rank() == 0:
            shown = ", ".join(f"{value} {perplexity:.2f}" for value, perplexity in tried.items())
            print(f"--{flag} {best} chosen, by perplexity on {len(run.held_out)} windows held out: {shown}", flush=True)
    return outcome


def prune_model(args: argparse.Namespace, run: Run, outcome: Outcome, trial: bool = False) -> Outcome:
    """Prune, and write the checkpoint where one is asked for, unless it is a trial; a streamed model is read from there
    afterwards."""
    settings, decoder, zeros, errors = run.settings_with(outcome.best), run.decoder, {}, {}
    how = {"targets": settings.targets, "updated": settings.changes_survivors, "trial": trial}
    with writer(decoder, run.outline.folder, args.save_model, **how) as written:
        for pruned in prune(
            decoder,
            run.calibration,
            settings,
            gradients=run.gradients and run.gradients.block,
            held_out=run.held_out if args.held_out and not trial else None,
            hidden_states=run.plan.samples,
        ):
            zeros[pruned.index] = pruned.zeros
            if pruned.errors:
                errors[pruned.index] = pruned.errors
            if written:
                written.write_block(decoder, pruned.index, settings.targets.get(pruned.index, ()))
    if run.plan.streamed:
        decoder.source = written.tensors()
    elif args.save_model and settings.changes_survivors and not trial:  # what is measured is what is saved
        round_as_saved(decoder, run.outline.folder, settings.targets)
    return replace(outcome, zeros=zeros, errors=errors)


def measure_pruned(args: argparse.Namespace, run: Run, phases: Phases, outcome: Outcome) -> Outcome:
    """The perplexities of the pruned model."""
    with phases("pruned perplexity"):
        pruned = {
            source: measure(args, run, windows, run.progress("pruned perplexity", source))
            for source, windows in run.evaluation.items()
        }
    return replace(outcome, pruned=pruned)


def measure(args: argparse.Namespace, run: Run, windows: torch.Tensor, progress: str) -> float:
    """The perplexity on windows (m, T) of the model as it is now."""
    group = run.plan.group(len(windows), 1) if run.plan.streamed else 1
    return perplexity(run.decoder, windows, batch=args.batch_size, group=group, progress=progress)


def score_tasks(args: argparse.Namespace, run: Run, phases: Phases, outcome: Outcome, which: str) -> Outcome:
    """The zero-shot accuracies of the model as it is now, "dense" or "pruned"."""
    with phases(f"{which} zero-shot"):
        accuracy = zero_shot.evaluate(run.decoder, run.outline.tokenizer, run.tasks, args.batch_size)
    return replace(outcome, accuracy=outcome.accuracy | {which: accuracy})


def results_of(run: Run, phases: Phases, outcome: Outcome, status: str) -> dict:
    """What there is so far, as results.json has it."""
    windows = {source: len(windows) for source, windows in run.evaluation.items()}
    facts = run.facts(outcome.best, outcome.zeros) | {"phases": phases.record}
    return record.results_of(outcome, status, windows, facts)


def report(args: argparse.Namespace, run: Run, phases: Phases, outcome: Outcome, status: str) -> None:
    """Write results.json and what lies beside it, if that is asked for."""
    results = results_of(run, phases, outcome, status)
    if args.save and parallel.rank() == 0:
        record.write(args.save, results, args.plots)


def finish(args: argparse.Namespace, run: Run, phases: Phases, outcome: Outcome) -> None:
    """The model card, results that say "complete", and the end of what is printed; its last lines are the result."""
    results = results_of(run, phases, outcome, COMPLETE)
    parallel.stop()
    if parallel.rank() > 0:
        return
    if args.save_model and run.settings.targets:  # else the folder is the dense one, its own card included
        calibrated = run.calibration is not None or bool(run.searches)
        card.write(Path(args.save_model), results, f"python {shlex.join(sys.argv)}", calibrated)
    if args.save:
        record.write(args.save, results, args.plots)
    saved = [f"log.txt, results.json and sparsity.png saved in {args.save}"] if args.save else []
    saved += [f"pruned checkpoint saved in {args.save_model}"] if args.save_model else []
    logger.info("summary\n%s", tables.summary(results, saved))
    print(tables.last_lines(results, run.text(args.eval_dataset[0]), saved))


if __name__ == "__main__":
    command.run(parse, main)
