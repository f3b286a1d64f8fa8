"""Memory where the allocators are not enough: freed pages given back, tensors that live in a file, allocations that fail."""

import atexit
import ctypes
import math
import os
import sys
import tempfile
from contextlib import suppress

import torch

LARGE = 2**20  # bytes
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
    """An uninitialised tensor in a temporary file that is gone when the tensor is. OSError: the disk has no room for it.

    Windows removes no file that is mapped: there it goes when the process ends.
    """
    handle, name = tempfile.mkstemp()
    try:
        with os.fdopen(handle):
            if hasattr(os, "posix_fallocate"):  # now, and not by a signal when a page is written
                os.posix_fallocate(handle, 0, math.prod(shape) * dtype.itemsize)
        return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    finally:
        if os.name == "nt":
            atexit.register(_remove, name)
        else:
            os.unlink(name)


def _remove(name: str) -> None:
    with suppress(OSError):  # still mapped
        os.unlink(name)
