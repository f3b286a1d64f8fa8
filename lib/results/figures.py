"""Figures as papers print them: one style, PNG and PDF, for light pages and dark ones.

A drawing is a function of a matplotlib `Figure`; `save` sets its size and colours and writes the files. What is drawn comes in
as plain numbers, so nothing here knows models or runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lib.atomic import replace_file

COLUMN, PAGE = 3.4, 6.9  # inches, the widths of a paper's column and of its page
DPI = 220  # of a PNG; a PDF has none
THEMES = {"light": ("white", "black", "#d0d0d0"), "dark": ("#0d1117", "#e6edf3", "#3a414b")}  # background, text, grid
# Okabe and Ito's colours, which people with any colour vision can tell apart. A method has the same colour in every figure; on
# dark pages, sky blue stands for blue. Markers and dashes tell methods apart where print has no colours.
COLOURS = {
    "gblm": "#D55E00", "wanda": "#0072B2", "sparsegpt": "#009E73", "magnitude": "#CC79A7", "gradient": "#E69F00",
}  # fmt: skip
ON_DARK = {"#0072B2": "#56B4E9"}
OTHERS = ("#56B4E9", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#0072B2", "#F0E442")
MARKERS = "osD^vPX*<>"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))
CELLS = 144  # along each side of a mask's image, at most; the weights of a cell are averaged

Line = Sequence[tuple[float, float, float]]  # (x, y, standard deviation of y), in the order of x


def save(
    draw: Callable,
    path: str | Path,
    size: tuple[float, float],
    themes: Sequence[str] = ("light",),
    ends: Sequence[str] = (".png", ".pdf"),
) -> list[Path]:
    """Draw on a figure of `size` inches; write PATH.png and PATH.pdf, and for the dark theme PATH-dark.png and PATH-dark.pdf."""
    import matplotlib  # here and not above: importing it takes a second, which most runs need not spend
    from matplotlib.figure import Figure  # not pyplot: it keeps every figure of the process alive

    written = []
    for theme in themes:
        background, text, grid = THEMES[theme]
        style = {
            "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "lines.linewidth": 1.2, "lines.markersize": 3.5,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.4, "axes.axisbelow": True,
            "legend.frameon": False, "figure.facecolor": background, "axes.facecolor": background, "savefig.facecolor": background,
            "text.color": text, "axes.labelcolor": text, "axes.edgecolor": text, "xtick.color": text, "ytick.color": text,
            "grid.color": grid, "pdf.fonttype": 42,
        }  # fmt: skip
        with matplotlib.rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            stem = f"{path}{'' if theme == 'light' else f'-{theme}'}"
            for end in ends:
                metadata = {"CreationDate": None} if end == ".pdf" else {}  # without a date, equal figures are equal bytes
                file = Path(stem + end)
                replace_file(file, partial(figure.savefig, dpi=DPI, metadata=metadata, format=end[1:]))
                written.append(file)
    return written


def looks_of(names: Sequence[str]) -> dict[str, dict]:
    """{name: colour, marker and dashes for `plot`}; "gblm best" has the colour of "gblm", and other dashes."""
    import matplotlib

    dark = matplotlib.rcParams["figure.facecolor"] == THEMES["dark"][0]
    looks = {}
    others = iter(OTHERS * len(names))
    for k, name in enumerate(names):
        method = next((known for known in COLOURS if name.split(",")[0].split()[0] == known), name)
        colour = COLOURS.get(method) or next(others)
        variant = sum(earlier.split(",")[0].split()[0] == method for earlier in names[:k])
        looks[name] = {
            "color": ON_DARK.get(colour, colour) if dark else colour,
            "marker": MARKERS[k % len(MARKERS)],
            "linestyle": DASHES[variant % len(DASHES)],
        }
    return looks


def perplexity_lines(
    figure, lines: Mapping[str, Line], xlabel: str, *, level: Mapping[str, float], log_x: bool = False
) -> None:
    """Perplexity against the quantity that `xlabel` names, a line for each name; `level`: {name: perplexity} of horizontal lines."""
    axes = figure.subplots()
    _draw_lines(axes, lines, level, log_x)
    axes.set(xlabel=xlabel, ylabel="perplexity")
    axes.legend()


def perplexity_panels(figure, panels: Mapping[str, tuple[Mapping[str, Line], Mapping[str, float]]], xlabel: str) -> None:
    """Perplexity lines on a logarithmic x axis, a panel for each title: {title: (lines, levels)}."""
    for k, (axes, (title, (lines, level))) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True)
    ):
        _draw_lines(axes, lines, level, log_x=True)
        axes.set(xlabel=xlabel, title=title, ylabel="" if k else "perplexity")
        axes.legend()


def _draw_lines(axes, lines: Mapping[str, Line], level: Mapping[str, float], log_x: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    looks = looks_of([*lines, *level])
    for name, line in lines.items():
        x, y, spread = (np.array(values, dtype=float) for values in zip(*line, strict=True))
        axes.errorbar(x, y, yerr=spread if spread.any() else None, label=name, capsize=2, **looks[name])
    for name, value in level.items():
        look = looks[name] if name.split()[0] in COLOURS else {"color": axes.xaxis.label.get_color()}
        axes.axhline(value, label=name, linewidth=1, **{**look, "marker": "", "linestyle": (0, (1, 1.5))})
    values = [y for line in lines.values() for _, y, _ in line] + list(level.values())
    if max(values) > 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if max(values) > 500 * min(values) else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if log_x:
        axes.set_xscale("log")


def blocks(figure, by_block: Mapping[str, Mapping[str, float]], ylabel: str) -> None:
    """One value for every linear of every block, {block: {linear: value}}: a line for each linear, along the blocks."""
    axes = figure.subplots()
    names = dict.fromkeys(name for linears in by_block.values() for name in linears)  # blocks may differ in their linears
    looks = looks_of(list(names))
    for k, name in enumerate(names):
        points = [(int(i), linears[name]) for i, linears in by_block.items() if name in linears]
        size = 2 + max(0, 7 - k)  # markers are hollow and get smaller, so that all of several equal lines are seen
        axes.plot(*zip(*points, strict=True), label=name, **looks[name], fillstyle="none", markersize=size)
    axes.set(xlabel="block", ylabel=ylabel, ylim=(0, 1.1 * max(axes.get_ylim()[1], 1e-6)))
    if len(names) > 12:  # stacks of experts
        axes.set_title(f"{len(names)} matrices")
    else:
        figure.legend(loc="outside right upper")


def phases(figure, seconds: Mapping[str, Mapping[str, float]]) -> None:
    """Seconds of every phase, {run: {phase: seconds}}: a bar for each run."""
    axes = figure.subplots()
    names = list(dict.fromkeys(phase for run in seconds.values() for phase in run))
    looks = looks_of(names)
    ends = np.zeros(len(seconds))
    for name in names:
        widths = np.array([run.get(name, 0.0) for run in seconds.values()])
        axes.barh(list(seconds), widths, left=ends, height=0.6, label=name, color=looks[name]["color"])
        ends += widths
    axes.set(xlabel="seconds")
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=min(4, len(names)))


def masks(figure, survivors: Mapping[str, np.ndarray]) -> None:
    """What masks leave: {name: (out, in), True where a weight survives}, with the share of every input (above) and output
    (beside) that survives.

    Two of them are drawn side by side, and a third image, on another scale, shows where they differ.
    """
    images = dict(survivors)
    if len(survivors) == 2:
        first, second = survivors.values()
        images["where they differ"] = first != second
    parts = figure.subfigures(1, len(images), squeeze=False)[0]
    for k, (part, (name, values)) in enumerate(zip(parts, images.items(), strict=True)):
        _draw_matrix(part, name, values, differs=k >= len(survivors))


def _draw_matrix(figure, name: str, values: np.ndarray, differs: bool) -> None:
    """The image of a boolean matrix with its means along both axes; `differs` says that True means a difference."""
    grid = figure.add_gridspec(3, 2, width_ratios=[4, 1], height_ratios=[1, 4, 0.2])
    image = figure.add_subplot(grid[1, 0])
    above, beside = figure.add_subplot(grid[0, 0], sharex=image), figure.add_subplot(grid[1, 1], sharey=image)
    rows, columns = values.shape
    cells, inputs, outputs = _averaged(values), values.mean(axis=0), values.mean(axis=1)
    limits = {"vmin": 0, "vmax": (cells.max() or 1) if differs else 1}
    shown = image.imshow(cells, cmap="viridis", extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest", **limits)
    image.set(xlabel="input", ylabel="output", xlim=(0, columns), ylim=(rows, 0))
    image.grid(visible=False)
    image.locator_params(nbins=4)
    line = {"color": COLOURS["gblm"], "linewidth": 0.4}
    above.plot(np.arange(columns) + 0.5, inputs, **line)
    beside.plot(outputs, np.arange(rows) + 0.5, **line)
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    for shares, limit, ticks in ((inputs, above.set_ylim, above.set_yticks), (outputs, beside.set_xlim, beside.set_xticks)):
        end = float(f"{shares.max():.1g}") or 1.0 if differs else 1.0
        limit(0, max(end, shares.max()))
        ticks([0, end], labels=["0", f"{end:g}"])
    above.set_title(f"{name}\n{100 * values.mean():.2f} %" if differs else f"{name}\nkept {100 * values.mean():.1f} %")
    label = "share that differs" if differs else "share of weights kept"
    bar = figure.colorbar(shown, cax=figure.add_subplot(grid[2, :]), label=label, orientation="horizontal")
    bar.locator.set_params(nbins=5)


def _averaged(values: np.ndarray) -> np.ndarray:
    """Means over cells of equal size, at most CELLS of them along each side; the last cells may be smaller."""
    for axis in (0, 1):
        step = -(-values.shape[axis] // CELLS)
        starts = np.arange(0, values.shape[axis], step)
        sizes = np.diff([*starts, values.shape[axis]])
        values = np.add.reduceat(values, starts, axis=axis, dtype=np.float64) / np.expand_dims(sizes, 1 - axis)
    return values
