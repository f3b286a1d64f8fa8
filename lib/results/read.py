"""Results of many runs, read back: results.json of main.py and the lines of scripts/table.py in, one `Run` for each out."""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.errors import InvalidInput, MissingInput

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # the status of a run that has ended

# Flags on which no result depends, such as places; and those that have a place of their own in a `Run`.
LEFT_OUT = (
    "save", "save_model", "cache_dir", "data_dir", "gradient_path", "device", "memory", "activation_memory", "batch_size",
    "grad_norm", "grad_exponent", "force", "plots", "held_out", "seed", "prune_method", "sparsity_type", "sparsity_ratio",
)  # fmt: skip
UPDATES = ("update", "stages", "asymmetric", "reconstruct", "reconstruct_lr")
FIRST = ("model", "method", "pattern", "ratio", "alpha", "norm", "nsamples", "seq_length", "dataset", "eval_dataset")
OF_SOME = ("pattern", "ratio", "alpha", "norm")  # not all methods, counting the dense model, have these
FORMS = {"gradient_inv": "inverse", "use_variant": "variant"}  # flags that make another method of one


@dataclass(frozen=True)
class Run:
    """One pruned model, or (`method` "dense") one that was not.

    `settings`: all that the result depends on, `FIRST` first, without the seed. `perplexity` of the model, `dense` before it
    was pruned; `seconds` by phase; `by_block` {"sparsity": {block: {linear: value}}}, and whatever else there is by block.
    """

    settings: dict[str, Any]
    seed: int
    perplexity: float
    dense: float | None = None
    sparsity: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gb: float | None = None
    by_block: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    source: str = ""
    rho: float | None = None  # what it is worse than the dense model, in units of what SparseGPT is on the same samples

    @property
    def trained(self) -> bool:
        """Whether its blocks were."""
        return bool(self.settings.get("reconstruct"))

    @property
    def key(self) -> str:
        """Equal for runs that differ at most in their seeds."""
        return json.dumps(self.settings)


def read(places: Iterable[str | Path]) -> list[Run]:
    """The runs in files (results.json, .jsonl) and below folders, in the order of names.

    Raises:
        FileNotFoundError: no such place. ValueError: a file that holds no results, or no finished run anywhere.
    """
    runs: dict[tuple[str, int], Run] = {}
    places = [Path(place) for place in places]
    for path in [file for place in places for file in _files(place)]:
        try:
            found = _runs_of(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} holds no results of main.py or scripts/table.py ({error!r}): leave it out") from error
        for run in found:
            if earlier := runs.get((run.key, run.seed)):
                logger.warning("%s has the settings of %s, which is left out", run.source, earlier.source)
            runs[run.key, run.seed] = run
    if not runs:
        raise InvalidInput(
            f"there is no finished run in {', '.join(map(str, places))}: main.py writes results.json with --save"
        )
    return [replace(run, rho=_rho(run, runs.values())) for run in runs.values()]


def by_settings(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ only in their seeds, together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    return [sorted(group, key=lambda run: run.seed) for group in groups.values()]


def varying(runs: Iterable[Run]) -> list[str]:
    """The settings in which runs differ, in the order of `FIRST`. That a method has no alpha is no difference."""
    values: dict[str, set] = {}
    runs = list(runs)
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values[name] = {json.dumps(run.settings.get(name)) for run in runs} - ({"null"} if name in OF_SOME else set())
    return [name for name, found in values.items() if len(found) > 1]


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted([*place.rglob("results.json"), *place.rglob("*.jsonl")])
    if not place.exists():
        raise MissingInput(f"{place} does not exist: give results.json, a .jsonl of scripts/table.py, or a folder of them")
    return [place]


def _runs_of(path: Path) -> list[Run]:
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [_of_row(json.loads(line), f"{path}:{k}") for k, line in enumerate(text.splitlines(), 1)]
    results = json.loads(text)
    perplexity = results["perplexity"]
    if results.get("status", COMPLETE) != COMPLETE or perplexity["pruned"] is None:
        logger.warning("%s is of a run that has not ended, and is left out", path)
        return []
    flags = results["flags"]
    return [
        Run(
            _settings(flags, flags["prune_method"], flags["sparsity_type"], results["sparsity_asked"], dtype=results["dtype"]),
            flags["seed"],
            float(perplexity["pruned"]),
            float(perplexity["dense"]),
            results["sparsity"],
            {name: phase["seconds"] for name, phase in results["phases"].items()},
            max(phase["peak_host_gb"] for phase in results["phases"].values()),
            _by_block(results),
            str(path),
        )
    ]


def _of_row(row: dict, source: str) -> Run:
    flags, phases = row["settings"], row["phases"]
    settings = _settings(
        flags,
        row["method"],
        row["pattern"],
        row["ratio"],
        alpha=row["alpha"],
        **{name: row.get(name) for name in ("recipe", "layer_ratios")},
    )
    seconds = {name: phase["seconds"] for name, phase in phases.items() if "seconds" in phase}
    memory = [phase["peak_host_gb"] for phase in phases.values() if "peak_host_gb" in phase]
    sparsity, peak = row.get("sparsity"), max(memory, default=None)
    return Run(settings, flags["seed"], row["perplexity"], None, sparsity, seconds, peak, source=source)


def _settings(flags: dict, method: str, pattern: str, ratio: float | None, **more) -> dict[str, Any]:
    """What a result depends on, without flags that are off: an older run does not know the newer ones."""
    own = {name: value for name, value in (flags | more).items() if name not in LEFT_OUT and value not in (None, False, [], "")}
    forms = [form for name, form in FORMS.items() if own.pop(name, False)]
    if not own.get("reconstruct"):
        own.pop("reconstruct_lr", None)  # of no training
    norm = re.search(r"_norm_(l\d)_", flags.get("gradient_path") or "")
    own |= {
        "model": Path(flags["model"]).name,
        "method": " ".join([method, *forms, *filter(None, [own.pop("recipe", None)])]),
        "pattern": pattern or None,
        "ratio": None if ratio is None else round(ratio, 4),
        "alpha": own.get("alpha") if method == "gblm" and "inverse" not in forms else None,
        "norm": norm[1] if norm and method in ("gradient", "gblm") else None,
    }
    whole = {name: int(value) for name, value in own.items() if isinstance(value, float) and value.is_integer()}
    return {name: (own | whole).get(name) for name in (*FIRST, *sorted(own.keys() - set(FIRST)))}  # 100.0 and 100 are one alpha


def _rho(run: Run, runs: Iterable[Run]) -> float | None:
    """(perplexity - dense) / (SparseGPT's - dense), of runs that differ in the method alone; None where one is not there."""

    def those(method: str, apart: tuple[str, ...]) -> list[Run]:
        def rest(other: Run) -> dict[str, Any]:
            return {name: value for name, value in other.settings.items() if name not in apart and value is not None}

        return [other for other in runs if other.settings["method"] == method and rest(other) == rest(run)]

    how = ("method", "alpha", "norm", "layer_ratios", *UPDATES)
    dense = [run.dense] if run.dense else [other.perplexity for other in those("dense", (*how, "pattern", "ratio"))]
    plain = [other for other in those("sparsegpt", how) if other.seed == run.seed and not other.settings.get("layer_ratios")]
    reference = [other.perplexity for other in plain if other.settings.get("update") in (None, "none") and not other.trained]
    if not dense or not reference or run.settings["method"] == "dense" or reference[0] == dense[0]:
        return None
    return (run.perplexity - dense[0]) / (reference[0] - dense[0])


def _by_block(results: dict) -> dict[str, dict[str, dict[str, float]]]:
    """{what: {block: {linear: value}}}; of errors, what is left of them after the update."""
    found = {"sparsity": results.get("sparsity_by_block", {})}
    return found | errors_left(results.get("errors_by_block", {}))


def errors_left(by_block: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{"error": {block: {linear, or "output" of the block: what is left}}} of a results.json's errors, and "error_held_out" of
    the linears, where there are any."""
    found: dict[str, dict] = {"error": {}, "error_held_out": {}}
    for i, block in by_block.items():
        linears = block["linears"]
        output = {"output": block["output"]["after"]} if block["output"] else {}
        found["error"][i] = {name: error["updated"] for name, error in linears.items()} | output
        found["error_held_out"][i] = {
            name: error["updated_held_out"] for name, error in linears.items() if "updated_held_out" in error
        }
    return {what: blocks for what, blocks in found.items() if any(blocks.values())}
