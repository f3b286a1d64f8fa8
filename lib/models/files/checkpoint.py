"""A checkpoint as it lies on disk: which files it has, and its tensors under the files' own names, mapped, never loaded whole."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from lib.errors import InvalidInput, MissingInput

# Files that hold weights, in any format of any tool. Everything else of a checkpoint's folder belongs to a pruned one too.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ckpt")
WEIGHT_INDEXES = ("*.safetensors.index.json", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json")
PRUNED_BY = "GBLM-Pruner"  # in the headers of files this project writes (`store`), which loaders do not look at


class Checkpoint(Mapping[str, torch.Tensor]):
    """{name in the files: tensor} of a checkpoint's folder: safetensors, or PyTorch's .bin where there are none.

    Raises:
        FileNotFoundError: a shard is missing, or there are no weights in either format. ValueError: a file is damaged.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.index: Path | None = None  # the sharded files' own, where there is one
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
        """A tensor's shape on the meta device; nothing is read."""
        shard = self.where[key]
        if shard in self._pickled:
            return self._pickled[shard][key].to("meta")
        with open_safetensors(self.shards[shard]) as file:
            return torch.empty(file.get_slice(key).get_shape(), device="meta")

    @property
    def updated(self) -> bool:
        """Whether this project wrote it and changed surviving weights as well."""
        for path in self.shards.values():
            if path.suffix == ".safetensors":
                with open_safetensors(path) as file:
                    if (file.metadata() or {}).get("updated"):
                        return True
        return False

    def _shards(self) -> dict[str, Path]:
        """{file: path}, of the format that transformers would load."""
        folder = Path(self.folder)
        for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            if (folder / single).is_file():  # where there are both, transformers ignores the index
                return {single: folder / single}
            if (folder / index).is_file():
                self.index = folder / index
                files = sorted(set(json.loads(self.index.read_text())["weight_map"].values()))
                if missing := [file for file in files if not (folder / file).is_file()]:
                    raise MissingInput(f"{folder} is incomplete, {missing[0]} of its index is not there: download it again")
                return {file: folder / file for file in files}
        raise MissingInput(f"{folder} has neither safetensors nor PyTorch weights ({SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME})")


def other_files(folder: str) -> dict[str, Path]:
    """{path inside the folder: file} of all that a checkpoint has besides weights: config, tokenizer, code, licence."""
    root = Path(folder)
    files = {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file() and not is_weights(path)}
    return {str(file): path for file, path in files.items() if not {".git", ".cache"} & set(file.parts)}


def is_weights(path: Path) -> bool:
    """Whether a file holds weights, or says which file does."""
    return any(path.match(pattern) for pattern in (*WEIGHT_FILES, *WEIGHT_INDEXES))


def open_safetensors(path: str | os.PathLike) -> safe_open:
    """A safetensors file, mapped; ValueError if it is not a whole one."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InvalidInput(f"{path} is not a whole safetensors file ({error}): restore it, or remove it") from error


def _mapped_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises half a dozen types here
        raise InvalidInput(
            f"{path} cannot be mapped ({type(error).__name__}): save the model once with transformers (model.save_pretrained)"
        ) from error
