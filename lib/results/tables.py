"""A run's results (results.json) as Markdown tables in aligned columns, for the terminal and for the model card."""

from collections.abc import Iterable, Sequence

NO_METRICS = ("documents", "num_fewshot")  # what else the result of a task has
UNITS = {"seconds": "seconds", "peak_host_gb": "host GB", "peak_gpu_gb": "GPU GB"}  # key of a phase -> its column


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column aligned to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(header))]
    rule = ["-" * width if k == 0 else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    aligned = [
        [cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def perplexities(results: dict) -> str:
    """Dense and pruned perplexity, a row for each text."""
    length = results["flags"]["seq_length"]
    rows = [
        [entry["dataset"], f"{entry['windows']} x {length}", f"{entry['dense']:.4f}", f"{entry['pruned']:.4f}"]
        for entry in results.get("perplexities", [results["perplexity"]])
    ]
    return table(["perplexity on", "windows", "dense", "pruned"], rows)


def zero_shot(results: dict) -> str:
    """Zero-shot results, a row for each task, metric and filter of its answers, with standard errors where the harness has them;
    and the mean accuracy."""
    models = results["zero_shot"]  # "dense" where it was scored, and "pruned"
    pruned = models["pruned"]
    rows = []
    for task, entry in pruned["tasks"].items():
        errors = {_error_of(metric) for metric in entry}
        for metric in entry:
            if metric not in errors and metric not in NO_METRICS:
                values = [_with_error(model["tasks"][task], metric) for model in models.values()]
                rows.append([task, metric, str(entry["num_fewshot"]), str(entry["documents"]), *values])
    if pruned["mean"] is not None:
        rows.append(["mean", "acc", "", "", *(f"{model['mean']:.4f}" for model in models.values())])
    return table([f"lm_eval {pruned['harness']}", "metric", "shots", "questions", *models], rows)


def phases(results: dict) -> str:
    """Seconds and peak memory of each phase."""
    record = results["phases"]
    units = [unit for unit in UNITS if any(unit in entry for entry in record.values())]
    rows = [[name, *(f"{entry[unit]:.2f}" if unit in entry else "" for unit in units)] for name, entry in record.items()]
    return table(["phase", *(UNITS[unit] for unit in units)], rows)


def summary(results: dict, saved: Sequence[str]) -> str:
    """All tables of a run, its sparsity, and the lines `saved`, which say what files it wrote."""
    parts = [perplexities(results), phases(results)]
    if "zero_shot" in results:
        parts.insert(1, zero_shot(results))
    sparsity = f"sparsity {results['sparsity']:.4f} of the linears, {results['sparsity_asked']:.4f} asked for"
    return "\n\n".join([*parts, "\n".join([sparsity, *saved])])


def last_lines(results: dict, text: str, saved: Sequence[str]) -> str:
    """The lines that a run ends with: its results; `text` says what its first perplexity was measured on."""
    measured = results["perplexity"]
    lines = [perplexities(results)] if "perplexities" in results else []
    lines += [zero_shot(results)] if "zero_shot" in results else []
    lines.append(f"sparsity {results['sparsity']:.4f}")
    lines.append(f"pruned perplexity {measured['pruned']:.4f} (dense {measured['dense']:.4f}) {text}")
    return "\n".join([*lines, *saved])


def _error_of(metric: str) -> str:
    """The key of a metric's standard error: that of "exact_match,strict-match" is "exact_match_stderr,strict-match"."""
    name, comma, answers = metric.partition(",")
    return f"{name}_stderr{comma}{answers}"


def _with_error(entry: dict, metric: str) -> str:
    value, error = entry[metric], entry.get(_error_of(metric))
    return "" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
