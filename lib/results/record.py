"""The files that a run leaves behind: results.json, log.txt as the published code wrote it, figures."""

import json
import logging
import math
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lib.atomic import replace_file
from lib.models.matrices import kind_of
from lib.results import figures
from lib.results.errors_left import defined, errors_left
from lib.results.read import COMPLETE

logger = logging.getLogger(__name__)

RESULTS, LOG = "results.json", "log.txt"
ERROR_FIGURES = {"error": "errors", "error_held_out": "errors_held_out"}  # quantity (`errors_left`) -> name of its figure
SIZE = (figures.PAGE, 2.6)  # inches, of figures along the blocks
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy")


@dataclass(frozen=True)
class Outcome:
    """What a run has measured so far; what is not known yet is empty.

    `dense`, `pruned`: text -> perplexity. `reused`: the texts whose dense perplexity is an earlier run's. `zeros`: block ->
    linear -> (weights that are zero, all weights). `errors`: block -> linear -> relative errors, of the blocks whose surviving
    weights were updated. `tried`: flag -> {value: perplexity on held-out windows}, of the searches. `best`: flag -> the value
    that its search took. `accuracy`: "dense", "pruned" -> zero-shot results.
    """

    dense: dict[str, float]
    reused: frozenset[str] = frozenset()
    zeros: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)
    errors: dict[int, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    tried: dict[str, dict] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, dict] = field(default_factory=dict)


def results_of(outcome: Outcome, status: str, windows: dict[str, int], facts: dict) -> dict:
    """The content of results.json. `windows`: text -> how many windows of it were measured; `facts` are taken over as they are."""
    perplexities = [
        {
            "dense": outcome.dense[source],
            "pruned": outcome.pruned.get(source),
            "dataset": source,
            "windows": count,
            "dense_reused": source in outcome.reused,
        }
        for source, count in windows.items()
    ]
    counts = [count for linears in outcome.zeros.values() for count in linears.values()]
    return {
        "status": status,
        **facts,
        "perplexity": perplexities[0],
        **({"perplexities": perplexities} if len(perplexities) > 1 else {}),
        **({"zero_shot": outcome.accuracy} if outcome.accuracy else {}),
        **({"chosen": outcome.best, "tried": outcome.tried} if outcome.tried else {}),
        "sparsity": sum(zero for zero, _ in counts) / sum(total for _, total in counts),
        "sparsity_by_block": by_linear(outcome.zeros),
        "errors_by_block": errors_by_linear(outcome.errors),
    }


def versions() -> dict[str, str]:
    """{package: version} of the packages that numbers may depend on, and of CUDA where there is a GPU."""
    packages = {name: version(name) for name in PACKAGES}
    return packages | ({"cuda": torch.version.cuda} if torch.cuda.is_available() and torch.version.cuda else {})


def name_of(device: torch.device) -> str:
    """The device as results name it: a GPU by its model, because another model may round differently."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def differences(before: dict, now: dict) -> str:
    """How two sets of settings differ, such as "nsamples was 8 and is now 16"; empty if they are equal."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in changed)


def point_out_earlier(place: Path, before: dict, now: dict) -> None:
    """Log, before the work, that the earlier result in `place` will be overwritten, and how its settings differ."""
    if changed := differences(before, now):
        logger.warning("the earlier result in %s will be overwritten when this run finishes: %s", place, changed)
    else:
        logger.info("the result in %s, of a run with the same settings, will be overwritten when this run finishes", place)


def point_out_unknown(place: Path) -> None:
    """Log, before the work, that what is in `place` will be overwritten: a damaged or unfinished result, or another tool's."""
    if place.exists():
        logger.warning("%s, which does not tell what made it, will be overwritten when this run finishes", place)


def point_out_earlier_run(save: str, settings: dict, without: frozenset[str] = frozenset()) -> None:
    """Log, before the work, that the results in the folder `save` will be overwritten.

    `settings` are this run's flags, layer_ratios, weights and versions; those named in `without` are not compared.
    """
    earlier = read(save)
    if not earlier:
        for file in (RESULTS, LOG):
            point_out_unknown(Path(save, file))
        return
    beside_flags = {key: value for key, value in settings.items() if key != "flags" and key not in without}
    before = earlier.get("flags", {}) | {key: earlier.get(key) for key in beside_flags}
    now = settings["flags"] | beside_flags
    compared = [key for key in now if key in before and key not in ("save", "save_model")]
    point_out_earlier(Path(save, RESULTS), {key: before[key] for key in compared}, {key: now[key] for key in compared})


def read(folder: str, file: str = RESULTS) -> dict:
    """A JSON object in `folder`, such as the results of an earlier run; {} if there is none, or none that can be read."""
    try:
        results = json.loads(Path(folder, file).read_text())
        return results if isinstance(results, dict) else {}
    except (OSError, ValueError):
        return {}


def write(folder: str, results: dict, plots: bool = False) -> None:
    """Write results.json and figures into `folder`, and log.txt if the run is complete.

    A file gets its name only when it is whole. If the run is not complete, an earlier run's log.txt is removed, because its
    results.json is replaced. A figure that cannot be drawn is a warning, and does not end the run.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    log, pruned = path / LOG, results["perplexity"]["pruned"]
    if results["status"] != COMPLETE:
        log.unlink(missing_ok=True)
    replace_file(path / RESULTS, lambda file: file.write_text(json.dumps(_finite(results), indent=2, allow_nan=False) + "\n"))
    if results["status"] == COMPLETE:
        replace_file(log, lambda file: file.write_text(f"actual_sparsity\tppl\n{results['sparsity']:.4f}\t{pruned:.4f}\n"))
    try:
        _draw(path, results, plots)
    except Exception as error:  # the disk, fonts or a library may fail; the numbers are already written
        logger.warning("figures in %s could not be drawn (%s: %s)", folder, type(error).__name__, error)
        for name in ("sparsity", "errors", "errors_held_out", "seconds"):  # an earlier run's
            for end in (".png", ".pdf"):
                path.joinpath(name + end).unlink(missing_ok=True)


def _draw(path: Path, results: dict, plots: bool) -> None:
    """Draw sparsity.png, the errors that updates leave where there are any, and what --plots asks for."""
    zeros, ends = results["sparsity_by_block"], (".png", ".pdf") if plots else (".png",)
    figures.save(lambda figure: figures.blocks(figure, _by_kind(zeros), "share of zeros"), path / "sparsity", SIZE, ends=ends)
    errors = defined(errors_left(results["errors_by_block"]), str(path))
    for quantity, name in ERROR_FIGURES.items():
        if quantity in errors:
            label = "error left" if quantity == "error" else "error left, held out"
            draw = partial(figures.blocks, by_block=_by_kind(errors[quantity]), ylabel=label)
            figures.save(draw, path / name, SIZE, ends=ends)
        else:  # such a figure would be an earlier run's
            for end in (".png", ".pdf"):
                path.joinpath(name + end).unlink(missing_ok=True)
    if plots and results["status"] == COMPLETE:
        seconds = {"": {name: phase["seconds"] for name, phase in results["phases"].items()}}
        figures.save(lambda figure: figures.phases(figure, seconds), path / "seconds", (SIZE[0], 1.4))


def _finite(value):
    """The value with NaN and infinities replaced by strings, which JSON can hold and `float` can read."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def by_linear(zeros: dict) -> dict[str, dict[str, float]]:
    """{block: {linear: sparsity}}, as JSON has it, from {block: {linear: (zeros, weights)}}."""
    return {str(i): {name: zero / total for name, (zero, total) in linears.items()} for i, linears in zeros.items()}


def errors_by_linear(errors: dict) -> dict[str, dict]:
    """Errors as JSON has them: {block: {"linears": {linear: errors}, "output": errors before and after reconstruction}}.

    The errors of a linear are "masked" and "updated", and the same two on held-out windows where there are any.
    """
    names = ("masked", "updated", "masked_held_out", "updated_held_out")
    return {
        str(i): {
            "linears": {name: dict(zip(names, values, strict=False)) for name, values in block.items() if name},
            "output": dict(zip(("before", "after"), block[""], strict=True)) if "" in block else None,
        }
        for i, block in errors.items()
    }


def _by_kind(blocks: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{block: {kind of linear: mean}}, so that all experts of a block are one line of a figure."""
    means = {}
    for i, linears in blocks.items():
        kinds: dict[str, list[float]] = {}
        for name, value in linears.items():
            kinds.setdefault(kind_of(name), []).append(value)
        means[i] = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    return means
