"""A checkpoint as it is on disk: which files it has, and its tensors under their names in the files, mapped one by one."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from lib.errors import InvalidInput, MissingInput

# Files that hold weights, in the format of any tool. All other files in a checkpoint's folder are copied to a pruned one.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ckpt")
WEIGHT_INDEXES = ("*.safetensors.index.json", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json")
PRUNED_BY = "GBLM-Pruner"  # in the headers of files that this project writes; loaders do not read it


class Checkpoint(Mapping[str, torch.Tensor]):
    """{name in the files: tensor} of a checkpoint's folder: from safetensors files, or from PyTorch's .bin if there are none.

    Raises:
        MissingInput: a shard is missing, or there are no weights in either format.
        InvalidInput: a file is damaged.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.index: Path | None = None  # the file that says in which shard a tensor is, if there are shards
        self.shards = self._shards()
        self.where: dict[str, str] = {}  # name of a tensor -> file
        self._pickled: dict[str, dict[str, torch.Tensor]] = {}
        for shard, path in self.shards.items():
            if shard.endswith(".safetensors"):
                with open_safetensors(path) as file:
                    self.where |= dict.fromkeys(file.keys(), shard)
            else:
                self._pickled[shard] = _mapped_pickle(path)
                self.where |= dict.fromkeys(self._pickled[shard], shard)

    def __getitem__(self, key: str) -> torch.Tensor:
        shard = self.where[key]
        if shard in self._pickled:
            return self._pickled[shard][key]
        with open_safetensors(self.shards[shard]) as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def outline(self, key: str) -> torch.Tensor:
        """A tensor of the same shape on the meta device. The tensor itself is not read."""
        shard = self.where[key]
        if shard in self._pickled:
            return self._pickled[shard][key].to("meta")
        with open_safetensors(self.shards[shard]) as file:
            return torch.empty(file.get_slice(key).get_shape(), device="meta")

    @property
    def updated(self) -> bool:
        """Whether this project wrote the checkpoint and changed surviving weights, too."""
        for path in self.shards.values():
            if path.suffix == ".safetensors":
                with open_safetensors(path) as file:
                    if (file.metadata() or {}).get("updated"):
                        return True
        return False

    def _shards(self) -> dict[str, Path]:
        """{file name: path} of the weights, in the format that transformers would load."""
        folder = Path(self.folder)
        for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            if (folder / single).is_file():  # if there is an index as well, transformers ignores it
                return {single: folder / single}
            if (folder / index).is_file():
                self.index = folder / index
                files = sorted(set(json.loads(self.index.read_text())["weight_map"].values()))
                if missing := [file for file in files if not (folder / file).is_file()]:
                    raise MissingInput(f"{folder} is incomplete, {missing[0]} of its index is not there: download it again")
                return {file: folder / file for file in files}
        raise MissingInput(f"{folder} has neither safetensors nor PyTorch weights ({SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME})")


def other_files(folder: str) -> dict[str, Path]:
    """{path inside the folder: path} of all files but weights: config, tokenizer, code, licence."""
    root = Path(folder)
    files = {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file() and not is_weights(path)}
    return {str(file): path for file, path in files.items() if not {".git", ".cache"} & set(file.parts)}


def is_weights(path: Path) -> bool:
    """Whether a file holds weights, or is an index of files that do."""
    return any(path.match(pattern) for pattern in (*WEIGHT_FILES, *WEIGHT_INDEXES))


def open_safetensors(path: str | os.PathLike) -> safe_open:
    """A safetensors file, mapped. InvalidInput if it is damaged or incomplete."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InvalidInput(f"{path} is not a whole safetensors file ({error}): restore it, or remove it") from error


def _mapped_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises errors of half a dozen types here
        raise InvalidInput(
            f"{path} cannot be mapped ({type(error).__name__}): save the model once with transformers (model.save_pretrained)"
        ) from error
