"""Check a pruned checkpoint: sparsity of every linear, an N:M pattern, and that every surviving weight is the dense model's.

    python scripts/check_sparsity.py out/model --pattern 2:4 --against meta-llama/Llama-2-7b-hf

Exits with 1 if the pattern or the comparison does not hold, and says where; with 2 if it cannot be checked. Weights are read
from the mapped files, a piece at a time, so a model of any size can be checked. Where surviving weights were updated (by
SparseGPT, by a recipe or its flags, or by scripts/finetune.py), the checkpoint's files say so, and --against only compares the
tensors that were not pruned.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import flags
from lib.errors import Refusal
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files import fetch
from lib.models.matrices import kind_of
from lib.pruning.masks import Sparsity
from lib.pruning.targets import Targets, select

PIECE = 2**24  # weights that are read at a time
SHOWN = 20  # problems that are printed, at most
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a weight -> integers of that size


def pieces(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first row, rows) of the parts of a tensor, seen as a matrix; each has about PIECE elements."""
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    rows = max(1, PIECE // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        yield start, matrix[start : start + rows]


def count_zeros(weight: torch.Tensor) -> int:
    return weight.numel() - sum(torch.count_nonzero(rows).item() for _, rows in pieces(weight))


def true_ones(mask: torch.Tensor) -> tuple[int, int, int]:
    """How many entries of a matrix are True, and the row and column of the first one."""
    return torch.count_nonzero(mask).item(), *divmod(mask.flatten().view(torch.uint8).argmax().item(), mask.shape[1])


def violations(weight: torch.Tensor, n: int, m: int) -> str:
    """How a matrix breaks N:M: its groups of `m` inputs with fewer than `n` zeros, in words. Empty if it does not."""
    total, first = 0, ""
    for start, rows in pieces(weight):
        zeros = (rows == 0).view(len(rows), -1, m).sum(dim=-1)
        count, row, group = true_ones(zeros < n)
        if count and not total:
            first = f"row {start + row}, inputs {group * m} to {group * m + m - 1}: {zeros[row, group].item()} zeros"
        total += count
    return f"{total} groups of {m} with fewer than {n} zeros, the first in {first}" if total else ""


def changes(tensor: torch.Tensor, dense: torch.Tensor, may_be_zero: bool) -> str:
    """How a tensor differs from the dense model's, bit by bit, in words; empty if it does not. `may_be_zero`: zeros do not count."""
    if tensor.shape != dense.shape or tensor.dtype != dense.dtype:
        return f"{tuple(tensor.shape)} in {tensor.dtype}, the dense model's is {tuple(dense.shape)} in {dense.dtype}"
    bits, total, first = BITS[tensor.element_size()], 0, ""
    for (start, rows), (_, expected) in zip(pieces(tensor), pieces(dense), strict=True):
        differs = rows.contiguous().view(bits) != expected.contiguous().view(bits)
        if may_be_zero:
            differs &= rows != 0
        count, row, column = true_ones(differs)
        if count and not total:
            first = f"row {start + row}, column {column}: {rows[row, column].item()}, dense {expected[row, column].item()}"
        total += count
    return f"{total} of {tensor.numel()} values are not the dense model's, the first in {first}" if total else ""


def report(decoder: Decoder, pattern: Sparsity | None, targets: Targets) -> list[str]:
    """Print the sparsity of every linear of a checkpoint; returns how the linears of `targets` break the pattern."""
    broken, zeros, sizes = [], Counter(), Counter()
    header: list[str] = []
    for i in range(len(decoder)):
        tensor: dict[str, torch.Tensor] = {}  # the last one that was read: experts share a tensor
        zeros_of_block, sizes_of_block = Counter(), Counter()  # kind of linear -> weights; all experts are of one kind
        for name, matrix in decoder.linears(i).items():
            if matrix.tensor_name not in tensor:
                tensor = {matrix.tensor_name: decoder.source[decoder.prefixes[i] + matrix.tensor_name]}
            weight = matrix.of(tensor[matrix.tensor_name])
            zeros_of_block[kind_of(name)] += count_zeros(weight)
            sizes_of_block[kind_of(name)] += weight.numel()
            if pattern and name in targets.get(i, {}) and (problem := violations(weight, pattern.n, pattern.m)):
                broken.append(f"{decoder.prefixes[i]}{name}: {problem}")
        if list(sizes_of_block) != header:  # once, unless blocks differ in their linears
            header = list(sizes_of_block)
            print("block", *header)
        shares = [f"{zeros_of_block[kind] / sizes_of_block[kind]:.4f}".ljust(len(kind)) for kind in header]
        print(f"{i:<5}", *shares, flush=True)
        zeros.update(zeros_of_block)
        sizes.update(sizes_of_block)
    print(f"sparsity {zeros.total() / sizes.total():.4f} over {sizes.total()} weights of the blocks' linears")
    return broken


def compare(decoder: Decoder, dense: Decoder) -> list[str]:
    """How the files of a checkpoint differ from the dense model's, apart from zeros in the blocks' linears.

    If the files say that surviving weights were updated, the tensors of the blocks' linears are not compared.
    """
    blocks = range(len(decoder))
    matrices = [(i, matrix) for i in blocks for matrix in (decoder.linears(i) | decoder.routers(i)).values()]
    pruned = decoder.source.in_files({decoder.prefixes[i] + matrix.tensor_name for i, matrix in matrices})
    files, expected = decoder.source.checkpoint, dense.source.checkpoint
    changed = [f"{name}: in only one of the two checkpoints" for name in sorted(set(files) ^ set(expected))]
    for name in [name for name in files if name in expected and not (files.updated and name in pruned)]:
        if problem := changes(files[name], expected[name], may_be_zero=name in pruned):
            changed.append(f"{name}: {problem}")
    return changed


def open_on_disk(name: str, args: argparse.Namespace) -> Decoder:
    """The model in a folder or on the hub, its weights left on disk."""
    folder = fetch.folder(name, cache_dir=args.cache_dir, weights=True)
    return loading.on_disk(folder, trust_remote_code=args.trust_remote_code)


def main(argv: list[str] | None = None) -> bool:
    """Check what the flags ask for; returns whether any check fails."""
    parser = flags.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder or hub name of the pruned model, in safetensors")
    parser.add_argument("--pattern", help="check for N:M, at least N zeros in every M consecutive inputs, such as 2:4")
    parser.add_argument(
        "--against", metavar="DENSE", help="compare with the model that it was pruned from, a folder or hub name"
    )
    flags.add_selection_flags(parser)
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the Python code that comes in the model's own folder"
    )
    parser.add_argument("--cache_dir", help="where downloads are kept (default: the hub's own cache)")
    args = parser.parse_args(argv)
    pattern = None
    if args.pattern == "unstructured":
        parser.error("--pattern is N:M; leave it out where no pattern is to be checked")
    if args.pattern:
        try:
            pattern = Sparsity.parse(args.pattern)
        except ValueError as error:
            parser.error(f"--pattern: {error}")
    elif args.include or args.exclude:
        parser.error("--include and --exclude select the linears that --pattern is checked on: add it")
    try:
        decoder = open_on_disk(args.checkpoint, args)
        dense = open_on_disk(args.against, args) if args.against else None
        targets = select(decoder, pattern, include=args.include, exclude=args.exclude) if pattern else {}
    except Refusal as error:
        parser.error(str(error))

    failed = False
    broken = report(decoder, pattern, targets)
    if pattern:
        show(broken, f"at least {pattern.n} zeros in every {pattern.m} inputs of {sum(map(len, targets.values()))} linears")
        failed |= bool(broken)
    if dense:
        changed = compare(decoder, dense)
        updated = decoder.source.checkpoint.updated
        compared = (
            "what was not pruned (its files say that surviving weights were updated)" if updated else "every other weight"
        )
        show(changed, f"{compared} is bit-identical to {args.against}")
        failed |= bool(changed)
    return failed


def show(problems: list[str], claim: str) -> None:
    """Print the problems, and whether a claim holds."""
    for problem in problems[:SHOWN]:
        print(problem)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more tensors")
    print(f"{'FAILS' if problems else 'holds'}: {claim}")


if __name__ == "__main__":
    sys.exit(main())
