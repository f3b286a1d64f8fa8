"""How much is removed where: flags about linears and blocks to a table of targets, block -> linear -> sparsity.

Patterns and a block number say which linears; a file, or a line from the first block to the last, how much of each.
"""

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from lib.errors import InvalidInput, MissingInput
from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity

EQUAL, LINE = "equal", "line"  # of --layer_ratios; LINE alone leaves the slope open, "line:0.3" gives it
LARGEST_SHARE = 0.95  # that a line asks a block to lose

Targets = dict[int, dict[str, Sparsity]]  # block -> linear -> how much to remove; what is missing stays dense


def select(
    decoder: Decoder,
    sparsity: Sparsity | None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layer: int = -1,
    ratios: dict[str, float | str] | None = None,
) -> Targets:
    """The linears to prune.

    Args:
        sparsity: of every linear that `ratios` does not name; None if it names all.
        include: shell patterns on full names ("model.layers.0.self_attn.q_proj"); () is all. `exclude`: likewise, and wins.
        layer: this block only; -1 is all.
        ratios: {block index, or pattern on full names: share to remove, "N:M" or "dense"}; of several that match the last
            one counts.

    Raises:
        ValueError: a block that does not exist, a pattern that matches no linear, an empty selection, a linear without a
            ratio, or one whose inputs the N:M pattern does not divide.
    """
    if not -1 <= layer < len(decoder):
        raise InvalidInput(f"--layer_no {layer} does not exist: the model has blocks 0 to {len(decoder) - 1}")
    blocks = range(len(decoder))
    linears = {(i, name): linear for i in blocks for name, linear in (decoder.linears(i) | decoder.routers(i)).items()}
    names = {(i, name): f"{decoder.prefixes[i]}{name}" for i, name in linears}
    for flag, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            _matching(pattern, names, flag, decoder)
    selected = {
        key: full
        for key, full in names.items()
        if layer in (-1, key[0])
        and (not include or any(fnmatchcase(full, pattern) for pattern in include))
        and (not linears[key].router or _by_name(full, include))
        and not any(fnmatchcase(full, pattern) for pattern in exclude)
    }
    if not selected:
        raise InvalidInput(f"nothing is selected: --include, --exclude and --layer_no leave none of the {len(names)} linears")

    by_ratio = _by_ratio(decoder, names, ratios or {})
    targets: Targets = {}
    for (i, name), full in selected.items():
        target = by_ratio.get((i, name), sparsity)
        if target is None:
            raise InvalidInput(f"{full} has no ratio: add --sparsity_ratio, for what --layer_ratios does not name")
        target.check_width(full, linears[i, name].in_features)
        if target.ratio:
            targets.setdefault(i, {})[name] = target
    return targets


def _by_ratio(
    decoder: Decoder, names: dict[tuple[int, str], str], ratios: dict[str, float | str]
) -> dict[tuple[int, str], Sparsity]:
    """How much of which linear `ratios` say to remove; of several that match it the last one counts."""
    sparsities: dict[tuple[int, str], Sparsity] = {}
    for key, ratio in ratios.items():
        if key.isdecimal():
            if int(key) >= len(decoder):
                raise InvalidInput(
                    f"block {key} of --layer_ratios does not exist: the model has blocks 0 to {len(decoder) - 1}"
                )
            matching = [linear for linear in names if linear[0] == int(key)]
        else:
            matching = _matching(key, names, "--layer_ratios", decoder)
        sparsities |= dict.fromkeys(matching, _sparsity(ratio))
    return sparsities


def total_ratio(decoder: Decoder, targets: Targets) -> float:
    """The share of zeros that `targets` ask for, over all linears of all blocks."""
    removed = total = 0.0
    for i in range(len(decoder)):
        of_block = targets.get(i, {})
        for name, linear in (
            decoder.linears(i) | {name: decoder.routers(i)[name] for name in of_block.keys() & decoder.routers(i).keys()}
        ).items():
            total += linear.shape.numel()
            removed += linear.shape.numel() * of_block[name].ratio if name in of_block else 0
    return removed / total


def ratios_of(decoder: Decoder, layer_ratios: str | None, sparsity: Sparsity | None) -> dict[str, float | str] | None:
    """What a --layer_ratios means for a model, as `select` takes it: of a line its shares, flat where the slope is open."""
    if is_line(layer_ratios):
        return line_of(decoder, slope_of(layer_ratios) or 0.0, sparsity.ratio)
    return read_ratios(layer_ratios) if layer_ratios else None


def read_ratios(path: str) -> dict[str, float | str]:
    """Read a --layer_ratios file, such as {"0": 0.3, "*.down_proj": "4:8", "*.o_proj": "dense"}.

    Raises:
        OSError: no such file. ValueError: not a JSON object of numbers in [0, 1), N:M patterns and "dense".
    """
    if not Path(path).exists() or Path(path).is_dir():
        raise MissingInput(f"--layer_ratios {path} is not a file, and neither line nor line:SLOPE, such as line:0.3")
    try:
        ratios = json.loads(Path(path).read_text())
    except OSError as error:
        raise MissingInput(f"--layer_ratios {path} cannot be read: {error}") from error
    except ValueError as error:  # not JSON, or not text
        raise InvalidInput(f'--layer_ratios {path} is not JSON ({error}): {{"0": 0.3}} would be') from error
    if not isinstance(ratios, dict) or not ratios:
        raise InvalidInput(f'{path} is not a JSON object of ratios, such as {{"0": 0.3, "*.down_proj": "4:8"}}')
    for key, ratio in ratios.items():
        try:
            _sparsity(ratio)
        except ValueError as error:
            expected = 'it must be a number in [0, 1), "N:M" or "dense"'
            raise InvalidInput(f"{path} gives {key!r} the ratio {ratio!r}: {expected}") from error
    return ratios


def is_line(text: str | None) -> bool:
    """Whether `--layer_ratios` is LINE, with a slope or without, and not a file."""
    return text is not None and (text == LINE or text.startswith(f"{LINE}:"))


def slope_of(text: str) -> float | None:
    """The slope in "line:0.3"; None in LINE alone.

    Raises:
        ValueError: it is not a number from -1 to 1.
    """
    _, colon, number = text.partition(":")
    try:
        slope = float(number) if colon else None
    except ValueError:
        slope = math.nan
    if slope is not None and not -1 <= slope <= 1:
        raise InvalidInput(f"--layer_ratios {text} has no slope from -1 to 1 behind the colon: write line, or line:0.3")
    return slope


def line_of(decoder: Decoder, slope: float, ratio: float) -> dict[str, float]:
    """{block: share to remove}, as `select` takes it, of `line` for this model; blocks without matrices have none."""
    weights = {str(i): sum(linear.shape.numel() for linear in decoder.linears(i).values()) for i in range(len(decoder))}
    weights = {block: count for block, count in weights.items() if count}
    return dict(zip(weights, line(slope, list(weights.values()), ratio), strict=True))


def line(slope: float, weights: list[int], ratio: float) -> list[float]:
    """Shares that rise by `slope` from the first block to the last, in equal steps (arXiv 2502.14770), and remove `ratio` of
    all weights: an error in an early block grows in all that follow it."""
    last = max(len(weights) - 1, 1)
    return balanced([slope * i / last for i in range(len(weights))], weights, ratio)


def check_line(ratio: float) -> None:
    """Raise ValueError if no shares of a line remove so much."""
    if ratio > LARGEST_SHARE:
        raise InvalidInput(f"--layer_ratios {LINE} removes at most {LARGEST_SHARE} of a block, not {ratio:g}")


def balanced(shares: list[float], weights: list[int], ratio: float) -> list[float]:
    """Shares shifted by one number and kept within [0, LARGEST_SHARE], such that they remove `ratio` of all `weights`.

    Raises:
        ValueError: `ratio` is above LARGEST_SHARE.
    """
    check_line(ratio)
    if ratio == 0:
        return [0.0] * len(shares)
    values, sizes = torch.tensor(shares, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    low, high = -values.max().item(), 1 - values.min().item()
    for _ in range(60):
        middle = (low + high) / 2
        reached = ((values + middle).clamp(0, LARGEST_SHARE) * sizes).sum() / sizes.sum()
        low, high = (middle, high) if reached < ratio else (low, middle)
    # Rounded, for a share a bit below 0.6 would remove one weight fewer of every row of 5120.
    return [round(share, 12) for share in (values + high).clamp(0, LARGEST_SHARE).tolist()]


def _sparsity(value: float | str) -> Sparsity:
    if value == "dense":
        return Sparsity(0.0)
    if isinstance(value, str):
        return Sparsity.parse(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"{value!r} is not a number")
    return Sparsity.parse("unstructured", value)


def _by_name(full: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern ends with the very name of a router, such as "*.gate": "*.mlp.*" does not mean it."""
    short = full.rpartition(".")[2]
    return any(pattern.rpartition(".")[2] == short and fnmatchcase(full, pattern) for pattern in patterns)


def _matching(pattern: str, names: dict[tuple[int, str], str], flag: str, decoder: Decoder) -> list[tuple[int, str]]:
    matching = [linear for linear, full in names.items() if fnmatchcase(full, pattern)]
    if not matching:
        for outside, module in decoder.model.named_modules():
            short = outside.rpartition(".")[2]
            weighs = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
            inside = outside.startswith(tuple(decoder.prefixes))
            if weighs and not inside and (fnmatchcase(outside, pattern) or fnmatchcase(short, pattern)):
                raise InvalidInput(
                    f"{flag} {pattern!r} means {outside}, which is never pruned: embeddings and the LM head stay dense, only "
                    f"linears of the blocks are pruned, such as {next(iter(names.values()))}"
                )
        raise InvalidInput(
            f"{flag} {pattern!r} matches none of the {len(names)} linears: they are called {next(iter(names.values()))} and so on"
        )
    return matching
