"""Check what only a GPU can prove; it takes minutes, and no network or model.

    bash scripts/gpu_check.sh
    python scripts/gpu_check.py --part compare updates
    python scripts/gpu_check.py --device cpu --part compare  # a rehearsal

Every part runs in a process of its own, and has a time limit; after one that
fails, the next ones run all the same. At the end the findings are printed as a
Markdown table, and the status is 1 if a part has failed. Without a GPU, a
rehearsal takes a small model: --device cpu, or standin, the tests' stand-in.

A block of LLaMA-2-7B takes 1.3 GB in --folder, which are freed at the end.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_parts import PARTS, Part
from gpu_setup import Listener, Setup, peak, prepare
from transformers.utils.logging import disable_progress_bar

GB_PER_BLOCK = 1.3  # of disk, at the full shape: weights, gradient norms and a pruned checkpoint in 16 bits, and some room
REHEARSAL = 10  # times as long a part may take where there is no GPU


@dataclass
class Finding:
    """A row of the table; `peak` is in GB, 0 where it is not known."""

    name: str
    compares: str
    passed: bool
    said: str
    seconds: float
    peak: float


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="NAME",
        help=f"run only these parts, of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu or standin to rehearse (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="number of blocks of the large model (default: %(default)s)")
    parser.add_argument("--folder", help="where models and results go (default: the system's temporary folder)")
    return parser.parse_args(argv)


def require_room(args: argparse.Namespace) -> None:
    """End with one line where there is no GPU, or no room for the large model."""
    if not args.device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        sys.exit("gpu_check: there is no GPU here that torch can use: --device cpu rehearses the check without one")
    needed, free = GB_PER_BLOCK * args.blocks + 3, shutil.disk_usage(args.folder or tempfile.gettempdir()).free / 1e9
    if free < needed:
        sys.exit(f"gpu_check: {free:.0f} GB are free, {args.blocks} blocks take {needed:.0f}: use --folder, or fewer --blocks")


def main(args: argparse.Namespace) -> int:
    """Run the parts that are asked for, and print the table; returns the exit status."""
    require_room(args)
    with tempfile.TemporaryDirectory(dir=args.folder, ignore_cleanup_errors=True) as folder:
        setup = Setup(args.device, Path(folder), args.blocks)
        prepare(setup)
        findings = []
        for name in args.part:
            print(f"\n== {name}: {PARTS[name].compares}", flush=True)
            findings.append(run(name, PARTS[name], setup))
            print(f"== {name} {'passed' if findings[-1].passed else 'FAILED'}: {findings[-1].said}", flush=True)
    print(f"\n{table(findings, args.device)}", flush=True)
    return int(not all(finding.passed for finding in findings))


def run(name: str, part: Part, setup: Setup) -> Finding:
    """Run a part in a process of its own, and end that with all that it has started when its time is over."""
    limit = part.seconds * (1 if setup.on_gpu else REHEARSAL)
    start, answer = time.perf_counter(), setup.folder / f"{name}.json"
    process = torch.multiprocessing.get_context("spawn").Process(target=inside, args=(part, setup, answer))
    process.start()
    try:
        process.join(limit)
    finally:
        if late := process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # where it is so young that it leads no group
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    seconds = time.perf_counter() - start
    if answer.exists():
        return Finding(name, part.compares, **json.loads(answer.read_text()), seconds=seconds)
    said = f"not done after {limit} s" if late else f"its process ended with status {process.exitcode}"
    return Finding(name, part.compares, False, said, seconds, 0.0)


def inside(part: Part, setup: Setup, answer: Path) -> None:
    """What the process of a part does: run it, and write {passed, said, peak} to `answer`."""
    os.setpgrp()
    disable_progress_bar()
    if setup.device == "standin":
        import accelerator

        accelerator.install()
    logger = logging.getLogger("lib.results.phases")
    logger.setLevel(logging.INFO)
    logger.addHandler(Listener(setup))
    try:
        said, passed = part.run(setup), True
    except (Exception, SystemExit) as error:  # whatever it is, the other parts are to run
        traceback.print_exc()
        said, passed = f"{type(error).__name__}: {error}", False
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps({"passed": passed, "said": said, "peak": peak(setup)}))
    partial.rename(answer)


def table(findings: list[Finding], device: str) -> str:
    """The findings in Markdown, under a line that says what they were made with."""
    lines = [
        f"{name_of(device)}:",
        "",
        "| part | what was compared | result | seconds | peak GPU GB |",
        "|---|---|---|---|---|",
    ]
    for one in findings:
        said = " ".join(one.said.replace("|", "/").split())[:600]
        gb = f"{one.peak:.2f}" if one.peak else ""
        lines.append(
            f"| {one.name} | {one.compares} | {'passed' if one.passed else '**failed**'}: {said} | {one.seconds:.0f} | {gb} |"
        )
    return "\n".join(lines)


def name_of(device: str) -> str:
    """The card, or the processor of a rehearsal, and the versions."""
    where, versions = f"A rehearsal on {device}", f"Python {platform.python_version()}, torch {torch.__version__}"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        where = f"{torch.cuda.get_device_name(device)}{f', {count} of them' if count > 1 else ''}"
        versions += f", CUDA {torch.version.cuda}"
    return f"{where}, {versions}"


if __name__ == "__main__":
    sys.exit(main(parse()))
