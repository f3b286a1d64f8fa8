"""Text that cannot be used, through both real command lines: one line that says what, where and the remedy; nothing is left behind."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from test_commands import COMMANDS

from lib.cli.command import run as run_command

GOOD = {"text": " ".join(["w5 w6"] * 40)}
CHAT = [{"role": "user", "content": "w5"}]


def lines(*rows) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def parquet(rows: list[dict], schema: pa.Schema | None = None) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    return buffer.getvalue()


EMPTY = pa.schema([("text", pa.string())])
PACKED = gzip.compress(lines(*[{"text": os.urandom(40).hex()} for _ in range(300)]))
TABLE = parquet([GOOD] * 3)

# case: (files, --dataset, more flags, what the line says); {} is the folder of the files
CASES = {
    "an empty file": ({"x.jsonl": b""}, "x.jsonl", "", "{}/x.jsonl holds no documents: give a file with text in it"),
    "an empty text": ({"x.txt": b""}, "x.txt", "", "{}/x.txt holds no documents"),
    "an empty list": ({"x.json": b" [ ] "}, "x.json", "", "{}/x.json holds no documents"),
    "blank lines": ({"x.jsonl": b"\n \n\n"}, "x.jsonl", "", "{}/x.jsonl holds no documents"),
    "an empty archive": ({"x.txt.gz": gzip.compress(b"")}, "x.txt.gz", "", "{}/x.txt.gz holds no documents"),
    "a table without rows": ({"x.parquet": parquet([], EMPTY)}, "x.parquet", "", "{}/x.parquet holds no documents"),
    "a table without columns": ({"x.parquet": parquet([])}, "x.parquet", "", "{}/x.parquet has the columns [], none of them is 'text' or"),
    "no file": ({}, "x.txt", "", "dataset file {}/x.txt does not exist: give an existing file"),
    "a format of no use": ({"x.csv": b"text\n"}, "x.csv", "", "/x.csv' is neither one of ['c4', 'wikitext2'] nor a path: give a .txt"),
    "an empty folder": ({"d/.hidden": b""}, "d", "", "dataset folder {}/d holds no files: give a .txt"),
    "a folder with something else": (
        {"d/a.txt": b"w5", "d/e/readme.md": b"#"},
        "d",
        "",
        "dataset {}/d has the file {}/d/e/readme.md, which is not a .txt",
    ),
    "a pattern of nothing": ({"a.txt": b"w5"}, "*.jsonl", "", "no file matches {}/*.jsonl: give a pattern that matches some"),
    "a bad file in a folder": (
        {"d/a.txt": b"w5", "d/b.jsonl": lines({"text": None})},
        "d",
        "",
        "{}/d/b.jsonl, line 1, column 'text' holds null instead of text",
    ),
    "null": (
        {"x.jsonl": lines(GOOD, "", {"text": None})},
        "x.jsonl",
        "",
        "{}/x.jsonl, line 3, column 'text' holds null instead of text: remove such rows",
    ),
    "a number": ({"x.jsonl": lines(GOOD, {"text": 5})}, "x.jsonl", "", "line 2, column 'text' holds a number instead of text"),
    "a number in a list": ({"x.json": json.dumps([GOOD, {"text": 0.5}]).encode()}, "x.json", "", "{}/x.json, row 2, column 'text' holds a number"),
    "a list of texts": ({"x.jsonl": lines({"text": ["a", "b"]})}, "x.jsonl", "", "line 1, column 'text' holds a list instead of text"),
    "an object": ({"x.jsonl": lines({"text": {"en": "a"}})}, "x.jsonl", "", "line 1, column 'text' holds an object instead of text"),
    "null in a table": ({"x.parquet": parquet([GOOD, {"text": None}])}, "x.parquet", "", "{}/x.parquet, row 2, column 'text' holds null"),
    "numbers in a table": ({"x.parquet": parquet([{"text": 1}])}, "x.parquet", "", "{}/x.parquet, row 1, column 'text' holds a number"),
    "bytes in a table": ({"x.parquet": parquet([{"text": b"w5"}])}, "x.parquet", "", "row 1, column 'text' holds bytes instead of text"),
    "half a surrogate pair": ({"x.jsonl": b'{"text": "\\ud83d"}'}, "x.jsonl", "", "line 1, column 'text' holds half of a surrogate pair"),
    "another column": (
        {"x.jsonl": lines({"body": "a", "id": 1})},
        "x.jsonl",
        "",
        "line 1, has the columns ['body', 'id'], none of them is 'text' or 'messages': name the one that holds the text with --text_column",
    ),
    "a column in some rows only": ({"x.jsonl": lines(GOOD, {"body": "a"})}, "x.jsonl", "", "line 2, has the columns ['body'], none of them is"),
    "no such column": ({"x.jsonl": lines(GOOD)}, "x.jsonl", "--text_column body", "has the columns ['text'], none of them is 'body': name the one"),
    "no such column in a table": ({"x.parquet": TABLE}, "x.parquet", "--text_column body", "{}/x.parquet has the columns ['text'], none of them is 'body'"),
    "rows below a key": (
        {"x.json": json.dumps({"version": 1, "data": [GOOD]}, indent=1).encode()},
        "x.json",
        "",
        "{}/x.json, row 1, has its rows below 'data': save what is there as a separate file, one row per line",
    ),
    "rows below numbers": ({"x.json": json.dumps({"0": {"0": GOOD, "1": GOOD}}).encode()}, "x.json", "", "has its rows below '0': save"),
    "rows behind keys": ({"x.json": json.dumps({"0": GOOD, "1": GOOD}).encode()}, "x.json", "", "line 1, is an object with a row under every key: save the rows as a list"),
    "chats in another column": (
        {"x.jsonl": lines({"conversations": [{"from": "human", "value": "w5"}]})},
        "x.jsonl",
        "",
        "line 1, has the columns ['conversations'], none of them is 'text' or 'messages': name the one",
    ),
    "no row": ({"x.jsonl": lines(GOOD, "17")}, "x.jsonl", "", '{}/x.jsonl, line 2, is a number: a row must be an object such as {"text": "..."}'),
    "a text where a column is asked for": ({"x.json": b'["a"]'}, "x.json", "--text_column body", 'row 1, is text: a row must be an object such as {"body"'),
    "no JSON": ({"x.jsonl": b"w5 w6\nw7"}, "x.jsonl", "", "{}/x.jsonl is not JSON (Expecting value: line 1 column 1 (char 0)): give one JSON object per line"),
    "a line cut off": ({"x.jsonl": lines(GOOD, '{"text": "w5')}, "x.jsonl", "", "{}/x.jsonl, line 2, is not JSON (Unterminated string"),
    "a list cut off": ({"x.json": json.dumps([GOOD] * 3).encode()[:-5]}, "x.json", "", "{}/x.json is not JSON ("),
    "brackets without end": ({"x.json": b"[" * 200_000}, "x.json", "", "{}/x.json is not JSON (maximum recursion depth"),
    "Latin-1 text": ({"x.txt": "w5 café".encode("latin-1")}, "x.txt", "", "{}/x.txt is not UTF-8 text near b'w5 caf\\xe9': convert it, perhaps with iconv -f LATIN1 -t UTF-8"),
    "Latin-1 rows": ({"x.jsonl": lines(GOOD) + b'\n{"text": "caf\xe9"}'}, "x.jsonl", "", "{}/x.jsonl is not UTF-8 text near b'"),
    "Latin-1 in a list": ({"x.json": b'[{"text":\n "caf\xe9"}]'}, "x.json", "", "{}/x.json is not UTF-8 text near b'"),
    "Latin-1, compressed": ({"x.txt.gz": gzip.compress(b"caf\xe9")}, "x.txt.gz", "", "{}/x.txt.gz is not UTF-8 text near b'caf\\xe9'"),
    "UTF-16": ({"x.txt": "w5".encode("utf-16")}, "x.txt", "", "{}/x.txt is not UTF-8 text near b'\\xff\\xfew\\x005\\x00': convert it, perhaps with iconv -f UTF-16"),
    "compressed without saying so": ({"x.jsonl": PACKED}, "x.jsonl", "", "{}/x.jsonl is not UTF-8 text near b'\\x1f\\x8b"),
    "an archive cut off": ({"x.jsonl.gz": PACKED[: len(PACKED) // 2]}, "x.jsonl.gz", "", "{}/x.jsonl.gz is not a whole gzip file (Compressed file ended"),
    "no archive": ({"x.jsonl.gz": lines(GOOD)}, "x.jsonl.gz", "", "{}/x.jsonl.gz is not a whole gzip file (Not a gzipped file"),
    "a damaged archive": ({"x.txt.gz": PACKED[:400] + b"\0" * 40 + PACKED[440:]}, "x.txt.gz", "", "{}/x.txt.gz is not a whole gzip file ("),
    "a table cut off": ({"x.parquet": TABLE[:-20]}, "x.parquet", "", "{}/x.parquet is not a Parquet file, or a damaged one ("),
    "no table": ({"x.parquet": lines(GOOD)}, "x.parquet", "", "{}/x.parquet is not a Parquet file, or a damaged one ("),
    "an empty table": ({"x.parquet": b""}, "x.parquet", "", "{}/x.parquet is not a Parquet file, or a damaged one ("),
    "a damaged table": ({"x.parquet": TABLE[:4] + b"\xff" * 40 + TABLE[44:]}, "x.parquet", "", "{}/x.parquet is not a Parquet file, or a damaged one ("),
    "chats and no template": ({"x.jsonl": lines({"messages": CHAT})}, "x.jsonl", "", "the text consists of conversations, and the tokenizer (TokenizersBackend) has no chat template"),
    "chats of another form": (
        {"x.jsonl": lines({"messages": [{"from": "human", "value": "w5"}]})},
        "x.jsonl",
        "",
        """line 1, column 'messages' is not a conversation (['from', 'value']): give every message a "role" and a "content", both text""",
    ),
    "a chat without content": ({"x.jsonl": lines({"messages": [*CHAT, {"role": "user", "content": None}]})}, "x.jsonl", "", "line 1, column 'messages' is not a conversation"),
    "an empty chat": ({"x.jsonl": lines({"messages": []})}, "x.jsonl", "", "line 1, column 'messages' is not a conversation (no messages)"),
    "documents too short": ({"x.jsonl": lines({"text": "w5 w6 w7"}, {"text": ""})}, "x.jsonl", "", "none of the 2 documents has more than 16 tokens (the longest has 3): use --seq_length 2"),
    "documents of nothing": ({"x.jsonl": lines({"text": " "}, {"text": ""})}, "x.jsonl", "", "none of the 2 documents has more than 16 tokens (the longest has 0): --pack to join documents"),
    "not enough to pack": ({"x.jsonl": lines({"text": "w5 w6"})}, "x.jsonl", "--pack", "all 1 documents packed hold 3 tokens, fewer than 4 windows of 16: use a shorter"),
    "no local copy": ({}, "c4", "--data_dir {}", "{}/allenai/c4/en/c4-train.00000-of-01024.json.gz does not exist: --data_dir must hold c4"),
    "not in the hub's cache": ({}, "c4", "", "c4: allenai/c4/en/c4-train.00000-of-01024.json.gz is not in the hub's cache and cannot be fetched ("),
}  # fmt: skip
EVALUATION_SAYS = {
    "documents too short": "the evaluation text has 3 tokens, fewer than one window of 16: shorten --seq_length",
    "documents of nothing": "the evaluation text has 0 tokens, fewer than one window of 16: shorten --seq_length",
    "not enough to pack": "the evaluation text has 2 tokens, fewer than one window of 16",
    "no local copy": "{}/allenai/c4/en/c4-validation.00000-of-00008.json.gz does not exist: --data_dir must hold c4",
    "not in the hub's cache": "c4: allenai/c4/en/c4-validation.00000-of-00008.json.gz is not in the hub's cache",
}


def command_line(monkeypatch, script: str, arguments: list[str]) -> tuple[int, str, str]:
    """Run a command as its file does when it is run; its exit status, standard output and error."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(COMMANDS[script].parse, COMMANDS[script].main)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=err)
    return status, out.getvalue(), err.getvalue()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, and what is in it."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def place(tmp_path, saved_model):
    """A function: files to a folder that holds them, an earlier result, and the flags that all cases share."""

    def prepared(files: dict[str, bytes]) -> tuple[Path, list[str]]:
        folder = tmp_path / "text"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        results = tmp_path / "results"
        results.mkdir()
        (results / "log.txt").write_text("an earlier result")
        flags = ["--model", saved_model, "--nsamples", 4, "--seq_length", 16, "--cache_dir", tmp_path / "cache"]
        return folder, list(map(str, flags))

    return prepared


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("script", COMMANDS)
def test_bad_text_is_one_line(case, script, place, tmp_path, monkeypatch):
    files, name, more, expected = CASES[case]
    folder, flags = place(files)
    dataset = name if name == "c4" else str(folder / name)
    results = str(tmp_path / "results")
    if script == "main.py":  # the same text to measure perplexity on
        (tmp_path / "good.jsonl").write_bytes(lines(GOOD))
        flags += ["--prune_method", "wanda", "--sparsity_ratio", "0.5", "--save", results, "--save_model", f"{results}/model"]
        flags += ["--dataset", str(tmp_path / "good.jsonl"), "--eval_dataset", dataset]
        (tmp_path / "results" / "model").mkdir()
        expected = EVALUATION_SAYS.get(case, expected)
    else:
        flags += ["--output_dir", results, "--dataset", dataset]
    before = contents(folder) | contents(tmp_path / "results")
    status, printed, said = command_line(monkeypatch, script, [*flags, *more.format(folder).split()])
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert status in (1, 2) and printed == "", said
    assert len(errors) == 1 and errors[0].startswith(f"{script}: error: ") and said.endswith(errors[0] + "\n"), said
    assert expected.replace("{}", str(folder)) in errors[0]
    assert "Traceback" not in said
    assert contents(folder) | contents(tmp_path / "results") == before


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, saved_model):
    """As a user without a network sees it, in a process of its own."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [
            sys.executable,
            "gradient_computation.py",
            "--model",
            saved_model,
            "--dataset",
            "wikitext2",
            "--seq_length",
            "16",
            "--output_dir",
            tmp_path,
        ],
        cwd=ROOT,
        env={**plain, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*", "no_proxy": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("gradient_computation.py: error: wikitext2: Salesforce/wikitext/wikitext-2-raw-v1/train-")
    assert line.endswith("Give a file instead, or --data_dir (install.md, Offline)")
    assert not list(tmp_path.glob("llama2/*"))
