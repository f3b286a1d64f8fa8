"""Results on disk: whatever has its name is whole, an older result goes only when the new one is, a folder is one run's.

NAME.partial   being written; a run that ends early removes it, and so does the next one
NAME.new       whole, waiting for its name; whoever looks for NAME next finishes the renaming
NAME.old       the result before, on its way out
NAME.claim     a run is writing to NAME; a run that is dead holds it no more
"""

import errno
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import psutil
from filelock import FileLock, Timeout

from lib.errors import InvalidInput, NoRoom

CLAIM = ".claim"  # how the names of claims end
TOUCHED_EVERY, STALE_AFTER = 30.0, 300.0  # seconds, of a `Marker`
ATTEMPTS = 10  # at a file or folder that other runs remove at the same time


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write(temporary path)` make a file, then give it its name: a half-written file is never taken for a whole one."""
    temporary = _beside(path, "partial")
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors makes a file that only its owner can read
        with open(temporary, "r+b") as file:  # to be written: Windows flushes no others
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Give the whole folder `partial` the name `folder`. Whenever the process dies, `settle` finds the old one or the new one."""
    settle(folder)
    partial.rename(_beside(folder, "new"))
    settle(folder)


def settle(folder: Path) -> None:
    """Finish what a process that died in `replace_folder` has left. No folder is ever renamed onto another (Windows)."""
    new, old = _beside(folder, "new"), _beside(folder, "old")
    with suppress(FileNotFoundError):  # another process is doing the same
        if new.is_dir():
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            new.rename(folder)
        if old.is_dir() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def check_writable(folder: str | os.PathLike) -> None:
    """Fail now (OSError) rather than after hours if results cannot go to `folder`. Nothing is left, not even the folder."""
    path = Path(folder).absolute()
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    finally:
        for parent in missing:
            with suppress(OSError):  # several processes may look at the same time
                parent.rmdir()


@contextmanager
def claimed(folder: str | os.PathLike, flag: str, content: str = "results") -> Iterator[None]:
    """Inside the context, no other run writes to `folder`; see `Claim`."""
    claim = Claim(folder, flag, content)
    try:
        yield
    finally:
        claim.release()


class Claim:
    """The right to write to `folder`, until `release` or the end of this process, however it ends.

    Paths with the same real path are the same folder. The claim is a file beside it, or in it where nothing can be written
    beside it. `release` leaves nothing, not even the parents of `folder` that the claim has made, if they are empty.

    Args:
        flag: which names the folder.
        content: what the run writes there, for the message.

    Raises:
        InvalidInput: another run has it.
        NoRoom: nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike, flag: str, content: str = "results"):
        real = Path(os.path.realpath(folder))
        self.made = [parent for parent in real.parents if not parent.exists()]
        self.holder: FileLock | Marker | None = None
        try:
            try:
                self.holder = _hold(real.parent / f"{real.name}{CLAIM}")
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not real.is_dir():
                    raise
                self.holder = _hold(real / CLAIM)
        except Timeout:
            self.release()
            raise InvalidInput(f"another run has its {content} in {folder}: let it finish, or use another {flag}") from None
        except OSError as error:
            self.release()
            raise NoRoom(f"{flag} {folder} cannot be written ({error}): choose another folder") from error

    def release(self) -> None:
        """Let other runs write there."""
        if self.holder:
            if isinstance(self.holder, FileLock):
                with suppress(OSError):  # Windows does not remove an open file; there filelock removes it
                    Path(self.holder.lock_file).unlink(missing_ok=True)
            self.holder.release()
            self.holder = None
        for parent in self.made:
            with suppress(OSError):  # if it is not empty, it stays
                parent.rmdir()
        self.made = []


class Marker:
    """A claim on a file system without locks: a file that says which process of which host has made it.

    It is stale when that process is dead; if it is another host's, when nobody has touched it for STALE_AFTER seconds.
    """

    def __init__(self, path: Path):
        self.path = path
        self.text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex})
        self.released = Event()

    def acquire(self) -> None:
        """Timeout: another process has it."""
        for _ in range(ATTEMPTS):
            with suppress(FileExistsError, FileNotFoundError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "x") as file:
                    file.write(self.text)
                Thread(target=self._keep_touching, daemon=True).start()
                return
            with suppress(FileNotFoundError):  # it has just been released
                if not _is_stale(self.path):
                    break
                self._remove_stale()
        raise Timeout(str(self.path))

    def release(self) -> None:
        """Remove it."""
        self.released.set()
        with suppress(OSError):
            if self.path.read_text() == self.text:  # else it was taken for stale
                self.path.unlink()

    def _keep_touching(self) -> None:
        while not self.released.wait(TOUCHED_EVERY):
            with suppress(OSError):
                os.utime(self.path)

    def _remove_stale(self) -> None:
        """Remove a stale file: renamed first, because another run may do the same and have put its own there since."""
        text, aside = self.path.read_text(), self.path.with_name(f"{uuid.uuid4().hex}{CLAIM}")
        self.path.rename(aside)
        if aside.read_text() == text:
            aside.unlink()
        else:
            aside.rename(self.path)


def _hold(path: Path) -> FileLock | Marker:
    """The claim in the file `path`: a lock of the system, or a `Marker` where the file system has none.

    Raises:
        Timeout: another process has it.
        OSError: nothing can be written there.
    """
    lock = FileLock(path, fallback_to_soft=False)  # the system releases it when the process dies
    try:
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):  # another run has just removed a parent that both have made
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
                return lock
        raise Timeout(str(path))
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or getattr(error, "errno", None) in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOSPC,
        ):
            raise
        with suppress(OSError):
            path.unlink(missing_ok=True)  # which filelock may have made
    marker = Marker(path.with_name(f"{path.name.removesuffix(CLAIM)}.process{CLAIM}"))
    marker.acquire()
    return marker


def _is_stale(path: Path) -> bool:
    """Whether whoever has made the file of a `Marker` is dead, as far as this host can know."""
    with tempfile.TemporaryFile(dir=path.parent) as now:  # by the clock of the file system
        touched = path.stat().st_mtime
        untouched = os.fstat(now.fileno()).st_mtime - touched > STALE_AFTER
    try:
        made_by = json.loads(path.read_text())
        if made_by["host"] != socket.gethostname():
            return untouched
        started = psutil.Process(made_by["pid"]).create_time()
    except psutil.NoSuchProcess:
        return True
    except (
        ValueError,
        KeyError,
        TypeError,
        psutil.Error,
    ):  # its process may have died, or be at work, between making and writing
        return untouched
    return untouched and started > touched  # another process has got the number


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f"{path.name}.{state}")
