"""Statistics of the inputs of a block's linears, taken while calibration samples run through it: accumulators, and what they give.

    ActivationNorm   ||X||, of one number for each input        wanda, gblm
    Hessian          X^T X, of one number for each pair         sparsegpt; ExactHessian for the updates
    Drift            the same, and Z^T X with the dense model's inputs Z     asymmetric targets

`observe` feeds them, `collect` runs the samples and adds up what several processes have seen.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.matrices import Matrix, kind_of, products
from lib.pruning.updates.precision import units_for

logger = logging.getLogger(__name__)

FEW_TOKENS = 64  # the statistics of an expert that fewer reach say little
SHOWN = 5  # names in a log line


@dataclass(frozen=True)
class Inputs:
    """What the calibration samples tell about the inputs of a linear. Linears that are given the same inputs share it: not to be
    changed in place."""

    x_norm: torch.Tensor  # ||X||, (in,)
    hessian: torch.Tensor | None = None  # H, (in, in)
    drift: torch.Tensor | None = None  # C of asymmetric.target, (in, in)


class ActivationNorm:
    """Accumulates `sum over samples and tokens of x_j^2` of a linear's inputs: (in,), fp32."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, dtype=torch.float32, device=device)
        self.tokens = 0

    @property
    def sums(self) -> list[torch.Tensor]:
        """What several processes add up."""
        return [self.total]

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of any leading shape, (..., in)."""
        self.tokens += inputs.numel() // inputs.shape[-1]
        self.total += inputs.reshape(-1, inputs.shape[-1]).float().square().sum(dim=0)

    def result(self, nsamples: int) -> Inputs:
        """`||X_j|| = sqrt((1/n) * sum x_j^2)`, (in,): a mean over the n SEQUENCES, not over tokens (arXiv 2311.04902)."""
        return Inputs((self.total / nsamples).sqrt())


class Hessian:
    """Accumulates `sum_s X_s X_s^T` of a linear's inputs: (in, in), fp32."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = 0

    @property
    def sums(self) -> list[torch.Tensor]:
        """What several processes add up."""
        return [self.total]

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of any leading shape, (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(rows)
        self.total.addmm_(rows.T, rows)

    def result(self, nsamples: int) -> Inputs:
        """`H = (2 / n) * sum_s X_s X_s^T`, n in sequences; (in, in). In place: the accumulator is used up."""
        hessian = self.total.mul_(2 / nsamples)
        return Inputs((hessian.diagonal() / 2).sqrt(), hessian)


class ExactHessian(Hessian):
    """The same sum, with products of 16-bit inputs left to units for them: exact there, and added up in fp32.

    It rounds otherwise than the published SparseGPT, and takes a fraction of the time.
    """

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of any leading shape, (..., in)."""
        with units_for(inputs.dtype, inputs.device):
            super().add(inputs)


@dataclass
class Stream:
    """Which model's inputs are coming, the dense or the pruned one's, and how many tokens a sample has."""

    dense: bool = False
    tokens: int = 0


class Drift(ExactHessian):
    """Accumulates beside `sum_s X_s X_s^T` of the pruned model's inputs also `sum_s Z_s X_s^T`, Z those of the dense model.

    Of every sample the dense model's inputs come first, as `stream` says. A matrix that is not given all tokens of a sample,
    as an expert is not, may be given others in the two models: for it, Z is X.
    """

    def __init__(self, width: int, device: torch.device, stream: Stream):
        super().__init__(width, device)
        self.cross = torch.zeros_like(self.total)
        self.stream = stream
        self.dense_rows: torch.Tensor | None = None  # of the sample whose rows in the pruned model come next

    @property
    def sums(self) -> list[torch.Tensor]:
        """What several processes add up."""
        return [self.total, self.cross]

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of any leading shape, (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.stream.dense:
            self.dense_rows = rows
            return
        super().add(inputs)
        dense, self.dense_rows = self.dense_rows, None
        paired = dense is not None and len(dense) == len(rows) == self.stream.tokens
        with units_for(rows.dtype, rows.device):
            self.cross.addmm_((dense if paired else rows).float().T, rows.float())

    def result(self, nsamples: int) -> Inputs:
        """`H = (2 / n) sum_s X_s X_s^T` and `C = (2 / n) sum_s (Z_s - X_s) X_s^T`, n in sequences; both (in, in), in place."""
        drift = self.cross.sub_(self.total).mul_(2 / nsamples)
        inputs = super().result(nsamples)
        return Inputs(inputs.x_norm, inputs.hessian, drift)


@contextmanager
def observe(linears: dict[str, Matrix], statistic: Callable) -> Iterator[dict]:
    """While the context is open, feed every input of `linears` to a `statistic(in, device)` of its own.

    Linears that are given the very same tensor (q, k and v; gate and up) share one statistic, so it is computed and kept
    once. Yields {name of the linear: its statistic}, filled as inputs come: an expert that no token is sent to has none.
    """
    statistics: dict[str, object] = {}
    last: list = [None, None]  # the input seen last, and the name of the linear that was given it first

    def seen(name: str, inputs: torch.Tensor) -> None:
        if inputs is not last[0]:
            last[:] = inputs, name
            if name not in statistics:
                statistics[name] = statistic(inputs.shape[-1], inputs.device)
            statistics[name].add(inputs)
        elif name not in statistics:
            statistics[name] = statistics[last[1]]

    with products(linears, seen):
        yield statistics


def collect(
    decoder: Decoder,
    i: int,
    linears: dict[str, Matrix],
    states: list[State],
    statistic: type,
    nsamples: int,
    dense: list[State] | None = None,
    text: str = "calibration",
) -> dict[str, Inputs]:
    """Run the samples through block `i` and return {linear: what they tell about its inputs} over the samples of all processes,
    without those that had no inputs in any.

    With `dense`, the same samples in the dense model, these pass the block as well, and the statistic is `Drift` of both.
    `text` says in warnings whose tokens they are.
    """
    stream = Stream()
    if dense is not None:
        statistic = partial(Drift, stream=stream)
    with observe(linears, statistic) as observed:
        for k, state in enumerate(states):
            if dense is not None:
                stream.dense, stream.tokens = True, state.hidden.numel() // state.hidden.shape[-1]
                decoder.advance(i, [dense[k]])
                stream.dense = False
            decoder.run(i, state.hidden.to(decoder.device), state.kwargs[i])
    tokens = _add_up(observed, linears, lambda name: statistic(linears[name].in_features, decoder.device))
    few = [name for name in linears if kind_of(name) != name and 0 < tokens[name] < FEW_TOKENS]
    point_out(decoder.prefixes[i], few, len(linears), f"had fewer than {FEW_TOKENS} {text} tokens")
    reached = [name for name in linears if tokens[name]]
    accumulators = {id(observed[name]): observed[name] for name in reached}
    results = {key: accumulator.result(nsamples) for key, accumulator in accumulators.items()}
    return {name: results[id(observed[name])] for name in reached}


def _add_up(observed: dict, linears: dict[str, Matrix], empty: Callable) -> Counter[str]:
    """Make the statistics in `observed` those of all processes, in place; returns how many tokens each linear was given there.

    An expert may have inputs in other processes only, where it has an `empty(name)` here.
    """
    first: dict[int, str] = {}  # a statistic -> the first of the linears that share it
    here = {name: (first.setdefault(id(seen), name), seen.tokens) for name, seen in observed.items()}
    everywhere = parallel.gather(here)
    owners = {name: owner for of_rank in everywhere for name, (owner, _) in of_rank.items()}
    for name in [*owners.values(), *linears]:
        if name not in observed:
            owner = owners.get(name, name)
            observed[name] = observed[owner] if owner in observed else empty(name)
    for name in dict.fromkeys(owners[name] for name in linears if name in owners):  # in the same order in every process
        for total in observed[name].sums:
            parallel.add_up(total)
    tokens: Counter[str] = Counter()
    for of_rank in everywhere:
        tokens.update({name: count for name, (_, count) in of_rank.items()})
    return tokens


def point_out(prefix: str, names: Collection[str], count: int, what: str) -> None:
    """Say what holds for `names` of a block's `count` matrices, if any."""
    if names:
        shown = ", ".join(sorted(names)[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
        logger.warning("%d of %d matrices in %s %s: %s", len(names), count, prefix.removesuffix("."), what, shown)
