"""What float16 does to gradients, with and without scaling the loss: gradients that vanish, and masks that change.

    python scripts/benchmarks/float16.py --model demo/SmolLM2-135M-Instruct

Two gradients in float16 are compared with this project's in float32: those of a plain backward pass of the whole model, as
published, and this project's. On a CPU without float16 instructions a sample of 2048 tokens takes minutes.
"""

import argparse
import sys
from pathlib import Path

import torch
from speed import naive_gradients

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.data.sources import documents
from lib.data.windows import calibration_windows
from lib.gradients.walk import SCALE, gradient_norms
from lib.models import loading
from lib.models.tokenizer import load_tokenizer
from lib.pruning.masks import Sparsity
from lib.pruning.methods import PAPER_ALPHA, Settings
from lib.pruning.prune import prune
from lib.pruning.targets import select

RATIO = 0.5  # of the masks


def norms_of(decoder, windows: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """This project's l2 norms: {block: {linear: (out, in)}}."""
    return {i: sums.result("l2") for i, sums in gradient_norms(decoder, windows, norms=("l2",), keep_graph=False)}


def plain_norms_of(decoder, windows: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """l2 norms by a plain backward pass in the model's dtype: {block: {linear: (out, in)}}."""
    linears = {(i, name): linear for i in range(len(decoder)) for name, linear in decoder.linears(i).items()}
    _, l2 = naive_gradients(decoder.model, linears, windows.to(decoder.device))
    return {i: {name: l2[i, name] for name in decoder.linears(i)} for i in range(len(decoder))}


def linears_of(decoder) -> list[torch.nn.Linear]:
    return [linear for i in range(len(decoder)) for linear in decoder.linears(i).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="folder or hub name (default: %(default)s)")
    parser.add_argument("--dataset", default="demo/calibration.jsonl", help="calibration text (default: %(default)s)")
    parser.add_argument("--nsamples", type=int, default=1, help="number of samples (default: %(default)s)")
    parser.add_argument("--seq_length", type=int, default=2048, help="tokens in a sample (default: %(default)s)")
    args = parser.parse_args()
    docs, tokenizer = documents(args.dataset), load_tokenizer(args.model)
    windows = calibration_windows(docs, tokenizer, args.nsamples, args.seq_length, seed=0)

    def masks_of(norms, method: str) -> list[torch.Tensor]:
        decoder = loading.load(args.model, dtype="float32")
        alpha = PAPER_ALPHA / SCALE
        list(prune(decoder, windows, Settings(method, select(decoder, Sparsity(RATIO)), alpha), gradients=norms.get))
        return [linear.weight == 0 for linear in linears_of(decoder)]

    # A weight that is zero in the dense model stays zero whatever the mask says, so it does not count.
    counted = [linear.weight != 0 for linear in linears_of(loading.load(args.model, dtype="float32"))]

    exact = norms_of(loading.load(args.model, dtype="float32"), windows)
    expected = {method: masks_of(exact, method) for method in ("gradient", "gblm")}
    print(f"{args.nsamples} samples of {args.seq_length} tokens, compared with float32")
    for label, compute in (("float16, loss not scaled", plain_norms_of), ("float16, loss scaled", norms_of)):
        norms = compute(loading.load(args.model, dtype="float16"), windows)
        zeros = total = 0
        for i, block in norms.items():
            for name, norm in block.items():
                zeros += ((norm == 0) & (exact[i][name] > 0)).sum().item()
                total += norm.numel()
        line = f"{label}: {100 * zeros / total:.2f} % of the norms became exactly 0"
        for method, masks in expected.items():
            triples = zip(masks_of(norms, method), masks, counted, strict=True)
            same = sum(((mask == reference) & counts).sum().item() for mask, reference, counts in triples)
            line += f", {100 * same / sum(counts.sum().item() for counts in counted):.2f} % of the mask bits of {method} agree"
        print(line, flush=True)


if __name__ == "__main__":
    main()
