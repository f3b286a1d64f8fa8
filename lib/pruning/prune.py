"""The one loop over blocks: a dense model and calibration windows in, a pruned model out."""

import logging
from collections.abc import Callable
from itertools import islice

import torch
from torch import nn
from tqdm import tqdm

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.weights import Matrix, idle, kind_of
from lib.pruning import scores, sparsegpt
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS, Choice, Method, mask_of
from lib.pruning.reconstruction import reconstruct
from lib.pruning.selection import Targets, select
from lib.pruning.statistics import collect, point_out
from lib.pruning.update import PUBLISHED, Recipe

logger = logging.getLogger(__name__)


class NotFinite(ValueError):
    """Scores or updated weights of a linear are NaN or infinite: of these settings, and perhaps not of others."""


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
    streams = [windows if needs_windows(method, recipe) else None, windows if recipe.follows_dense else None, held_out]
    states, dense, held_states = _enter(decoder, streams, hidden_states)
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
