"""A file to its documents.

    .txt            the whole file is one document
    .jsonl, .json   rows: a JSON object a line, a list of them, or a single one
    .parquet        rows

All but .parquet are read with .gz behind their name as well. Of a row counts the column that is asked for, else `text`, else
`messages`. It holds a text or a conversation, a list of {"role": ..., "content": ...}; a row may also be a text itself.
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
COLUMNS = ("text", "messages")
KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def format_of(path: Path) -> str | None:
    """Which of FORMATS a file is read as, by its name; None: as none of them."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in FORMATS and (path.suffix, suffix) != (".gz", ".parquet") else None


def read(path: Path, column: str | None = None) -> Iterator[Document]:
    """The documents of a file, in its order. A .txt or .json file is in memory while it is read, the others are not.

    Raises:
        ValueError: a file that is damaged, not UTF-8 or not what its name says, or a row without text; the message names the
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
        raise InvalidInput(f"{path} is not a gzip file, or not all of one ({error}): fetch or compress it again") from error
    except UnicodeDecodeError as error:
        near = error.object[max(error.start - 20, 0) : error.start + 10]
        raise InvalidInput(f"{path} is not UTF-8 text, see {near!r}: {_encoding_remedy(path)}") from error


def _text(file) -> Iterator[str]:
    text = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    if text:
        yield text


def _json_rows(path: Path, file) -> Iterator[tuple[str, Any]]:
    """Rows, and where in the file each is."""
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
        raise InvalidInput(f"{where} is not JSON ({error}): give one JSON object a line, or one list of objects") from error


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
        raise InvalidInput(f"{where} is an object with a row behind every key: save a list of the rows, or a row a line")
    for key, value in row.items():
        if _holds_rows(value, wanted):
            raise InvalidInput(f"{where} has its rows below {key!r}: save what is there as a file of its own, a row a line")
    raise InvalidInput(
        f"{where} has the columns {list(row)[:20]}, none is {' or '.join(map(repr, wanted))}: name the one that holds the text "
        "with --text_column"
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
        f"{where} holds {KINDS.get(type(value), type(value).__name__)} instead of text: remove such rows, or name another column "
        "with --text_column"
    )


def _encoding_remedy(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b" and path.suffix != ".gz":
        return "it is compressed with gzip, so let its name end in .gz"
    encoding = "UTF-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "LATIN1"
    return f"convert it, perhaps with iconv -f {encoding} -t UTF-8"
