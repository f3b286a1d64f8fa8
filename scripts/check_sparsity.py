"""Check a pruned checkpoint: sparsity of every linear, an N:M pattern, and that every surviving weight is the dense model's.

    python scripts/check_sparsity.py out/model --pattern 2:4 --against meta-llama/Llama-2-7b-hf

Exits with 1 if the pattern or the comparison does not hold, and says where; with 2 if it cannot be checked. Weights are read
from the mapped files, a piece at a time, so any size of model can be checked. SparseGPT updates the weights it keeps, and its
checkpoints say so: of them, --against compares what was not pruned.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import flags
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files import fetch
from lib.models.matrices import kind_of
from lib.pruning.masks import Sparsity
from lib.pruning.targets import Targets, select

PIECE = 2**24  # weights read at a time
SHOWN = 20  # of many problems
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pieces(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a tensor, as a matrix of about PIECE elements."""
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    rows = max(1, PIECE // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        yield start, matrix[start : start + rows]


def count_zeros(weight: torch.Tensor) -> int:
    return weight.numel() - sum(torch.count_nonzero(rows).item() for _, rows in pieces(weight))


def true_ones(mask: torch.Tensor) -> tuple[int, int, int]:
    """How many entries of a matrix are True, and row and column of the first."""
    return torch.count_nonzero(mask).item(), *divmod(mask.flatten().view(torch.uint8).argmax().item(), mask.shape[1])


def violations(weight: torch.Tensor, n: int, m: int) -> str:
    """What breaks N:M in a matrix: groups of `m` inputs with fewer than `n` zeros. Empty if nothing does."""
    count, first = 0, ""
    for start, rows in pieces(weight):
        zeros = (rows == 0).view(len(rows), -1, m).sum(dim=-1)
        found, row, group = true_ones(zeros < n)
        if found and not count:
            first = f"row {start + row}, inputs {group * m} to {group * m + m - 1}: {zeros[row, group].item()} zeros"
        count += found
    return f"{count} groups of {m} with fewer than {n} zeros, the first in {first}" if count else ""


def changes(tensor: torch.Tensor, dense: torch.Tensor, may_be_zero: bool) -> str:
    """How a tensor differs from the dense model's, bit by bit; zeros may differ in a pruned linear. Empty if it does not."""
    if tensor.shape != dense.shape or tensor.dtype != dense.dtype:
        return f"{tuple(tensor.shape)} in {tensor.dtype}, the dense model's is {tuple(dense.shape)} in {dense.dtype}"
    bits, count, first = BITS[tensor.element_size()], 0, ""
    for (start, rows), (_, expected) in zip(pieces(tensor), pieces(dense), strict=True):
        differs = rows.contiguous().view(bits) != expected.contiguous().view(bits)
        if may_be_zero:
            differs &= rows != 0
        found, row, column = true_ones(differs)
        if found and not count:
            first = f"row {start + row}, column {column}: {rows[row, column].item()}, dense {expected[row, column].item()}"
        count += found
    return f"{count} of {tensor.numel()} values are not the dense model's, the first in {first}" if count else ""


def report(decoder: Decoder, pattern: Sparsity | None, targets: Targets) -> list[str]:
    """Print the sparsity of every linear of a checkpoint; returns what breaks the pattern in the linears of `targets`."""
    broken, zeros, total = [], Counter(), Counter()
    header: list[str] = []
    for i in range(len(decoder)):
        read: dict[str, torch.Tensor] = {}
        found, size = Counter(), Counter()  # of the matrices of one kind: those of all experts are one
        for name, matrix in decoder.linears(i).items():
            if matrix.tensor_name not in read:
                read = {matrix.tensor_name: decoder.source[decoder.prefixes[i] + matrix.tensor_name]}
            weight = matrix.of(read[matrix.tensor_name])
            found[kind_of(name)] += count_zeros(weight)
            size[kind_of(name)] += weight.numel()
            if pattern and name in targets.get(i, {}) and (problem := violations(weight, pattern.n, pattern.m)):
                broken.append(f"{decoder.prefixes[i]}{name}: {problem}")
        if list(size) != header:  # once, unless blocks differ in their linears
            header = list(size)
            print("block", *header)
        print(f"{i:<5}", *(f"{found[kind] / size[kind]:.4f}".ljust(len(kind)) for kind in header), flush=True)
        zeros.update(found)
        total.update(size)
    zeros, total = zeros.total(), total.total()
    print(f"sparsity {zeros / total:.4f} over {total} weights of the blocks' linears")
    return broken


def compare(decoder: Decoder, dense: Decoder) -> list[str]:
    """What the files of a checkpoint have that the dense model's have not, apart from zeros in the blocks' linears.

    If the files say that survivors were updated, the values of pruned linears are not compared.
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


def opened(name: str, args: argparse.Namespace) -> Decoder:
    folder = fetch.folder(name, cache_dir=args.cache_dir, weights=True)
    return loading.on_disk(folder, trust_remote_code=args.trust_remote_code)


def main(argv: list[str] | None = None) -> bool:
    """Check what the flags ask for; returns whether anything fails."""
    parser = flags.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder or hub name of the pruned model, in safetensors")
    parser.add_argument("--pattern", help="N:M, at least N zeros in every M consecutive inputs, such as 2:4")
    parser.add_argument("--against", metavar="DENSE", help="folder or hub name of the model it was pruned from")
    flags.add_selection_flags(parser)
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a model's own folder brings")
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
        parser.error("--include and --exclude choose what --pattern is checked on: add it")
    try:
        decoder = opened(args.checkpoint, args)
        dense = opened(args.against, args) if args.against else None
        targets = select(decoder, pattern, include=args.include, exclude=args.exclude) if pattern else {}
    except (ValueError, OSError) as error:
        parser.error(str(error))

    failed = False
    broken = report(decoder, pattern, targets)
    if pattern:
        show(broken, f"at least {pattern.n} zeros in every {pattern.m} inputs of {sum(map(len, targets.values()))} linears")
        failed |= bool(broken)
    if dense:
        changed = compare(decoder, dense)
        rest = (
            "what was not pruned (survivors were updated, its files say)"
            if decoder.source.checkpoint.updated
            else "every other weight"
        )
        show(changed, f"{rest} is bit-identical to {args.against}")
        failed |= bool(changed)
    return failed


def show(problems: list[str], claim: str) -> None:
    for problem in problems[:SHOWN]:
        print(problem)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more tensors")
    print(f"{'FAILS' if problems else 'holds'}: {claim}")


if __name__ == "__main__":
    sys.exit(main())
