"""Score to mask: which weights go. A mask is bool, (out, in), and True where a weight is REMOVED, everywhere in this project.

Ties fall to the lower column, as a stable ascending sort would have it, but nothing here sorts a whole row where
selecting one value is enough.
"""

import re
from dataclasses import dataclass
from functools import partial

import torch

from lib.errors import InvalidInput

VARIANT_SHARE = 0.8  # of a row's total, at most, is removed by `--use_variant`
VARIANT_TOLERANCE = 0.001  # of its bisection: on the sparsity reached, and on the bracket
VARIANT_STEPS = 10  # VARIANT_SHARE halved so often is less than VARIANT_TOLERANCE
RANKED_GROUP = 8  # groups up to this size are ranked by comparing all pairs, larger ones by selection (measured)
TIES = 0.01  # of a matrix: more weights than are asked for, which equal the threshold, go with it
PART = 2**21  # scores that are copied at a time


@dataclass(frozen=True)
class Sparsity:
    """How much to remove: a share `ratio` of every row (or matrix), or exactly `n` of every `m` consecutive inputs."""

    ratio: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, pattern: str, ratio: float | None = None) -> "Sparsity":
        """Read "unstructured" (needs `ratio`) or "N:M" (N REMOVED of every M; implies the ratio N / M).

        Raises:
            ValueError: unknown pattern, N not below M, a ratio outside [0, 1), missing, or contradicting N:M.
        """
        if pattern == "unstructured":
            if ratio is None:
                raise InvalidInput("unstructured sparsity needs a ratio: add --sparsity_ratio, for example 0.5")
            if not 0 <= ratio < 1:
                raise InvalidInput(f"sparsity ratio {ratio} is outside [0, 1): give the share of weights to remove")
            return cls(ratio)
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if not match:
            raise InvalidInput(f'sparsity type {pattern!r} is neither "unstructured" nor N:M such as 2:4')
        n, m = map(int, match.groups())
        if not 0 < n < m:
            raise InvalidInput(f"sparsity type {pattern}: N counts the removed weights of every M, so 0 < N < M must hold")
        if ratio is not None and not abs(ratio - n / m) <= 1e-9:
            raise InvalidInput(
                f"sparsity type {pattern} implies the ratio {n / m:g}, not {ratio:g}: leave --sparsity_ratio out"
            )
        return cls(n / m, n, m)

    def check_width(self, name: str, width: int) -> None:
        """Raise ValueError if a linear with `width` inputs cannot be cut into groups of `m`."""
        if self.m and width % self.m:
            raise InvalidInput(f"{name} has {width} inputs, not divisible by {self.m}: choose an N:M whose M divides it")


def mask_of(score: torch.Tensor, target: Sparsity, group: str = "row") -> torch.Tensor:
    """The mask, (out, in), True = remove, of the lowest scores: N of every M inputs, or a share of every `group`.

    `group`: "row", of every output row; "matrix", of all of it; "variant", of rows, by the share of their total (`variant`).
    """
    if target.m:
        return n_of_m(score, target.n, target.m)
    if target.ratio == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    unstructured = {"row": per_row, "matrix": partial(whole_matrix, cut_ties=True), "variant": variant}
    return unstructured[group](score, target.ratio)


def per_row(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """Remove the `int(in * ratio)` lowest scores of every output row."""
    return _lowest(score, int(score.shape[-1] * ratio))


def whole_matrix(score: torch.Tensor, ratio: float, cut_ties: bool = False) -> torch.Tensor:
    """Remove every score not above the value at position `int(out * in * ratio)` of the ascending order.

    `cut_ties`: where so many scores are equal, as in a ternary model, that this would be a share of more than TIES beyond `ratio`,
    only the first of those that equal that value go, row by row, until `ratio` is reached.
    """
    count = int(score.numel() * ratio)
    threshold = _selected(score.flatten(), count)
    mask = score <= threshold
    if not cut_ties:
        return mask
    most = count + max(1, TIES * score.numel())
    if score.device.type == "cpu" and torch.count_nonzero(mask) <= most:
        return mask
    in_order = _from_the_left(score.flatten()[None], threshold[None], count).view(score.shape)
    return torch.where(torch.count_nonzero(mask) <= most, mask, in_order)


def n_of_m(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Remove the `n` lowest scores of every `m` consecutive inputs; `in` must be divisible by `m`."""
    groups = score.reshape(-1, m)
    if m > RANKED_GROUP:
        return _lowest(groups, n).view(score.shape)
    # A score's rank is the number of scores before it in the stable ascending order of its group. Each shift compares all
    # pairs that stand `shift` apart: of two equal scores the left one comes first.
    rank = torch.zeros_like(groups, dtype=torch.uint8)
    for shift in range(1, m):
        left_first = groups[:, :-shift] <= groups[:, shift:]
        rank[:, shift:] += left_first
        rank[:, :-shift] += ~left_first
    return (rank < n).view(score.shape)


def variant(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """Wanda's variant: remove per row the lowest scores that add up to a share of the row's total, the same share everywhere.

    The share is bisected in [0, 0.8] from 0.4 until the matrix' sparsity is within 0.001 of `ratio`, or the bracket
    is narrower than 0.001 (Wanda, arXiv 2306.11695, section 4.3, `--use_variant`).
    """
    order = score.sort(dim=-1, stable=True)
    cumulative = order.values.cumsum(dim=-1)
    total = cumulative[:, -1:]
    low, high = (torch.full((), share, dtype=torch.float64, device=score.device) for share in (0.0, VARIANT_SHARE))
    for step in range(VARIANT_STEPS + 1):
        share = (low + high) / 2
        removed = torch.searchsorted(cumulative, total * share, right=True)  # (out, 1): how many c <= share * total
        if step < VARIANT_STEPS:
            # Decided where the scores are: a bracket that is good enough stays as it is.
            sparsity = removed.sum(dtype=torch.float64) / score.numel()
            enough = (sparsity - ratio).abs() <= VARIANT_TOLERANCE
            low = torch.where(enough | (sparsity > ratio), low, share)
            high = torch.where(enough | (sparsity <= ratio), high, share)
    columns = torch.arange(score.shape[-1], device=score.device)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order.indices, columns < removed)


def lowest_of(mask: torch.Tensor, score: torch.Tensor, share: float) -> torch.Tensor:
    """Of the weights that `mask` removes, the `share` of lowest score over the whole matrix: a stage on the way to the mask.

    Rows, and groups of N:M, get there at different times (arXiv 2401.02938 does so at 2:4). Equal scores go together.
    """
    count, marked = torch.count_nonzero(mask) * share, torch.where(mask, score, torch.inf)
    if score.device.type == "cpu":
        if count < 1:
            return torch.zeros_like(mask)
        return (score <= _selected(marked.flatten(), int(count) - 1, reordered=True)).logical_and_(mask)
    position = count.long() - 1  # sorted, which takes longer, but nobody has to wait to know how many they are
    return mask & (score <= marked.flatten().sort().values.gather(0, position.clamp(min=0)[None])) & (position >= 0)


def _selected(values: torch.Tensor, position: int, reordered: bool = False) -> torch.Tensor:
    """The value at `position` (from 0) of the ascending order of a vector, (1,), or of every row of a matrix, (out, 1).

    `reordered` says that the values may be, along the last dimension.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.kthvalue(position + 1, dim=-1, keepdim=True).values
    # numpy has vector instructions for it: 4 to 10 times as fast as kthvalue (measured). A copy of all values at once would
    # take as long again.
    selected = []
    for rows in values.split(max(1, PART // values.shape[-1])) if values.ndim > 1 else (values,):
        rows = rows.detach().numpy() if reordered else rows.detach().numpy().copy()
        rows.partition(position)
        selected.append(torch.from_numpy(rows[..., position : position + 1].copy()))
    return torch.cat(selected)


def _lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` lowest scores of every row of a 2-d tensor, ties to the lower column."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _selected(score, count - 1)
    mask = score <= threshold
    # More are marked where several scores equal a row's threshold. On a CPU it is cheap to ask which rows these are; a GPU
    # would have to be waited for.
    if score.device.type != "cpu":
        return _from_the_left(score, threshold, count)
    rows = (mask.view(torch.uint8).sum(dim=-1, dtype=torch.int32) > count).nonzero().flatten()  # twice as fast as count_nonzero
    if len(rows):
        mask[rows] = _from_the_left(score[rows], threshold[rows], count)
    return mask


def _from_the_left(score: torch.Tensor, threshold: torch.Tensor, count: int) -> torch.Tensor:
    """Mark what is below a row's `threshold`, (out, 1), and of what equals it the leftmost, up to `count`."""
    below = score < threshold
    tied = score == threshold
    room = count - below.sum(dim=-1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= room))
