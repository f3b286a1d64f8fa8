"""Sends a group of samples through the blocks and back: the chain rule, cut at the borders between blocks.

In: windows of tokens, and a model as head - blocks - tail. Out: for each block the gradients of its matrices, added sample by
sample to `sums.BlockSums`. What crosses a border is the hidden state, and what blocks leave for later ones
(`lib.models.block_arguments`).
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from lib import parallel
from lib.errors import InvalidInput
from lib.gradients.sums import BlockSums
from lib.models import block_arguments
from lib.models.block_arguments import Carried, Place
from lib.models.decoder import Decoder, State
from lib.models.matrices import Matrix, idle, kind_of, products

logger = logging.getLogger(__name__)

# float16 only. Gradients of a mean loss over 2048 tokens are often below 6e-8, the smallest float16. So the loss is multiplied
# by a power of two before the backward pass, and the factor is divided out in fp32 when a gradient is added to the sums.
# Because each block has a backward pass of its own, the factor is adjusted at every border to the magnitude of the gradient.
LOSS_SCALE = 2.0**16  # at the start of a sample's backward pass
BORDER_MAGNITUDE = 16.0  # about the largest entry of an adjusted upstream gradient, far from overflow and underflow
OVERFLOW_STEP = 2.0**4  # what the loss scale is divided by after an overflow
LOSS_SCALE_MIN = 2.0**-24  # a gradient that overflows even below this is not a matter of the scale
SHOWN = 5  # names in a log line


class _Checks:
    """Numbers that must be finite: collected on their device and looked at together, because each look waits for the GPU."""

    def __init__(self):
        self.messages: list[str] = []
        self.values: list[torch.Tensor] = []

    def add(self, message: str, value: torch.Tensor) -> None:
        """`message` is the error to raise if `value`, a scalar, is not finite; a {} in it stands for the value."""
        self.messages.append(message)
        self.values.append(value)

    def settle(self) -> None:
        """Raise InvalidInput for the first of the values that is not finite, if there is one, and forget them all."""
        for message, value in zip(self.messages, torch.stack(self.values).tolist() if self.values else (), strict=True):
            if not math.isfinite(value):
                raise InvalidInput(f"{message.format(value)}: {_REMEDY}")
        self.__init__()


@dataclass
class _Pass:
    """One sample's pass through one block: all that its gradients are computed from."""

    inputs: torch.Tensor
    carried: Carried  # as it was before the block ran
    output: torch.Tensor | None = None  # with the graph; None if the block must be run again for it
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)  # leaves of the graph: the matrices that took part
    taken: dict[Place, torch.Tensor] = field(default_factory=dict)  # leaves of the graph: what earlier blocks have left
    left: dict[Place, torch.Tensor] = field(default_factory=dict)  # outputs of the graph: what this block leaves for later ones


@dataclass
class _Upstream:
    """The gradient of one sample's loss with respect to what comes out of a block."""

    hidden: torch.Tensor  # multiplied by the loss scale
    loss_scale: float
    carried: dict[Place, torch.Tensor] = field(default_factory=dict)  # fp32, not multiplied by the loss scale


class Groups:
    """Sends groups of samples through the blocks and back, and counts the matrices that get no gradient."""

    def __init__(self, decoder: Decoder, norms: tuple[str, ...], scale: float, keep_graph: bool, missing: dict[str, int]):
        self.decoder = decoder
        self.norms = norms
        self.scale = scale
        self.keep_graph = keep_graph
        self.scaled = decoder.model.dtype == torch.float16
        self.missing = dict(missing)  # matrix -> number of samples that gave it no gradient

    def group(self, chunk: torch.Tensor, sums_so_far: Mapping[int, BlockSums], first: int) -> Iterator[tuple[int, BlockSums]]:
        """Add the gradients of a group of samples (g, T) to the sums; yields (block, its sums), last block first.

        `first` is the number of the group's first sample in the run, for messages.
        """
        decoder = self.decoder
        states = [decoder.enter(window[None]) for window in chunk]
        borders = [self._forward(i, states) for i in range(len(decoder))]
        checks = _Checks()
        upstream = [
            self._tail(state, window[None], first + s, checks)
            for s, (state, window) in enumerate(zip(states, chunk, strict=True))
        ]
        for i in reversed(range(len(decoder))):
            with decoder.resident(i):
                sums = sums_so_far.get(i) or BlockSums(self.norms, self.scale)
                border = borders.pop()
                for s, state in enumerate(states):
                    passed, border[s] = border[s], None  # so that a sample's graph is freed when its gradients are added
                    if passed.output is None:
                        self._run(i, passed, state)
                    self._backward(i, passed, sums, upstream[s], first + s, checks)
                    del passed
            if not self.keep_graph or i == 0:  # before the caller stores the sums: with the graph kept, back at block 0
                checks.settle()
            yield i, sums

    def _forward(self, i: int, states: list[State]) -> list[_Pass]:
        """Run block `i` forward, with a graph if graphs are kept."""
        border = []
        with self.decoder.resident(i):
            for state in states:
                passed = _Pass(state.hidden, block_arguments.snapshot(state.carried))
                if self.keep_graph:
                    lent = self._run(i, passed, state)
                    state.hidden = passed.output.detach()
                    block_arguments.keep(state.carried, lent)
                else:
                    self.decoder.advance(i, [state])
                border.append(passed)
        return border

    @torch.enable_grad()
    def _run(self, i: int, passed: _Pass, state: State) -> Carried:
        """Run block `i` with a graph and note its leaves and outputs in `passed`; returns the mappings that it has filled."""
        lent, passed.taken = block_arguments.with_leaves(passed.carried)
        kwargs = state.kwargs[i] | {name: mapping for name, mapping in lent.items() if name in state.kwargs[i]}
        with products(matrices_of(self.decoder, i), leaves=passed.matrices):
            # The inputs of block 0 too, although nobody uses their gradient: a block that skips its linears then has a graph.
            passed.output = self.decoder.run(i, passed.inputs.requires_grad_(), kwargs)
        passed.left = block_arguments.left(lent, passed.taken)
        return lent

    def _tail(self, state: State, tokens: torch.Tensor, sample: int, checks: _Checks) -> _Upstream:
        """The gradient of the loss with respect to the last block's output."""
        hidden, state.hidden = state.hidden, None
        loss_scale = LOSS_SCALE if self.scaled else 1.0
        while True:
            loss, gradient = self.decoder.tail(hidden, tokens, loss_scale)
            checks.add(f"sample {sample} has a loss of {{}}", loss)
            if not self.scaled:
                return _Upstream(gradient, loss_scale)
            checks.settle()
            if torch.isfinite(gradient).all():
                return _Upstream(gradient, loss_scale)
            loss_scale = self._lower(loss_scale, sample, "the LM head")

    def _backward(self, i: int, passed: _Pass, sums: BlockSums, upstream: _Upstream, sample: int, checks: _Checks) -> None:
        """Go back through block `i` with one sample: add its gradients to the sums, and make `upstream` that of block i - 1."""
        leaves = [*passed.matrices.values(), *passed.taken.values(), passed.inputs]
        later = {place: upstream.carried.pop(place) for place in passed.left if place in upstream.carried}
        outputs = [passed.output, *(passed.left[place] for place in later)]
        while True:
            scale = upstream.loss_scale
            of_outputs = [upstream.hidden, *((gradient * scale).to(passed.output.dtype) for gradient in later.values())]
            grads = torch.autograd.grad(outputs, leaves, of_outputs, allow_unused=True, retain_graph=self.scaled)
            # The sum is finite if and only if every entry is. It takes one pass over memory, isfinite() would take four.
            size = torch.stack([grad.sum(dtype=torch.float32) for grad in grads if grad is not None]).abs().amax()
            if not self.scaled:
                checks.add(f"sample {sample} gives a non-finite gradient in block {i}", size)
                break
            size, largest = torch.stack([size, grads[-1].abs().amax().float()]).tolist()
            if math.isfinite(size):
                break
            upstream.loss_scale = self._lower(scale, sample, f"block {i}")
            upstream.hidden = upstream.hidden * (upstream.loss_scale / scale)
        gradient_of = dict(zip([*passed.matrices, *passed.taken], grads, strict=False))
        for name, matrix in matrices_of(self.decoder, i).items():
            if gradient_of.get(name) is None:
                key = f"{self.decoder.prefixes[i]}{name}"
                self.missing[key] = self.missing.get(key, 0) + 1
            else:
                sums.add(name, matrix.oriented(gradient_of[name]), scale)
        for place in passed.taken:
            if gradient_of[place] is not None:  # the gradients from all blocks that read it add up
                gradient = gradient_of[place].float() / scale
                upstream.carried[place] = upstream.carried[place] + gradient if place in upstream.carried else gradient
        step = 2.0 ** math.floor(math.log2(BORDER_MAGNITUDE / largest)) if self.scaled and largest > 0 else 1.0
        upstream.hidden, upstream.loss_scale = grads[-1] if step == 1 else grads[-1] * step, scale * step

    def _lower(self, loss_scale: float, sample: int, where: str) -> float:
        """The next lower loss scale after an overflow; InvalidInput if there is none."""
        if loss_scale < LOSS_SCALE_MIN:
            raise InvalidInput(f"sample {sample} gives a non-finite gradient in {where} at any loss scale: {_REMEDY}")
        return loss_scale / OVERFLOW_STEP

    def report_missing(self, nsamples: int) -> dict[str, int]:
        """Warn of matrices without a gradient; returns {matrix: number of samples, of all processes, that gave it none}."""
        nsamples = sum(parallel.gather(nsamples))
        missing = sum(map(Counter, parallel.gather(self.missing)), Counter())
        experts, rest = [], []
        for i, prefix in enumerate(self.decoder.prefixes):
            names = matrices_of(self.decoder, i)
            idle_experts, idle_others = idle(names, [name for name in names if missing[prefix + name] < nsamples])
            experts += [prefix + name for name in idle_experts]
            rest += [prefix + name for name in idle_others]
            for name in names:
                if kind_of(name) == name and 0 < missing[prefix + name] < nsamples:
                    logger.warning("%s got no gradient from %d of %d samples", prefix + name, missing[prefix + name], nsamples)
        if experts:
            logger.warning("%d matrices of experts had no tokens of any sample, such as %s", len(experts), experts[0])
        if rest:
            logger.warning(
                "%d matrices got no gradient from any sample and stay dense where a method needs gradients: %s",
                len(rest), ", ".join(rest[:SHOWN]) + (" ..." if len(rest) > SHOWN else ""),
            )  # fmt: skip
        return dict(missing)


def matrices_of(decoder: Decoder, i: int) -> dict[str, Matrix]:
    """The matrices of block `i` that gradients are computed for: routers too, because a flag of main.py may name them."""
    return decoder.linears(i) | decoder.routers(i)


_REMEDY = "use --dtype bfloat16 or float32, or leave the sample out with another --seed"
