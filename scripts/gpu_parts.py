"""The parts of scripts/gpu_check.py: each prints what it finds, and returns it in a few words for the table."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_setup import Failed, Setup, both_commands, command, execute, expect, in_words, largest_difference, norms_in, stored

from lib import parallel
from lib.evaluation.perplexity import perplexity
from lib.gradients.walk import gradient_norms
from lib.models import loading
from lib.models.files.checkpoint import Checkpoint
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS, Settings
from lib.pruning.prune import prune
from lib.pruning.targets import select
from lib.pruning.updates.recipe import PUBLISHED, RECIPES, Recipe

ONE_TILE = 64  # tokens; beyond them attention's backward may add up in any order, and two runs differ in the last bits
NORM_TOLERANCE = 1e-3  # of the Frobenius norm of a linear's gradient norms: two devices round differently in float32
FLOAT16_TOLERANCE = 0.05  # the same, between float16 and float32
MASKS_ALIKE = 0.999  # share of the first block's mask bits that agree at least: the others are near ties
SOLVED_ALIKE = 0.98  # the same where a solver feeds rounding back
PERPLEXITY_TOLERANCE = 0.01
ERROR_TOLERANCE = 0.05  # of a linear's relative error in the first block, after an update


def tests(setup: Setup) -> str:
    workers = min(os.cpu_count(), 4)
    return execute("-m", "pytest", "-m", "not slow", "-n", workers, "-rfE", "--tb=short", "--device", setup.device)


def windows() -> torch.Tensor:
    return torch.randint(3, 250, (8, 128), generator=torch.Generator().manual_seed(0))


def load(setup: Setup, device: str):
    return loading.load(str(setup.model), dtype="float32", device=device)


@dataclass
class Pruned:
    """The mask bits of the first block and the errors of its linears after the update, and the model's perplexity."""

    mask: torch.Tensor
    errors: dict[str, float]
    perplexity: float


def pruned(setup: Setup, device: str, method: str, pattern: str, recipe: Recipe, gradients) -> Pruned:
    decoder = load(setup, device)
    settings = Settings(method, select(decoder, Sparsity.parse(pattern, 0.5)), recipe=recipe)
    first, *_ = [block.errors for block in prune(decoder, windows(), settings, gradients=gradients)]
    mask = torch.cat([(linear.weight == 0).flatten() for linear in decoder.linears(0).values()]).cpu()
    return Pruned(mask, {name: values[1] for name, values in first.items()}, perplexity(decoder, windows()))


def compare_pruned(setup: Setup, method: str, pattern: str, recipe: Recipe = PUBLISHED, name="", gradients=None) -> float:
    """Prune on the CPU and on the device; returns the share of mask bits that agree."""
    here, there = (pruned(setup, device, method, pattern, recipe, gradients) for device in ("cpu", setup.device))
    alike = (here.mask == there.mask).float().mean().item()
    changed = METHODS[method].solver or recipe.changes_survivors
    apart = max((abs(there.errors[linear] / error - 1) for linear, error in here.errors.items()), default=0.0)
    expect(
        alike >= (SOLVED_ALIKE if changed else MASKS_ALIKE)
        and apart < ERROR_TOLERANCE
        and abs(there.perplexity / here.perplexity - 1) < PERPLEXITY_TOLERANCE,
        f"{name or method:>9} {pattern:<12} {100 * alike:.4f} % of the first block's mask bits agree, errors of its linears differ "
        f"by {100 * apart:.2f} % at most, perplexity {there.perplexity:.3f} (CPU {here.perplexity:.3f})",
    )
    return alike


def compare(setup: Setup) -> str:
    def norms(device: str) -> dict:
        walk = gradient_norms(load(setup, device), windows())
        return {(i, name): norm.cpu() for i, sums in walk for name, norm in sums.result("l2").items()}

    expected = norms("cpu")
    worst = largest_difference(expected, norms(setup.device))
    expect(worst < NORM_TOLERANCE, f"gradient norms differ by at most {worst:.1e} of their size")

    def gradients(i: int) -> dict[str, torch.Tensor]:
        return {name: norm for (block, name), norm in expected.items() if block == i}

    alike = {
        method: min(compare_pruned(setup, method, pattern, gradients=gradients) for pattern in ("unstructured", "2:4"))
        for method in METHODS
    }
    masks = ", ".join(f"{method} {100 * share:.2f} %" for method, share in alike.items())
    return f"norms differ by {worst:.1e} at most; mask bits alike: {masks}"


def updates(setup: Setup) -> str:
    alike = {name: compare_pruned(setup, "wanda", "2:4", recipe, name) for name, recipe in RECIPES.items()}
    alike["obs"] = compare_pruned(setup, "wanda", "2:4", Recipe("obs"), "obs")
    alike["sparsegpt"] = compare_pruned(setup, "sparsegpt", "2:4")
    return f"mask bits alike: {', '.join(f'{name} {100 * share:.2f} %' for name, share in alike.items())}"


def float16(setup: Setup) -> str:
    flags, exact = ["--nsamples", 8, "--seq_length", 128], setup.folder / "float32"
    results = both_commands(setup, setup.folder / "float16", *flags, "--dtype", "float16")
    common = ["--model", setup.model, "--dataset", setup.text, *flags, "--norms", "l2", "--output_dir", exact]
    command(setup, "gradient_computation.py", *common, "--dtype", "float32")
    worst = largest_difference(norms_in(exact), norms_in(setup.folder / "float16"))
    expect(worst < FLOAT16_TOLERANCE, f"gradient norms in float16 differ from those in float32 by {worst:.1e} at most")
    return (
        f"norms differ by {worst:.1e} at most; perplexity {results['perplexity']['pruned']:.1f}, sparsity {results['sparsity']}"
    )


def processes(setup: Setup) -> str:
    several = 2 if not setup.on_gpu or torch.cuda.device_count() > 1 else 1
    common = [
        "--model", setup.model, "--dataset", setup.text, "--nsamples", 8, "--seq_length", ONE_TILE, "--dtype", "float32",
        "--device", setup.others, "--cache_dir", setup.folder / "cache",
    ]  # fmt: skip
    alone, together, found = setup.folder / "alone", setup.folder / "together", []
    for out, launcher in (
        (alone, []),
        (together, ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={several}"]),
    ):
        execute(*launcher, "gradient_computation.py", *common, "--norms", "l2", "--output_dir", out)
        execute(
            *launcher, "main.py", *common, "--eval_dataset", setup.folder / "short.txt", "--no_cache", "--force", "--save", out,
            "--prune_method", "gblm", "--sparsity_type", "2:4", "--gradient_path", stored(alone),
        )  # fmt: skip
        found.append(json.loads((out / "results.json").read_text()))
        setup.phases += [("", "", f"peak_gpu_gb {phase.get('peak_gpu_gb', 0)}") for phase in found[-1]["phases"].values()]
    expect(found[1]["processes"] == several, f"{several} processes under torchrun")
    worst = largest_difference(norms_in(alone), norms_in(together))
    expect(worst < NORM_TOLERANCE, f"gradient norms under torchrun differ by {worst:.1e} at most")
    one, more = (results["perplexity"]["pruned"] for results in found)
    expect(abs(more / one - 1) < PERPLEXITY_TOLERANCE, f"pruned perplexity {more:.3f} under torchrun, {one:.3f} without")
    if setup.on_gpu and several == 1:
        group_of_one(setup)
        return f"one process, as there is one GPU: norms differ by {worst:.1e} at most; sums over NCCL in a group of one"
    return f"{several} processes over {'NCCL' if setup.on_gpu else 'gloo'}: norms differ by {worst:.1e} at most"


def group_of_one(setup: Setup) -> None:
    """What lib/parallel.py asks of NCCL, and of gloo beside it, in a group of this process alone."""
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{setup.folder}/group", rank=0, world_size=1)
    for device in ("cuda", "cpu"):
        total = torch.arange(4.0, device=device)
        parallel.add_up(total)
        parallel.add_up_at(total, 0)
        expect(total.tolist() == [0, 1, 2, 3], f"sums of a group of one on {device}")
    expect(parallel.gather("x") == ["x"], "objects of a group of one")
    parallel.stop()


def streamed(setup: Setup) -> str:
    flags, found = ["--nsamples", 8, "--seq_length", ONE_TILE], []
    for dtype in ("float32", "float16"):
        for setup.memory in ("resident", "streamed"):
            out = setup.folder / f"{dtype}-{setup.memory}"
            results = both_commands(setup, out, *flags, "--dtype", dtype, "--memory", setup.memory)
            weights = {("saved", name): tensor for name, tensor in Checkpoint(str(out / "model")).items()}
            found.append(({**norms_in(out), **weights}, results["perplexity"]["pruned"]))
        (here, one), (there, other) = found[-2:]
        same = here.keys() == there.keys() and all(torch.equal(tensor, there[key]) for key, tensor in here.items())
        expect(same and one == other, f"{dtype}: {len(here)} tensors and the perplexity, {one:.4f} and {other:.4f}, are equal")
    return "the same bits in float32 and in float16"


def make_large(setup: Setup, name: str, blocks: int, *flags) -> Path:
    """A random model of LLaMA-2-7B's shape; the small model in a rehearsal."""
    if not setup.on_gpu:
        return setup.model
    made = setup.folder / name
    execute("scripts/benchmarks/make_checkpoint.py", made, "--device", setup.device, "--blocks", blocks, *flags)
    return made


def large(setup: Setup) -> str:
    model, length = make_large(setup, "large", setup.blocks), 2048 if setup.on_gpu else 256
    for setup.memory in ("resident", "streamed"):
        out = setup.folder / "large-out"
        both_commands(
            setup, out, "--nsamples", 4, "--seq_length", length, "--dtype", "float16", "--memory", setup.memory, model=model
        )
        shutil.rmtree(out)
    if setup.on_gpu:
        shutil.rmtree(model)
    return f"{f'{setup.blocks} blocks' if setup.on_gpu else 'the small model'}: {in_words(setup)}"


def speed_2_4(setup: Setup) -> str:
    import speed_2_4 as script

    model, out = make_large(setup, "one-block", 1, "--vocabulary", 2048), setup.folder / "speed"
    length = 2048 if setup.on_gpu else 256
    command(
        setup, "main.py", "--model", model, "--prune_method", "magnitude", "--sparsity_type", "2:4", "--seq_length", length, "--force",
        "--eval_dataset", setup.folder / "short.txt", "--no_cache", "--save_model", out,
    )  # fmt: skip
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        script.main(script.parse([str(out), "--device", setup.device]))
    print(printed.getvalue(), flush=True)
    lines = printed.getvalue().splitlines()
    if not setup.on_gpu:
        return lines[0]
    if not (timed := [line for line in lines if line.startswith("forward pass")]):
        raise Failed(f"there are no times: {lines[0]}")
    return timed[-1]


@dataclass(frozen=True)
class Part:
    """What runs, its limit in seconds on a GPU, and what it compares."""

    run: Callable[[Setup], str]
    seconds: int
    compares: str


PARTS = {
    "tests": Part(tests, 480, "the fast tests, with their models on the device"),
    "compare": Part(
        compare, 90, "gradient norms, and every method's masks and perplexities, unstructured and 2:4: with the CPU's"
    ),
    "updates": Part(updates, 120, "every recipe, `obs` and `sparsegpt`, 2:4: masks, errors and perplexities with the CPU's"),
    "float16": Part(float16, 60, "both commands in float16: finite, and gradient norms with those in float32"),
    "processes": Part(processes, 120, "both commands under torchrun, with one process without it"),
    "streamed": Part(streamed, 60, "both commands with the blocks in memory, and streamed from files: bit for bit"),
    "large": Part(large, 180, "both commands on a random model of LLaMA-2-7B's shape, resident and streamed"),
    "speed_2_4": Part(speed_2_4, 120, "a block of LLaMA-2-7B's shape: forward pass dense, and through 2:4 kernels"),
}
