"""One safetensors file whose tensors can be written in their places; the library itself writes whole files only.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place in the data, and
free `__metadata__`), and the data. Format: https://github.com/huggingface/safetensors#format
"""

import json
import shutil
from pathlib import Path

import torch

METADATA = "__metadata__"
PIECE = 2**24  # bytes copied at a time


class SafetensorsFile:
    """A file with tensors in their places, to be written over one by one."""

    def __init__(self, path: Path, header: dict, data: int):
        self.path = path
        self.header = header
        self.data = data  # where it starts

    @classmethod
    def copy(cls, source: Path, target: Path, metadata: dict[str, str]) -> "SafetensorsFile":
        """Copy a file with `metadata` added to its own; all else, and every byte of the data, is as it was."""
        with open(source, "rb") as read, open(target, "wb") as write:
            header = json.loads(read.read(int.from_bytes(read.read(8), "little")))
            header = {METADATA: header.get(METADATA, {}) | metadata} | {key: v for key, v in header.items() if key != METADATA}
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # tensors stay aligned
            write.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(read, write, PIECE)
        return cls(target, header, 8 + len(text))

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a tensor, of the shape and dtype that the file has for it, over the one there."""
        entry = self.header[key]
        begin, end = entry["data_offsets"]
        values = tensor.contiguous().flatten().view(torch.uint8)
        if list(tensor.shape) != entry["shape"] or len(values) != end - begin:
            raise ValueError(f"{key} is {tuple(tensor.shape)} in {tensor.dtype}, {self.path} has {entry}")
        with open(self.path, "rb+") as file:
            file.seek(self.data + begin)
            file.write(values.numpy())
