"""Host memory where the allocators are not enough: freed pages given back, tensors that live in a file."""

import ctypes
import math
import os
import sys
import tempfile

import torch


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps what is below its (growing) threshold, block after block."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in a temporary file that is gone when the tensor is. OSError: the disk has no room for it."""
    with tempfile.NamedTemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # now, and not by a signal when a page is written
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
