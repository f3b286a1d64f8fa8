"""Results of many runs, read back. In: results.json of main.py, and rows of scripts/table.py. Out: a `Run` for each of them."""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.errors import InvalidInput, MissingInput
from lib.results.errors_left import ByBlock, errors_left

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # the status of a finished run; results of older versions have no status

# Flags that are not settings of a run: no perplexity depends on them, such as folders and the tasks of the harness, or a `Run`
# has them in another form.
LEFT_OUT = (
    "save", "save_model", "cache_dir", "data_dir", "gradient_path", "device", "memory", "activation_memory", "batch_size",
    "grad_norm", "grad_exponent", "force", "plots", "held_out", "seed", "prune_method", "sparsity_type", "sparsity_ratio",
    "no_cache", "eval_zero_shot", "eval_dense", "tasks", "num_fewshot", "limit", "include_path",
)  # fmt: skip
WITHOUT_EFFECT = {"layer_no": -1, "update": "none", "stages": 1, "asymmetric": 0, "reconstruct": 0}  # values that do nothing
AS_PUBLISHED = WITHOUT_EFFECT | {"bos": "first"}  # as in runs that do not have these flags
UPDATES = ("update", "stages", "asymmetric", "reconstruct", "reconstruct_lr")
FIRST = ("model", "method", "pattern", "ratio", "alpha", "norm", "nsamples", "seq_length", "dataset", "eval_dataset")
OF_SOME = ("pattern", "ratio", "alpha", "norm")  # settings that some methods, or the dense model, do not have
FORMS = {"gradient_inv": "inverse", "use_variant": "variant"}  # flags that make one method into another -> what its name gets


@dataclass(frozen=True)
class Run:
    """The result of one pruned model, or of a dense one, whose `method` is "dense".

    `settings`: all that the result depends on but the seed, those in `FIRST` first. `perplexity`: of the pruned model, and
    `dense` before it was pruned. `seconds`: by phase. `by_block`: {"sparsity": {block: {linear: value}}}, and likewise whatever
    else results.json has for every block.
    """

    settings: dict[str, Any]
    seed: int
    perplexity: float
    dense: float | None = None
    sparsity: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gb: float | None = None
    by_block: dict[str, ByBlock] = field(default_factory=dict)
    source: str = ""
    weights: str | None = None  # which the dense model's are, a checksum; older runs and rows of scripts/table.py do not say
    rho: float | None = None  # rise of the perplexity over the dense one, divided by that of SparseGPT with the same samples

    @property
    def trained(self) -> bool:
        """Whether its blocks were trained (--reconstruct)."""
        return bool(self.settings.get("reconstruct"))

    @property
    def key(self) -> str:
        """A text that is equal for runs that differ at most in their seeds."""
        return json.dumps(self.settings)


def read(places: Iterable[str | Path]) -> list[Run]:
    """The finished runs in files (results.json, .jsonl) and below folders, in the order of the files' names.

    Of several runs with the same settings and seed the last one counts, and a warning names the other.

    Raises:
        MissingInput: a place does not exist.
        InvalidInput: a file holds no results, or no place has a finished run.
    """
    runs: dict[tuple[str, int], Run] = {}
    places, finished = [Path(place) for place in places], []
    for path in [file for place in places for file in _files(place)]:
        try:
            finished += _runs_of(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} holds no results of main.py or scripts/table.py ({error!r}): leave it out") from error
    for run in _with_models_told_apart(finished):
        if earlier := runs.get((run.key, run.seed)):
            logger.warning("%s has the settings of %s, which is left out", run.source, earlier.source)
        runs[run.key, run.seed] = run
    if not runs:
        raise InvalidInput(
            f"there is no finished run in {', '.join(map(str, places))}: main.py writes results.json with --save"
        )
    return [replace(run, rho=_rho(run, runs.values())) for run in runs.values()]


def by_settings(runs: Iterable[Run]) -> list[list[Run]]:
    """Groups of runs that differ only in their seeds, in the order of the seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    return [sorted(group, key=lambda run: run.seed) for group in groups.values()]


def varying(runs: Iterable[Run]) -> list[str]:
    """The settings in which runs differ, in the order of `FIRST`. To lack a setting in `OF_SOME`, as alpha, is no difference."""
    values: dict[str, set] = {}
    runs = list(runs)
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values[name] = {json.dumps(run.settings.get(name)) for run in runs} - ({"null"} if name in OF_SOME else set())
    return [name for name, different in values.items() if len(different) > 1]


def _with_models_told_apart(runs: list[Run]) -> list[Run]:
    """The runs, in which models of one name and dtype but of different weights have these in their names."""

    def name_of(run: Run) -> tuple:
        return run.settings["model"], run.settings.get("dtype")

    weights: dict[tuple, set[str]] = {}
    for run in runs:
        weights.setdefault(name_of(run), set()).update({run.weights} - {None})
    return [
        replace(run, settings=run.settings | {"model": f"{run.settings['model']} {run.weights[:8]}"})
        if run.weights and len(weights[name_of(run)]) > 1
        else run
        for run in runs
    ]


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted([*place.rglob("results.json"), *place.rglob("*.jsonl")])
    if not place.exists():
        raise MissingInput(f"{place} does not exist: give results.json, a .jsonl of scripts/table.py, or a folder of them")
    return [place]


def _runs_of(path: Path) -> list[Run]:
    """The runs of a file; none, and a warning, if it is the results.json of a run that is not finished."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [_run_of_row(json.loads(line), f"{path}:{k}") for k, line in enumerate(text.splitlines(), 1)]
    results = json.loads(text)
    perplexity = results["perplexity"]
    if results.get("status", COMPLETE) != COMPLETE or perplexity["pruned"] is None:
        logger.warning("%s is of a run that has not ended, and is left out", path)
        return []
    flags = results["flags"] | {"dtype": results["dtype"], **_shares(results)}
    return [
        Run(
            _settings(flags, flags["prune_method"], flags["sparsity_type"], results["sparsity_asked"]),
            flags["seed"],
            float(perplexity["pruned"]),
            float(perplexity["dense"]),
            results["sparsity"],
            {name: phase["seconds"] for name, phase in results["phases"].items()},
            max(phase["peak_host_gb"] for phase in results["phases"].values()),
            _by_block(results),
            str(path),
            results.get("weights"),
        )
    ]


def _shares(results: dict) -> dict[str, str]:
    """What the file of --layer_ratios said, as "0=0.3 *.o_proj=dense": of the file itself only its name is known."""
    flag, shares = results["flags"].get("layer_ratios"), results.get("layer_ratios")
    if not flag or not shares or re.fullmatch("line(:.*)?", flag):
        return {}
    texts = {name: share if isinstance(share, str) else repr(float(share)) for name, share in shares.items()}
    return {"layer_ratios": " ".join(f"{name}={text}" for name, text in texts.items())}


def _run_of_row(row: dict, source: str) -> Run:
    """The run of one line of scripts/table.py."""
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
    """What a result depends on; flags that are off are left out, because older runs do not have the newer flags."""
    settings = {
        name: sorted(value) if name in ("include", "exclude") else value
        for name, value in (flags | more).items()
        if name not in LEFT_OUT and value not in (None, False, [], "") and value != AS_PUBLISHED.get(name)
    }
    if isinstance(texts := settings.get("eval_dataset"), list):
        settings["eval_dataset"] = texts[0]  # the perplexity of a `Run` is that on the first text
    if settings.get("alpha") == "auto" or settings.get("layer_ratios") == "line":
        settings["held_out"] = flags.get("held_out")  # on which values were compared
    forms = [form for name, form in FORMS.items() if settings.pop(name, False)]
    if not settings.get("reconstruct"):
        settings.pop("reconstruct_lr", None)  # nothing was trained
    norm = re.search(r"_norm_(l\d)_", flags.get("gradient_path") or "")
    settings |= {
        "model": Path(flags["model"]).name,
        "method": " ".join([method, *forms, *filter(None, [settings.pop("recipe", None)])]),
        "pattern": pattern or None,
        "ratio": None if ratio is None else round(ratio, 4),
        "alpha": (flags | more).get("alpha") if method == "gblm" and "inverse" not in forms else None,  # 0 is not off
        "norm": norm[1] if norm and method in ("gradient", "gblm") else None,
    }
    # As integers, so that 100.0 and 100 are the same alpha.
    settings |= {name: int(value) for name, value in settings.items() if isinstance(value, float) and value.is_integer()}
    return {name: settings.get(name) for name in (*FIRST, *sorted(settings.keys() - set(FIRST)))}


def _rho(run: Run, runs: Iterable[Run]) -> float | None:
    """(perplexity - dense) / (SparseGPT's - dense), of runs that differ only in how they prune; None if one of them is missing."""

    def runs_with(method: str, ignored: tuple[str, ...]) -> list[Run]:
        """The runs of a method whose settings are those of `run`, apart from the `ignored` ones."""

        def compared(other: Run) -> dict[str, Any]:
            return {name: value for name, value in other.settings.items() if name not in ignored and value is not None}

        return [other for other in runs if other.settings["method"] == method and compared(other) == compared(run)]

    how = ("method", "alpha", "norm", "layer_ratios", *UPDATES)
    dense = [run.dense] if run.dense else [other.perplexity for other in runs_with("dense", (*how, "pattern", "ratio"))]
    sparsegpt = [other for other in runs_with("sparsegpt", how) if other.seed == run.seed]
    published = [
        other
        for other in sparsegpt
        if not other.settings.get("layer_ratios") and other.settings.get("update") in (None, "none") and not other.trained
    ]
    reference = [other.perplexity for other in published]
    if not dense or not reference or run.settings["method"] == "dense" or reference[0] == dense[0]:
        return None
    return (run.perplexity - dense[0]) / (reference[0] - dense[0])


def _by_block(results: dict) -> dict[str, ByBlock]:
    """{quantity: {block: {linear: value}}}, of the sparsity and of the errors that updates leave."""
    return {"sparsity": results.get("sparsity_by_block", {})} | errors_left(results.get("errors_by_block", {}))
