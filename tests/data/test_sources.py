"""Sources of text: files of every format, folders and patterns, the hub with and without a network."""

import gzip
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from lib.data import sources

CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]


@pytest.fixture
def read(tmp_path):
    """A function: a source to the list of its documents."""

    def documents(source, **options) -> list:
        docs = sources.documents(str(source), cache_dir=str(tmp_path / "cache"), **options)
        assert [docs[i] for i in range(len(docs))] == docs[:] == list(docs)
        return list(docs)

    return documents


def write(path: Path, rows: list) -> Path:
    """Rows as what the path's name says; a .txt is the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if ".txt" in path.name:
        content = rows[0]
    elif ".jsonl" in path.name:
        content = "\n".join(map(json.dumps, rows))
    else:
        content = json.dumps(rows)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(content.encode())
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz", "x.parquet"])
def test_rows(tmp_path, read, name):
    texts = ["first\ndocument", "", "größer 漢字\u2028\r\n"]
    assert read(write(tmp_path / name, [{"id": i, "text": text} for i, text in enumerate(texts)])) == texts
    assert read(write(tmp_path / "other" / name, [{"body": text, "text": "no"} for text in texts]), column="body") == texts
    assert read(write(tmp_path / "chat" / name, [{"messages": CHAT}] * 2)) == [CHAT, CHAT]
    assert read(write(tmp_path / "named" / name, [{"talk": CHAT, "text": "no"}]), column="talk") == [CHAT]
    assert read(write(tmp_path / "both" / name, [{"messages": CHAT, "text": "yes"}])) == ["yes"]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, read, name):
    assert read(write(tmp_path / name, ["\ufefffirst\r\ndocument\rall of it\n"])) == ["first\ndocument\nall of it\n"]


@pytest.mark.parametrize(
    "content, expected",
    [
        ('\n\n{"text": "a"}\n\n  {"text": "b"}  \n', ["a", "b"]),
        ('[\n {"text": "a"},\n {"text": "b"}\n]\n', ["a", "b"]),
        ('{\n "text": "a"\n}\n', ["a"]),
        ('["a", "b"]', ["a", "b"]),
        ('\ufeff{"text": "a"}\r\n{"text": "b", "text2": null}', ["a", "b"]),
        ('{"meta": 1, "text": "a"}\n{"meta": {"any": [1, "x"]}, "text": "b"}', ["a", "b"]),  # other columns do not matter
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_json_as_people_write_it(tmp_path, read, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == expected


def test_missing_parts_of_messages_are_left_out(tmp_path, read):
    """Arrow fills them with null, and templates ask whether they are there."""
    rows = [{"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "name": "c"}]}]
    expected = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]]
    assert read(write(tmp_path / "x.parquet", rows)) == read(write(tmp_path / "x.json", rows)) == expected


def test_folders_and_patterns_are_read_in_the_order_of_their_names(tmp_path, read, monkeypatch):
    folder = tmp_path / "texts"
    for name in ("b.txt", "a/z.txt", "B.txt", "a-b.txt"):
        write(folder / name, [name])
    write(folder / "a" / "c.parquet", [{"text": "1"}, {"text": "2"}])
    write(folder / "a" / "d.json.gz", [{"text": "3"}, {"messages": CHAT}])
    (folder / "b" / ".cache").mkdir(parents=True)
    for hidden in (".DS_Store", "b/.cache/index.bin"):
        (folder / hidden).write_bytes(b"\0")
    everything = ["B.txt", "a-b.txt", "1", "2", "3", CHAT, "a/z.txt", "b.txt"]
    assert read(folder) == everything
    assert read(folder / "*.txt") == ["B.txt", "a-b.txt", "b.txt"]
    assert read(folder / "**" / "*.[tp]*") == ["B.txt", "a-b.txt", "1", "2", "a/z.txt", "b.txt"]
    monkeypatch.chdir(tmp_path)
    assert read("texts/") == read("texts") == read("./texts/../texts") == everything
    assert read(write(tmp_path / "[1]*.txt", ["the file itself"])) == ["the file itself"]


def test_a_changed_file_is_read_anew(tmp_path, read):
    path = write(tmp_path / "x.txt", ["before"])
    assert read(path) == ["before"]
    before = path.stat()
    write(path, ["after!"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read(path) == ["after!"]
    assert read(write(tmp_path / "x.jsonl", [{"text": "a", "b": "c"}])) == ["a"]
    assert read(tmp_path / "x.jsonl", column="b") == ["c"]


def test_what_was_read_once_is_not_read_again(tmp_path, read, monkeypatch):
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    assert read(path) == ["a"]
    monkeypatch.setattr(sources, "read", None)
    assert read(path) == ["a"]


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("nothing.jsonl", FileNotFoundError, "does not exist"),
        ("words.docx", ValueError, "neither one of"),
        ("x.parquet.gz", ValueError, "neither one of"),
        ("c5", ValueError, "neither one of"),
        ("", ValueError, "neither one of"),
        ("no/*.jsonl", FileNotFoundError, "no file matches"),
    ],
)
def test_sources_that_cannot_be_read(source, error, message):
    with pytest.raises(error, match=message):
        sources.check_source(source)


def test_a_missing_local_copy(tmp_path):
    with pytest.raises(FileNotFoundError, match="hub's layout"):
        sources.documents("c4", data_dir=str(tmp_path))


def test_the_hubs_layout(shared_data, tmp_path):
    cache = str(tmp_path)
    assert len(sources.documents("c4", str(shared_data), cache_dir=cache, column="body")) == 1100  # the column is that of files
    assert len(sources.documents("c4", str(shared_data), "evaluation", cache)) == 100
    rows = sources.documents("wikitext2", str(shared_data), "evaluation", cache)
    assert len(rows) == 4358 and rows[0] == ""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: HEAD and GET of a file, at a commit and with its ETag."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.asked.append(self.path)
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        if content is not None:
            self.send_header("X-Repo-Commit", "0123456789" * 4)
            self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content

    def do_GET(self):
        self.wfile.write(self.do_HEAD() or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """An imitation of the hub on the loopback address, with a C4 and a WikiText-2."""
    rows = [{"text": " ".join(f"w{3 + (i * k) % 90}" for k in range(60))} for i in range(1, 30)]
    for name, purposes in sources.HUB.items():
        for purpose, (repository, file) in purposes.items():
            path = write(tmp_path / name / purpose / Path(file).name.replace(".json.gz", ".jsonl.gz"), rows)
            Hub.files[f"/datasets/{repository}/resolve/main/{file}"] = path.read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    Hub.asked.clear()


SCRIPT = """
import sys
from lib.data.sources import documents
from lib.data.windows import calibration_windows, evaluation_tokens
tokenizer = lambda text, **options: {"input_ids": [int(word[1:]) for word in text.split()]}
for name in ("c4", "wikitext2"):
    print(calibration_windows(documents(name), tokenizer, 3, 20, seed=1, source=name).tolist())
    print(evaluation_tokens(documents(name, purpose="evaluation"), tokenizer, name).tolist()[:100])
"""


def with_hub(port: int, home: Path, *command, **environment) -> subprocess.CompletedProcess:
    """Run Python with its hub on this machine; huggingface_hub reads its environment at import."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**plain, **hub, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_online_offline_and_out_of_reach_are_the_same(hub, tmp_path):
    port, home = hub.server_address[1], tmp_path / "home"
    online = with_hub(port, home, "-c", SCRIPT)
    assert online.returncode == 0, online.stderr
    assert len(online.stdout.splitlines()) == 4
    assert {path for path in Hub.asked if "c4-train" in path} == {path for path in Hub.files if "c4-train" in path}
    assert with_hub(port, home, "-c", SCRIPT, HF_HUB_OFFLINE="1").stdout == online.stdout
    hub.shutdown()
    hub.server_close()
    shutil.rmtree(home / "datasets")  # the downloaded files are enough
    assert with_hub(port, home, "-c", SCRIPT).stdout == online.stdout


@pytest.mark.parametrize("case", ["offline", "refused", "silent", "not there"])
def test_a_hub_out_of_reach_is_one_error_soon(tmp_path, hub, case, monkeypatch):
    expected = {"offline": "HF_HUB_OFFLINE", "refused": "refused", "silent": "no answer in 2.5 s", "not there": "404"}[case]
    monkeypatch.setattr(
        "lib.models.files.hub.hf_hub_url", lambda *file, **options: f"http://127.0.0.1:{hub.server_address[1]}/{file}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", case == "offline")
    monkeypatch.setattr("lib.models.files.hub.PATIENCE", 2.5)  # as HF_HUB_ETAG_TIMEOUT sets it, so that the test is short
    if case == "not there":
        Hub.files.clear()
    elif case != "offline":
        hub.shutdown()  # the system still accepts connections
    if case == "refused":
        hub.server_close()
    start = time.monotonic()
    with pytest.raises(ConnectionError) as error:
        sources.documents("wikitext2", cache_dir=str(tmp_path))
    assert time.monotonic() - start < 3.5  # retries take 25
    file = "Salesforce/wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet"
    assert str(error.value).startswith(f"wikitext2: {file} is not in the hub's cache and cannot be fetched (")
    assert expected.lower() in str(error.value).lower() and "Give a file instead, or --data_dir" in str(error.value)
    assert "\n" not in str(error.value)
