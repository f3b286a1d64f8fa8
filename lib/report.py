"""What a run leaves behind: log.txt as published, results.json, plots; and the time and memory each phase took."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from lib import figures
from lib.files import replace_file
from lib.models.weights import kind_of
from lib.results import errors_left

try:
    import resource
except ImportError:  # Windows
    resource = None

logger = logging.getLogger(__name__)

RESULTS = "results.json"
FILES = {"error": "errors", "error_held_out": "errors_held_out"}  # the figures' names
SIZE = (figures.PAGE, 2.6)  # inches, of sparsity.png
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that numbers may depend on."""
    return {name: version(name) for name in PACKAGES}


def differences(before: dict, now: dict) -> str:
    """What two sets of settings do not share, "nsamples was 8 and is now 16"; empty if nothing."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in changed)


def point_out_earlier(place: Path, before: dict, now: dict) -> None:
    """Say before the work that an earlier result in `place` is replaced when this run has its own, and what differs."""
    if changed := differences(before, now):
        logger.warning("the earlier result in %s is replaced when this run has its own: %s", place, changed)
    else:
        logger.info("the result in %s, of a run with the same settings, is replaced when this run has its own", place)


def point_out_unknown(place: Path) -> None:
    """The same of what lies in `place` and does not tell what made it: damaged, unfinished, or of another tool."""
    if place.exists():
        logger.warning("%s, which does not tell what made it, is replaced when this run has its own", place)


def read(folder: str, file: str = RESULTS) -> dict:
    """A JSON file in `folder`, such as the results of an earlier run; {} where there is none that can be read."""
    try:
        results = json.loads(Path(folder, file).read_text())
        return results if isinstance(results, dict) else {}
    except (OSError, ValueError):
        return {}


class Phases:
    """Seconds and peak memory of the named parts of a run: `with phases("prune"): ...`, then `phases.record`.

    What has the same name is one part: its seconds add up.
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
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak resident set, so each phase has its own
    except OSError:
        pass  # elsewhere a phase's peak is the process' peak so far


def _peak_host() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        if resource is None:
            import psutil

            memory = psutil.Process().memory_info()
            return getattr(memory, "peak_wset", memory.rss)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(folder: str, results: dict, plots: bool = False) -> None:
    """Write results.json, sparsity.png and, once the pruned perplexity is known, log.txt and the other `plots` into `folder`.

    Each has its name only when it is whole. An earlier run's log.txt goes with that run's results.json.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    pruned, measured = results["perplexity"]["pruned"], path / "log.txt"
    replace_file(path / RESULTS, lambda file: file.write_text(json.dumps(_finite(results), indent=2, allow_nan=False) + "\n"))
    if pruned is None:
        measured.unlink(missing_ok=True)
    else:
        replace_file(measured, lambda file: file.write_text(f"actual_sparsity\tppl\n{results['sparsity']:.4f}\t{pruned:.4f}\n"))
    zeros, ends = results["sparsity_by_block"], (".png", ".pdf") if plots else (".png",)
    figures.save(lambda figure: figures.blocks(figure, _by_kind(zeros), "share of zeros"), path / "sparsity", SIZE, ends=ends)
    errors = errors_left(results["errors_by_block"])
    for what, name in FILES.items():
        if what in errors:
            label = "error left" if what == "error" else "error left, held out"
            draw = partial(figures.blocks, by_block=_by_kind(errors[what]), ylabel=label)
            figures.save(draw, path / name, SIZE, ends=ends)
        else:  # an earlier run's
            for end in (".png", ".pdf"):
                path.joinpath(name + end).unlink(missing_ok=True)
    if plots and pruned is not None:
        seconds = {"": {name: phase["seconds"] for name, phase in results["phases"].items()}}
        figures.save(lambda figure: figures.phases(figure, seconds), path / "seconds", (SIZE[0], 1.4))


def _finite(value):
    """The same with NaN and infinities as strings, which JSON can hold and `float` reads."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def by_linear(zeros: dict) -> dict[str, dict[str, float]]:
    """{block: {linear: sparsity}}, for JSON."""
    return {str(i): {name: zero / total for name, (zero, total) in linears.items()} for i, linears in zeros.items()}


def errors_by_linear(errors: dict) -> dict[str, dict]:
    """{block: {"linears": {linear: {"masked", "updated", and both on windows held out}}, "output": {"before", "after"}}}, for
    JSON."""
    names = ("masked", "updated", "masked_held_out", "updated_held_out")
    return {
        str(i): {
            "linears": {name: dict(zip(names, values, strict=False)) for name, values in found.items() if name},
            "output": dict(zip(("before", "after"), found[""], strict=True)) if "" in found else None,
        }
        for i, found in errors.items()
    }


def _by_kind(blocks: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{block: {kind of linear: mean}}: the experts of a block are one line of a figure."""
    means = {}
    for i, linears in blocks.items():
        kinds: dict[str, list[float]] = {}
        for name, value in linears.items():
            kinds.setdefault(kind_of(name), []).append(value)
        means[i] = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    return means
