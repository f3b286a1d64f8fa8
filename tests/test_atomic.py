"""A folder that is claimed is one run's, whatever becomes of that run and whatever the file system lacks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import filelock
import pytest
from conftest import ROOT

from lib import atomic
from lib.atomic import claimed
from lib.errors import InvalidInput, NoRoom

REFUSED = r"another run has its results in .*pruned: let it finish, or use another --save_model"
HOLDER = """
import errno, sys, time
import filelock
from lib.atomic import claimed

def no_locks(self, **how):
    raise {raised}

if {locks} is False:
    filelock.FileLock.acquire = no_locks
with claimed(sys.argv[1], "--save_model"):
    print("claimed", flush=True)
    time.sleep(600)
"""
WITHOUT_LOCKS = [
    OSError(errno.ENOLCK, "No locks available"),
    OSError(errno.EOPNOTSUPP, "Operation not supported"),
    OSError(errno.ENOSYS, "Function not implemented"),
    NotImplementedError("no flock"),
]


def another_process(folder, locks=True):
    code = HOLDER.format(locks=locks, raised="OSError(errno.ENOLCK, 'No locks available')")
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    return process


def without_locks(monkeypatch, error=WITHOUT_LOCKS[0]):
    def acquire(self, **how):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_is_one_runs_until_that_run_is_dead(tmp_path, locks, monkeypatch):
    folder = tmp_path / "new" / "parents" / "pruned"
    (tmp_path / "link").symlink_to(tmp_path / "new", target_is_directory=True)
    if not locks:
        without_locks(monkeypatch)
    process = another_process(folder, locks)
    try:
        for path in (folder, tmp_path / "link" / "parents" / "." / "pruned"):
            with pytest.raises(InvalidInput, match=REFUSED), claimed(path, "--save_model"):
                pass
        with claimed(tmp_path / "new" / "parents" / "other", "--save_model"):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with claimed(folder, "--save_model"):
        pass
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("error", WITHOUT_LOCKS, ids=str)
def test_file_systems_without_locks(tmp_path, error, monkeypatch):
    without_locks(monkeypatch, error)
    with claimed(tmp_path / "a" / "pruned", "--save_model"):
        (claim,) = (tmp_path / "a").iterdir()
        with pytest.raises(InvalidInput, match=REFUSED), claimed(tmp_path / "a" / "pruned", "--save_model"):
            pass
    assert not list(tmp_path.iterdir())
    assert claim.name.endswith(atomic.CLAIM)


def test_another_hosts_claim_is_stale_when_nobody_touches_it(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    monkeypatch.setattr(atomic, "TOUCHED_EVERY", 0.02)
    claim = tmp_path / "pruned.process.claim"
    for text in (json.dumps({"host": "another", "pid": 1, "id": ""}), "", "{"):
        claim.write_text(text)
        with pytest.raises(InvalidInput, match=REFUSED), claimed(tmp_path / "pruned", "--save_model"):
            pass
        os.utime(claim, (time.time() - 2 * atomic.STALE_AFTER,) * 2)
        with claimed(tmp_path / "pruned", "--save_model"):
            os.utime(claim, (1, 1))
            for _ in range(500):
                time.sleep(0.02)
                if claim.stat().st_mtime > 1:
                    break
            assert claim.stat().st_mtime > 1
        assert not list(tmp_path.iterdir())


def test_a_claim_leaves_nothing_and_takes_nothing(tmp_path):
    with claimed(tmp_path / "a" / "b" / "pruned", "--save_model"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["pruned.claim"]
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with claimed(tmp_path / "empty" / "pruned", "--save_model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_folder_whose_parent_cannot_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    acquire = filelock.FileLock.acquire

    def refused(self, **how):
        if os.path.dirname(self.lock_file) != str(folder):
            raise PermissionError(errno.EACCES, "Permission denied")
        return acquire(self, **how)

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    refusal = pytest.raises(InvalidInput, match="another run has its results in .*results")
    with claimed(folder, "--save"), refusal, claimed(folder, "--save"):
        pass
    assert not list(folder.iterdir())
    with (
        pytest.raises(NoRoom, match=r"--save .*missing cannot be written .*choose another folder"),
        claimed(tmp_path / "missing", "--save"),
    ):
        pass
