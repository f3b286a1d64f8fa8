"""What a run leaves behind: log.txt as published, results.json, plots; and the time and memory each phase took."""

import json
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from lib import figures

logger = logging.getLogger(__name__)

SIZE = (figures.PAGE, 2.6)  # inches, of sparsity.png
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that numbers may depend on."""
    return {name: version(name) for name in PACKAGES}


def check_writable(folder: str | None) -> None:
    """Make a folder that results will go to, and fail now (OSError) rather than after hours if that is impossible."""
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # several processes may look at the same time


class Phases:
    """Seconds and peak memory of the named parts of a run: `with phases("prune"): ...`, then `phases.record`."""

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
        self.record[name] = entry
        logger.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in entry.items()))


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak resident set, so each phase has its own
    except OSError:
        pass  # elsewhere a phase's peak is the process' peak so far


def _peak_host() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(folder: str, results: dict, plots: bool = False) -> None:
    """Write results.json, sparsity.png and, once the pruned perplexity is known, log.txt and the other `plots` into `folder`."""
    path = Path(folder)
    if (pruned := results["perplexity"]["pruned"]) is not None:
        (path / "log.txt").write_text(f"actual_sparsity\tppl\n{results['sparsity']:.4f}\t{pruned:.4f}\n")
    (path / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    ends = (".png", ".pdf") if plots else (".png",)
    zeros = results["sparsity_by_block"]
    figures.save(lambda figure: figures.blocks(figure, zeros, "share of zeros"), path / "sparsity", SIZE, ends=ends)
    if plots and pruned is not None:
        seconds = {"": {name: phase["seconds"] for name, phase in results["phases"].items()}}
        figures.save(lambda figure: figures.phases(figure, seconds), path / "seconds", (SIZE[0], 1.4))


def by_linear(zeros: dict) -> dict[str, dict[str, float]]:
    """{block: {linear: sparsity}}, for JSON."""
    return {str(i): {name: zero / total for name, (zero, total) in linears.items()} for i, linears in zeros.items()}
