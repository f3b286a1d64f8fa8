"""Figures: what is drawn is what was measured, labelled, in colours that differ, on light pages and dark ones."""

import numpy as np
import plot_mask
import pytest
from conftest import ROOT, prune_model, random_windows, tiny_decoder, tiny_model
from matplotlib.figure import Figure
from matplotlib.image import imread

from lib.models import loading
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS
from lib.results import figures

LARGEST = 300_000  # bytes of a PNG in the repository


def draw(drawing, *arguments, **more) -> Figure:
    figure = Figure(layout="constrained")
    drawing(figure, *arguments, **more)
    figure.draw_without_rendering()
    return figure


def luminance(colour: str) -> float:
    values = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_save_writes_both_formats_and_themes_the_same_bytes_each_time(tmp_path):
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths = figures.save(lambda figure: figure.subplots().plot([1, 2]), tmp_path / folder / "x", (2, 2), ("light", "dark"))
        assert [path.name for path in paths] == ["x.png", "x.pdf", "x-dark.png", "x-dark.pdf"]
        found.append([path.read_bytes() for path in paths])
    assert found[0] == found[1]
    assert imread(tmp_path / "a" / "x.png")[0, 0, :3].min() == 1 and imread(tmp_path / "a" / "x-dark.png")[0, 0, :3].max() < 0.2


@pytest.mark.parametrize("theme", figures.THEMES)
def test_methods_have_colours_of_their_own_that_are_seen(theme):
    import matplotlib

    names = [*METHODS, "gblm best", "gblm, alpha 10"]
    with matplotlib.rc_context({"figure.facecolor": figures.THEMES[theme][0]}):
        looks = figures.looks_of(names)
    background = "#ffffff" if theme == "light" else figures.THEMES[theme][0]
    assert all(contrast(look["color"], background) > 2 for look in looks.values())
    assert len({looks[name]["color"] for name in METHODS}) == len(METHODS)
    assert looks["gblm best"]["color"] == looks["gblm, alpha 10"]["color"] == looks["gblm"]["color"]
    assert len({str((look["color"], look["linestyle"])) for look in looks.values()}) == len(names)
    assert len({look["marker"] for look in looks.values()}) == len(names)


def test_lines_are_the_points_and_every_axis_has_a_name():
    lines = {"gblm": [(10, 25, 0), (50, 49, 2)], "wanda": [(10, 26, 0), (50, 900, 0)]}
    (axes,) = draw(figures.perplexity_lines, lines, "weights removed (%)", level={"dense": 20}).axes
    drawn = {text.get_text() for text in axes.get_legend().get_texts()}
    assert drawn == {"gblm", "wanda", "dense"}
    points = {(round(x), round(y)) for line in axes.lines for x, y in line.get_xydata()}
    assert {(10, 25), (50, 49), (10, 26), (50, 900)} <= points
    assert axes.get_xlabel() and axes.get_ylabel() == "perplexity" and axes.get_yscale() == "log"
    (axes,) = draw(figures.perplexity_lines, {"gblm": [(1, 25, 0), (2, 30, 0)]}, "x", level={}).axes
    assert axes.get_yscale() == "linear"
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert any(ticks)


def test_blocks_and_seconds_are_the_numbers():
    (axes,) = draw(figures.blocks, {"0": {"a": 0.5, "b": 0.2}, "1": {"a": 0.6}}, "share").axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 0.5], [1, 0.6]], [[0, 0.2]]]
    assert axes.get_xlabel() == "block" and axes.get_ylabel() == "share" and axes.get_ylim()[1] > 0.6
    (axes,) = draw(figures.phases, {"one": {"prune": 2.0, "perplexity": 3.0}, "two": {"perplexity": 1.0}}).axes
    widths = {(bar.get_x(), bar.get_width()) for bar in axes.patches if bar.get_width()}
    assert widths == {(0, 2), (2, 3), (0, 1)} and axes.get_xlabel() == "seconds"


@pytest.mark.parametrize("shape", [(3, 5), (144, 150), (300, 145), (1000, 700)])
def test_cells_are_means_of_their_weights(shape):
    mask = np.random.default_rng(0).random(shape) < 0.3
    cells = figures._averaged(mask)
    steps = [-(-size // figures.CELLS) for size in shape]
    assert (
        cells.shape == tuple(-(-size // step) for size, step in zip(shape, steps, strict=True))
        and max(cells.shape) <= figures.CELLS
    )
    for i, j in ((0, 0), (cells.shape[0] - 1, cells.shape[1] - 1), (cells.shape[0] // 2, 0)):
        block = mask[i * steps[0] : (i + 1) * steps[0], j * steps[1] : (j + 1) * steps[1]]
        assert cells[i, j] == pytest.approx(block.mean())


def test_a_mask_is_drawn_with_its_marginals_and_where_two_differ():
    mask = np.zeros((6, 8), dtype=bool)
    mask[:, :3] = mask[2] = True
    other = mask.copy()
    other[0, 0] = False
    figure = draw(figures.masks, {"one": mask, "two": other})
    assert len(figure.subfigs) == 3
    for part, values in zip(figure.subfigs, (mask, other, mask != other), strict=True):
        image, above, beside, _ = part.axes
        assert np.array_equal(image.images[0].get_array(), values)
        assert np.allclose(above.lines[0].get_ydata(), values.mean(axis=0))
        assert np.allclose(beside.lines[0].get_xdata(), values.mean(axis=1))
        assert image.get_xlabel() == "input" and image.get_ylabel() == "output"
        assert image.get_ylim() == (6, 0)  # as matrices are written
    assert len(draw(figures.masks, {"one": mask}).subfigs) == 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two pruned tiny models of a family."""

    def make(family: str):
        folders = []
        for method in ("wanda", "magnitude"):
            decoder = tiny_decoder(family)
            prune_model(decoder, random_windows(4), method=method, sparsity=Sparsity.parse("unstructured", 0.5))
            folders.append(tmp_path_factory.mktemp(method) / "model")
            decoder.model.cpu().save_pretrained(folders[-1])
        return folders

    return make


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_mask_is_the_checkpoints(family, checkpoints):
    folder, _ = checkpoints(family)
    decoder, on_disk = loading.load(str(folder), dtype="float32", device="cpu"), loading.on_disk(str(folder))
    for name, linear in decoder.linears(1).items():
        survivors = plot_mask.survivors(on_disk, decoder.prefixes[1] + name)
        assert np.array_equal(survivors, (linear.weight != 0).numpy())
    with pytest.raises(ValueError, match="--linear lm_head is not one of the"):
        plot_mask.survivors(on_disk, "lm_head")


def test_the_mask_script(checkpoints, tmp_path, capsys):
    one, other = checkpoints("llama")
    arguments = [
        str(one),
        "--linear",
        "model.layers.0.mlp.up_proj",
        "--against",
        str(other),
        "--output",
        str(tmp_path / "mask"),
    ]
    plot_mask.main(plot_mask.parse([*arguments, "--dark"]))
    printed = capsys.readouterr().out
    assert f"{one.parent.name}: 0.5000 of" in printed and "of the mask's bits are equal" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"mask.png", "mask.pdf", "mask-dark.png", "mask-dark.pdf"}
    with pytest.raises(ValueError, match="give them --names"):
        plot_mask.main(plot_mask.parse([str(one), "--linear", "x", "--against", str(one)]))
    tiny_model(intermediate_size=64).cpu().save_pretrained(tmp_path / "wide")
    arguments[4] = str(tmp_path / "wide")
    with pytest.raises(ValueError, match="compare one model's"):
        plot_mask.main(plot_mask.parse(arguments))
    for wrong in (["a/b/c", "--linear", "x"], [str(one), "--linear", "x", "--names", "a", "b"], [str(one)]):
        with pytest.raises(SystemExit):
            plot_mask.parse(wrong)


def test_figures_of_the_documents_are_small_and_both_themes_are_there():
    pictures = list((ROOT / "docs" / "figures").glob("*.png"))
    assert pictures
    for path in pictures:
        assert path.stat().st_size < LARGEST, path
        light = path.with_name(path.name.replace("-dark", ""))
        assert light.exists() and light.with_stem(f"{light.stem}-dark").exists()
