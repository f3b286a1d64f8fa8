"""Products of float32 matrices on units for shorter formats, where what they round is exact already or does not matter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def shortened(device: torch.device) -> Iterator[None]:
    """While open, float32 products on `device` take factors rounded to bf16 (CPU) or tf32 (GPU); sums stay float32.

    Where a device has no such units, they are float32 products, or are put together from shorter ones.
    """
    backend, format = (torch.backends.mkldnn, "bf16") if device.type == "cpu" else (torch.backends.cuda, "tf32")
    before = backend.matmul.fp32_precision
    try:
        backend.matmul.fp32_precision = format
        yield
    finally:
        backend.matmul.fp32_precision = before


def is_exact(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `shortened` leaves factors as they are that were cast to float32 from `dtype`."""
    return dtype == torch.bfloat16 or (dtype == torch.float16 and device.type != "cpu")
