"""Products of float32 matrices on units for 16-bit formats, where what these round is exact already or does not matter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def units_for(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While open, products of float32 matrices on `device` are left to its units for `dtype`, sums staying float32.

    Factors that were cast from `dtype` are exact there, others are rounded: to bf16 on a CPU, to tf32 on a GPU. Nothing
    changes for float32, nor for float16 on a CPU, of which bf16 does not hold all bits. A device without such units puts the
    products together otherwise. The setting is the process', not a thread's.
    """
    backend, shorter = (torch.backends.mkldnn, "bf16") if device.type == "cpu" else (torch.backends.cuda, "tf32")
    before = backend.matmul.fp32_precision
    try:
        if dtype == torch.bfloat16 or (dtype == torch.float16 and shorter == "tf32"):
            backend.matmul.fp32_precision = shorter
        yield
    finally:
        backend.matmul.fp32_precision = before
