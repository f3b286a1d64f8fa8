"""Where text comes from: a source is "c4", "wikitext2", a file (see readers.py), a folder or a pattern of files.

The two names stand for files of the Hugging Face hub or, with `data_dir`, for the same files in a local copy that is laid out
as on the hub.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from lib.data.readers import Document, format_of, read
from lib.errors import InvalidInput, MissingInput, OutOfReach
from lib.models.files import hub

# name of a corpus -> purpose -> (hub repository, file in the repository)
HUB = {
    "c4": {
        "calibration": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
        "evaluation": ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
    },
    "wikitext2": {
        "calibration": ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
        "evaluation": ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    },
}
READABLE = "a .txt, .jsonl, .json (all also .gz) or .parquet file"
FEATURES = Features({"document": Value("large_string"), "conversation": Value("bool")})


class Documents(Sequence[Document]):
    """The documents of a source. They stay on disk and are mapped into memory."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int | slice) -> Document | list[Document]:
        return [self[k] for k in range(len(self))[i]] if isinstance(i, slice) else _unpacked(self.rows[i])

    def __iter__(self) -> Iterator[Document]:
        return map(_unpacked, self.rows)


def check_source(source: str, data_dir: str | None = None, purpose: str = "calibration") -> None:
    """Raise MissingInput or InvalidInput, before any work is done, if `documents` could not read `source`."""
    if source not in HUB:
        _files_of(source)
    elif data_dir is not None and not (path := _local_copy(source, data_dir, purpose)).is_file():
        raise MissingInput(f"{path} does not exist: --data_dir must hold {source} in the hub's layout")


def documents(
    source: str,
    data_dir: str | None = None,
    purpose: str = "calibration",
    cache_dir: str | None = None,
    column: str | None = None,
) -> Documents:
    """The documents of a source. Those of several files are in the order of the files' names.

    `purpose` is "calibration" or "evaluation" and picks the split of the hub's corpora. `column` is the one that rows of files
    have their text in (default: see readers.py). The documents are also stored as one Arrow file in `cache_dir`, which later
    runs read instead of the source.

    Raises:
        MissingInput: there is no such file.
        OutOfReach: the hub does not answer.
        InvalidInput: the source is unknown or has no documents, or a file cannot be read (`readers.read`).
    """
    check_source(source, data_dir, purpose)
    if source not in HUB:
        paths = _files_of(source)
    elif data_dir is not None:
        paths, column = [_local_copy(source, data_dir, purpose)], None
    else:
        paths, column = [_fetched(source, purpose, cache_dir)], None
    return Documents(_on_disk(source, paths, column, cache_dir))


def _on_disk(source: str, paths: list[Path], column: str | None, cache_dir: str | None) -> Dataset:
    def rows() -> Iterator[dict]:
        empty = True
        for path in paths:
            for document in read(path, column):
                empty = False
                conversation = not isinstance(document, str)
                yield {"document": json.dumps(document) if conversation else document, "conversation": conversation}
        if empty:
            raise InvalidInput(f"{source} holds no documents: give a file with text in it")

    # The Arrow file is named by all that its content depends on. If any of it changes, the source is read anew.
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    code = [Path(__file__).with_name(name).read_text() for name in ("readers.py", "sources.py")]
    digest = hashlib.sha256(json.dumps([states, column, code]).encode()).hexdigest()
    try:
        return Dataset.from_generator(rows, features=FEATURES, cache_dir=cache_dir, fingerprint=digest[:32])
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _unpacked(row: dict) -> Document:
    return json.loads(row["document"]) if row["conversation"] else row["document"]


def _files_of(source: str) -> list[Path]:
    """The files of a source that is not one of HUB's names, sorted by their paths inside it: in one order on every machine."""
    path = Path(source)
    if source and path.is_dir():
        inside = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        inside = sorted((name for name in inside if not any(part.startswith(".") for part in name.parts)), key=Path.as_posix)
        if not inside:
            raise MissingInput(f"dataset folder {source} holds no files: give {READABLE}, or a folder of them")
        files = [path / name for name in inside]
    elif not path.exists() and glob.has_magic(source):
        files = sorted((Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()), key=Path.as_posix)
        if not files:
            raise MissingInput(f"no file matches {source}: give a pattern that matches some, such as 'texts/*.jsonl'")
    else:
        files = [path]
    if (unreadable := next((file for file in files if format_of(file) is None), None)) is not None:
        if unreadable == path:
            raise InvalidInput(
                f"dataset {source!r} is neither one of {sorted(HUB)} nor a path: give {READABLE}, or a folder of them"
            )
        pattern = unreadable.with_name("*.jsonl")
        raise InvalidInput(
            f"dataset {source} has the file {unreadable}, which is not {READABLE}: choose files by a pattern such as "
            f"'{pattern}'"
        )
    if not files[0].is_file():
        raise MissingInput(f"dataset file {source} does not exist: give an existing file or one of {sorted(HUB)}")
    return files


def _local_copy(source: str, data_dir: str, purpose: str) -> Path:
    return Path(data_dir, *HUB[source][purpose])


def _fetched(source: str, purpose: str, cache_dir: str | None) -> Path:
    repository, file = HUB[source][purpose]
    try:
        return Path(hub.fetch(repository, file, repo_type="dataset", cache_dir=cache_dir))
    except ConnectionError as error:
        raise OutOfReach(f"{source}: {error}. Give a file instead, or --data_dir (install.md, Offline)") from error
