"""Where weights live on disk: a checkpoint's tensors mapped from its safetensors, and pruned blocks written as new shards.

Nothing here holds more than one block in memory. Names are those of `model.state_dict()`.
"""

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from lib.files import replace_file

SHARDS = "model*.safetensors"
METADATA = {"format": "pt", "pruned_by": "GBLM-Pruner"}  # in the files' headers, which loaders do not look at


def open_checkpoint(name: str, cache_dir: str | None = None) -> Mapping[str, torch.Tensor] | None:
    """The tensors of a local or hub checkpoint, read from its mapped safetensors on access; None if it has none.

    Raises:
        FileNotFoundError: a shard is missing. ValueError: one is damaged.
    """
    find = {"cache_dir": cache_dir, "_raise_exceptions_for_missing_entries": False}
    shards = [SAFE_WEIGHTS_NAME]  # where there are both, transformers ignores the index as well
    if cached_file(name, SAFE_WEIGHTS_NAME, **find) is None and (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **find)):
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        if missing := [shard for shard in shards if cached_file(name, shard, **find) is None]:
            raise FileNotFoundError(f"{name} is incomplete, {missing[0]} of its index is not there: download it again")
    entries = {}
    for shard in shards:
        path = cached_file(name, shard, **find)
        if path is None:
            return None
        entries |= _entries(path)
    return OffloadedWeightsLoader(index=entries)


def foreign_weights(folder: str | os.PathLike) -> Path | None:
    """A file of weights in `folder` that a `Store` would delete and none has written; None if there is none."""
    for path in sorted(Path(folder).glob(SHARDS)):
        try:
            with _opened(path) as file:
                own = (file.metadata() or {}).get("pruned_by") == METADATA["pruned_by"]
        except ValueError:
            own = False  # a `Store` leaves no damaged files
        if not own:
            return path
    return None


def _entries(path: str | os.PathLike) -> dict[str, dict]:
    with _opened(path) as file:
        return {key: {"safetensors_file": str(path), "weight_name": key} for key in file.keys()}  # noqa: SIM118 (a safe_open is not iterable)


def _opened(path: str | os.PathLike) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): restore it, or remove it") from error


class Store:
    """A checkpoint folder in the making: sharded safetensors that `transformers` loads, a shard for each pruned block.

    A tensor is written as the source has it, in the source's dtype, with zeros where the pruned weight is zero: a surviving
    weight is bit-identical to the source's even if the run computed in another dtype.
    """

    def __init__(self, folder: str | os.PathLike, source: Mapping[str, torch.Tensor], nblocks: int):
        self.folder = Path(folder)
        self.source = source
        self.nshards = nblocks + 1
        self.weight_map: dict[str, str] = {}
        self.total_size = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        # The index goes first and comes back last: without it the folder is no checkpoint.
        for stale in [self.folder / SAFE_WEIGHTS_INDEX_NAME, *self.folder.glob(SHARDS + "*")]:  # and unfinished ones
            stale.unlink(missing_ok=True)

    def write_block(self, i: int, prefix: str, block: torch.nn.Module, pruned: Container[str], updated: bool = False) -> None:
        """Write block `i`, whose tensors are called `prefix` + their name inside it.

        `pruned`: names inside the block of the linears that were pruned; nothing else differs from the source. `updated`: their
        surviving weights changed as well (SparseGPT).
        """
        tensors = {}
        for name, value in block.state_dict().items():
            original = self.source[prefix + name]
            owner, _, kind = name.rpartition(".")
            if kind != "weight" or owner not in pruned:
                tensors[prefix + name] = original
            elif updated:
                tensors[prefix + name] = value.to("cpu", original.dtype)
            else:
                tensors[prefix + name] = original.masked_fill((value == 0).to(original.device), 0)
        self._write_shard(i + 1, tensors)

    def finish(self, names: list[str], config, tokenizer=None) -> None:
        """Write the tensors `names` that no block has, as the source has them, then config, tokenizer and the index."""
        self._write_shard(0, {name: self.source[name] for name in names if name not in self.weight_map})
        config.save_pretrained(self.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder)
        index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(self.weight_map.items()))}
        text = json.dumps(index, indent=2)
        replace_file(self.folder / SAFE_WEIGHTS_INDEX_NAME, lambda path: path.write_text(text))

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What has been written so far, read from its mapped files."""
        written = {}
        for shard in set(self.weight_map.values()):
            written |= _entries(self.folder / shard)
        return OffloadedWeightsLoader(index=written)

    def _write_shard(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        shard = f"model-{number + 1:05d}-of-{self.nshards:05d}.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        replace_file(self.folder / shard, lambda path: save_file(contiguous, path, metadata=METADATA))
        self.weight_map |= dict.fromkeys(contiguous, shard)
        self.total_size += sum(tensor.numel() * tensor.element_size() for tensor in contiguous.values())
