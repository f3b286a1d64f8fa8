"""Where the pruned blocks of a run go: into a checkpoint, or of a streamed model without one into temporary files."""

import tempfile
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file

from lib import parallel
from lib.models.decoder import Decoder
from lib.models.files.checkpoint import Checkpoint
from lib.models.files.conversion import ModelTensors
from lib.models.files.pruned_checkpoint import Store
from lib.models.host import require_room, room_in, temporary_folder

MORE_FOR_BLOCKS = "set TMPDIR to a folder on a disk with room, or write a checkpoint on one with --save_model"


class Scratch:
    """Pruned tensors of a streamed run that writes no checkpoint, as the run has them: a file for each block, in a temporary
    folder that is gone when the tensors are.

    Args:
        beside: the folder that it is in; None: the system's for temporary files.
        size: bytes that will be written.
        rounded: as a checkpoint that another process writes has them.

    Raises:
        NoRoom: the disk has no room for them.
    """

    def __init__(self, beside: Path | None, dense: ModelTensors, size: int = 0, rounded: bool = False):
        place = beside or temporary_folder()
        require_room(place, size, MORE_FOR_BLOCKS)
        with room_in(place, MORE_FOR_BLOCKS):
            self.folder = tempfile.TemporaryDirectory(dir=place)
        self.dense = dense
        self.rounded = rounded
        self.index: dict[str, dict] = {}

    def write_block(self, decoder: Decoder, i: int, pruned: Collection[str]) -> None:
        """As `Store.write_block`."""
        prefix, matrices = decoder.prefixes[i], decoder.matrices(i)
        path, tensors = Path(self.folder.name, f"{prefix}safetensors"), {matrices[name].tensor_name for name in pruned}
        state = decoder.blocks[i].state_dict()
        values = {prefix + name: value.cpu().contiguous() for name, value in state.items() if name in tensors}
        if self.rounded:
            values = {name: value.to(_stored_dtype(self.dense, name)).to(value.dtype) for name, value in values.items()}
        with room_in(path.parent, MORE_FOR_BLOCKS):
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
    decoder: Decoder, model: str, save_model: str | None, targets: Mapping[int, Collection[str]], updated: bool, trial: bool
) -> Iterator[Store | Scratch | None]:
    """What pruned blocks are written to while this is open: a checkpoint in `save_model`, by the first process; else, of a
    streamed model, temporary files; else nothing. It is finished on the way out, or discarded if that is by an error.

    `model`: the dense model's folder. `targets`: {block: names of its matrices that are pruned}; `updated`: whether what stays
    of them changes as well. A `trial` writes no checkpoint.
    """
    written: Store | Scratch | None = None
    if save_model and not trial and parallel.rank() == 0:
        dense = decoder.source if decoder.source is not None else ModelTensors(Checkpoint(model), decoder.model)
        written = Store(save_model, dense, updated)
    elif decoder.source is not None:
        beside = Path(save_model).resolve().parent if save_model else None
        rounded = bool(save_model) and updated and not trial
        size = _size_of(decoder, targets)
        written = Scratch(beside if beside and beside.is_dir() else None, decoder.source, size, rounded)
    try:
        yield written
        if written:
            written.finish()
    except BaseException:
        if written:
            written.discard()
        raise


@torch.no_grad()
def round_as_saved(decoder: Decoder, model: str, targets: Mapping[int, Collection[str]]) -> None:
    """Give updated weights of a resident model the values that they have in its checkpoint, whose dtype may be another one.

    `model`: the dense model's folder. `targets`: {block: names of its matrices that were pruned}.
    """
    dense = ModelTensors(Checkpoint(model), decoder.model)
    for i, names in targets.items():
        state, matrices = decoder.blocks[i].state_dict(), decoder.matrices(i)
        for name in {matrices[name].tensor_name for name in names}:
            dtype = _stored_dtype(dense, decoder.prefixes[i] + name)
            if dtype != state[name].dtype:
                state[name].copy_(state[name].to(dtype))


def _size_of(decoder: Decoder, targets: Mapping[int, Collection[str]]) -> int:
    """Bytes of the tensors that hold the matrices `targets`, in the run's dtype."""
    size = 0
    for i, names in targets.items():
        state, matrices = decoder.blocks[i].state_dict(), decoder.matrices(i)
        size += sum(state[name].numel() for name in {matrices[name].tensor_name for name in names})
    return size * decoder.model.dtype.itemsize


def _stored_dtype(dense: ModelTensors, name: str) -> torch.dtype:
    """The dtype of what a tensor of the model is made from in the files."""
    dtypes = [dense.checkpoint[key].dtype for key in dense.group_of[name].names]
    return reduce(torch.promote_types, dtypes)
