"""The table of methods and the one loop over blocks: a dense model and calibration windows in, a pruned model out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.weights import Matrix
from lib.pruning import scores, sparsegpt
from lib.pruning.activations import ActivationNorm, observe
from lib.pruning.masks import Sparsity, n_of_m, per_row, variant, whole_matrix
from lib.pruning.selection import Targets, select

logger = logging.getLogger(__name__)

PAPER_ALPHA = 100.0  # arXiv 2311.04902, section 4; the published gradient files have it baked in as their scale
MAX_ALPHA = 1e30  # scores are fp32, and above 1e8 the activation term is lost in their rounding anyway


@dataclass(frozen=True)
class Method:
    """How a method decides: by a score and a mask, or (`statistic` is a Hessian, no score) by SparseGPT's solver."""

    score: Callable | None = None
    inverse: Callable | None = None  # the score under --gradient_inv
    statistic: type | None = None  # of the inputs of a linear; None: the method does not look at activations
    gradients: bool = False
    group: str = "row"  # what weights compete in when unstructured: "row" or "matrix"
    variant: bool = False  # accepts --use_variant


METHODS = {
    "magnitude": Method(scores.magnitude, group="matrix"),
    "wanda": Method(scores.wanda, statistic=ActivationNorm, variant=True),
    "gradient": Method(scores.gradient, scores.gradient_inverse, gradients=True),
    "gblm": Method(scores.gblm, scores.gblm_inverse, statistic=ActivationNorm, gradients=True, variant=True),
    "sparsegpt": Method(statistic=sparsegpt.Hessian),
}

Zeros = dict[int, dict[str, tuple[int, int]]]  # block -> linear -> (weights that are zero, all weights)


@torch.no_grad()
def prune(
    decoder: Decoder,
    windows: torch.Tensor | None,
    *,
    method: str,
    sparsity: Sparsity | Targets,
    gradients: Callable[[int], dict[str, torch.Tensor]] | None = None,
    alpha: float = 1.0,
    use_variant: bool = False,
    gradient_inv: bool = False,
    hidden_states: int | None = None,
    finished: Callable[[int, nn.Module], None] = lambda i, block: None,
) -> Zeros:
    """Prune a model block by block, first to last.

    Block i sees activations that already passed through the pruned blocks 0..i-1. All its linears are scored from the
    unpruned block's activations, pruned together, and the block is run again to feed the next.

    Args:
        windows: (n, T) token ids, of which several processes take a share each; None for a method that does not look at activations.
        sparsity: of every linear, or a table from `selection.select`.
        gradients: block index -> {linear: gradient norm (out, in)} of the dense model, for a method that uses them.
        alpha: weight of the gradient term of "gblm", applied to the norms as `gradients` returns them.
        hidden_states: keep more than so many samples' hidden states in a file, not in memory.
        finished: called with every block, while it is resident, when its weights are final.

    Raises:
        ValueError: an N:M pattern that does not divide a linear, or one whose scores, or solved weights, are not finite.
    """
    targets = sparsity if isinstance(sparsity, dict) else select(decoder, sparsity)
    rule = METHODS[method]
    states = decoder.enter_all(parallel.share(windows), hidden_states) if rule.statistic else []
    zeros: Zeros = {}
    for i in tqdm(range(len(decoder)), desc=f"pruning ({method})", unit="block", disable=None):
        with decoder.resident(i) as block:
            matrices = decoder.linears(i) | decoder.routers(i)
            chosen = {name: matrices[name] for name in targets.get(i, ())}
            linears = decoder.linears(i) | chosen
            statistics = _observe(decoder, i, chosen, states, rule.statistic, len(windows)) if rule.statistic and chosen else {}
            norms = gradients(i) if rule.gradients and chosen else {}
            sound: dict[str, torch.Tensor] = {}  # linear -> whether what its mask was decided by is finite
            unknown = _unknown(decoder.prefixes[i], chosen, statistics, norms)
            for name, linear in chosen.items():
                if name in unknown:
                    linear.weight.masked_fill_(mask_of(scores.magnitude(linear.weight), targets[i][name]), 0)
                    continue
                if rule.score is None:
                    linear.weight.copy_(sparsegpt.solve(linear.weight, statistics[name], targets[i][name]))
                    sound[name] = linear.weight.isfinite().all()
                    continue
                factors = {}
                if rule.statistic:
                    unreached = torch.zeros((), device=linear.weight.device)
                    factors["x_norm"] = unreached if statistics[name] is None else statistics[name]
                if rule.gradients:
                    factors["grad_norm"] = norms[name].to(linear.weight.device, non_blocking=True)
                measure = rule.inverse if gradient_inv else rule.score
                if measure is scores.gblm:
                    factors["alpha"] = alpha
                score = measure(linear.weight, **factors)
                sound[name] = score.amax().isfinite()  # scores are not negative, and NaN is larger than all
                linear.weight.masked_fill_(mask_of(score, targets[i][name], rule.group, use_variant), 0)
            zeros[i], broken = _look(linears, sound)
            if broken:
                remedy = _SCORE_REMEDY if rule.score else _SOLVER_REMEDY
                raise ValueError(f"{decoder.prefixes[i]}{broken[0]}: {remedy}")
            finished(i, block)
            if i + 1 < len(decoder):
                decoder.advance(i, states)
    return zeros


def mask_of(score: torch.Tensor, sparsity: Sparsity, group: str = "row", use_variant: bool = False) -> torch.Tensor:
    """The mask (True = remove) a method's comparison group and a sparsity ask for, (out, in)."""
    if sparsity.m:
        return n_of_m(score, sparsity.n, sparsity.m)
    if sparsity.ratio == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if use_variant:
        return variant(score, sparsity.ratio)
    return whole_matrix(score, sparsity.ratio) if group == "matrix" else per_row(score, sparsity.ratio)


def share_of_zeros(zeros: Zeros) -> float:
    """Sparsity over all linears of all blocks."""
    counts = [count for linears in zeros.values() for count in linears.values()]
    return sum(zero for zero, _ in counts) / sum(total for _, total in counts)


def _observe(
    decoder: Decoder, i: int, linears: dict[str, Matrix], states: list[State], statistic: type, nsamples: int
) -> dict[str, torch.Tensor | None]:
    """Run the samples through block `i` and return {linear: statistic of its inputs over the samples of all processes}, None
    for an expert that no token was sent to."""
    with observe(linears, statistic) as observed:
        for state in states:
            decoder.run(i, state.hidden.to(decoder.device), state.kwargs[i])
    for name, linear in linears.items():
        if name not in observed:
            if linear.index is None:
                raise ValueError(f"{decoder.prefixes[i]}{name} was never run: it does not take part in the block's forward")
            observed[name] = statistic(linear.in_features, decoder.device)  # an expert; elsewhere it may have tokens
    shared = {id(observed[name]): observed[name] for name in linears}.values()  # in the same order in every process
    for seen in shared:
        parallel.add_up(seen.total)
    tokens = parallel.add_up(torch.tensor([seen.tokens for seen in shared]))
    reached = {id(seen): count for seen, count in zip(shared, tokens.tolist(), strict=True)}
    return {name: observed[name].result(nsamples) if reached[id(observed[name])] else None for name in linears}


def _unknown(prefix: str, linears: dict[str, Matrix], statistics: dict, norms: dict) -> set[str]:
    """Matrices of experts that no calibration token reached: nothing is known of them but their own weights."""
    experts = [name for name, linear in linears.items() if linear.index is not None]
    unknown = {
        name
        for name in experts
        if (statistics or norms) and statistics.get(name) is None and (not norms or not norms[name].any())
    }
    if unknown:
        logger.warning(
            "%d of %d matrices of experts in %s had no calibration tokens, they are pruned by magnitude: %s",
            len(unknown), len(experts), prefix.removesuffix("."), ", ".join(sorted(unknown)[:3]) + (" ..." if len(unknown) > 3 else ""),
        )  # fmt: skip
    return unknown


def _look(linears: dict[str, Matrix], sound: dict[str, torch.Tensor]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """A block's (zeros, weights) per linear, and the names of those that are not sound: one wait for the device."""
    nonzero = [torch.count_nonzero(linear.weight) for linear in linears.values()]
    numbers = torch.stack([*nonzero, *sound.values()]).tolist()
    zeros = {
        name: (linear.weight.numel() - count, linear.weight.numel())
        for (name, linear), count in zip(linears.items(), numbers, strict=False)
    }
    return zeros, [name for name, flag in zip(sound, numbers[len(linears) :], strict=True) if not flag]


_SCORE_REMEDY = "scores contain NaN or infinity: check the weights and gradient norms, or use --dtype bfloat16 or float32"
_SOLVER_REMEDY = (
    "the Hessian of the inputs is not positive definite, or a weight not finite: check the weights, use more --nsamples, "
    "or --dtype bfloat16 or float32"
)
