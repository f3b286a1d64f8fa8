"""Results on disk: whatever has its name is whole, an older result goes only when the new one is.

NAME.partial   being written; a run that ends early removes it, and so does the next one
NAME.new       whole, waiting for its name; whoever looks for NAME next finishes the renaming
NAME.old       the result before, on its way out
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


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


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f"{path.name}.{state}")
