"""A safetensors file in which single tensors can be overwritten; the safetensors library only writes whole files.

A file consists of the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place in the
data, and `__metadata__` with any text), and the data. Format: https://github.com/huggingface/safetensors#format
"""

import json
import shutil
from pathlib import Path

import torch

METADATA = "__metadata__"
MARKS = ("pruned_by", "files", "updated")  # what this project writes there of one run, and not of those before it
PIECE = 2**24  # bytes copied at a time


class SafetensorsFile:
    """A file whose tensors are overwritten one by one."""

    def __init__(self, path: Path, header: dict, data: int):
        self.path = path
        self.header = header
        self.data = data  # the byte of the file at which the data starts

    @classmethod
    def copy(cls, source: Path, target: Path, metadata: dict[str, str]) -> "SafetensorsFile":
        """Copy a file and put `metadata` into its header, in place of what has the same names there. Everything else, every byte
        of the data included, stays the same.

        A file with metadata has to say that its tensors are PyTorch's, or transformers refuses it; one without any need not.
        """
        with open(source, "rb") as read, open(target, "wb") as write:
            header = json.loads(read.read(int.from_bytes(read.read(8), "little")))
            earlier = {key: value for key, value in header.pop(METADATA, {}).items() if key not in MARKS}
            header = {METADATA: {"format": "pt"} | earlier | metadata} | header
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # tensors stay aligned
            write.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(read, write, PIECE)
        return cls(target, header, 8 + len(text))

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor with one of the same shape and dtype."""
        entry = self.header[key]
        begin, end = entry["data_offsets"]
        values = tensor.contiguous().flatten().view(torch.uint8)
        if list(tensor.shape) != entry["shape"] or len(values) != end - begin:
            raise ValueError(f"{key} is {tuple(tensor.shape)} in {tensor.dtype}, {self.path} has {entry}")
        with open(self.path, "rb+") as file:
            file.seek(self.data + begin)
            file.write(values.numpy())
