"""scripts/gpu_check.py, rehearsed without a GPU: the parts pass, one that fails leaves the others running, the table tells both."""

import os
import subprocess
import sys
import time

import gpu_check
import pytest
from conftest import ROOT
from gpu_parts import PARTS, Part
from gpu_setup import Failed, Setup, expect

QUICK = ["compare", "speed_2_4"]  # what the fast tier has time for


def passes(setup: Setup) -> str:
    assert setup.model.is_dir() and setup.text.is_file()
    return "it | holds"


def fails(setup: Setup) -> str:
    expect(True, "this holds")
    expect(1 > 2, "one is more than two")


def dies(setup: Setup) -> str:
    os._exit(7)


def sleeps(setup: Setup) -> str:
    time.sleep(600)


def test_a_part_that_fails_leaves_the_others_running(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "REHEARSAL", 1)
    parts = {run.__name__: Part(run, 60, f"whether it {run.__name__}") for run in (fails, dies, passes)}
    monkeypatch.setattr(gpu_check, "PARTS", parts | {"sleeps": Part(sleeps, 1, "nothing")})
    args = gpu_check.parse(["--device", "cpu", "--folder", str(tmp_path), "--part", "fails", "dies", "sleeps", "passes"])
    assert gpu_check.main(args) == 1
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| fails", "| dies", "| sleeps", "| passes"]
    assert [row[2] for row in rows] == [
        "**failed**: Failed: one is more than two", "**failed**: its process ended with status 7",
        "**failed**: not done after 1 s", "passed: it / holds",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_hold_is_said(capsys):
    with pytest.raises(Failed, match="2 is 3"):
        expect(False, "2 is 3")
    assert capsys.readouterr().out == "2 is 3\n"


def test_without_a_gpu_it_says_how_to_rehearse(monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu rehearses"):
        gpu_check.main(gpu_check.parse([]))


def rehearse(device: str, parts: list[str]) -> None:
    command = [sys.executable, "scripts/gpu_check.py", "--device", device, "--part", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = done.stdout[done.stdout.rindex(f"A rehearsal on {device}, Python") :].splitlines()
    assert [line.split(" | ")[0] for line in table[4:]] == [f"| {part}" for part in parts]
    assert all(" | passed: " in line for line in table[4:])


def test_the_quick_parts_pass():
    rehearse("cpu", QUICK)


@pytest.mark.slow
def test_every_part_but_the_tests_passes():
    rehearse("cpu", [part for part in PARTS if part != "tests"])
