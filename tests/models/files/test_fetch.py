"""Models on the hub: fetched from an imitation of it on the loopback address, then found in its cache without a network."""

import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

from lib.errors import InvalidInput
from lib.models.files.fetch import folder as folder_of

COMMIT = {"main": "a" * 40, "v2": "b" * 40}


class Hub(SimpleHTTPRequestHandler):
    """As much of the hub's interface as `snapshot_download` asks: a revision's commit, its files, one file."""

    asked: list[str] = []  # noqa: RUF012 (of all requests)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        parts = path.split("/")
        if parts[:2] != ["me", "tiny"]:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif self.path.startswith("/api") and parts[2] == "revision":
            if parts[3] in COMMIT:
                self.answer(200, {"id": "me/tiny", "sha": COMMIT[parts[3]], "siblings": []})
            else:
                self.answer(404, {"error": "Revision Not Found"}, {"X-Error-Code": "RevisionNotFound"})
        elif self.path.startswith("/api"):
            files = list(Path(self.directory).iterdir())
            entry = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": self.oid(path)} for path in files]
            self.answer(200, entry)
        else:
            file = Path(self.directory, parts[-1])
            if parts[3] == COMMIT["v2"] and file.name == "config.json":
                self.answer(200, json.loads(file.read_text()) | {"of_revision": "v2"}, self.headers_of(file, parts[3], "v2"))
            else:
                self.answer(200, file.read_bytes(), self.headers_of(file, parts[3]))

    do_HEAD = do_GET

    def oid(self, path: Path) -> str:
        return sha256(path.read_bytes()).hexdigest()[:40]

    def headers_of(self, file: Path, commit: str, more: str = "") -> dict[str, str]:
        return {"X-Repo-Commit": commit, "ETag": f'"{self.oid(file)}{more}"'}

    def answer(self, status: int, content, headers=()) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(saved_model, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(saved_model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    (folder / "LICENSE").write_text("as you like")
    Hub.asked = []
    hub = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=folder))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{hub.server_port}"
    hub.shutdown()


def fetch(endpoint: str, cache: Path, offline: bool = False, name: str = "me/tiny", **more) -> list[str]:
    """`fetch.folder` in a process of its own: the folder and the files in it, or the error."""
    code = (
        "import sys, os; from lib.models.files import fetch\n"
        f"try: found = fetch.folder({name!r}, cache_dir={str(cache)!r}, **{more!r})\n"
        "except (ValueError, FileNotFoundError) as error: print(error)\n"
        "else: print(found, *sorted(os.listdir(found)), sep='\\n')"
    )
    environment = {"HF_ENDPOINT": endpoint, "PATH": "", "HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Retrying" not in done.stderr
    return done.stdout.splitlines()


def test_a_model_is_fetched_and_found_again_without_a_network(server, tmp_path):
    cache = tmp_path / "cache"
    others = ["LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    where, *files = fetch(server, cache)
    assert where.endswith(COMMIT["main"]) and files == others  # what is refused before its weights are needed downloads none
    assert fetch(server, cache, weights=True) == [where, *sorted([*others, "model.safetensors"])]
    assert not [path for path in Hub.asked if path.endswith(".bin")]
    for unreachable in ({"endpoint": "http://127.0.0.1:9"}, {"endpoint": server, "offline": True}):
        asked = len(Hub.asked)
        assert fetch(**unreachable, cache=cache, weights=True)[0] == where
        assert len(Hub.asked) == asked


def test_a_revision_is_another_folder(server, tmp_path):
    where, *_ = fetch(server, tmp_path / "cache", revision="v2")
    assert json.loads(Path(where, "config.json").read_text())["of_revision"] == "v2"
    [said] = fetch(server, tmp_path / "cache", revision="v3")
    assert said == f"me/tiny has no revision v3: see {server}/me/tiny/commits"


def test_a_name_that_the_hub_does_not_know(server, tmp_path):
    [said] = fetch(server, tmp_path / "cache", name="me/nothing")
    assert said == "the hub has no model me/nothing, or it is private: check the name, or log in with `hf auth login`"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("beside_a_model", [True, False])
def test_an_adapter_has_to_be_merged_first(saved_model, tmp_path, file, beside_a_model):
    """transformers would apply it where peft is installed, and leave it out in silence elsewhere."""
    if beside_a_model:
        shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(InvalidInput, match=rf"holds an adapter \({file}\).*merge it first"):
        folder_of(str(tmp_path))
