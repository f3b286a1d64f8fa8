"""The seconds and the peak memory of each phase of a run."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

logger = logging.getLogger(__name__)


class Phases:
    """Seconds and peak memory of the phases of a run: `with phases("prune"): ...`, then `phases.record`.

    Parts of a run that have the same name are one phase: their seconds add up, and the larger peak counts.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.record: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        _reset_peak(self.device)
        yield
        entry = {"seconds": round(time.perf_counter() - start, 2), "peak_host_gb": round(_peak_host() / 1e9, 3)}
        if self.device.type != "cpu":
            entry["peak_gpu_gb"] = round(torch.get_device_module(self.device).max_memory_allocated(self.device) / 1e9, 3)
        if earlier := self.record.get(name):
            entry = {key: max(value, earlier[key]) for key, value in entry.items()}
            entry["seconds"] = round(time.perf_counter() - start + earlier["seconds"], 2)
        self.record[name] = entry
        logger.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in entry.items()))


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # on Linux, forgets the peak resident set, so that each phase has one
    except OSError:
        pass  # elsewhere, a phase's peak is the peak of the process so far


def _peak_host() -> int:
    """The peak resident set of this process, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        if resource is None:
            import psutil

            memory = psutil.Process().memory_info()
            return getattr(memory, "peak_wset", memory.rss)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
