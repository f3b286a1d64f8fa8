"""Reads a file into documents.

    .txt            the whole file is one document
    .jsonl, .json   rows: one JSON object per line, a list of objects, or a single object
    .parquet        rows

All formats but .parquet may also be compressed with gzip (.jsonl.gz). The document of a row is in the column that the caller
names, otherwise in `text`, otherwise in `messages`. It is a text or a conversation, which is a list of {"role": ...,
"content": ...}. A row may also be a text itself, without columns.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.errors import InvalidInput

Document = str | list[dict[str, Any]]  # a text, or the messages of a conversation

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COLUMNS = ("text", "messages")  # where the document of a row is looked for, in this order
KINDS = {  # how error messages call what a row holds
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def format_of(path: Path) -> str | None:
    """The one of FORMATS that a file is read as, by its name; None if its name ends in none of them."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in FORMATS and (path.suffix, suffix) != (".gz", ".parquet") else None


def read(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield the documents of a file in order. A .txt file or a JSON list is held in memory as a whole, other files are not.

    Raises:
        InvalidInput: the file is damaged, not in UTF-8 or not what its name says, or a row has no text. The message names the
            file, the line or row, what is there, and a remedy.
    """
    try:
        if format_of(path) == ".parquet":
            yield from _parquet(path, column)
            return
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if format_of(path) == ".txt":
                yield from _text(file)
            else:
                yield from (_document(row, f"{path}, {where},", column) for where, row in _json_rows(path, file))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidInput(f"{path} is not a whole gzip file ({error}): fetch or compress it again") from error
    except UnicodeDecodeError as error:
        near = error.object[max(error.start - 20, 0) : error.start + 10]
        raise InvalidInput(f"{path} is not UTF-8 text near {near!r}: {_encoding_remedy(path)}") from error


def _text(file) -> Iterator[str]:
    text = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    if text:
        yield text


def _json_rows(path: Path, file) -> Iterator[tuple[str, Any]]:
    """Yield where in the file a row is, and the row."""
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    number, first = next(lines, (1, b""))
    first = first.removeprefix(codecs.BOM_UTF8)
    if _is_a_row(first):
        for at, line in chain([(number, first)], lines):
            yield f"line {at}", _parse(line.decode(), f"{path}, line {at},")
    elif first:
        content = _parse("\n" * (number - 1) + (first + file.read()).decode(), str(path))
        rows = content if isinstance(content, list) else [content]
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _is_a_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict | str)
    except (json.JSONDecodeError, RecursionError):
        return False


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON ({error}): give one JSON object per line, or one list of objects") from error


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            name = _column_of(dict.fromkeys(file.schema_arrow.names), column, str(path))
            values = chain.from_iterable(batch.column(name).to_pylist() for batch in file.iter_batches(columns=[name]))
            for number, value in enumerate(values, 1):
                yield _content(value, f"{path}, row {number}, column {name!r}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"{path} is not a Parquet file, or a damaged one ({reason}): fetch or write it again") from error


def _document(row: Any, where: str, column: str | None) -> Document:
    if isinstance(row, dict):
        name = _column_of(row, column, where)
        return _content(row[name], f"{where} column {name!r}")
    if isinstance(row, str) and column is None:
        return _content(row, where)
    raise InvalidInput(f'{where} is {KINDS[type(row)]}: a row must be an object such as {{"{column or "text"}": "..."}}')


def _column_of(row: dict[str, Any], column: str | None, where: str) -> str:
    wanted = [column] if column else COLUMNS
    for name in wanted:
        if name in row:
            return name
    if _holds_rows(row, wanted):
        raise InvalidInput(f"{where} is an object with a row under every key: save the rows as a list, or one per line")
    for key, value in row.items():
        if _holds_rows(value, wanted):
            raise InvalidInput(f"{where} has its rows below {key!r}: save what is there as a separate file, one row per line")
    raise InvalidInput(
        f"{where} has the columns {list(row)[:20]}, none of them is {' or '.join(map(repr, wanted))}: "
        "name the one that holds the text with --text_column"
    )


def _holds_rows(value: Any, wanted: Iterable[str]) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else value
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and set(wanted) & set(row) for row in rows)


def _content(value: Any, where: str) -> Document:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"{where} holds half of a surrogate pair, which is not text ({error}): remove the row"
            ) from error
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        messages = [{key: part for key, part in message.items() if part is not None} for message in value]
        if messages and all(isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
            return messages
        keys = sorted(messages[0]) if messages else "no messages"
        raise InvalidInput(f'{where} is not a conversation ({keys}): give every message a "role" and a "content", both text')
    raise InvalidInput(
        f"{where} holds {KINDS.get(type(value), type(value).__name__)} instead of text: remove such rows, or name another "
        "column with --text_column"
    )


def _encoding_remedy(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b" and path.suffix != ".gz":
        return "it is compressed with gzip, so let its name end in .gz"
    encoding = "UTF-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "LATIN1"
    return f"convert it, perhaps with iconv -f {encoding} -t UTF-8"
