"""Time this project's masks and gradients and a naive restatement in the same run, and print the ratios.

    python scripts/benchmarks/speed.py --model demo/SmolLM2-135M-Instruct

Naive masks are a Python loop over N:M groups, and a full stable sort of every row. Naive gradients are a backward pass of the
whole model in float32, with every gradient copied and accumulated twice. The two run in turn, and the median ratio is printed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.gradients.walk import SCALE, gradient_norms
from lib.models import loading
from lib.pruning import masks


def naive_n_of_m(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mask the n lowest scores of each group of m columns, group after group, by a stable sort."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], m):
        lowest = torch.sort(score[:, start : start + m], dim=1, stable=True).indices[:, :n]
        mask.scatter_(1, start + lowest, True)
    return mask


def naive_per_row(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """Mask the lowest scores of each row, by a full stable sort."""
    lowest = torch.sort(score, dim=1, stable=True).indices[:, : int(score.shape[1] * ratio)]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)


def naive_gradients(language_model: torch.nn.Module, linears: dict, windows: torch.Tensor) -> tuple[dict, dict]:
    """The l1 and the l2 norms by backward passes of the whole model, each as {name: (out, in)}."""
    language_model.requires_grad_(True)
    l1 = {name: torch.zeros_like(linear.weight, dtype=torch.float32) for name, linear in linears.items()}
    l2 = {name: torch.zeros_like(linear.weight, dtype=torch.float32) for name, linear in linears.items()}
    for window in windows:
        language_model.zero_grad()
        language_model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, linear in linears.items():
            grad = linear.weight.grad.detach().clone().float()
            l1[name] += (grad * SCALE).abs()
            l2[name] += (grad * SCALE) ** 2
    language_model.zero_grad()
    return l1, {name: total.sqrt() for name, total in l2.items()}


def seconds(function, *args, **kwargs) -> float:
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def compare(label: str, naive, ours, runs: int) -> None:
    """Run both in turn, `runs` times; print the median times, and the median of naive time / our time."""
    naive(), ours()
    pairs = [(seconds(naive), seconds(ours)) for _ in range(runs)]
    slow, fast = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{label:<34} naive {slow:8.3f} s   ours {fast:8.3f} s   {ratio:5.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="folder or hub name (default: %(default)s)")
    parser.add_argument("--nsamples", type=int, default=8, help="number of samples (default: %(default)s)")
    parser.add_argument("--seq_length", type=int, default=512, help="tokens in a sample (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="number of times that each pair is run (default: %(default)s)")
    args = parser.parse_args()

    decoder = loading.load(args.model, dtype="float32", device="cpu")
    linears = {f"{i}.{name}": linear for i in range(len(decoder)) for name, linear in decoder.linears(i).items()}
    generator = torch.Generator().manual_seed(0)
    scores = [linear.weight.abs() * torch.rand(linear.in_features, generator=generator) for linear in linears.values()]
    with torch.no_grad():
        for n, m in ((2, 4), (4, 8)):
            compare(
                f"{n}:{m} masks",
                lambda n=n, m=m: [naive_n_of_m(score, n, m) for score in scores],
                lambda n=n, m=m: [masks.n_of_m(score, n, m) for score in scores],
                args.runs,
            )
        compare(
            "50 % unstructured masks",
            lambda: [naive_per_row(score, 0.5) for score in scores],
            lambda: [masks.per_row(score, 0.5) for score in scores],
            args.runs,
        )

    windows = torch.randint(decoder.model.config.vocab_size, (args.nsamples, args.seq_length), generator=generator)

    def our_gradients(model):
        for _, sums in gradient_norms(model, windows):
            sums.result("l1"), sums.result("l2")

    default = loading.load(args.model, device="cpu")
    for label, model in (("float32", decoder), (f"default, {default.model.dtype}".replace("torch.", ""), default)):
        compare(
            f"gradients ({label})",
            lambda: naive_gradients(decoder.model, linears, windows),
            lambda model=model: our_gradients(model),
            args.runs,
        )


if __name__ == "__main__":
    main()
