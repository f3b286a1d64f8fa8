"""Gradient norms, block by block: calibration windows in, fp32 sums of |G| and G^2 per weight out.

The chain rule is cut at the borders of the blocks. Forward: every block's input is kept. Backward, from the last block to
the first: a sample's upstream gradient goes through one block, the gradients of its linears are added to the sums and
dropped, and the gradient of its input is kept for the block before. The numbers equal whole-model autograd to rounding, yet
gradients, sums and (recomputing) graph and weights exist for one block at a time.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from tqdm import tqdm

from lib import parallel
from lib.gradients.sums import BlockSums
from lib.models.decoder import Decoder, State
from lib.models.weights import Matrix, idle, kind_of, products

logger = logging.getLogger(__name__)

NORMS = ("l1", "l2")
SCALE = 100.0  # of the published gradient files: G is multiplied by it before the norm

# float16 only. Gradients of a mean loss over 2048 tokens are often below 6e-8, the smallest float16: the loss is multiplied
# by a power of two before backward, and the factor taken out in fp32 when a gradient is added to the sums. Since each
# block's backward starts anew, the factor is readjusted at every border to the magnitude of the gradient there.
LOSS_SCALE = 2.0**16
BORDER_MAGNITUDE = 16.0  # the largest entry of an upstream gradient after readjusting: far from overflow and underflow
OVERFLOW_STEP = 2.0**4
LOSS_SCALE_MIN = 2.0**-24
SHOWN = 5  # names in a log line


class InMemory(dict):
    """{block index: BlockSums} between groups of samples, for a run that need not survive its process."""

    done = 0

    def __init__(self):
        super().__init__()
        self.missing: dict[str, int] = {}

    def commit(self, done: int, missing: dict[str, int]) -> None:
        """Nothing to make durable; `work.GradientWork` does."""

    def due(self) -> bool:
        return False


def gradient_norms(
    decoder: Decoder,
    windows: torch.Tensor,
    *,
    norms: tuple[str, ...] = NORMS,
    scale: float = SCALE,
    keep_graph: bool = True,
    group: int | None = None,
    work=None,
    first: int = 0,
) -> Iterator[tuple[int, BlockSums]]:
    """Sum the gradients of every linear in every block over windows (n, T), one sample at a time.

    Labels are the input ids, the loss is the model's own mean cross-entropy (arXiv 2311.04902, section 3). There are two
    orders with the same result. With the graph kept, a sample goes through all blocks and back before the next one, and the
    sums of all blocks are in memory. Otherwise a group of samples goes through each block together, blocks are run again for
    their backward, and only the sums of one block are in memory: a block that is on disk is read once for a group.

    Args:
        keep_graph: which of the two.
        group: samples of a group (default: all), where the graph is not kept.
        work: keeps the sums between groups, or saves them now and then, and says how many samples they cover already:
            `InMemory` (default) or `work.GradientWork`.
        first: number of the first window in the whole run, where this process has a share of it; for messages only.

    Yields:
        (block index, its sums), last block first, each as soon as it is final; summed over all processes.

    Raises:
        ValueError: a non-finite loss or gradient (names the sample).
    """
    for i in range(len(decoder)):
        for matrix in matrices_of(decoder, i).values():
            if matrix.index is None:  # those of a stack get tensors of their own when they are used
                matrix.stored.requires_grad_(True)  # nothing but the blocks' matrices ever gets a gradient
    work, windows = InMemory() if work is None else work, windows.to(decoder.device)
    walk = _Walk(decoder, norms, scale, keep_graph, work.missing)
    done = work.done
    with tqdm(
        total=len(windows) * len(decoder), initial=done * len(decoder), desc="gradients", unit="block", disable=None
    ) as bar:
        if keep_graph:
            sums = dict(work)
            for window in windows[done:]:
                for i, block_sums in walk.group(window[None], sums, first + done):
                    sums[i] = block_sums
                    bar.update()
                done += 1
                if done < len(windows) and work.due():
                    work.save(sums, done, walk.missing)
            for i in reversed(range(len(decoder))):
                yield i, sums.pop(i).of_all_ranks(matrices_of(decoder, i), decoder.device)
        else:
            for chunk in windows[done:].split(group or len(windows)):
                last = done + len(chunk) == len(windows)
                for i, block_sums in walk.group(chunk, work, first + done):
                    bar.update(len(chunk))
                    if last:
                        yield i, block_sums.of_all_ranks(matrices_of(decoder, i), decoder.device)
                    else:
                        work[i] = block_sums
                done += len(chunk)
                if not last:
                    work.commit(done, walk.missing)
    work.missing = walk.report_missing(len(windows))  # of all processes, now that this one's are no longer needed


class _Checks:
    """Numbers that must be finite: collected where they are, and looked at together, since looking waits for a GPU."""

    def __init__(self):
        self.messages: list[str] = []
        self.values: list[torch.Tensor] = []

    def add(self, message: str, value: torch.Tensor) -> None:
        """`message` says what a non-finite `value` (a scalar) would mean, and may show it as {}."""
        self.messages.append(message)
        self.values.append(value)

    def settle(self) -> None:
        """Raise ValueError if a value is not finite: for the one that was added first."""
        for message, value in zip(self.messages, torch.stack(self.values).tolist() if self.values else (), strict=True):
            if not math.isfinite(value):
                raise ValueError(f"{message.format(value)}: {_REMEDY}")
        self.__init__()


class _Walk:
    """Groups of samples through the blocks and back."""

    def __init__(self, decoder: Decoder, norms: tuple[str, ...], scale: float, keep_graph: bool, missing: dict[str, int]):
        self.decoder = decoder
        self.norms = norms
        self.scale = scale
        self.keep_graph = keep_graph
        self.scaled = decoder.model.dtype == torch.float16
        self.missing = dict(missing)  # linear -> samples that gave it no gradient

    def group(self, chunk: torch.Tensor, kept: Mapping[int, BlockSums], first: int) -> Iterator[tuple[int, BlockSums]]:
        """One group of samples, (g, T), the first of which is sample `first` of the run; yields (block, sums)."""
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
                sums = kept.get(i) or BlockSums(self.norms, self.scale)
                border = borders.pop()
                for s, state in enumerate(states):
                    inputs, output, leaves = border[s]
                    border[s] = None  # the graph of a sample goes with its gradients
                    if output is None:
                        output, leaves = self._with_graph(i, inputs, state)
                    upstream[s] = self._backward(i, leaves, sums, inputs, output, upstream[s], first + s, checks)
                    del inputs, output, leaves
            if not self.keep_graph or i == 0:  # a kept graph goes on to the next block, sums that leave are sound
                checks.settle()
            yield i, sums

    def _forward(self, i: int, states: list[State]) -> list[tuple]:
        """Block `i` forward: per sample (its input, its output with the graph and the graph's leaves, or None where they will
        be recomputed)."""
        border = []
        with self.decoder.resident(i):
            for state in states:
                inputs = state.hidden
                output = leaves = None
                if self.keep_graph:
                    output, leaves = self._with_graph(i, inputs, state)
                    state.hidden = output.detach()
                else:
                    self.decoder.advance(i, [state])
                border.append((inputs, output, leaves))
        return border

    @torch.enable_grad()
    def _with_graph(self, i: int, inputs: torch.Tensor, state: State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Block `i`'s output, and {matrix that took part: tensor that autograd has its gradient for}."""
        leaves: dict[str, torch.Tensor] = {}
        with products(matrices_of(self.decoder, i), leaves=leaves):
            # Block 0's inputs too, although nobody wants their gradient: they give a block that skips its linears a graph as well.
            return self.decoder.run(i, inputs.requires_grad_(), state.kwargs[i]), leaves

    def _tail(self, state: State, tokens: torch.Tensor, sample: int, checks: "_Checks") -> tuple[torch.Tensor, float]:
        """dL/dhidden of the last block's output, multiplied by a loss scale, and that scale."""
        hidden, state.hidden = state.hidden, None
        loss_scale = LOSS_SCALE if self.scaled else 1.0
        while True:
            loss, gradient = self.decoder.tail(hidden, tokens, loss_scale)
            checks.add(f"sample {sample} has a loss of {{}}", loss)
            if not self.scaled:
                return gradient, loss_scale
            checks.settle()
            if torch.isfinite(gradient).all():
                return gradient, loss_scale
            loss_scale = self._lower(loss_scale, sample, "the LM head")

    def _backward(self, i, leaves, sums, inputs, output, upstream, sample, checks):
        """One sample through block `i`: add its gradients to the sums, return the upstream gradient of block i - 1."""
        gradient, loss_scale = upstream
        wanted = [*leaves.values(), inputs]
        while True:
            grads = torch.autograd.grad(output, wanted, gradient, allow_unused=True, retain_graph=self.scaled)
            # The sum is finite if and only if every entry is: one pass, where isfinite() takes four.
            size = torch.stack([grad.sum(dtype=torch.float32) for grad in grads if grad is not None]).abs().amax()
            if not self.scaled:
                checks.add(f"sample {sample} gives a non-finite gradient in block {i}", size)
                break
            size, largest = torch.stack([size, grads[-1].abs().amax().float()]).tolist()
            if math.isfinite(size):
                break
            lowered = self._lower(loss_scale, sample, f"block {i}")
            gradient, loss_scale = gradient * (lowered / loss_scale), lowered
        given = dict(zip(leaves, grads, strict=False))
        for name, matrix in matrices_of(self.decoder, i).items():
            if given.get(name) is None:
                key = f"{self.decoder.prefixes[i]}{name}"
                self.missing[key] = self.missing.get(key, 0) + 1
            else:
                sums.add(name, matrix.oriented(given[name]), loss_scale)
        if self.scaled and largest > 0:
            step = 2.0 ** math.floor(math.log2(BORDER_MAGNITUDE / largest))
            return grads[-1] * step, loss_scale * step
        return grads[-1], loss_scale

    def _lower(self, loss_scale: float, sample: int, where: str) -> float:
        if loss_scale < LOSS_SCALE_MIN:
            raise ValueError(f"sample {sample} gives a non-finite gradient in {where} at any loss scale: {_REMEDY}")
        return loss_scale / OVERFLOW_STEP

    def report_missing(self, nsamples: int) -> dict[str, int]:
        """{matrix: samples of all processes that gave it no gradient}."""
        nsamples = sum(parallel.gather(nsamples))
        missing = sum(map(Counter, parallel.gather(self.missing)), Counter())
        experts, rest = [], []
        for i, prefix in enumerate(self.decoder.prefixes):
            names = matrices_of(self.decoder, i)
            without, idle_ones = idle(names, [name for name in names if missing[prefix + name] < nsamples])
            experts += [prefix + name for name in without]
            rest += [prefix + name for name in idle_ones]
            for name in names:
                if kind_of(name) == name and 0 < missing[prefix + name] < nsamples:
                    logger.warning("%s got no gradient from %d of %d samples", prefix + name, missing[prefix + name], nsamples)
        if experts:
            logger.warning("%d matrices of experts had no tokens of any sample, such as %s", len(experts), experts[0])
        if rest:
            logger.warning(
                "%d matrices got no gradient from any sample, they stay dense where a method needs gradients: %s",
                len(rest), ", ".join(rest[:SHOWN]) + (" ..." if len(rest) > SHOWN else ""),
            )  # fmt: skip
        return dict(missing)


def matrices_of(decoder: Decoder, i: int) -> dict[str, Matrix]:
    """All that gradients are computed for in block `i`: routers too, should a flag of main.py name them."""
    return decoder.linears(i) | decoder.routers(i)


_REMEDY = "use --dtype bfloat16 or float32, or leave the sample out with another --seed"
