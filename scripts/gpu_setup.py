"""What the parts of scripts/gpu_check.py share: a small model and a text, the two commands, and what is expected of them."""

import json
import logging
import math
import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # accelerator.py
sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_checkpoint import write_tokenizer

import gradient_computation
import main as pruning
from lib.gradients.folder import GradientNorms

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"gradient_computation.py": gradient_computation, "main.py": pruning}
SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8}  # of the small model
SMALLER = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}  # in a rehearsal
BLOCKS, VOCABULARY = 3, 512  # of both


class Failed(Exception):
    """A part found something that must not be."""


def expect(condition: bool, message: str) -> None:
    """Print a message; raise Failed with it if its condition does not hold."""
    print(message, flush=True)
    if not condition:
        raise Failed(message)


@dataclass
class Setup:
    """Where a part runs: `device` as --device has it, a `folder` with the small model and a text, `blocks` of the large one."""

    device: str
    folder: Path
    blocks: int
    memory: str = ""  # --memory of the command that runs
    phases: list[tuple[str, str, str]] = field(default_factory=list)  # that were logged: (memory, phase, figures)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def model(self) -> Path:
        return self.folder / "small"

    @property
    def text(self) -> Path:
        return self.folder / "text.jsonl"

    @property
    def others(self) -> str:
        """The device of a process that this one starts: no other process knows the stand-in."""
        return self.device if self.on_gpu else "cpu"


def prepare(setup: Setup) -> None:
    """Write the small model, in float16 and with a tokenizer that splits text into bytes, and 16 documents of random letters."""
    config = LlamaConfig(
        **(SIZES if setup.on_gpu else SMALLER), num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, max_position_embeddings=4096
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)  # a new model's weights are so small that hardly any matters
    model.half().save_pretrained(setup.model)
    write_tokenizer(setup.model)
    rng = random.Random(0)
    documents = ("".join(rng.choices("abcdefgh ", k=3000)) for _ in range(16))
    setup.text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    (setup.folder / "short.txt").write_text("".join(rng.choices("abcdefgh ", k=9000 if setup.on_gpu else 700)))


class Listener(logging.Handler):
    """Prints the phases that commands log, and notes them in a setup."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.setup = setup

    def emit(self, record: logging.LogRecord) -> None:
        phase, _, figures = record.getMessage().partition(": ")
        self.setup.phases.append((self.setup.memory, phase, figures))
        print(f"{self.setup.memory:>9} {phase:<18} {figures}", flush=True)


def peak(setup: Setup) -> float:
    """The most GPU memory that this process has held at a time, in GB, of what torch knows."""
    peaks = [float(found[1]) for *_, figures in setup.phases if (found := re.search(r"peak_gpu_gb ([\d.]+)", figures))]
    return max([*peaks, torch.cuda.max_memory_allocated() / 1e9 if setup.on_gpu else 0.0])


def in_words(setup: Setup) -> str:
    """The seconds, and the GPU memory, of the phases that were logged."""
    words: dict[str, list[str]] = {}
    for memory, phase, figures in setup.phases:
        numbers = dict(figure.split() for figure in figures.split(", "))
        gb = f" {numbers['peak_gpu_gb']} GB" if "peak_gpu_gb" in numbers else ""
        words.setdefault(memory, []).append(f"{phase} {numbers['seconds']} s{gb}")
    return "; ".join(f"{memory}: {', '.join(phases)}" for memory, phases in words.items())


def command(setup: Setup, script: str, *arguments) -> None:
    """Run a command in this process, on the setup's device."""
    given = [*arguments, "--cache_dir", setup.folder / "cache", "--device", setup.device]
    COMMANDS[script].main(COMMANDS[script].parse([str(argument) for argument in given]))


def execute(*arguments) -> str:
    """Run Python in the repository, printing what it prints; returns the last line. Raises Failed if it fails."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    if process.wait():
        raise Failed(f"{' '.join(map(str, arguments[:4]))} ...: status {process.returncode}, {last}")
    return last


def both_commands(setup: Setup, out: Path, *flags, model: Path | None = None) -> dict:
    """Gradients, then gblm 2:4 with them, of the small model or another; returns results.json of `out`."""
    common = ["--model", model or setup.model, "--dataset", setup.text, *flags]
    command(setup, "gradient_computation.py", *common, "--norms", "l2", "--output_dir", out)
    command(
        setup, "main.py", *common, "--prune_method", "gblm", "--sparsity_type", "2:4", "--gradient_path", stored(out), "--force",
        "--eval_dataset", setup.folder / "short.txt", "--no_cache", "--save", out, "--save_model", out / "model",
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    found = [float(results["perplexity"][name]) for name in ("dense", "pruned")]
    expect(all(map(math.isfinite, found)), f"perplexities {found[0]:.3f} and {found[1]:.3f} are finite")
    expect(abs(results["sparsity"] - 0.5) < 1e-3, f"sparsity {results['sparsity']:.4f}")
    return results


def stored(folder: Path) -> Path:
    """The l2 norms that a command has stored somewhere in a folder."""
    return next(folder.rglob("*_l2_*"))


def norms_in(folder: Path) -> dict[tuple[int, str], torch.Tensor]:
    """Their tensors, in float32."""
    gradients = GradientNorms(stored(folder))
    return {(i, name): norm.float() for i in range(BLOCKS) for name, norm in gradients.block(i).items()}


def largest_difference(expected: dict, found: dict) -> float:
    """The largest of the differences between tensors, each relative to the Frobenius norm of the one expected."""
    if expected.keys() != found.keys():
        raise Failed("there are tensors of other names")
    return max(((found[key] - tensor).norm() / tensor.norm()).item() for key, tensor in expected.items())
