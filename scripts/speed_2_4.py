"""What 2:4 saves: time of products and of a forward pass, and bytes on disk.

    python scripts/speed_2_4.py out/gblm-2-4/model
    python scripts/speed_2_4.py out/gblm-2-4/model \\
        --against demo/SmolLM2-135M-Instruct

Times are those of torch's semi-structured tensors, and need a GPU whose tensor
cores skip zeros (NVIDIA Ampere or newer); without one, only bytes are measured.
"zipped" is zstd where it is installed (Python 3.14, or pip install zstandard),
else zlib. "packed" is computed and not written: it counts every weight that is
not zero, and one bit for each weight, zero or not (for 2:4 the kernels store as
much). compressed-tensors wrote such files until it dropped sparse formats; its
version 0.20 does not read them.
"""

import argparse
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.errors import Refusal
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files import fetch
from lib.models.files.checkpoint import Checkpoint

AMPERE = (8, 0)  # compute capability
REPEATS = 20  # of a measurement, whose median counts
PIECE = 2**24  # bytes that are compressed at a time


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub name of a 2:4 model")
    parser.add_argument("--against", metavar="DENSE", help="model that it was pruned from, whose bytes are measured as well")
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=flags.at_least(1),
        default=[1, 128, 2048],
        metavar="N",
        help="numbers of tokens in one product (default: 1 128 2048)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        default="float16",
        help="number format of the products (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the Python code that comes in the model's own folder"
    )
    parser.add_argument("--cache_dir", metavar="DIR", help="where downloads are kept (default: the hub's own cache)")
    args = parser.parse_args(argv)
    try:
        loading.resolve_device(args.device)
        for name in filter(None, (args.checkpoint, args.against)):
            fetch.check_name(name)
    except Refusal as error:
        parser.error(str(error))
    return args


def main(args: argparse.Namespace) -> None:
    """Measure times, where that is possible, and then bytes."""
    device = loading.resolve_device(args.device)
    folders = {
        name: fetch.folder(name, cache_dir=args.cache_dir, weights=True)
        for name in filter(None, (args.against, args.checkpoint))
    }
    if missing := missing_kernels(device):
        print(f"times are left out: {missing}")
    else:
        decoder = loading.load(
            folders[args.checkpoint], dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code
        )
        compare_times(decoder, args.tokens)
    for name, folder in folders.items():
        by_kind = sizes(folder, args.trust_remote_code)
        print(f"{name}: {', '.join(f'{kind} {size / 1e6:.1f} MB' for kind, size in by_kind.items())}")


def missing_kernels(device: torch.device) -> str:
    """Why 2:4 products cannot be faster on a device; empty if they can."""
    if device.type != "cuda":
        return "2:4 kernels are for NVIDIA GPUs, and this is a CPU"
    if torch.version.hip or torch.cuda.get_device_capability(device) < AMPERE:
        return f"{torch.cuda.get_device_name(device)} has no 2:4 tensor cores, NVIDIA Ampere and newer have"
    return ""


# Times


@torch.no_grad()
def compare_times(decoder: Decoder, counts: list[int]) -> None:
    """Time products with a linear of each shape, and the forward pass before and after the 2:4 linears are converted."""
    device = decoder.device
    print(f"{torch.cuda.get_device_name(device)}, {decoder.model.dtype}, medians of {REPEATS}")
    shapes: dict[tuple[int, int], tuple[str, nn.Module]] = {}
    for name, matrix in decoder.linears(0).items():
        if isinstance(matrix.module, nn.Linear) and is_2_4(matrix.weight):
            shapes.setdefault(tuple(matrix.shape), (name, matrix.module))
    vocabulary = decoder.model.get_input_embeddings().weight.shape[0]
    for tokens in counts:
        for shape, (name, linear) in shapes.items():
            inputs = torch.randn(tokens, shape[1], device=device, dtype=linear.weight.dtype)
            try:
                sparse = to_sparse_semi_structured(linear.weight.detach())
                product = nn.functional.linear(inputs, sparse)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                print(f"{name} {shape}, {tokens} tokens: torch has no kernel for it ({str(error).splitlines()[0]})")
                continue
            expected = nn.functional.linear(inputs, linear.weight)
            error = ((product - expected).norm() / expected.norm()).item()
            times = [
                seconds(lambda weight=weight, inputs=inputs: nn.functional.linear(inputs, weight), device)
                for weight in (linear.weight, sparse)
            ]
            print_times(f"{name} {shape}, {tokens} tokens", *times, f"results differ by {error:.1e}")
    windows = [torch.randint(0, vocabulary, (1, tokens), device=device) for tokens in counts]
    dense = [seconds(lambda window=window: decoder.model(window, use_cache=False), device) for window in windows]
    converted, linears = convert(decoder)
    print(f"{converted} of {linears} linears converted")
    for window, before in zip(windows, dense, strict=True):
        after = seconds(lambda window=window: decoder.model(window, use_cache=False), device)
        print_times(f"forward pass, {window.shape[1]} tokens", before, after)


def convert(decoder: Decoder) -> tuple[int, int]:
    """Store every 2:4 linear for whose shape there is a kernel as a semi-structured tensor; returns (how many, of how many)."""
    converted = total = 0
    for i in range(len(decoder)):
        for matrix in decoder.linears(i).values():
            total += 1
            if isinstance(matrix.module, nn.Linear) and is_2_4(matrix.weight):
                try:
                    sparse = to_sparse_semi_structured(matrix.weight.detach())
                except (RuntimeError, ValueError):  # a shape that no kernel takes
                    continue
                matrix.module.weight = nn.Parameter(sparse, requires_grad=False)
                converted += 1
    return converted, total


def is_2_4(weight: torch.Tensor) -> bool:
    """Whether every four consecutive inputs of a weight (out, in) have at least two zeros."""
    return weight.shape[1] % 4 == 0 and bool(((weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all())


def seconds(run: Callable, device: torch.device) -> float:
    """The median time of REPEATS calls, after three that warm up."""
    times = []
    for k in range(REPEATS + 3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        if k >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def print_times(what: str, dense: float, sparse: float, remark: str = "") -> None:
    print(f"{what}: dense {1e3 * dense:.3f} ms, 2:4 {1e3 * sparse:.3f} ms, {dense / sparse:.2f} x", remark, flush=True)


# Bytes


def sizes(name: str, trust_remote_code: bool = False) -> dict[str, int]:
    """Bytes of a checkpoint's weights: plain, zipped, and with every matrix of the blocks packed."""
    checkpoint = Checkpoint(name)
    compression, compressor = best_compressor()
    plain = zipped = saved = 0
    for path in checkpoint.shards.values():
        plain += path.stat().st_size
        stream = compressor()
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                zipped += len(stream.compress(piece))
        zipped += len(stream.flush())
    decoder = loading.on_disk(name, trust_remote_code=trust_remote_code)
    for i, prefix in enumerate(decoder.prefixes):
        for tensor in sorted({f"{prefix}{matrix.tensor_name}" for matrix in decoder.linears(i).values()}):
            weight = decoder.source[tensor]
            packed = torch.count_nonzero(weight).item() * weight.element_size() + weight.numel() // 8
            saved += max(0, weight.numel() * weight.element_size() - packed)  # a dense matrix stays as it is
    return {"plain": plain, f"zipped ({compression})": zipped, "packed": plain - saved}


def best_compressor() -> tuple[str, Callable]:
    """The name of a compression, and a function that makes an object with `compress` and `flush`."""
    try:
        from compression import zstd  # Python 3.14

        return "zstd", zstd.ZstdCompressor
    except ImportError:
        pass
    try:
        import zstandard

        return "zstd", lambda: zstandard.ZstdCompressor().compressobj()
    except ImportError:
        return "zlib", zlib.compressobj


if __name__ == "__main__":
    command.run(parse, main)
