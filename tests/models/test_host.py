"""Tensors that live in temporary files, where there is no room for these."""

import errno
import os
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch
from conftest import random_windows, tiny_decoder

from lib.errors import NoRoom
from lib.models.host import mapped

REMEDY = r".*: set TMPDIR to a folder on a disk with room, or .*--activation_memory"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_hidden_states_without_room_are_one_line(number, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(NoRoom, match=rf"{tmp_path} has no room for .*{os.strerror(number)}{REMEDY}"):
        tiny_decoder().enter_all(random_windows(4), in_memory=1)
    assert not list(tmp_path.iterdir())


def test_room_for_hidden_states_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 12 * 5 - 1))
    with pytest.raises(NoRoom, match=rf"{tmp_path} needs 0\.0 GB{REMEDY}"):
        mapped((12, 5), torch.float32)
    assert mapped((11, 5), torch.float32).shape == (11, 5)


def test_no_folder_for_temporary_files(monkeypatch):
    """As where all of them are full."""

    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(NoRoom, match=r"No usable temporary directory found in .*: set TMPDIR"):
        mapped((12, 5), torch.float32)
