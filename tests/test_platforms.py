"""Both commands where parts of Python that only some systems have are missing."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from lib.results import phases

# As on Windows: nobody can import fcntl, nor this project `resource` (psutil's module for Linux needs that itself).
BLOCKED = """
import builtins, runpy, sys
real, blocked, root = builtins.__import__, sys.argv.pop(1), sys.argv.pop(1)
if blocked != "resource":
    sys.modules[blocked] = None
def importing(name, globals=None, *args, **more):
    if name == blocked and globals and str(globals.get("__file__", "")).startswith((root + "/lib", root + "/main", root + "/grad")):
        raise ImportError(name)
    return real(name, globals, *args, **more)
builtins.__import__ = importing
sys.argv = sys.argv[1:]
sys.path.insert(0, root)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def blocked(module: str, *command) -> str:
    words = [sys.executable, "-c", BLOCKED, module, ROOT, *command]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("module", ["resource", "fcntl"])
def test_commands_without(module, saved_model, documents, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    flags = ["--model", saved_model, "--dataset", text, "--nsamples", 2, "--seq_length", 16, "--cache_dir", tmp_path / "cache"]
    assert "--prune_method" in blocked(module, "main.py", "--help")
    assert "gradient norms saved" in blocked(module, "gradient_computation.py", *flags, "--output_dir", tmp_path)
    printed = blocked(
        module,
        "main.py",
        *flags,
        "--prune_method",
        "wanda",
        "--sparsity_ratio",
        0.5,
        "--eval_dataset",
        text,
        "--memory",
        "streamed",
    )
    assert "pruned perplexity" in printed


def test_the_check_blocks_what_it_says():
    with pytest.raises(AssertionError, match="import of argparse halted"):
        blocked("argparse", "main.py", "--help")


@pytest.mark.parametrize("system, factor", [("darwin", 1), ("freebsd", 1024)])
def test_peak_memory_where_there_is_no_proc(system, factor, monkeypatch):
    def unreadable(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(phases.Path, "read_text", unreadable)
    monkeypatch.setattr(phases.sys, "platform", system)
    assert phases._peak_host() == phases.resource.getrusage(phases.resource.RUSAGE_SELF).ru_maxrss * factor
    monkeypatch.setattr(phases, "resource", None)
    assert phases._peak_host() > 10**7  # Windows, where psutil is asked
