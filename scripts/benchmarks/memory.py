"""Peak memory of the gradient command and of a naive restatement in float32, each measured in a new process.

    python scripts/benchmarks/memory.py --model demo/SmolLM2-135M-Instruct

The restatement is a backward pass of the whole model with both sums in memory (`naive_gradients` of speed.py).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAIVE = """
import sys, torch
sys.path[:0] = ["scripts/benchmarks", "."]
from speed import naive_gradients
from lib.data.sources import documents
from lib.data.windows import calibration_windows
from lib.models import loading
from lib.models.tokenizer import load_tokenizer
name, dataset, n, length = sys.argv[1:]
windows = calibration_windows(documents(dataset), load_tokenizer(name), int(n), int(length), 0)
decoder = loading.load(name, dtype="float32", device="cpu")
linears = {f"{i}.{key}": linear for i in range(len(decoder)) for key, linear in decoder.linears(i).items()}
naive_gradients(decoder.model, linears, windows)
"""


def peak(*arguments: str) -> float:
    """Run Python; returns the peak resident set of the process, in GB."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{arguments[:2]} ended with status {status}")
    return usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="folder or hub name (default: %(default)s)")
    parser.add_argument("--dataset", default="demo/calibration.jsonl", help="calibration text (default: %(default)s)")
    parser.add_argument("--nsamples", default="8", help="number of samples (default: %(default)s)")
    parser.add_argument("--seq_length", default="2048", help="tokens in a sample (default: %(default)s)")
    args = parser.parse_args()
    naive = peak("-c", NAIVE, args.model, args.dataset, args.nsamples, args.seq_length)
    print(f"naive, float32                       {naive:6.2f} GB", flush=True)
    flags = ["--model", args.model, "--dataset", args.dataset, "--nsamples", args.nsamples, "--seq_length", args.seq_length]
    with tempfile.TemporaryDirectory() as folder:
        for memory, label in (("resident", "the graph kept"), ("streamed", "recomputing")):
            ours = peak("gradient_computation.py", *flags, "--memory", memory, "--output_dir", folder)
            print(f"ours, default dtype, {label:<15} {ours:6.2f} GB   {ours / naive:.2f} of naive", flush=True)


if __name__ == "__main__":
    main()
