"""How much memory there is and what a run would take: in memory or streamed, and how many samples at a time."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from lib import parallel
from lib.errors import NoRoom
from lib.models.decoder import Decoder
from lib.models.host import is_out_of_memory

logger = logging.getLogger(__name__)

RESERVE = 0.8  # of the free memory may be planned with
ACTIVATION_SHARE = 0.25  # of the free memory for kept hidden states, unless --activation_memory says otherwise
SOLVER_SQUARES, SOLVER_WEIGHTS = 4, 8  # fp32 matrices (in, in) and (out, in) that a solver has at a time, at most
TRAINING_BYTES = 4 + 4 + 8 + 1  # of a trained weight: fp32 copy, gradient, Adam's two moments, mask
SAID = 200  # characters of an allocator's message that are passed on
GRAPH_WIDTH = 24  # a block's graph holds about this many tensors as large as its hidden state (measured on LLaMA blocks)


@dataclass(frozen=True)
class Needs:
    """What a command keeps beside the weights, for `plan`.

    `sums_per_weight`: bytes for each weight of all blocks' matrices. `graph`: a sample's graph through all blocks. `hidden_states`:
    how many (T, H). `hessians`: how many (in, in) for each linear of a block. `solver`: whether an update is solved for from
    them. `training`: whether a block is trained.
    """

    sums_per_weight: int = 0
    graph: bool = False
    hidden_states: int = 0
    hessians: int = 0
    solver: bool = False
    training: bool = False

    def of(self, decoder: Decoder, itemsize: int, state: int) -> dict[str, int]:
        """{what: bytes} of a resident run in a dtype of `itemsize` bytes with hidden states of `state` bytes, all of these kept."""
        in_blocks = [_numel(block) for block in decoder.blocks]
        shapes = [list(decoder.shapes(i).values()) for i in range(len(decoder))]
        # Linears with the same inputs share a Hessian, which a model that is only an outline does not tell: an upper bound.
        hessians = max(sum(4 * width**2 for _, width in block) for block in shapes)
        solver = max(4 * (SOLVER_SQUARES * width**2 + SOLVER_WEIGHTS * out * width) for block in shapes for out, width in block)
        trained = max(in_blocks) * (TRAINING_BYTES + itemsize) + GRAPH_WIDTH * state
        return {
            "weights": _numel(decoder.model) * itemsize,
            "sums of gradients": _numel(decoder.blocks) * self.sums_per_weight,
            "graph": len(decoder) * GRAPH_WIDTH * state * self.graph,
            "hidden states": self.hidden_states * state,
            "Hessians": hessians * self.hessians,
            "solver": solver * self.solver,
            "training of a block": trained * self.training,
        }


@dataclass(frozen=True)
class Plan:
    """What `plan` has decided.

    `streamed`: the blocks stay on disk. `hidden_states`: how many of a sample's hidden states may be kept at a time.
    `arguments`: what else a sample keeps, in hidden states. `bytes`: {what: bytes} that are held besides.
    """

    streamed: bool
    hidden_states: int
    arguments: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{what} {size / 1e9:.1f} GB" for what, size in self.bytes.items() if size)

    def measured(self, decoder: Decoder) -> "Plan":
        """The same with what a sample of the model keeps, which its config does not say."""
        planned = decoder.model.config.get_text_config().hidden_size * decoder.model.dtype.itemsize
        if decoder.hidden_bytes == planned and not decoder.own_bytes:
            return self
        logger.info("a kept sample takes %.1f times its width", (decoder.hidden_bytes + decoder.own_bytes) / planned)
        states = max(1, int(self.hidden_states * planned / decoder.hidden_bytes))
        return replace(self, hidden_states=states, arguments=decoder.own_bytes / decoder.hidden_bytes)

    @property
    def samples(self) -> int:
        """How many samples with one hidden state each may be kept."""
        return max(1, int(self.hidden_states / (1 + self.arguments)))

    def group(self, nsamples: int, states_per_sample: int) -> int:
        """Samples of a group, in as few and as equal groups as the kept hidden states allow."""
        largest = max(1, int(self.hidden_states / (states_per_sample + self.arguments)))
        return math.ceil(nsamples / math.ceil(nsamples / largest))


def _numel(module: nn.Module) -> int:
    """The parameters of a module, those that parts of it share once."""
    return sum(parameter.numel() for parameter in module.parameters())


def container_bytes(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """What the control groups of this process (cgroup v2: containers, batch jobs) leave it; infinity where none has a limit."""
    free = math.inf
    try:
        group = root / process.read_text().rpartition("0::/")[2].strip()
    except OSError:
        return free
    for folder in (group, *group.parents):
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        # Mapped files count as used until others need the room.
        free = min(free, limit - used + int(statistics["inactive_file"]))
    return free


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of the host, shared between the processes of this machine."""
    if device.type != "cpu":
        return torch.get_device_module(device).mem_get_info(device)[0]
    return int(min(psutil.virtual_memory().available, container_bytes())) // parallel.local_world()


def plan(
    decoder: Decoder,
    needs: Needs,
    *,
    memory: str,
    dtype: torch.dtype,
    device: torch.device,
    seq_length: int,
    activation_memory: float | None = None,
) -> Plan:
    """Decide between memory and streaming; log which and why.

    Args:
        decoder: `loading.outline` of the model.
        memory: "resident", "streamed", or "auto": resident if weights and working set fit in the free memory.
        dtype: that the model computes in.
        activation_memory: GB for kept hidden states; None: a share of the free memory.
    """
    state = seq_length * decoder.model.config.get_text_config().hidden_size * dtype.itemsize
    free = free_bytes(device)
    budget = activation_memory * 1e9 if activation_memory is not None else ACTIVATION_SHARE * free
    held = needs.of(decoder, dtype.itemsize, state)
    held["hidden states"] = min(held["hidden states"], int(budget))
    needed = sum(held.values())
    streamed = memory == "streamed" or (memory == "auto" and needed > RESERVE * free)
    if streamed:
        widest = max(_numel(block) for block in decoder.blocks)
        held["weights"] -= (_numel(decoder.blocks) - widest) * dtype.itemsize
        held["sums of gradients"] = widest * needs.sums_per_weight
        held["graph"] //= len(decoder)
    decided = Plan(streamed, max(1, int(budget // state)), bytes=held)
    logger.info(
        "%s (--memory %s): a resident run needs about %.1f GB besides the process itself, %.1f GB are free on %s; to be held: %s",
        "streamed" if streamed else "resident", memory, needed / 1e9, free / 1e9, device, decided,
    )  # fmt: skip
    return decided


@contextmanager
def watched(plan: Plan, device: torch.device) -> Iterator[None]:
    """An allocation that fails, on the host or a GPU, becomes one line that says what was held and what would need less.

    Raises:
        NoRoom: instead of what torch and Python raise.
    """
    try:
        yield
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is that of its CPU allocator
        if not is_out_of_memory(error):
            raise
        free, where = free_bytes(device), "the host" if device.type == "cpu" else str(device)
        smaller = "a smaller --activation_memory" if plan.streamed else "--memory streamed, a smaller --activation_memory"
        said = " ".join(str(error).split())[:SAID] or type(error).__name__
        raise NoRoom(
            f"out of memory, {free / 1e9:.1f} GB are free on {where} while this was held: {plan} ({said}). Use {smaller}, fewer "
            "--nsamples or a shorter --seq_length"
        ) from error
