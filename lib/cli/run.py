"""main.py's flags to one value: all that they name, opened, and how the model is to be pruned."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lib import parallel
from lib.atomic import claimed
from lib.cli.open import Outline, check_vocabulary, compare_samples, load, open_model, read_calibration, read_evaluation
from lib.cli.prune_checks import has_search, recipe_of, sparsity_of
from lib.cli.prune_flags import AUTO
from lib.evaluation import zero_shot
from lib.gradients.folder import GradientNorms
from lib.models import checks, fingerprint, loading, memory
from lib.models.decoder import Decoder
from lib.models.files.pruned_checkpoint import Store
from lib.pruning import search, targets
from lib.pruning.methods import METHODS, PAPER_ALPHA, Settings
from lib.pruning.outcome import Zeros
from lib.pruning.statistics import ActivationNorm
from lib.results import record
from lib.results.phases import Phases

logger = logging.getLogger(__name__)

PAPER_NSAMPLES = 128  # of gradients that do not say


@dataclass(frozen=True)
class Run:
    """What main.py's flags name, read and checked. Of all this only the weights in `decoder` ever change."""

    decoder: Decoder
    plan: memory.Plan
    outline: Outline
    selection: dict[str, Any]  # of `targets.select`, but for the ratios
    ratios: (
        dict[str, float | str] | None
    )  # what --layer_ratios means for the model, of a slope that is searched for: equal shares
    settings: Settings  # with a flag whose value is to be searched for as published
    searches: dict[str, Sequence]  # flag -> the values to try
    gradients: GradientNorms | None
    calibration: torch.Tensor | None  # (n, T); None where neither method nor recipe looks at activations
    held_out: torch.Tensor | None  # (m, T), drawn after them and those of the gradients
    evaluation: dict[str, torch.Tensor]  # text -> (m, T)
    tasks: zero_shot.Tasks | None
    weights: str  # which the dense model's are, a checksum
    flags: dict[str, Any]  # as results.json has them

    def settings_with(self, values: dict[str, Any]) -> Settings:
        """The settings with other values of --alpha and --layer_ratios."""
        settings = self.settings
        if "alpha" in values:
            settings = replace(settings, alpha=values["alpha"] / self.gradients.scale)  # stored norms have their scale baked in
        if "layer_ratios" in values:
            ratios = self.ratios_with(values)
            settings = replace(settings, targets=targets.select(self.decoder, **self.selection, ratios=ratios))
        return settings

    def ratios_with(self, values: dict[str, Any]) -> dict[str, float | str] | None:
        """{block or pattern: share}, likewise."""
        if "layer_ratios" in values:
            return targets.ratios_of(self.decoder, values["layer_ratios"], self.selection["sparsity"])
        return self.ratios

    def text(self, source: str) -> str:
        """What a perplexity of this run is measured on."""
        count, length = self.evaluation[source].shape
        return f"on {source}, {count} windows of {length} tokens"

    def progress(self, name: str, source: str) -> str:
        """What a bar is called while it is measured."""
        return name if len(self.evaluation) == 1 else f"{name} on {source}"

    def identity(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the results depend on: flags, the shares that they mean, the weights, versions."""
        return {
            "flags": self.flags,
            "layer_ratios": self.ratios_with(values),
            "weights": self.weights,
            "versions": record.versions(),
        }

    def facts(self, values: dict[str, Any], zeros: dict[int, Zeros]) -> dict[str, Any]:
        """What results.json says about the run itself; `values` are of the flags that were searched for."""
        decoder, wanted = self.decoder, self.settings_with(values).targets
        return {
            **self.identity(values),
            "dtype": str(decoder.model.dtype).removeprefix("torch."),
            "device": record.name_of(decoder.device),
            "streamed": self.plan.streamed,
            "skipped_blocks": sorted(decoder.skipped),
            "processes": parallel.world(),
            "sparsity_asked": targets.total_ratio(decoder, wanted),
            "dense": checks.dense_shares(decoder),
            "took_no_part": [
                f"{decoder.prefixes[i]}{name}" for i, names in wanted.items() for name in names if not zeros[i][name][0]
            ],
        }


@contextmanager
def outputs_claimed(args: argparse.Namespace) -> Iterator[None]:
    """Inside the context, no other run writes to the folders of --save_model and --save, which may be the same."""
    flags = {"--save": args.save, "--save_model": args.save_model}
    folders = {os.path.normcase(os.path.realpath(folder)): (folder, flag) for flag, folder in flags.items() if folder}
    with ExitStack() as claims:
        if parallel.rank() == 0:
            for folder, flag in folders.values():
                claims.enter_context(claimed(folder, flag))
        yield


def open_run(args: argparse.Namespace, device: torch.device, phases: Phases) -> Run:
    """Read all that main.py needs, the model last; refuse what does not belong together."""
    _warn_of_flags_without_effect(args)
    outline, method = open_model(args), METHODS[args.prune_method]
    selection = {
        "sparsity": sparsity_of(args), "include": args.include, "exclude": args.exclude, "layer": args.layer_no
    }  # fmt: skip

    ratios = targets.ratios_of(outline.decoder, args.layer_ratios, selection["sparsity"])
    wanted = targets.select(outline.decoder, **selection, ratios=ratios)
    gradients = GradientNorms(args.gradient_path) if method.gradients else None
    alpha = PAPER_ALPHA if args.alpha == AUTO else args.alpha
    settings = Settings(
        args.prune_method,
        wanted,
        alpha / gradients.scale if gradients else 1.0,
        use_variant=args.use_variant,
        gradient_inv=args.gradient_inv,
        recipe=recipe_of(args),
    )
    evaluation = {source: read_evaluation(args, outline, source) for source in args.eval_dataset}
    calibration, held_out = _calibration_and_held_out(args, outline, settings, gradients)
    check_vocabulary(args, outline, *evaluation.values(), calibration, held_out)
    tasks = None
    if args.eval_zero_shot:
        tasks = zero_shot.load(args.tasks, include_path=args.include_path, num_fewshot=args.num_fewshot, limit=args.limit)
    decoder, plan = load(args, device, outline, _needs(args, settings))
    if decoder.skipped:  # only now known
        ratios = targets.ratios_of(decoder, args.layer_ratios, selection["sparsity"])
        settings = replace(settings, targets=targets.select(decoder, **selection, ratios=ratios))
    _tell(decoder, settings.targets)
    if _searches(args):
        loading.require_restorable(outline.folder, decoder)
    if gradients:
        with phases("check gradients"):
            gradients.check(decoder)
        if calibration is not None:
            compare_samples(args, outline, gradients)
    flags = vars(args) | {"bos": outline.bos}
    if len(evaluation) == 1:
        flags["eval_dataset"] = args.eval_dataset[0]  # as it was before there could be several
    return Run(
        decoder, plan, outline, selection, ratios, settings, _searches(args), gradients, calibration, held_out, evaluation, tasks,
        fingerprint.checksum(decoder)[:16], flags,
    )  # fmt: skip


def announce(args: argparse.Namespace, run: Run) -> None:
    """Say on what perplexity will be measured, and which earlier results will be overwritten; refuse now what has no room."""
    if parallel.rank() > 0:
        return
    if args.save:
        of_a_line = frozenset(
            {"layer_ratios"} if targets.is_line(args.layer_ratios) else ()
        )  # whose shares follow from the flag
        record.point_out_earlier_run(args.save, run.identity({}), of_a_line)
    if args.save_model and any(Path(args.save_model).glob("*.safetensors")):
        configs = [record.read(folder, "config.json") for folder in (args.save_model, run.outline.folder)]
        changed = record.differences(*configs) or "of the same architecture"
        logger.warning("the pruned checkpoint in %s will be overwritten when this run finishes: %s", args.save_model, changed)
    if args.save_model and run.searches:  # not only after the trials
        Store(args.save_model, loading.dense_tensors(run.outline.folder, run.decoder)).discard()
    texts, tokenizer = "; ".join(map(run.text, run.evaluation)), run.outline.tokenizer
    print(f"tokenizer {type(tokenizer).__name__} of {len(tokenizer)} tokens, perplexity {texts}", flush=True)


def _warn_of_flags_without_effect(args: argparse.Namespace) -> None:
    without_effect = {
        "--grad_norm": args.grad_norm,
        "--grad_exponent": args.grad_exponent,
        "--gradient_path": args.gradient_path and not METHODS[args.prune_method].gradients,
    }
    for flag, used in without_effect.items():
        if used:
            logger.warning("%s has no effect with %s", flag, args.prune_method)


def _calibration_and_held_out(
    args: argparse.Namespace, outline: Outline, settings: Settings, gradients: GradientNorms | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The windows that pruning is fitted to, and others that neither activations nor gradients have seen."""
    if args.held_out or has_search(args):
        first = max(args.nsamples, gradients.index.get("nsamples", PAPER_NSAMPLES) if gradients else 0)
        count = args.held_out or search.held_out_for(args.nsamples)
        drawn = read_calibration(args, outline, first - args.nsamples + count)
        return drawn[: args.nsamples] if settings.needs_windows else None, drawn[first:]
    return read_calibration(args, outline) if settings.needs_windows else None, None


def _needs(args: argparse.Namespace, settings: Settings) -> memory.Needs:
    """What pruning keeps beside the weights."""
    recipe, updates = settings.recipe, settings.changes_survivors
    held_out = (args.held_out or 0) * (recipe.update != "none")
    return memory.Needs(
        hidden_states=args.nsamples * (settings.needs_windows + recipe.follows_dense) + held_out,
        hessians=(settings.statistic not in (None, ActivationNorm)) * (1 + (recipe.asymmetric > 0)) + (held_out > 0),
        solver=updates,
        training=recipe.epochs > 0,
    )


def _searches(args: argparse.Namespace) -> dict[str, Sequence]:
    searches: dict[str, Sequence] = {"alpha": search.ALPHAS} if args.alpha == AUTO else {}
    return searches | ({"layer_ratios": search.LINES} if args.layer_ratios == targets.LINE else {})


def _tell(decoder: Decoder, wanted: targets.Targets) -> None:
    """Say what will be pruned, and what stays dense."""
    logger.info(
        "pruning %d of %d linears, to a sparsity of %.4f over all of them", sum(map(len, wanted.values())),
        sum(len(decoder.linears(i)) for i in range(len(decoder))), targets.total_ratio(decoder, wanted),
    )  # fmt: skip
    if dense := checks.dense_shares(decoder):
        shown = ", ".join(f"{name} {share:.1%}" for name, share in dense.items())
        logger.info(
            "neither matrix products nor experts: %.1f %% of the blocks' weights stay dense: %s",
            100 * sum(dense.values()),
            shown,
        )
