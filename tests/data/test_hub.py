"""Loading from the Hub: a server on loopback speaks the part of its protocol that the libraries use."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hub_layout import SURREAL, write_archive, write_hub_layout

import echo4o_hf

REPOSITORY = "Yejy53/Echo-4o-Image"
LOAD = """
import hashlib, json, sys
import echo4o_hf
from datasets import load_dataset

def digest(row):
    images = [*row["input_images"], row["output_image"]]
    return [row["id"], hashlib.sha1(b"".join(image["bytes"] for image in images)).hexdigest()]

def digests(name, **options):
    rows = load_dataset("echo-4o-image", name, split="train", decode=False, **options)
    return sorted(map(digest, rows))
"""


class Hub(BaseHTTPRequestHandler):
    """One dataset repository: `folder` at the commit `commit`, also called main. GETs of files go to `requested`."""

    folder = Path()
    commit = "c" * 40
    requested: list[str] = []
    cut: str | None = None  # the connection breaks once, halfway through this file

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            return self.api("/".join(parts[2:4]), *parts[4:])
        owner, name, kind, revision, *rest = parts[1:]
        file = self.folder.joinpath(*rest)
        if (parts[0], f"{owner}/{name}", kind) != ("datasets", REPOSITORY, "resolve") or not file.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
        if self.command == "GET":
            self.requested.append("/".join([self.headers.get("Range", ""), *rest]))
        return self.reply(200, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": self.commit}, file.read_bytes())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content = unquote(body.decode())
        paths = json.loads(content)["paths"] if content.startswith("{") else re.findall(r"paths=([^&]*)", content)
        files = [self.folder / path.replace("+", " ") for path in paths]
        self.reply(200, {}, json.dumps([entry(self.folder, file) for file in files if file.exists()]).encode())

    def api(self, repository, kind="revision", revision="main", *rest):
        if repository != REPOSITORY:
            return self.reply(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if revision not in ("main", self.commit):
            return self.reply(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if kind == "revision":
            files = [{"rfilename": str(file.relative_to(self.folder))} for file in files_below(self.folder)]
            return self.reply(200, {}, json.dumps({"id": REPOSITORY, "sha": self.commit, "siblings": files}).encode())
        assert kind == "tree", self.path
        below = self.folder.joinpath(*rest)
        found = files_below(below) if "recursive=true" in self.path.lower() else sorted(below.iterdir())
        return self.reply(200, {}, json.dumps([entry(self.folder, file) for file in found]).encode())

    def reply(self, status, headers, body=b"{}"):
        span = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and status == 200:
            start, stop = int(span[1]), min(int(span[2] or len(body)) + 1, len(body))
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
            status, body = 206, body[start:stop]
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            if Hub.cut and self.path.endswith(Hub.cut):
                Hub.cut, body = None, body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def files_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def entry(root: Path, path: Path) -> dict:
    if path.is_dir():
        return {"type": "directory", "path": str(path.relative_to(root)), "oid": "d" * 40}
    return {"type": "file", "path": str(path.relative_to(root)), "size": path.stat().st_size, "oid": etag(path)}


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """The server's address and the rows of its dataset."""
    Hub.folder, Hub.requested, Hub.cut = tmp_path / "repository", [], None
    rows = write_hub_layout(Hub.folder)
    (Hub.folder / "README.md").write_text("A card.")
    digests = sorted([row.id, hashlib.sha1(b"".join([*row.inputs, row.output])).hexdigest()] for row in rows)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", digests
    server.shutdown()
    server.server_close()


def run(script: str, home: Path, **environment: str):
    """Run LOAD and then `script` in a process of its own; returns the JSON that it prints last."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "PYTHONPATH": str(Path(echo4o_hf.__file__).parents[1]),
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", LOAD + script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def below(digests, subset):
    return [row for row in digests if row[0].startswith(subset)]


def test_streaming_then_eager_then_offline(hub, tmp_path):
    address, expected = hub
    one, several = below(expected, "surreal_fantasy"), below(expected, "multi_reference")
    streaming = """
def outcome(**options):
    try:
        return len(digests("surreal_fantasy", **options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
others = [outcome(revision="v9"), outcome(repo_id="some/one")]
print(json.dumps([digests('all', streaming=True), outcome(streaming=True, revision="c" * 40), *others]))
"""
    rows, number, revision, repository = run(streaming, tmp_path / "home", HF_ENDPOINT=address)
    assert rows == expected and number == len(one)
    assert "RevisionNotFound" in revision and "v9" in revision
    assert "RepositoryNotFound" in repository and "some/one" in repository
    stored = {path.name for path in (tmp_path / "home" / "hub").rglob("*.tar.gz")}
    assert stored == {"human.tar.gz", "object.tar.gz", "sence.tar.gz"}  # the references
    assert len([path for path in Hub.requested if "_output" in path and path.endswith("gz")]) == 2  # each read once

    Hub.requested.clear()
    eager = "print(json.dumps([digests('surreal_fantasy'), digests('multi_reference')]))"
    assert run(eager, tmp_path / "home", HF_ENDPOINT=address) == [one, several]
    assert not [path for path in Hub.requested if "Instruction" in path or "_input" in path]

    offline = """
made_anew = digests('surreal_fantasy', max_pixels=10**6)
print(json.dumps([digests('surreal_fantasy'), made_anew, digests('multi_reference', streaming=True)]))
"""
    assert run(offline, tmp_path / "home", HF_HUB_OFFLINE="1") == [one, one, several]


def test_an_interrupted_download_goes_on(hub, tmp_path):
    address, expected = hub
    padded = Hub.folder / SURREAL / "images" / "padded.tar.gz"
    write_archive(padded, [("padding.bin", os.urandom(24 << 20))])  # the client writes blocks of 10 MiB
    Hub.cut = padded.name
    script = "print(json.dumps(digests('surreal_fantasy')))"
    assert run(script, tmp_path / "home", HF_ENDPOINT=address) == below(expected, "surreal_fantasy")
    parts = [path for path in Hub.requested if path.endswith(padded.name)]
    assert len(parts) == 2 and re.match(r"bytes=[1-9]\d*-", parts[1]), parts
