"""A pruned checkpoint in the making: the dense model's folder with zeros in it, and nothing else changed.

Every file that holds no weights is copied byte for byte. Weights keep the dense files' names, dtypes and sharding, tensors
that nobody knows included: a file of weights is copied, and the pruned tensors are written over in their places.
"""

import json
import os
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lib import parallel
from lib.errors import InvalidInput, NoRoom
from lib.models.decoder import Decoder
from lib.models.files.checkpoint import PRUNED_BY, Checkpoint, is_weights, open_safetensors, other_files
from lib.models.files.conversion import ModelTensors
from lib.models.files.safetensors_file import SafetensorsFile

LEAVES_FIRST_COMES_LAST = "config.json"  # without it, a folder is no checkpoint


class Store:
    """A pruned copy of a dense checkpoint, written beside `folder` and put in its place when it is whole.

    A surviving weight is bit-identical to the dense file's, whatever dtype the run computes in.

    Args:
        folder: where the checkpoint goes. An earlier one of this project there is replaced when this one is whole.
        dense: the dense model's tensors, in its files.
        updated: surviving weights change as well; the files say so in their headers.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, folder: str | os.PathLike, dense: ModelTensors, updated: bool = False):
        self.folder = Path(os.path.realpath(folder))
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.dense = dense
        self.updated = updated
        own = {self.folder, self.partial}  # which may lie in the dense folder
        others = other_files(dense.checkpoint.folder)
        self.others = {file: path for file, path in others.items() if not own & set(Path(os.path.realpath(path)).parents)}
        self.shards: dict[str, SafetensorsFile] = {}  # a dense file -> its copy
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        self.partial.mkdir(parents=True)
        size = sum(path.stat().st_size for path in [*dense.checkpoint.shards.values(), *self.others.values()])
        if size > (free := shutil.disk_usage(self.partial).free):
            self.partial.rmdir()
            raise NoRoom(
                f"{folder} needs {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free: choose another --save_model"
            )

    def write_block(self, decoder: Decoder, i: int, pruned: Collection[str]) -> None:
        """Write the `pruned` matrices of block `i`, which is resident."""
        prefix, matrices = decoder.prefixes[i], decoder.matrices(i)
        state = {prefix + name: value for name, value in decoder.blocks[i].state_dict().items()}
        self.write(state, [prefix + matrices[name].tensor_name for name in pruned])

    def write(self, state: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
        """Write tensors of the model, and those that are made from the same ones in the files, which are in `state` too.

        Raises:
            InvalidInput: an updated weight that the file's dtype cannot hold.
        """
        done: set[str] = set()
        for name in names:
            group = self.dense.group_of[name]
            if group.first not in done:  # of tensors made from the same ones in the files, all are carried back together
                done.add(group.first)
                for key, value in self.dense.carried_back(group.first, state).items():
                    self._write(key, value.cpu())

    def finish(self) -> None:
        """Write all that is left, and put the checkpoint in place of an earlier one."""
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

    def _write(self, key: str, value: torch.Tensor) -> None:
        shard = self._shard(self.dense.checkpoint.where[key])
        original = self.dense.checkpoint[key]
        if self.updated:
            tensor = value.to(original.dtype)
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


class Scratch:
    """Pruned tensors of a streamed run that writes no checkpoint, as the run has them: a file for each block, in a temporary
    folder that is gone when the tensors are."""

    def __init__(self, beside: Path | None, dense: Mapping[str, torch.Tensor]):
        self.folder = tempfile.TemporaryDirectory(dir=beside)
        self.dense = dense
        self.index: dict[str, dict] = {}

    def write_block(self, decoder: Decoder, i: int, pruned: Collection[str]) -> None:
        """As `Store.write_block`."""
        prefix, matrices = decoder.prefixes[i], decoder.matrices(i)
        path, tensors = Path(self.folder.name, f"{prefix}safetensors"), {matrices[name].tensor_name for name in pruned}
        state = decoder.blocks[i].state_dict()
        values = {prefix + name: value.cpu().contiguous() for name, value in state.items() if name in tensors}
        save_file(values, path)
        self.index |= {name: {"safetensors_file": str(path), "weight_name": name} for name in values}

    def discard(self) -> None:
        """Leave nothing of it."""
        self.folder.cleanup()

    def finish(self) -> None:
        """Nothing has to be put anywhere."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """{name in the model: tensor} of the pruned model: these, and the dense ones of what was not pruned."""
        return _Kept(self, OffloadedWeightsLoader(index=self.index), self.dense)


class _Kept(ChainMap):
    """Tensors of a `Scratch`, whose folder stays as long as they do."""

    def __init__(self, scratch: Scratch, *tensors: Mapping[str, torch.Tensor]):
        super().__init__(*tensors)
        self.scratch = scratch


@contextmanager
def writer(
    decoder: Decoder, model: str, save_model: str | None, updated: bool, trial: bool
) -> Iterator[Store | Scratch | None]:
    """What pruned blocks are written to while this is open: a checkpoint in `save_model`, by the first process; else, of a
    streamed model, temporary files; else nothing. It is finished on the way out, or discarded if that is by an error.

    `model`: the dense model's folder. A `trial` writes no checkpoint.
    """
    written: Store | Scratch | None = None
    if save_model and not trial and parallel.rank() == 0:
        dense = decoder.source if decoder.source is not None else ModelTensors(Checkpoint(model), decoder.model)
        written = Store(save_model, dense, updated)
    elif decoder.source is not None:
        beside = Path(save_model).resolve().parent if save_model else None
        written = Scratch(beside if beside and beside.is_dir() else None, decoder.source)
    try:
        yield written
        if written:
            written.finish()
    except BaseException:
        if written:
            written.discard()
        raise


def foreign_weights(folder: str | os.PathLike) -> Path | None:
    """A file of weights in `folder` that a `Store` would replace and none has written; None if there is none."""
    weights = [path for path in sorted(Path(folder).glob("*")) if path.is_file() and is_weights(path)]
    own = [path for path in weights if path.suffix == ".json" or (path.suffix == ".safetensors" and _pruned_by_us(path))]
    return next((path for path in weights if path not in own), None)


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
