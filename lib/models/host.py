"""Host memory where the allocators are not enough: freed pages given back, tensors that live in a file."""

import atexit
import ctypes
import math
import os
import sys
import tempfile
from contextlib import suppress

import torch


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps what is below its (growing) threshold, block after block."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


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
