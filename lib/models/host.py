"""Memory and disks where their allocators are not enough: freed pages given back, tensors that live in a file, allocations that
fail, disks that are full."""

import atexit
import ctypes
import errno
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from lib.errors import NoRoom

LARGE = 2**20  # bytes
FULL = (errno.ENOSPC, errno.EFBIG, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else []))  # Windows has no quotas of that name
MORE_FOR_STATES = "set TMPDIR to a folder on a disk with room, or keep more in memory with a larger --activation_memory"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def return_large_memory() -> None:
    """From now on memory of LARGE and more is the system's again as soon as it is freed.

    glibc raises its threshold for that to 32 MB, and what is below lies scattered in its heap: matrices of a block, gone but
    for holes that the next block's do not fit into. Matrices of 32 MB, such as those of a 7B model, are treated so anyway.
    """
    _mallopt(M_MMAP_THRESHOLD, LARGE)


def keep_memory() -> None:
    """From now on freed memory stays with the process, but for tensors of 32 MB and more.

    A block's activations are a few MB each, a thousand times a second. glibc would give them back to the system, which
    fills every page with zeros when it is needed again.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that it takes
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps what is below its (growing) threshold, block after block."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def _mallopt(option: int, value: int) -> None:
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(option, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocation that failed."""
    of_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or of_host


def is_device_fault(error: BaseException) -> bool:
    """Whether a GPU or its driver has failed, which says nothing about the model that it was computing."""
    return isinstance(error, torch.AcceleratorError)


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in a temporary file that is gone when the tensor is.

    Windows removes no file that is mapped: there it goes when the process ends.

    Raises:
        NoRoom: the disk has no room for it.
    """
    folder, size = temporary_folder(), math.prod(shape) * dtype.itemsize
    require_room(folder, size, MORE_FOR_STATES)
    with room_in(folder, MORE_FOR_STATES):
        handle, name = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle):
                if hasattr(os, "posix_fallocate"):  # now, and not by a signal when a page is written
                    os.posix_fallocate(handle, 0, size)
            return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        finally:
            if os.name == "nt":
                atexit.register(_remove, name)
            else:
                os.unlink(name)


def temporary_folder() -> Path:
    """Where temporary files go. NoRoom if there is no such folder, which is so as well where every one of them is full."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise NoRoom(f"{error.strerror}: set TMPDIR to a folder on a disk with room") from error


def require_room(folder: Path, size: int, remedy: str, named: str | os.PathLike | None = None) -> None:
    """Raise NoRoom if the disk of `folder`, which the message calls `named`, has less than `size` bytes free."""
    if size > (free := shutil.disk_usage(folder).free):
        raise NoRoom(f"{named or folder} needs {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free: {remedy}")


@contextmanager
def room_in(folder: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Inside the context, files are written to `folder`: a disk that is full by then, or a quota, is one line.

    Raises:
        NoRoom: instead of what the system and safetensors raise.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in FULL or any(f"os error {number})" in str(error) for number in FULL)
        if isinstance(error, NoRoom) or not full:
            raise
        raise NoRoom(f"{folder} has no room for what is written there ({error}): {remedy}") from error


def _remove(name: str) -> None:
    with suppress(OSError):  # still mapped
        os.unlink(name)
