"""The table of methods and the one loop over blocks: a dense model and calibration windows in, a pruned model out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from lib import parallel
from lib.models.decoder import Decoder, State
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
        ValueError: an N:M pattern that does not divide a linear, or non-finite scores.
    """
    targets = sparsity if isinstance(sparsity, dict) else select(decoder, sparsity)
    rule = METHODS[method]
    states = decoder.enter_all(parallel.share(windows), hidden_states) if rule.statistic else []
    zeros: Zeros = {}
    for i in tqdm(range(len(decoder)), desc=f"pruning ({method})", unit="block", disable=None):
        with decoder.resident(i) as block:
            linears = decoder.linears(i)
            chosen = {name: linears[name] for name in targets.get(i, ())}
            statistics = _observe(decoder, i, chosen, states, rule.statistic, len(windows)) if rule.statistic and chosen else {}
            norms = gradients(i) if rule.gradients and chosen else {}
            for name, linear in chosen.items():
                try:
                    if rule.score is None:
                        linear.weight.copy_(sparsegpt.solve(linear.weight, statistics[name], targets[i][name]))
                        continue
                    factors = {}
                    if rule.statistic:
                        factors["x_norm"] = statistics[name]
                    if rule.gradients:
                        factors["grad_norm"] = norms[name].to(linear.weight.device)
                    score = rule.inverse if gradient_inv else rule.score
                    if score is scores.gblm:
                        factors["alpha"] = alpha
                    mask = mask_of(score(linear.weight, **factors), targets[i][name], rule.group, use_variant)
                except ValueError as error:
                    raise ValueError(f"{decoder.prefixes[i]}{name}: {error}") from error
                linear.weight.masked_fill_(mask, 0)
            zeros[i] = {name: _count_zeros(linear.weight) for name, linear in linears.items()}
            finished(i, block)
            if i + 1 < len(decoder):
                decoder.advance(i, states)
    return zeros


def mask_of(score: torch.Tensor, sparsity: Sparsity, group: str = "row", use_variant: bool = False) -> torch.Tensor:
    """The mask (True = remove) a method's comparison group and a sparsity ask for, (out, in).

    Raises:
        ValueError: a score that is NaN or infinite.
    """
    if not score.amax().isfinite():  # scores are not negative, and NaN is larger than all
        raise ValueError(
            "scores contain NaN or infinity: check the weights and gradient norms, or use --dtype bfloat16 or float32"
        )
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
    decoder: Decoder, i: int, linears: dict, states: list[State], statistic: type, nsamples: int
) -> dict[str, torch.Tensor]:
    """Run the samples through block `i` and return {linear: statistic of its inputs over the samples of all processes}."""
    with observe(linears, statistic) as observed:
        for state in states:
            decoder.run(i, state.hidden.to(decoder.device), state.kwargs[i])
    never = linears.keys() - observed.keys()
    if never:
        raise ValueError(f"{decoder.prefixes[i]}{min(never)} was never run: it does not take part in the block's forward")
    for shared in {id(seen): seen for seen in observed.values()}.values():
        parallel.add_up(shared.total)
    return {name: seen.result(nsamples) for name, seen in observed.items()}


def _count_zeros(weight: torch.Tensor) -> tuple[int, int]:
    return weight.numel() - torch.count_nonzero(weight).item(), weight.numel()
