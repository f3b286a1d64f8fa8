"""Perplexities of dense models that earlier runs have measured: each in a small JSON file, named by all that it depends on."""

import hashlib
import inspect
import json
import logging
import os
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch

from lib import parallel
from lib.atomic import replace_file
from lib.evaluation import perplexity
from lib.models import decoder as decoder_module
from lib.models.decoder import Decoder

logger = logging.getLogger(__name__)

WORD = torch.int64  # the type that a tensor's bits are summed as


def folder(cache_dir: str | None = None) -> Path:
    """The folder of the files: in `cache_dir`, or by default in the user's cache."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_dir or Path(user, "gblm-pruner"), "dense_perplexity")


class DenseCache:
    """The dense perplexities in a folder that were measured under the same `conditions`.

    Only the first process reads and writes files. `find` gives all processes what it has read.
    """

    def __init__(self, folder: Path, conditions: dict):
        self.folder = folder
        self.conditions = conditions

    @classmethod
    def of(cls, decoder: Decoder, cache_dir: str | None = None) -> "DenseCache":
        """The perplexities of one model, in this environment."""
        return cls(folder(cache_dir), conditions(decoder) if parallel.rank() == 0 else {})

    def find(self, windows: torch.Tensor) -> float | None:
        """The stored perplexity on windows (n, T); None if there is none."""
        stored = None
        if parallel.rank() == 0:
            try:
                stored = json.loads(self._file(windows).read_text())["perplexity"]
            except (OSError, ValueError, KeyError, TypeError):  # no such file, or a damaged one: measure again
                pass
        return parallel.gather(stored)[0]

    def keep(self, windows: torch.Tensor, perplexity: float, text: str) -> None:
        """Store a perplexity for later runs. `text` tells a reader of the file where the windows are from."""
        if parallel.rank() > 0:
            return
        content = {"perplexity": perplexity, "text": text, "windows": list(windows.shape), **self.conditions}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._file(windows), lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
        except OSError as error:
            logger.info("the dense perplexity is not stored for later runs: %s", error)

    def _file(self, windows: torch.Tensor) -> Path:
        text = _sha256(windows.cpu().contiguous().numpy().tobytes() + str(tuple(windows.shape)).encode())
        return self.folder / f"{_sha256(json.dumps([self.conditions, text], sort_keys=True).encode())[:32]}.json"


def conditions(decoder: Decoder) -> dict:
    """All that a perplexity depends on besides the windows: weights, config, dtype, device, versions, and the code itself."""
    cuda = decoder.device.type == "cuda"
    code = inspect.getsource(perplexity) + inspect.getsource(decoder_module)
    config = {name: value for name, value in decoder.model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "weights": weights_digest(decoder),
        "config": _sha256(json.dumps(config, sort_keys=True, default=str).encode()),
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(decoder.device) if cuda else decoder.device.type,
        "capability": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "code": _sha256(code.encode()),
    }


def weights_digest(decoder: Decoder) -> str:
    """SHA-256 that depends on every bit of every tensor of the model. Reads the whole model once."""
    digest, path = hashlib.sha256(), decoder.prefixes[0].removesuffix("0.")

    def add(module: torch.nn.Module, prefix: str = "", without: str | None = None) -> None:
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            skipped = tensor.is_meta  # it belongs to a block that never runs and is not read
            if not skipped and (without is None or not name.startswith(without)):
                digest.update(f"{prefix}{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_sums(tensor))

    add(decoder.model, without=path)
    for i in range(len(decoder)):
        with decoder.resident(i) as block:
            add(block, decoder.prefixes[i])
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sums(tensor: torch.Tensor) -> bytes:
    """Sums of a tensor's bits along rows and along columns, modulo 2^64, computed on the tensor's device."""
    rows = tensor.detach().contiguous().view(-1, tensor.shape[-1] if tensor.ndim else 1)
    if rows.shape[1] * rows.itemsize % WORD.itemsize == 0:
        aligned = rows.storage_offset() * rows.itemsize % WORD.itemsize == 0
        words = (rows if aligned else rows.clone()).view(WORD)  # summed ten times as fast as a narrower type
    else:
        words = rows.view(torch.int8)
    return torch.cat([words.sum(0, dtype=WORD), words.sum(1, dtype=WORD)]).cpu().numpy().tobytes()
