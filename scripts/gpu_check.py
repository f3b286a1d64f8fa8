"""Check what only a GPU can prove; it takes minutes, and no network or model.

    bash scripts/gpu_check.sh
    python scripts/gpu_check.py --device cpu --blocks 2  # a rehearsal

1. the fast tests, with the models on the GPU
2. gradients, masks and perplexities of a small random model, compared with the
   CPU's
3. gradients of two processes over NCCL, compared with one's, if there are two
   GPUs
4. both commands on a random model of LLaMA-2-7B's shape, resident and streamed,
   with the seconds and peak memory of every phase

The 32 blocks of LLaMA-2-7B take 45 GB in --folder, which are freed at the end.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.evaluation.perplexity import perplexity
from lib.gradients.folder import GradientNorms
from lib.gradients.walk import gradient_norms
from lib.models import loading
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS, Settings
from lib.pruning.prune import prune
from lib.pruning.targets import select

ROOT = Path(__file__).resolve().parents[1]
LLAMA_2_7B = {"hidden": 4096, "intermediate": 11008, "heads": 32, "vocabulary": 32000}
SMALL = {"hidden": 256, "intermediate": 688, "heads": 8, "vocabulary": 512}
GB_PER_BLOCK = 1.3  # of disk, at the full shape: weights, gradient norms and a pruned checkpoint in 16 bits, and some room
NORM_TOLERANCE = 1e-3  # of the Frobenius norm of a linear's gradient norms: two devices round differently in float32
MASKS_ALIKE = 0.999  # share of the first block's mask bits that agree at least: the others are near ties
SOLVED_ALIKE = 0.98  # the same for sparsegpt, whose solver feeds rounding back
PERPLEXITY_TOLERANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu to rehearse the check with a small model (default: %(default)s)"
    )
    parser.add_argument("--blocks", type=int, default=32, help="number of blocks of the large model (default: %(default)s)")
    parser.add_argument("--folder", help="where models and results go (default: the system's temporary folder)")
    parser.add_argument("--no_tests", action="store_true", help="leave out the fast tests")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("gpu_check: there is no GPU here that torch can use; --device cpu --blocks 2 rehearses the check without one")
    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        needed, free = GB_PER_BLOCK * args.blocks + 3, shutil.disk_usage(folder).free / 1e9
        if args.device != "cpu" and free < needed:
            sys.exit(
                f"gpu_check: {folder} has {free:.0f} GB free, {args.blocks} blocks take {needed:.0f}: use --folder, or fewer --blocks"
            )
        start = time.perf_counter()
        if not args.no_tests:
            stage("fast tests")
            execute("-m", "pytest", "-m", "not slow", "-n", str(min(os.cpu_count(), 8)), "--device", args.device)
        text = write_text(Path(folder))
        stage("a small model against the CPU")
        compare_with_cpu(make(Path(folder, "small"), args.device, 3, SMALL), args.device)
        stage("two processes")
        if args.device == "cpu" or torch.cuda.device_count() > 1:
            compare_two_processes(Path(folder, "small"), text, args.device)
        else:
            print("left out: there is one GPU")
        large(Path(folder), text, args.device, args.blocks)
        print(f"\ngpu_check passed on {name_of(args.device)} in {time.perf_counter() - start:.0f} s", flush=True)


def stage(name: str) -> None:
    print(f"\n== {name}", flush=True)


def name_of(device: str) -> str:
    return "the CPU, a rehearsal" if device == "cpu" else torch.cuda.get_device_name()


def execute(*arguments: str | Path) -> str:
    """Run Python in the repository; returns its standard error, where it logs. Ends the check if it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-5000:])
        sys.exit(f"gpu_check: failed with status {done.returncode}: {' '.join(map(str, arguments))}")
    print(done.stdout.strip().rpartition("\n")[2], flush=True)
    return done.stderr


def expect(condition: bool, message: str) -> None:
    """Print a message; end the check if its condition does not hold."""
    print(message, flush=True)
    if not condition:
        sys.exit(f"gpu_check: failed: {message}")


def make(folder: Path, device: str, blocks: int, shape: dict[str, int]) -> Path:
    """Make a random model, whose tokenizer splits text into bytes."""
    flags = [part for key, value in shape.items() for part in (f"--{key}", str(value))]
    execute("scripts/benchmarks/make_checkpoint.py", folder, "--device", device, "--blocks", str(blocks), *flags)
    return folder


def write_text(folder: Path) -> Path:
    """Write 16 documents of 3,000 random letters."""
    rng, path = random.Random(0), folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": "".join(rng.choices("abcdefgh ", k=3000))}) for _ in range(16)))
    return path


def compare_with_cpu(model: Path, device: str) -> None:
    """Compare gradient norms, masks and perplexities in float32 on both devices."""
    windows = torch.randint(3, 250, (8, 256), generator=torch.Generator().manual_seed(0))

    def on(where: str):
        return loading.load(str(model), dtype="float32", device=where)

    def norms(where: str) -> dict[int, dict[str, torch.Tensor]]:
        walk = gradient_norms(on(where), windows)
        return {i: {name: norm.cpu() for name, norm in sums.result("l2").items()} for i, sums in walk}

    expected, computed = norms("cpu"), norms(device)
    worst = max(
        ((computed[i][name] - norm).norm() / norm.norm()).item()
        for i, block in expected.items()
        for name, norm in block.items()
    )
    expect(worst < NORM_TOLERANCE, f"gradient norms differ by at most {worst:.1e} of their size")

    def pruned(where: str, method: str, pattern: str) -> tuple[torch.Tensor, float]:
        decoder = on(where)
        settings = Settings(method, select(decoder, Sparsity.parse(pattern, 0.5)))
        list(prune(decoder, windows, settings, gradients=expected.get))
        first = [(linear.weight == 0).flatten() for linear in decoder.linears(0).values()]
        return torch.cat(first).cpu(), perplexity(decoder, windows)

    for method in METHODS:
        for pattern in ("unstructured", "2:4"):
            (masks, here), (others, there) = (pruned(where, method, pattern) for where in ("cpu", device))
            alike = (masks == others).float().mean().item()
            expect(
                alike >= (SOLVED_ALIKE if METHODS[method].solver else MASKS_ALIKE)
                and abs(there / here - 1) < PERPLEXITY_TOLERANCE,
                f"{method:>9} {pattern:<12} {100 * alike:.4f} % of the first block's mask bits agree, "
                f"perplexity {there:.3f} (CPU {here:.3f})",
            )


def compare_two_processes(model: Path, text: Path, device: str) -> None:
    """Compare the gradient norms that one process and two processes compute."""
    norms = []  # of one process, and of two
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        output = model.with_name(f"processes{len(norms)}")
        flags = ["--model", model, "--dataset", text, "--nsamples", "8", "--seq_length", "256", "--dtype", "float32"]
        execute(*launcher, "gradient_computation.py", *flags, "--norms", "l2", "--device", device, "--output_dir", output)
        gradients = GradientNorms(next(output.rglob("*_l2_*")))
        norms.append([norm for i in range(3) for norm in gradients.block(i).values()])
    worst = max(((a.float() - b.float()).norm() / a.float().norm()).item() for a, b in zip(*norms, strict=True))
    expect(worst < NORM_TOLERANCE, f"gradient norms of two processes differ from one's by {worst:.1e} at most")


def large(folder: Path, text: Path, device: str, blocks: int) -> None:
    """Run both commands on the large model, resident and streamed."""
    stage(f"{'LLaMA-2-7B' if device != 'cpu' else 'a small LLaMA'}, {blocks} blocks")
    model = make(folder / "large", device, blocks, LLAMA_2_7B if device != "cpu" else SMALL)
    short = folder / "short.txt"
    short.write_text(json.loads(text.read_text().partition("\n")[0])["text"] * 3)  # four windows of 2048
    length = "2048" if device != "cpu" else "256"
    common = ["--model", model, "--dataset", text, "--nsamples", "4", "--seq_length", length, "--device", device, "--force"]
    for memory in ("resident", "streamed"):
        gradients, saved = folder / "gradients", folder / "saved"
        log = execute(
            "gradient_computation.py", *common, "--memory", memory, "--norms", "l2", "--output_dir", gradients
        )  # fmt: skip
        report(memory, log)
        log = execute(
            "main.py", *common, "--memory", memory, "--eval_dataset", short, "--prune_method", "gblm", "--sparsity_type", "2:4",
            "--gradient_path", next(gradients.rglob("*_l2_*")), "--save", saved,
        )  # fmt: skip
        report(memory, log)
        sparsity = json.loads((saved / "results.json").read_text())["sparsity"]
        expect(abs(sparsity - 0.5) < 1e-3, f"sparsity {sparsity:.4f}")
        shutil.rmtree(gradients)


def report(memory: str, log: str) -> None:
    """Print the phases of a command from its log."""
    for phase, figures in re.findall(r"INFO (.+): (seconds .+)", log):
        print(f"{memory:>9} {phase:<18} {figures}", flush=True)


if __name__ == "__main__":
    main()
