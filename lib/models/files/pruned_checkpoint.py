"""A pruned checkpoint in the making: the dense model's folder with zeros in it, and nothing else changed.

Every file that holds no weights is copied byte for byte. Weights keep the dense files' names, dtypes and sharding, tensors
that nobody knows included: a file of weights is copied, and the pruned tensors are written over in their places.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lib.atomic import CLAIM
from lib.errors import InvalidInput, NoRoom
from lib.models.decoder import Decoder
from lib.models.files.checkpoint import PRUNED_BY, Checkpoint, is_weights, open_safetensors, other_files
from lib.models.files.conversion import ModelTensors
from lib.models.files.safetensors_file import SafetensorsFile
from lib.models.host import require_room, room_in

MORE = "choose another --save_model"
LEAVES_FIRST_COMES_LAST = "config.json"  # without it, a folder is no checkpoint


class Store:
    """A pruned copy of a dense checkpoint, written beside `folder` and put in its place when it is whole.

    A surviving weight is bit-identical to the dense file's, whatever dtype the run computes in.

    Args:
        folder: where the checkpoint goes. An earlier one of this project there is replaced when this one is whole.
        dense: the dense model's tensors, in its files.
        updated: surviving weights change as well; the files say so in their headers.

    Raises:
        NoRoom: the disk has no room for it.
    """

    def __init__(self, folder: str | os.PathLike, dense: ModelTensors, updated: bool = False):
        self.folder = Path(os.path.realpath(folder))
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.dense = dense
        self.updated = updated
        ours = {self.folder, self.partial}  # which may lie in the dense folder
        others = other_files(dense.checkpoint.folder)
        self.others = {
            file: path
            for file, path in others.items()
            if not ours & set(Path(os.path.realpath(path)).parents) and not file.endswith(CLAIM)
        }
        self.shards: dict[str, SafetensorsFile] = {}  # a dense file -> its copy
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        self.partial.mkdir(parents=True)
        size = sum(path.stat().st_size for path in [*dense.checkpoint.shards.values(), *self.others.values()])
        try:
            require_room(self.partial, size, MORE, folder)
        except NoRoom:
            self.partial.rmdir()
            raise

    def write_block(self, decoder: Decoder, i: int, pruned: Collection[str]) -> None:
        """Write the `pruned` matrices of block `i`, which is resident."""
        prefix, matrices = decoder.prefixes[i], decoder.matrices(i)
        state = {prefix + name: value for name, value in decoder.blocks[i].state_dict().items()}
        dense = {
            matrix.tensor_name for name, matrix in matrices.items() if name not in pruned
        }  # experts, in stacks with others
        names = dict.fromkeys(matrices[name].tensor_name for name in pruned)
        self.write(state, [prefix + name for name in names], {prefix + name for name in names if name in dense})

    def write(self, state: Mapping[str, torch.Tensor], names: Iterable[str], in_part: Collection[str] = ()) -> None:
        """Write tensors of the model, and those that are made from the same ones in the files, which are in `state` too.

        Of tensors that were pruned only `in_part`, weights that are what the file's are in the run's dtype keep the file's bits.

        Raises:
            InvalidInput: an updated weight that the file's dtype cannot hold.
        """
        done: set[str] = set()
        for name in names:
            group = self.dense.group_of[name]
            if group.first not in done:  # of tensors made from the same ones in the files, all are carried back together
                done.add(group.first)
                for key, value in self.dense.carried_back(group.first, state).items():
                    with room_in(self.partial, MORE):
                        self._write(key, value.cpu(), name in in_part)

    def finish(self) -> None:
        """Write all that is left, and put the checkpoint in place of an earlier one."""
        with room_in(self.partial, MORE):
            for shard in self.dense.checkpoint.shards:
                self._shard(shard)
            if self.dense.checkpoint.index:
                self._write_index()
            for file, path in self.others.items():
                (self.partial / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.partial / file)
            self._put_in_place()

    def discard(self) -> None:
        """Leave nothing of an unfinished checkpoint."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def tensors(self) -> ModelTensors:
        """The finished checkpoint's tensors, read from its files."""
        return ModelTensors(Checkpoint(str(self.folder)), self.dense.model)

    def _write(self, key: str, value: torch.Tensor, in_part: bool) -> None:
        shard = self._shard(self.dense.checkpoint.where[key])
        original = self.dense.checkpoint[key]
        if self.updated:
            tensor = value.to(original.dtype)
            if in_part:
                tensor = torch.where(value == original.to(value.dtype), original, tensor)
            if not tensor.isfinite().all():
                largest = torch.finfo(original.dtype).max
                raise InvalidInput(f"{key} has updated weights beyond {largest:g}, the largest of its {original.dtype}")
        else:
            tensor = original.masked_fill((value == 0) & (original != 0), 0)  # a -0.0 of the dense model stays one
        shard.write(key, tensor)

    def _shard(self, file: str) -> SafetensorsFile:
        """The copy of a dense file, made when it is first needed."""
        if file not in self.shards:
            # The model card is an earlier checkpoint's own, even if the dense model had none.
            metadata = {"pruned_by": PRUNED_BY, "files": json.dumps(sorted({*self.others, "README.md"}))}
            if self.updated:
                metadata["updated"] = "true"
            source, target = self.dense.checkpoint.shards[file], self.partial / _safetensors_name(file)
            if not file.endswith(".safetensors"):
                plain = target.with_suffix(".plain")
                pickled = {
                    key: self.dense.checkpoint[key] for key, where in self.dense.checkpoint.where.items() if where == file
                }
                save_file({key: tensor.clone() for key, tensor in pickled.items()}, plain, metadata={"format": "pt"})
                source = plain
            self.shards[file] = SafetensorsFile.copy(source, target, metadata)
            if not file.endswith(".safetensors"):
                plain.unlink()
        return self.shards[file]

    def _write_index(self) -> None:
        index = self.dense.checkpoint.index
        if index.name.startswith(SAFE_WEIGHTS_INDEX_NAME.partition(".index")[0]):
            shutil.copyfile(index, self.partial / index.name)
            return
        content = json.loads(index.read_text())
        content["weight_map"] = {key: _safetensors_name(file) for key, file in content["weight_map"].items()}
        (self.partial / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n")

    def _put_in_place(self) -> None:
        earlier = _files_of_earlier(self.folder)
        new = [str(path.relative_to(self.partial)) for path in sorted(self.partial.rglob("*")) if path.is_file()]
        for file in new:
            with open(self.partial / file, "rb+") as opened:
                os.fsync(opened.fileno())
        # From here on only names change.
        (self.folder / LEAVES_FIRST_COMES_LAST).unlink(missing_ok=True)
        for file in earlier - set(new):
            (self.folder / file).unlink(missing_ok=True)
        for file in sorted(new, key=lambda file: file == LEAVES_FIRST_COMES_LAST):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.partial / file, self.folder / file)
        shutil.rmtree(self.partial)


def foreign_weights(folder: str | os.PathLike) -> Path | None:
    """A file of weights in `folder` that a `Store` would replace and none has written; None if there is none."""
    weights = [path for path in sorted(Path(folder).glob("*")) if path.is_file() and is_weights(path)]
    ours = [path for path in weights if path.suffix == ".json" or (path.suffix == ".safetensors" and _pruned_by_us(path))]
    return next((path for path in weights if path not in ours), None)


def _pruned_by_us(path: Path) -> dict[str, str] | None:
    """The metadata of a file that a `Store` has written."""
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
    except ValueError:
        return None  # a `Store` leaves no damaged files
    return metadata if metadata.get("pruned_by") == PRUNED_BY else None


def _files_of_earlier(folder: Path) -> set[str]:
    """What an earlier checkpoint of this project has put into `folder`."""
    files: set[str] = set()
    for path in folder.glob("*.safetensors"):
        if metadata := _pruned_by_us(path):
            files |= {path.name, SAFE_WEIGHTS_INDEX_NAME, *json.loads(metadata.get("files", "[]"))}
    return files


def _safetensors_name(file: str) -> str:
    """The file that takes a shard's tensors: its own name, of a .bin that of the safetensors beside it."""
    return (
        file if file.endswith(".safetensors") else file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
    )
