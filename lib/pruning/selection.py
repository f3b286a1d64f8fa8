"""Which linears are pruned and how much of each: patterns on names, a block number and per-block ratios to a table."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity

Targets = dict[int, dict[str, Sparsity]]  # block -> linear -> how much to remove; what is missing stays dense


def select(
    decoder: Decoder,
    sparsity: Sparsity | None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layer: int = -1,
    ratios: dict[str, float] | None = None,
) -> Targets:
    """The linears to prune.

    Args:
        sparsity: of every linear that `ratios` does not name; None if it names all.
        include: shell patterns on full names ("model.layers.0.self_attn.q_proj"); () is all. `exclude`: likewise, and wins.
        layer: this block only; -1 is all.
        ratios: {block index, or pattern on full names: share to remove}; of several that match the last one counts.

    Raises:
        ValueError: a block that does not exist, a pattern that matches no linear, an empty selection, a linear without a
            ratio, or one whose inputs the N:M pattern does not divide.
    """
    if not -1 <= layer < len(decoder):
        raise ValueError(f"--layer_no {layer} does not exist: the model has blocks 0 to {len(decoder) - 1}")
    blocks = range(len(decoder))
    linears = {(i, name): linear for i in blocks for name, linear in (decoder.linears(i) | decoder.routers(i)).items()}
    names = {(i, name): f"{decoder.prefixes[i]}{name}" for i, name in linears}
    for flag, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            _matching(pattern, names, flag)
    selected = {
        key: full
        for key, full in names.items()
        if layer in (-1, key[0])
        and (not include or any(fnmatchcase(full, pattern) for pattern in include))
        and (not linears[key].router or _by_name(full, include))
        and not any(fnmatchcase(full, pattern) for pattern in exclude)
    }
    if not selected:
        raise ValueError(f"nothing is selected: --include, --exclude and --layer_no leave none of the {len(names)} linears")

    own: dict[tuple[int, str], Sparsity] = {}
    for key, ratio in (ratios or {}).items():
        if key.isdecimal():
            if int(key) >= len(decoder):
                raise ValueError(f"block {key} of --layer_ratios does not exist: the model has blocks 0 to {len(decoder) - 1}")
            matching = [linear for linear in names if linear[0] == int(key)]
        else:
            matching = _matching(key, names, "--layer_ratios")
        own |= dict.fromkeys(matching, Sparsity(ratio))

    targets: Targets = {}
    for (i, name), full in selected.items():
        target = own.get((i, name), sparsity)
        if target is None:
            raise ValueError(f"{full} has no ratio: add --sparsity_ratio, for what --layer_ratios does not name")
        target.check_width(full, linears[i, name].in_features)
        if target.ratio:
            targets.setdefault(i, {})[name] = target
    return targets


def total_ratio(decoder: Decoder, targets: Targets) -> float:
    """The share of zeros that `targets` ask for, over all linears of all blocks."""
    removed = total = 0.0
    for i in range(len(decoder)):
        own = targets.get(i, {})
        for name, linear in (
            decoder.linears(i) | {name: decoder.routers(i)[name] for name in own.keys() & decoder.routers(i).keys()}
        ).items():
            total += linear.shape.numel()
            removed += linear.shape.numel() * own[name].ratio if name in own else 0
    return removed / total


def read_ratios(path: str) -> dict[str, float]:
    """Read a --layer_ratios file, such as {"0": 0.3, "*.down_proj": 0.6}.

    Raises:
        FileNotFoundError: no such file. ValueError: not a JSON object of numbers in [0, 1).
    """
    try:
        ratios = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(ratios, dict) or not ratios:
        raise ValueError(f'{path} is not a JSON object of ratios, such as {{"0": 0.3, "*.down_proj": 0.6}}')
    for key, ratio in ratios.items():
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise ValueError(f"{path} gives {key!r} the ratio {ratio!r}: it must be a number in [0, 1)")
    return ratios


def _by_name(full: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern ends with the very name of a router, such as "*.gate": "*.mlp.*" does not mean it."""
    own = full.rpartition(".")[2]
    return any(pattern.rpartition(".")[2] == own and fnmatchcase(full, pattern) for pattern in patterns)


def _matching(pattern: str, names: dict[tuple[int, str], str], flag: str) -> list[tuple[int, str]]:
    matching = [linear for linear, full in names.items() if fnmatchcase(full, pattern)]
    if not matching:
        raise ValueError(
            f"{flag} {pattern!r} matches none of the {len(names)} linears: they are called {next(iter(names.values()))} and so on"
        )
    return matching
