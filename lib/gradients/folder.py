"""Gradient norms on disk: one safetensors file per block and an `index.json` that says what made them.

    gradients_aggregrate_norm_l2_model_NAME/
        block_000.safetensors ...    keys as published, "self_attn.q_proj_layer_0": (out, in), float16 or float32, scaled
        index.json                   written last: provenance, fingerprint of the model, each file's checksum

The published format, one .pth file with a dict of float16 tensors of scale 100, can be read as well.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib import parallel
from lib.atomic import replace_file, replace_folder, settle
from lib.errors import InvalidInput, MissingInput
from lib.gradients.walk import SCALE
from lib.models import fingerprint
from lib.models.decoder import Decoder

logger = logging.getLogger(__name__)

INDEX = "index.json"
DTYPE_SLACK = 2.0**-7  # relative, one unit in the last place of bfloat16: a weight may change so much in another dtype
REMEDY = "compute the gradients again with gradient_computation.py"


def folder_of(output_dir: str, llama_version: int, norm: str, model: str) -> Path:
    """Where the published code puts the norms of a model, with its misspelling but without its file extension."""
    name = Path(model.rstrip("/")).name
    return Path(output_dir, f"llama{llama_version}", f"gradients_aggregrate_norm_{norm}_model_{name}")


def key_of(matrix: str, block: int) -> str:
    """The published key of a matrix."""
    return f"{matrix}_layer_{block}"


def scales_of(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest scale with which a gradient of norm 1 can be stored in `dtype`.

    For float16 these are the least and the largest number it holds. For float32 they are the square roots of those numbers,
    because the squares of scaled gradients are summed in fp32.
    """
    info = torch.finfo(dtype)
    if dtype == torch.float32:
        return math.sqrt(info.smallest_normal), math.sqrt(info.max)
    return info.smallest_normal, info.max


class GradientWriter:
    """Writes a gradient folder under a temporary name and renames it when its index is in place.

    If there are several processes, each has a writer, any of them may write a block, and all call `finish`. It is a context
    manager: if it is left before `finish`, nothing of the new folder stays, and an earlier result is unchanged.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float16):
        self.folder = folder
        self.dtype = dtype
        self.partial = folder.with_name(folder.name + ".partial")
        if parallel.rank() == 0:
            settle(folder)
            shutil.rmtree(self.partial, ignore_errors=True)
        parallel.wait()
        self.partial.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, dict] = {}
        self.fingerprint: dict[str, list[float]] = {}
        self.total = self.underflow = self.overflow = 0  # norms; how many of them became 0, or were cut, when stored

    def write_block(self, i: int, norms: dict[str, torch.Tensor], fingerprint: dict[str, torch.Tensor]) -> None:
        """Write the norms {matrix: (out, in)} of block `i` and remember the fingerprint of its weights.

        Raises:
            InvalidInput: a norm is NaN or infinite before it is stored.
        """
        tensors, checks = {}, []
        for name, norm in norms.items():
            stored = tensors[key_of(name, i)] = norm.to(self.dtype).contiguous()
            underflow = norm.count_nonzero() - stored.count_nonzero()
            checks.append(torch.stack([norm.amax().isfinite(), underflow, stored.isinf().sum()]))
            self.total += norm.numel()
            self.fingerprint[key_of(name, i)] = fingerprint[name].tolist()
        checks = torch.stack(checks).tolist() if checks else []  # empty for a block that the forward pass skips
        for (key, stored), (finite, underflow, overflow) in zip(tensors.items(), checks, strict=True):
            if not finite:
                raise InvalidInput(f"{key} holds NaN or infinity: use a smaller --scale, or --dtype float32")
            self.underflow += underflow
            if overflow:
                self.overflow += overflow
                stored.clamp_(max=torch.finfo(self.dtype).max)
            tensors[key] = stored.cpu()
        file = self.partial / f"block_{i:03d}.safetensors"
        replace_file(file, lambda path: save_file(tensors, path))
        self.files[file.name] = {"sha256": _checksum(file), "tensors": {key: list(t.shape) for key, t in tensors.items()}}

    def finish(self, provenance: dict) -> None:
        """Write the index and give the folder its name, in place of an older one. `provenance` must hold the scale."""
        self._collect()
        if parallel.rank() > 0:
            return
        if self.underflow or self.overflow:
            logger.warning(
                "of %d norms stored in %s, %d became 0 and %d were cut to its largest number: --norm_dtype float32 loses fewer",
                self.total, self.dtype, self.underflow, self.overflow,
            )  # fmt: skip
        index = {
            **provenance,
            "norm_dtype": str(self.dtype).removeprefix("torch."),
            "stored_zero": self.underflow,
            "stored_cut": self.overflow,
            "files": dict(sorted(self.files.items())),
            "fingerprint": dict(sorted(self.fingerprint.items())),
        }
        text = json.dumps(index, indent=1)
        replace_file(self.partial / INDEX, lambda path: path.write_text(text))
        replace_folder(self.partial, self.folder)

    def __enter__(self) -> "GradientWriter":
        return self

    def __exit__(self, *error) -> None:
        if parallel.rank() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _collect(self) -> None:
        """Put together for the index what all processes have written."""
        written = parallel.gather((self.files, self.fingerprint, self.total, self.underflow, self.overflow))
        files, fingerprints, *counts = zip(*written, strict=True)
        self.files, self.fingerprint = ({k: v for part in parts for k, v in part.items()} for parts in (files, fingerprints))
        self.total, self.underflow, self.overflow = map(sum, counts)


class GradientNorms:
    """Gradient norms on disk, read one block at a time: a folder that `GradientWriter` wrote, or a published .pth file.

    Raises:
        MissingInput: there is no such path, or it is a folder without an index.
        InvalidInput: it has neither of the two formats.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.index: dict = {}
        self.files: dict[str, dict] = {}
        self.fingerprint: dict[str, list[float]] = {}
        self.scale = SCALE
        self.published: dict[str, torch.Tensor] = {}
        settle(self.path)
        if not self.path.exists():
            raise MissingInput(f"gradient path {path} does not exist: {REMEDY}")
        if self.path.is_dir():
            if not (self.path / INDEX).is_file():
                inside = [str(index.parent) for index in sorted(self.path.glob(f"**/{INDEX}"))]
                remedy = f"did you mean {' or '.join(inside)}?" if inside else REMEDY
                raise MissingInput(f"{path} has no {INDEX}, so it is not a finished result: {remedy}")
            try:
                self.index = json.loads((self.path / INDEX).read_text())
                self.scale, self.files, self.fingerprint = (self.index[key] for key in ("scale", "files", "fingerprint"))
                if not 0 < self.scale < math.inf:
                    raise ValueError(f"scale {self.scale}")
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInput(f"{self.path / INDEX} is damaged ({error!r}): restore it, or {REMEDY}") from error
        else:
            try:
                self.published = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # torch raises half a dozen types here
                raise InvalidInput(f"{path} is neither a gradient folder nor a published .pth file: {REMEDY}") from error
            content = self.published.items() if isinstance(self.published, dict) else [(type(self.published).__name__, None)]
            if strange := [key for key, value in content if not (isinstance(key, str) and isinstance(value, torch.Tensor))]:
                raise InvalidInput(f"{path} holds {strange[0]}, and is not the published dict of tensors: {REMEDY}")

    def block(self, i: int) -> dict[str, torch.Tensor]:
        """The norms of block `i` as they are stored: {matrix: (out, in)}, mapped."""
        suffix = key_of("", i)
        tensors = load_file(self.path / self._file(i)) if self.path.is_dir() else self.published
        return {key.removesuffix(suffix): tensor for key, tensor in tensors.items() if key.endswith(suffix)}

    def check(self, decoder: Decoder) -> None:
        """Compare all norms with a model, a block at a time; raise InvalidInput naming the first tensor that is wrong."""
        blocks = len(self.files) or len({key.rpartition("_layer_")[2] for key in self.published})
        if blocks != len(decoder):
            raise InvalidInput(f"{self.path} holds {blocks} blocks, the model has {len(decoder)}: it belongs to another model")
        for i in range(len(decoder)):
            shapes = decoder.shapes(i)
            keys = {name: key_of(name, i) for name in shapes}
            if self.path.is_dir():
                self._check_file(i, keys)
            norms = self.block(i)
            for name, shape in shapes.items():
                if name not in norms:
                    raise InvalidInput(f"{self.path} has no tensor {keys[name]}: it belongs to another model, or {REMEDY}")
                if (stored := tuple(norms[name].shape)) != tuple(shape):
                    raise InvalidInput(
                        f"{keys[name]} in {self.path} is {stored}, the model's is {tuple(shape)}: it belongs to another model"
                    )
                if not torch.isfinite(norms[name]).all():
                    raise InvalidInput(
                        f"{keys[name]} in {self.path} holds NaN or infinity: {REMEDY}, in --dtype bfloat16 or float32"
                    )
            if self.fingerprint:
                for name, weights in fingerprint.of_block(decoder, i).items():
                    if not _same_weights(weights, self.fingerprint.get(keys[name])):
                        raise InvalidInput(
                            f"{keys[name]} in {self.path} was computed for other weights ({self.index.get('model')}): "
                            f"gradients must come from the dense model that is to be pruned, so {REMEDY}"
                        )

    def is_of(self, decoder: Decoder) -> bool:
        """Whether these are the norms of this model's weights, as far as the index can tell."""
        weights = {key_of(name, i): few for i in range(len(decoder)) for name, few in fingerprint.of_block(decoder, i).items()}
        return weights.keys() == self.fingerprint.keys() and all(
            _same_weights(few, self.fingerprint[key]) for key, few in weights.items()
        )

    def _file(self, i: int) -> str:
        return f"block_{i:03d}.safetensors"

    def _check_file(self, i: int, keys: dict[str, str]) -> None:
        file = self._file(i)
        tensors = ", ".join(keys.values())
        if file not in self.files or not (self.path / file).is_file():
            raise InvalidInput(f"{self.path / file} ({tensors}) is missing: restore it, or {REMEDY}")
        if _checksum(self.path / file) != self.files[file]["sha256"]:
            raise InvalidInput(
                f"{self.path / file} ({tensors}) is corrupted, its checksum is not the index's: restore it, or {REMEDY}"
            )


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_weights(weights: torch.Tensor, recorded: list[float] | None) -> bool:
    if recorded is None:
        return False
    recorded = torch.tensor(recorded)
    largest = torch.maximum(weights.abs(), recorded.abs())
    tiny = torch.finfo(torch.float16).smallest_normal  # below it, float16 rounds more coarsely than DTYPE_SLACK
    return bool(((weights - recorded).abs() <= DTYPE_SLACK * largest.clamp(min=tiny)).all())
