"""Accuracy on zero-shot and few-shot tasks: the prompts and scores of lm-evaluation-harness, on the model in memory.

The package is lm_eval (requirements-eval.txt). Importing it takes seconds, so only the functions that need it do.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from lib import parallel
from lib.errors import InvalidInput
from lib.models.decoder import Decoder

TASKS = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]  # the paper's seven
OLDEST = "0.4.13"  # version of lm_eval that has the API used here


@dataclass(frozen=True)
class Tasks:
    """The tasks that a model is measured on; made by `load`."""

    names: list[str]
    manager: Any  # the harness' index of tasks
    num_fewshot: int | None  # None: the task's own number, 0 as a rule
    limit: float | None  # documents of each task; below 1, a share of them


def require() -> None:
    """Raise InvalidInput if the harness is not installed, or is too old."""
    try:
        installed = version("lm_eval")
    except PackageNotFoundError:
        installed = "none"
    if installed == "none" or Version(installed) < Version(OLDEST):
        raise InvalidInput(
            f"--eval_zero_shot needs lm-evaluation-harness (lm_eval {OLDEST}, found {installed}): "
            "pip install -r requirements-eval.txt"
        )


def load(
    names: Sequence[str], *, include_path: str | None = None, num_fewshot: int | None = None, limit: float | None = None
) -> Tasks:
    """Find tasks, groups and tags of the harness or of YAML files below `include_path`, and fetch their data.

    Raises:
        InvalidInput: the harness is not installed, does not know a task, cannot read its data, or has fewer documents than
            there are processes.
    """
    require()
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it warns of files that leave out settings
    manager = _index(names, include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"perhaps {near[0]}? " if near else ""
            raise InvalidInput(
                f"--tasks {name} is not a task of lm_eval {version('lm_eval')}: {hint}`lm_eval ls tasks` lists them"
            )
        for task in _loaded(manager, name).values():
            count = len(task.eval_docs) if limit is None or limit < 1 else min(int(limit), len(task.eval_docs))
            if count < parallel.world():
                raise InvalidInput(f"{count} documents of {name} for {parallel.world()} processes: give each at least one")
    return Tasks(list(names), manager, num_fewshot, limit)


def evaluate(decoder: Decoder, tokenizer, tasks: Tasks, batch: int = 1) -> dict:
    """The harness' results in the first process, {} in all others.

    {"harness": its version, "tasks": {name: {metric: value, metric_stderr: value or None, "documents": n, "num_fewshot": k}},
    "mean": mean accuracy of the tasks and groups that `tasks` names}. Accuracies are in [0, 1]; "acc" is the paper's. A metric of
    answers that a filter has picked out is "metric,filter", and its error "metric_stderr,filter".
    """
    import lm_eval

    from lib.evaluation.harness import InMemory

    with decoder.whole() as model:
        results = lm_eval.simple_evaluate(
            model=InMemory(model, tokenizer, batch),
            tasks=tasks.names,
            task_manager=tasks.manager,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            log_samples=False,
        )
    return _summary(results) if results else {}


def _index(names: Sequence[str], include_path: str | None):
    from lm_eval.tasks import TaskManager

    if include_path:
        included = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(included.all_subtasks):
            return included  # without reading the harness' thousands of files
    return TaskManager(include_path=include_path)


def _loaded(manager, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # a task file, or whichever library reads the data, may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInput(
            f"--tasks {name} cannot be loaded ({reason}): its data must be on the hub or in the hub's cache, or a file that "
            "the task's YAML below --include_path names"
        ) from error


def _summary(results: dict) -> dict:
    """The harness' results in the form that `evaluate` returns."""
    in_groups = {child for children in results["group_subtasks"].values() for child in children}
    tasks, accuracies = {}, []
    for name, metrics in results["results"].items():
        values = {
            key.removesuffix(",none"): None if value == "N/A" else float(value) for key, value in metrics.items() if "," in key
        }
        tasks[name] = {**values, "documents": metrics["sample_len"], "num_fewshot": results["n-shot"].get(name)}
        if name not in in_groups and "acc" in values:
            accuracies.append(values["acc"])
    mean = sum(accuracies) / len(accuracies) if accuracies else None
    return {"harness": version("lm_eval"), "tasks": tasks, "mean": mean}
