"""The table of methods and the one loop over blocks: a dense model and calibration windows in, a pruned model out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from tqdm import tqdm

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.weights import Matrix, idle, kind_of
from lib.pruning import scores, sparsegpt, update
from lib.pruning.activations import ActivationNorm
from lib.pruning.masks import Sparsity, lowest_of, n_of_m, per_row, variant, whole_matrix
from lib.pruning.reconstruction import reconstruct
from lib.pruning.selection import Targets, select
from lib.pruning.statistics import collect, point_out
from lib.pruning.update import PUBLISHED, Recipe

logger = logging.getLogger(__name__)

PAPER_ALPHA = 100.0  # arXiv 2311.04902, section 4; the published gradient files have it baked in as their scale
MAX_ALPHA = 1e30  # scores are fp32, and above 1e8 the activation term is lost in their rounding anyway


class NotFinite(ValueError):
    """Scores or updated weights of a linear are NaN or infinite: of these settings, and perhaps not of others."""


@dataclass(frozen=True)
class Method:
    """How a method decides: by a score and a mask, or (`statistic` is a Hessian, no score) by SparseGPT's solver."""

    score: Callable | None = None
    inverse: Callable | None = None  # the score under --gradient_inv
    statistic: type | None = None  # of the inputs of a linear; None: the method does not look at activations
    gradients: bool = False
    group: str = "row"  # what weights compete in when unstructured: "row" or "matrix"
    variant: bool = False  # accepts --use_variant

    def observes(self, recipe: Recipe = PUBLISHED) -> type | None:
        """The statistic that method and recipe need: a Hessian's diagonal holds the activation norm as well."""
        return self.statistic if recipe.update == "none" else sparsegpt.ExactHessian


METHODS = {
    "magnitude": Method(scores.magnitude, group="matrix"),
    "wanda": Method(scores.wanda, statistic=ActivationNorm, variant=True),
    "gradient": Method(scores.gradient, scores.gradient_inverse, gradients=True),
    "gblm": Method(scores.gblm, scores.gblm_inverse, statistic=ActivationNorm, gradients=True, variant=True),
    "sparsegpt": Method(statistic=sparsegpt.Hessian),
}


class Choice:
    """What decides over the weights of one linear: (its weights as they are now, a share) -> mask, True = remove.

    Args:
        statistic: activation norm (in,), Hessian (in, in), or Hessian and drift (2, in, in).
        grad_norm: (out, in), where the rule uses gradients.
    """

    def __init__(
        self,
        rule: Method,
        target: Sparsity,
        statistic: torch.Tensor | None,
        grad_norm: torch.Tensor | None,
        *,
        alpha: float = 1.0,
        inverse: bool = False,
        use_variant: bool = False,
    ):
        self.rule, self.target, self.use_variant = rule, target, use_variant
        self.hessian, self.drift = None, None
        if statistic is not None and statistic.ndim > 1:
            self.hessian, self.drift = statistic if statistic.ndim == 3 else (statistic, None)
        self.measure = (rule.inverse if inverse else rule.score) or scores.wanda
        self.alpha = {"alpha": alpha} if self.measure is scores.gblm else {}
        self.factors: dict[str, torch.Tensor] = {}
        if rule.statistic and statistic is None:  # an expert that no token reached
            self.factors["x_norm"] = torch.zeros(())
        elif rule.statistic:
            self.factors["x_norm"] = statistic if self.hessian is None else (self.hessian.diagonal() / 2).sqrt()
        if rule.gradients:
            self.factors["grad_norm"] = grad_norm
        self.sound = True  # whether all scores so far were finite; a tensor, that nobody need wait for

    def __call__(self, weight: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """The mask that method and target ask for, or of what it removes the `share` of lowest score."""
        factors = {name: value.to(weight.device, non_blocking=True) for name, value in self.factors.items()}
        score = self.measure(weight, **factors, **self.alpha)
        self.sound = score.amax().isfinite() & self.sound  # scores are not negative, and NaN is larger than all
        if self.rule.score:
            mask = mask_of(score, self.target, self.rule.group, self.use_variant)
        else:
            mask = sparsegpt.solve(weight, self.hessian.clone(), self.target) == 0
        return mask if share == 1 else lowest_of(mask, score, share)

    def pruned(self, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        """The weight without what is removed, (out, in), what remains updated as the recipe says, or by SparseGPT as published."""
        if self.rule.score is None and recipe.update == "none":
            return sparsegpt.solve(weight, self.hessian.clone(), self.target)
        return update.solve(weight, self.hessian, self, recipe, self.drift)

    def prune(self, linear: Matrix, recipe: Recipe, held: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prune a linear in place. `held` is the Hessian of windows held out.

        Returns whether its weights, and what decided them, are finite; and the errors of its outputs, (2,) or with `held` (4,),
        where an update has changed what stays.
        """
        weight = self.pruned(linear.weight, recipe)
        sound, errors = self.sound & weight.isfinite().all(), None
        if recipe.update != "none" and self.hessian is not None:
            hessians = [self.hessian] if held is None else [self.hessian, held]
            errors = torch.cat([update.relative_errors(linear.weight, weight, hessian) for hessian in hessians])
        linear.weight.copy_(weight)
        return sound, errors


# linear -> relative error of its outputs (masked alone, updated), the same two on windows held out where there are some;
# "" -> the block's own (before reconstruction, after)
Errors = dict[str, tuple[float, ...]]
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
    recipe: Recipe = PUBLISHED,
    hidden_states: int | None = None,
    held_out: torch.Tensor | None = None,
    finished: Callable[[int, nn.Module], None] = lambda i, block: None,
    measured: Callable[[int, Errors], None] = lambda i, errors: None,
) -> Zeros:
    """Prune a model block by block, first to last: observe -> score -> mask -> (update) -> (reconstruct) -> advance.

    Block i sees activations that already passed through the pruned blocks 0..i-1. All its linears are scored from the
    unpruned block's activations, pruned together, and the block is run again to feed the next.

    Args:
        windows: (n, T) token ids, of which several processes take a share each; None where neither method nor recipe looks
            at activations.
        sparsity: of every linear, or a table from `selection.select`.
        gradients: block index -> {linear: gradient norm (out, in)} of the dense model, for a method that uses them.
        alpha: weight of the gradient term of "gblm", applied to the norms as `gradients` returns them.
        recipe: what becomes of the weights that stay.
        hidden_states: keep more than so many samples' hidden states in a file, not in memory.
        held_out: (m, T) more windows, which nothing here is fitted to: errors of updated linears are measured on them too.
        finished: called with every block, while it is resident, when its weights are final.
        measured: called with the errors of every block whose surviving weights change.

    Raises:
        ValueError: an N:M pattern that does not divide a linear. NotFinite: scores, or updated weights, of one.
    """
    targets = sparsity if isinstance(sparsity, dict) else select(decoder, sparsity)
    rule, options = METHODS[method], {"alpha": alpha, "inverse": gradient_inv, "use_variant": use_variant}
    statistic = rule.observes(recipe)
    held_out = None if recipe.update == "none" else held_out
    states, dense, held_states = _enter(
        decoder,
        [
            windows if needs_windows(method, recipe) else None,
            windows if recipe.follows_dense else None,
            held_out,
        ],
        hidden_states,
    )
    zeros: Zeros = {}
    for i in tqdm(range(len(decoder)), desc=f"pruning ({method})", unit="block", disable=None):
        with decoder.resident(i) as block:
            linears = decoder.linears(i)
            matrices = linears | decoder.routers(i)
            chosen = {name: matrices[name] for name in targets.get(i, ())}
            linears |= chosen
            paired = dense if recipe.asymmetric and chosen else None
            if paired is None:
                decoder.advance(i, dense)
            statistics = collect(decoder, i, chosen, states, statistic, len(windows), paired) if statistic and chosen else {}
            norms = gradients(i) if rule.gradients and chosen else {}
            held_hessians: dict[str, torch.Tensor | None] = {}
            if held_out is not None and chosen:
                held_hessians = collect(decoder, i, chosen, held_states, sparsegpt.ExactHessian, len(held_out), text="held-out")
            experts, unused = _unknown(decoder.prefixes[i], chosen, linears, statistics, norms)
            sound: dict[str, torch.Tensor] = {}  # linear -> whether its weights, and what decided them, are finite
            errors: dict[str, torch.Tensor] = {}
            for name, linear in chosen.items():
                target = targets[i][name]
                if name in experts:
                    linear.weight.masked_fill_(mask_of(scores.magnitude(linear.weight), target), 0)
                elif name not in unused:
                    sound[name], found = Choice(rule, target, statistics.get(name), norms.get(name), **options).prune(
                        linear, recipe, held_hessians.get(name)
                    )
                    errors |= {name: found} if found is not None else {}
            statistics.clear()  # not beside what training needs, nor the next block's
            held_hessians.clear()
            if recipe.epochs and chosen:
                errors[""] = reconstruct(
                    decoder, i, chosen, states, dense, count=len(windows), epochs=recipe.epochs, rate=recipe.rate
                )
            zeros[i], broken = _look(linears, sound)
            if broken:
                raise NotFinite(f"{decoder.prefixes[i]}{broken[0]}: {_remedy(rule, recipe)}")
            if errors:
                measured(i, _tell(i, errors))
            finished(i, block)
            if i + 1 < len(decoder):
                decoder.advance(i, states)
                decoder.advance(i, held_states)
    return zeros


def needs_windows(method: str, recipe: Recipe = PUBLISHED) -> bool:
    """Whether calibration windows have to run through the model."""
    return METHODS[method].observes(recipe) is not None or recipe.epochs > 0


def _enter(decoder: Decoder, streams: list[torch.Tensor | None], hidden_states: int | None) -> list[list[State]]:
    """The states of this process' share of each stream's windows, of which all together keep `hidden_states` in memory."""
    total = sum(len(windows) for windows in streams if windows is not None)
    entered = []
    for windows in streams:
        if windows is None:
            entered.append([])
        else:
            in_memory = None if hidden_states is None else hidden_states * len(windows) // total
            entered.append(decoder.enter_all(parallel.share(windows), in_memory))
    return entered


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


def _unknown(
    prefix: str, linears: dict[str, Matrix], block: dict[str, Matrix], statistics: dict, norms: dict
) -> tuple[set[str], set[str]]:
    """Of the linears of a block that the method knows too little of: experts that no calibration token reached, to be pruned
    by magnitude like all of their kind, and those that stay dense, for they do not take part in the forward or the loss."""
    met = {name for name in linears if statistics.get(name) is not None} if statistics else set(linears)
    felt = {name for name in linears if _any(norms[name])} if norms else set(linears)
    apart = block.keys() - linears.keys()  # of these nothing is known: an expert beside them may well be in use
    experts, dense = idle(linears, (met & felt) | {name for name in apart if kind_of(name) != name})
    # An expert with inputs is scored by them, even if no gradient came back to it.
    experts = {name for name in experts if not (statistics and name in met)}
    point_out(prefix, experts, len(linears), "had no calibration tokens, they are pruned by magnitude")
    point_out(prefix, dense, len(linears), "do not take part in the forward pass or in the loss, they stay dense")
    return experts, set(dense)


def _any(norm: torch.Tensor) -> bool:
    """Whether something in a matrix is not zero; usually its first row tells."""
    return bool(norm[0].any()) or bool(norm.any())


def _look(linears: dict[str, Matrix], sound: dict[str, torch.Tensor]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """A block's (zeros, weights) per linear, and the names of those that are not sound: one wait for the device."""
    if not linears:  # a block that the forward skips
        return {}, []
    nonzero = [torch.count_nonzero(linear.weight) for linear in linears.values()]
    numbers = torch.stack([*nonzero, *sound.values()]).tolist() if nonzero else []
    zeros = {
        name: (linear.weight.numel() - count, linear.weight.numel())
        for (name, linear), count in zip(linears.items(), numbers, strict=False)
    }
    return zeros, [name for name, flag in zip(sound, numbers[len(linears) :], strict=True) if not flag]


def _tell(i: int, errors: dict[str, torch.Tensor]) -> Errors:
    """The errors as numbers, with a line about them in the log."""
    values = iter(torch.cat(list(errors.values())).tolist())  # one wait for all
    numbers = {name: tuple(islice(values, len(own))) for name, own in errors.items()}
    linears = [own for name, own in numbers.items() if name]
    said = []
    for what, pairs in ("", [own[:2] for own in linears]), (" on windows held out", [own[2:] for own in linears if own[2:]]):
        if pairs:
            before, after = (sum(of_all) / len(pairs) for of_all in zip(*pairs, strict=True))
            said.append(f"of its linears{what} {before:.4f} masked, {after:.4f} updated (mean)")
    if "" in numbers:
        said.append("of its output {:.4f}, {:.4f} reconstructed (windows held out)".format(*numbers[""]))
    logger.info("block %d: relative error %s", i, ", ".join(said))
    return numbers


def _remedy(rule: Method, recipe: Recipe) -> str:
    """What to say of a linear that is not sound."""
    if recipe.update != "none":
        return "scores or updated weights are not finite: check weights and gradient norms, or use --dtype bfloat16 or float32"
    if rule.score is None:
        return (
            "the Hessian of the inputs is not positive definite, or a weight not finite: check the weights, use more --nsamples, "
            "or --dtype bfloat16 or float32"
        )
    return "scores contain NaN or infinity: check the weights and gradient norms, or use --dtype bfloat16 or float32"
