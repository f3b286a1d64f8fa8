"""Unfinished gradient sums on disk: what a run needs to continue, between groups of samples and after it was killed.

    gradients_work_NAME/
        state.json            how many samples the sums cover, and the settings they were made with; replaced atomically
        samples_00016/        the sums over the first 16 samples, one safetensors file per block

A group writes its sums beside those of the group before, which are deleted once state.json names the new ones. So whenever
the process dies, the sums that state.json names are complete.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib.atomic import Claim, replace_file
from lib.errors import InvalidInput
from lib.gradients.sums import BlockSums
from lib.models.host import room_in

logger = logging.getLogger(__name__)

STATE = "state.json"
SAVED_AFTER = 60.0  # seconds of work that a resident run may lose when it is killed
SAVING_SHARE = 0.1  # of a run's time that saving may take: slow saving is done less often


class GradientWork(MutableMapping):
    """{block index: BlockSums} on disk. Reading gives the sums of the last commit, writing becomes visible at the next one.

    It is a context manager. However it is left, it leaves no lock and nothing half-written. Committed sums stay until `remove`.

    Args:
        folder: where the sums are stored.
        settings: all that the sums depend on. A resumed run must have the same.
        resume: continue from the sums in the folder, or start from nothing if there are none. Otherwise they are deleted.

    Raises:
        InvalidInput: the folder has the sums of other settings (the message names the difference) or a damaged state, or
            another run is using it.
        NoRoom: nothing can be written there.
    """

    def __init__(self, folder: Path, settings: dict, device: torch.device, resume: bool = False):
        self.folder = folder
        self.settings = settings
        self.device = device
        self.done = 0
        self.missing: dict[str, int] = {}
        self.saved, self.took = time.monotonic(), 0.0  # when sums were last saved, and the seconds that it took
        self.lock = Claim(folder, "--output_dir", "sums")
        try:
            self._start(resume)
        except BaseException:
            self.lock.release()
            raise

    def _start(self, resume: bool) -> None:
        """Take over the sums of an earlier run, or delete them."""
        if (self.folder / STATE).is_file():
            recorded = _read_state(self.folder / STATE) if resume else None
            if recorded is None:
                logger.warning("the unfinished sums in %s are deleted: --resume would have continued with them", self.folder)
            else:
                for key, value in self.settings.items():
                    if recorded["settings"].get(key) != value:
                        raise InvalidInput(
                            f"cannot resume: {key} was {recorded['settings'].get(key)!r} and is now {value!r} ({self.folder}); "
                            "use the same flags (instead of --memory auto, what it decided on), or start anew without --resume"
                        )
                self.done, self.missing = recorded["done"], recorded["missing"]
        if not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)
        for other in self.folder.glob("samples_*"):
            if other != self._sums(self.done):
                shutil.rmtree(other)
        self._next().mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "GradientWork":
        return self

    def __exit__(self, *error) -> None:
        if self.done:
            shutil.rmtree(self._next(), ignore_errors=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()
        with suppress(OSError):  # if it is not empty, it stays
            self.folder.parent.rmdir()

    def __getitem__(self, i: int) -> BlockSums:
        file = self._sums(self.done) / f"block_{i:03d}.safetensors"
        if not self.done:
            raise KeyError(i)
        sums = BlockSums(self.settings["norms"], self.settings["scale"])
        for key, total in load_file(file).items():
            norm, layout, name = key.split("/")
            total = total.to(self.device, non_blocking=True)
            sums.totals[norm][name] = total.T if layout == "transposed" else total
        return sums

    def __setitem__(self, i: int, sums: BlockSums) -> None:
        tensors = {}
        for norm, totals in sums.totals.items():
            for name, total in totals.items():
                if total.is_contiguous():
                    tensors[f"{norm}/plain/{name}"] = total.cpu()
                else:  # the layout of autograd's gradients, see BlockSums.add
                    tensors[f"{norm}/transposed/{name}"] = total.T.contiguous().cpu()
        with room_in(self.folder, "choose an --output_dir on a disk with room; --resume continues with what is there"):
            replace_file(self._next() / f"block_{i:03d}.safetensors", lambda path: save_file(tensors, path))

    def __delitem__(self, i: int) -> None:
        raise TypeError("sums are deleted when the next are committed")

    def __iter__(self) -> Iterator[int]:
        if self.done:
            yield from (int(file.stem.partition("_")[2]) for file in sorted(self._sums(self.done).glob("block_*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def commit(self, done: int, missing: dict[str, int]) -> None:
        """Make the sums written since the last commit the current ones: those of the first `done` samples."""
        before = self._sums(self.done)
        self._next().rename(self._sums(done))
        text = json.dumps({"done": done, "missing": missing, "settings": self.settings}, indent=1)
        replace_file(self.folder / STATE, lambda path: path.write_text(text))
        self.done, self.missing = done, dict(missing)
        shutil.rmtree(before, ignore_errors=True)
        self._next().mkdir(exist_ok=True)

    def due(self) -> bool:
        """Whether it is time that a run with its sums in memory saves them."""
        return time.monotonic() - self.saved >= max(SAVED_AFTER, self.took / SAVING_SHARE)

    def save(self, sums: Mapping[int, BlockSums], done: int, missing: dict[str, int]) -> None:
        """Write and commit the sums of all blocks."""
        start = time.monotonic()
        self.update(sums)
        self.commit(done, missing)
        self.saved = time.monotonic()
        self.took = self.saved - start

    def remove(self) -> None:
        """Delete all sums, which nobody needs once the result is in place."""
        self.done = 0
        shutil.rmtree(self.folder)

    def _sums(self, done: int) -> Path:
        return self.folder / f"samples_{done:05d}"

    def _next(self) -> Path:
        return self.folder / "samples_next"


def _read_state(path: Path) -> dict:
    try:
        state = json.loads(path.read_text())
        return {key: state[key] for key in ("settings", "done", "missing")}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"cannot resume: {path} is damaged ({error!r}): start anew without --resume") from error
