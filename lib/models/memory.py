"""How much memory there is and what a run would take: in memory or streamed, and how many samples at a time."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from lib import parallel
from lib.models.decoder import Decoder
from lib.models.loading import resolve_dtype

logger = logging.getLogger(__name__)

RESERVE = 0.8  # of the free memory may be planned with
ACTIVATION_SHARE = 0.25  # of the free memory for kept hidden states, unless --activation_memory says otherwise
GRAPH_WIDTH = 24  # a block's graph holds about this many tensors as large as its hidden state (measured on LLaMA blocks)


@dataclass(frozen=True)
class Plan:
    """What `plan` has decided.

    `streamed`: the blocks stay on disk. `hidden_states`: how many of a sample's hidden states may be kept at a time. `own`: what
    else a sample keeps, in hidden states.
    """

    streamed: bool
    hidden_states: int
    own: float = 0.0

    def measured(self, decoder: Decoder) -> "Plan":
        """The same with what a sample of the model keeps, which its config does not say."""
        planned = decoder.model.config.get_text_config().hidden_size * decoder.model.dtype.itemsize
        if decoder.hidden_bytes == planned and not decoder.own_bytes:
            return self
        logger.info("a kept sample takes %.1f times its width", (decoder.hidden_bytes + decoder.own_bytes) / planned)
        states = max(1, int(self.hidden_states * planned / decoder.hidden_bytes))
        return replace(self, hidden_states=states, own=decoder.own_bytes / decoder.hidden_bytes)

    @property
    def samples(self) -> int:
        """How many samples with one hidden state each may be kept."""
        return max(1, int(self.hidden_states / (1 + self.own)))

    def group(self, nsamples: int, states_per_sample: int) -> int:
        """Samples of a group, in as few and as equal groups as the kept hidden states allow."""
        largest = max(1, int(self.hidden_states / (states_per_sample + self.own)))
        return math.ceil(nsamples / math.ceil(nsamples / largest))


def container_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What the control groups of this process (cgroup v2: containers, batch jobs) leave it; infinity where none has a limit."""
    free = math.inf
    try:
        group = root / own.read_text().rpartition("0::/")[2].strip()
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
    *,
    memory: str,
    dtype: str,
    device: torch.device,
    seq_length: int,
    sums_per_weight: int = 0,
    graph: bool = False,
    hidden_states: int = 0,
    activation_memory: float | None = None,
) -> Plan:
    """Decide between memory and streaming; log which and why.

    Args:
        decoder: `loading.outline` of the model.
        memory: "resident", "streamed", or "auto": resident if weights and working set fit in the free memory.
        sums_per_weight: bytes kept for each weight of a linear of all blocks when resident.
        graph: whether a sample's graph through all blocks is kept when resident.
        hidden_states: how many (T, H) hidden states a resident run keeps.
        activation_memory: GB for kept hidden states; None: a share of the free memory.
    """
    model, config = decoder.model, decoder.model.config
    width = resolve_dtype(dtype, config, device).itemsize
    in_blocks = sum(parameter.numel() for parameter in decoder.blocks.parameters())
    state = seq_length * config.get_text_config().hidden_size * width
    free = free_bytes(device)
    budget = activation_memory * 1e9 if activation_memory is not None else ACTIVATION_SHARE * free
    needed = sum(parameter.numel() for parameter in model.parameters()) * width + in_blocks * sums_per_weight
    needed += len(decoder) * GRAPH_WIDTH * state * graph + min(hidden_states * state, budget)
    streamed = memory == "streamed" or (memory == "auto" and needed > RESERVE * free)
    logger.info(
        "%s (--memory %s): a resident run needs about %.1f GB besides the process itself, %.1f GB are free on %s",
        "streamed" if streamed else "resident", memory, needed / 1e9, free / 1e9, device,
    )  # fmt: skip
    return Plan(streamed, max(1, int(budget // state)))
