"""Hub ids: what is fetched, what stays away, and one sentence for everything that can be wrong with them."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import environment, in_process, make_job

from epmq.errors import SourceError
from epmq.hub import find_model, name_of

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "bpe.codes": b"merges",
    "source.spm": b"pieces",
    "target.spm": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_own.py": b"print('run me')",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "onnx/model.onnx": b"graph",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as fetching a snapshot needs: org/model in two revisions, and org/gated."""

    fetched: list[str]

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if path == "/shutdown":
            self.answer(200)
            threading.Thread(target=self.close_down).start()
            return None
        parts = path.strip("/").removeprefix("api/models/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        if repository == "org/broken":
            self.close_connection = True
            return None
        if repository == "org/gated":
            return self.answer(403, error="GatedRepo")
        if repository != "org/model":
            return self.answer(404, error="RepoNotFound")
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", COMMIT):
            return self.answer(404, error="RevisionNotFound")
        if rest[:1] == ["revision"]:
            return self.answer(200, {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]})
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": f, "size": len(b), "oid": f"{i:040x}"}
                for i, (f, b) in enumerate(FILES.items())
            ]
            return self.answer(200, tree)
        name = "/".join(rest[2:])
        self.fetched.append(name)
        return self.answer(200, FILES[name])

    def close_down(self) -> None:
        """From here on nobody listens at the address."""
        self.server.shutdown()
        self.server.server_close()

    do_HEAD = do_GET  # noqa: N815 (the base class's naming)

    def answer(self, code: int, content: Any = b"", error: str | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:08x}"')
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    Hub.fetched = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# In a process of its own, because the hub's client reads its settings once.
SCRIPT = """
import json, sys, urllib.error, urllib.request
from epmq.errors import SourceError
from epmq.hub import find_model, name_of
found = {}
for name in sys.argv[2:]:
    if name == "shutdown":
        urllib.request.urlopen(sys.argv[1] + "/shutdown").close()
        while True:
            try:
                urllib.request.urlopen(sys.argv[1] + "/api/models/org/none", timeout=1).close()
            except urllib.error.HTTPError:
                continue
            except OSError:
                break
        continue
    try:
        path = find_model(name)
        found[name] = [str(path), name_of(path), sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))]
    except SourceError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_a_model_is_fetched_without_its_code(hub: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    asked = [
        "org/model",
        "org/model@v1",
        "org/model@v9",
        "org/none",
        "org/gated",
        "org/broken",
        "shutdown",
        "org/model@main",
        "org/later",
    ]
    settings = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    proxies = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, address, *asked]
    surroundings = {**environment(), **settings, **proxies}
    done = subprocess.run(
        command, capture_output=True, text=True, env=surroundings, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    path, name, content = found["org/model"]
    assert path == str(tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT)
    assert name == f"org/model@{COMMIT[:12]}"
    wanted = [
        "bpe.codes", "chat_template.jinja", "config.json", "model.safetensors", "source.spm", "target.spm",
        "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    assert content == wanted
    assert sorted(set(Hub.fetched)) == wanted, "nothing else was even asked for"
    assert found["org/model@v1"][2] == wanted
    assert "the hub knows no revision 'v9' of 'org/model'" in found["org/model@v9"]
    assert "the hub knows no model 'org/none'" in found["org/none"]
    assert "the hub gives 'org/gated' only to those who accepted its terms" in found["org/gated"]
    assert "the hub id 'org/broken' cannot be fetched (" in found["org/broken"]
    assert found["org/model@main"][2] == wanted, "from the cache, as the hub is gone"
    offline = "the hub id 'org/later' is not in the local cache and the hub cannot be reached; give a local folder."
    assert found["org/later"] == f"there is no such file or folder: org/later; and {offline}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache in a folder, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put_into_cache(cache: Path, name: str, folder: Path) -> Path:
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


def test_a_recipe_of_hub_ids_in_the_cache(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    expected = in_process(capsys, "merge", job.write(), "--out", tmp_path / "local")
    assert (expected.code, expected.err) == (0, "")
    put_into_cache(cache, "org/base", job.folder / "base")
    put_into_cache(cache, "org/reviews", job.folder / "experts" / "reviews")
    job.recipe["base"] = "org/base"
    job.recipe["experts"]["reviews"] = "org/reviews@main"
    done = in_process(capsys, "merge", job.write(), "--out", tmp_path / "hub")
    assert (done.code, done.err) == (0, "")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_an_id_that_is_not_in_the_cache(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    job.recipe["experts"]["reviews"] = "org/reviews"
    done = in_process(capsys, "merge", job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert "experts.reviews: there is no such file or folder: " in done.err
    assert "the hub id 'org/reviews' is not in the local cache and the hub cannot be reached" in done.err


def test_a_path_is_never_looked_for_in_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: str) -> Path:
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr("epmq.hub._fetch", refuse)
    (tmp_path / "experts" / "a").mkdir(parents=True)
    assert find_model("experts/a", tmp_path) == tmp_path / "experts" / "a"
    for name in ("experts/b", "/org/name", "./org/name", "../name", "name", "org/name/more", "org/na me", "a@b/c", ""):
        if name:
            with pytest.raises(SourceError, match="there is no such file or folder"):
                find_model(name, tmp_path)


def test_names_of_folders_in_reports(tmp_path: Path) -> None:
    assert name_of(tmp_path / "models" / "base") == "base"
    assert name_of(tmp_path / "models--org--some--name" / "snapshots" / COMMIT) == f"org/some--name@{COMMIT[:12]}"
