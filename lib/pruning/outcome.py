"""What pruning a block has come to: its zeros, the errors of its outputs, whether its weights can be used; and the log's words."""

import logging
import math
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn

from lib.errors import InvalidInput
from lib.models.decoder import Decoder
from lib.models.matrices import Matrix, idle, kind_of
from lib.pruning.methods import Settings
from lib.pruning.statistics import Inputs, point_out
from lib.pruning.updates.recipe import relative_errors

logger = logging.getLogger(__name__)

APART = 0.01  # from the sparsity asked for, more is worth a line in the log

# linear -> relative error of its outputs (masked alone, updated), the same two on windows held out where there are some;
# "" -> the block's own (before reconstruction, after)
Errors = dict[str, tuple[float, ...]]
Zeros = dict[str, tuple[int, int]]  # linear -> (weights that are zero, all weights)


class NotFinite(InvalidInput):
    """Scores or updated weights of a linear are NaN or infinite: of these settings, and perhaps not of others."""


@dataclass(frozen=True)
class PrunedBlock:
    """Block `index`, resident; the zeros of its linears, and the errors of those whose surviving weights have changed."""

    index: int
    block: nn.Module
    zeros: Zeros
    errors: Errors


@dataclass
class Findings:
    """What is found out while a block is pruned, left where it is: looking at it would wait for the device."""

    settings: Settings
    sound: dict[str, torch.Tensor] = field(default_factory=dict)  # linear -> whether its weights and scores are finite
    errors: dict[str, torch.Tensor] = field(default_factory=dict)

    def watch(self, name: str, values: torch.Tensor) -> None:
        """Note whether all of the scores or weights of a linear are finite."""
        # The least and the largest are finite if and only if all are (NaN is both): one pass, in a tenth of isfinite()'s time.
        self.sound[name] = torch.stack(values.aminmax()).isfinite().all() & self.sound.get(name, True)

    def measure(self, name: str, weight: torch.Tensor, updated: torch.Tensor, inputs: Inputs, held_out: Inputs | None) -> None:
        """Note the errors of a linear's outputs, (2,) or with windows held out (4,), where a recipe has updated its weight."""
        if self.settings.recipe.update != "none":
            measured = [inputs] if held_out is None else [inputs, held_out]
            self.errors[name] = torch.cat([relative_errors(weight, updated, one.hessian) for one in measured])

    def of_block(self, decoder: Decoder, i: int, block: nn.Module, linears: dict[str, Matrix]) -> PrunedBlock:
        """All of it as numbers, for which the device is waited for once, and once more where there are errors.

        Raises:
            NotFinite: weights, or scores, of a linear.
        """
        counted = decoder.linears(i) | linears
        nonzero = [torch.count_nonzero(linear.weight) for linear in counted.values()]
        numbers = torch.stack([*nonzero, *self.sound.values()]).tolist() if nonzero else []  # none: the forward skips the block
        zeros = {
            name: (linear.weight.numel() - count, linear.weight.numel())
            for (name, linear), count in zip(counted.items(), numbers, strict=False)
        }
        for name, sound in zip(self.sound, numbers[len(counted) :], strict=True):
            if not sound:
                raise NotFinite(f"{decoder.prefixes[i]}{name}: {_remedy(self.settings)}")
        self._point_out_other_sparsities(decoder.prefixes[i], i, zeros)
        return PrunedBlock(i, block, zeros, _as_numbers(i, self.errors) if self.errors else {})

    def _point_out_other_sparsities(self, prefix: str, i: int, zeros: Zeros) -> None:
        """Say which linears have another share of zeros than was asked for, and how large the difference is."""
        reached = {name: zero / total for name, (zero, total) in zeros.items() if name in self.sound}
        apart = {name: share - self.settings.targets[i][name].ratio for name, share in reached.items()}
        far = [name for name, difference in apart.items() if abs(difference) > APART]
        if far:
            worst = max(far, key=lambda name: abs(apart[name]))
            what = f"have another sparsity than the one asked for, {worst} {reached[worst]:.4f} instead of "
            what += f"{self.settings.targets[i][worst].ratio:.4f} (weights that are zero already, equal scores, few inputs)"
            point_out(prefix, far, len(zeros), what)


def share_of_zeros(zeros: dict[int, Zeros]) -> float:
    """Sparsity over all linears of all blocks."""
    counts = [count for linears in zeros.values() for count in linears.values()]
    return sum(zero for zero, _ in counts) / sum(total for _, total in counts)


def unreached(
    decoder: Decoder,
    i: int,
    linears: dict[str, Matrix],
    inputs: dict[str, Inputs],
    grad_norms: dict[str, torch.Tensor],
    settings: Settings,
) -> tuple[set[str], set[str]]:
    """Of the linears of a block those that the method knows too little of: experts that no calibration token reached, to be
    pruned by magnitude like all of their kind, and those that stay dense, for they have no part in the forward or the loss."""
    met = set(linears) if settings.statistic is None else linears.keys() & inputs.keys()
    felt = {name for name in linears if _any(grad_norms[name])} if grad_norms else set(linears)
    apart = decoder.linears(i).keys() - linears.keys()  # of these nothing is known: an expert beside them may well be in use
    experts, dense = idle(linears, (met & felt) | {name for name in apart if kind_of(name) != name})
    # An expert with inputs is scored by them, even if no gradient came back to it.
    experts = {name for name in experts if not (settings.statistic and name in met)}
    prefix = decoder.prefixes[i]
    point_out(prefix, experts, len(linears), "had no calibration tokens, they are pruned by magnitude")
    point_out(prefix, dense, len(linears), "do not take part in the forward pass or in the loss, they stay dense")
    return experts, set(dense)


def _any(norm: torch.Tensor) -> bool:
    """Whether something in a matrix is not zero; usually its first row tells."""
    return bool(norm[0].any()) or bool(norm.any())


def _as_numbers(i: int, errors: dict[str, torch.Tensor]) -> Errors:
    """The errors as numbers, with a line about them in the log."""
    values = iter(torch.cat(list(errors.values())).tolist())  # one wait for all
    numbers = {name: tuple(islice(values, len(error))) for name, error in errors.items()}
    linears = [error for name, error in numbers.items() if name]
    said = []
    for what, pairs in ("", [error[:2] for error in linears]), (" on windows held out", [e[2:] for e in linears if e[2:]]):
        defined = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if defined:
            before, after = (sum(of_all) / len(defined) for of_all in zip(*defined, strict=True))
            said.append(f"of its linears{what} {before:.4f} masked, {after:.4f} updated (mean)")
        if len(defined) < len(pairs):
            said.append(f"of {len(pairs) - len(defined)} linears{what} undefined, since their outputs are zero")
    if "" in numbers:
        said.append("of its output {:.4f}, {:.4f} reconstructed (windows held out)".format(*numbers[""]))
    logger.info("block %d: relative error %s", i, ", ".join(said))
    return numbers


def _remedy(settings: Settings) -> str:
    """What to say of a linear that is not sound."""
    if settings.recipe.update != "none":
        return "scores or updated weights are not finite: check weights and gradient norms, or use --dtype bfloat16 or float32"
    if settings.rule.solver:
        return (
            "the Hessian of the inputs is not positive definite, or a weight not finite: check the weights, use more --nsamples, "
            "or --dtype bfloat16 or float32"
        )
    return "scores contain NaN or infinity: check the weights and gradient norms, or use --dtype bfloat16 or float32"
