"""Loading by name: a server on loopback speaks the part of the Hub's protocol that huggingface_hub uses."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import echo4o_hf
from echo4o_hf.model.official import write_official

REPOSITORY = "someone/Echo-4o"

LOAD = """
import json
from pathlib import Path
from echo4o_hf.model.checkpoint import find_files, load_components, resolve

def outcome(load, *arguments, **options):
    try:
        return load(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def scale(**options):
    return load_components("someone/Echo-4o", **options)["vae"].config.scaling_factor
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories as {name: {revision: folder}}; all file requests are kept in `requested`."""

    repositories: dict[str, dict[str, Path]] = {}
    requested: list[str] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, kind, revision, *rest = parts[2:] if api else parts
        folders = self.repositories.get(f"{owner}/{name}")
        if folders is None:
            return self.reply(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        commits = {commit_of(key): key for key in folders}
        folder = folders.get(commits.get(revision, revision))
        if folder is None:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        commit = commit_of(commits.get(revision, revision))
        if api and kind == "revision":
            return self.reply(200, {}, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": []}).encode())
        if api and kind == "tree":
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            entries = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": etag(file)}
                for file in files
            ]
            return self.reply(200, {}, json.dumps(entries).encode())
        assert kind == "resolve"
        file = folder.joinpath(*rest)
        if not file.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if self.command == "GET":
            self.requested.append(f"{revision}/{'/'.join(rest)}")
        return self.reply(200, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": commit}, file.read_bytes())

    def reply(self, status, headers, body=b"{}"):
        span = self.headers.get("Range", "")
        if span.startswith("bytes=") and status == 200:
            start = int(span.removeprefix("bytes=").split("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            status, body = 206, body[start:]
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def commit_of(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


def etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(components, tmp_path):
    """Address of a server with two revisions of someone/Echo-4o, told apart by the VAE's scale."""
    revisions = {"main": 0.5, "v2": 0.75}
    for revision, scale in revisions.items():
        components["vae"].register_to_config(scaling_factor=scale)
        write_official(components, tmp_path / revision / "Echo-4o")
        for extra in ("README.md", "Echo-4o/optimizer.safetensors", "Echo-4o/training.bin"):
            (tmp_path / revision / extra).write_text("not needed")
    saved = tmp_path / "pipeline"
    for file in ("model_index.json", "model/config.json", "model/model.safetensors", "vae/config.json", "other/x.bin"):
        (saved / file).parent.mkdir(parents=True, exist_ok=True)
        (saved / file).write_text(json.dumps({"file": file}))  # equal files would be downloaded once
    Hub.repositories = {
        REPOSITORY: {revision: tmp_path / revision for revision in revisions},
        "someone/pipeline": {"main": saved},
    }
    Hub.requested = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(script, home, **environment):
    """Run LOAD and then `script` in a process of its own; returns the JSON that it prints last."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "PYTHONPATH": str(Path(echo4o_hf.__file__).parents[1]),
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", LOAD + script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_by_name_then_from_the_cache_then_without_network(hub, tmp_path):
    online = """
from echo4o_hf import BagelForConditionalGeneration, BagelProcessor
files = sorted(path.name for path in find_files("someone/Echo-4o", "model").iterdir())
print(json.dumps({
    "config only": files,
    "main": outcome(scale),
    "v2": outcome(scale, revision="v2", subfolder="Echo-4o"),
    "model": outcome(lambda: BagelForConditionalGeneration.from_pretrained("someone/Echo-4o").config.max_latent_size),
    "processor": outcome(lambda: BagelProcessor.from_pretrained("someone/Echo-4o").bos_token_id),
    "pipeline": outcome(lambda: str(resolve("someone/pipeline", component="vae"))),
    "no repository": outcome(resolve, "someone/else"),
    "no revision": outcome(resolve, "someone/Echo-4o", revision="v3"),
    "no subfolder": outcome(resolve, "someone/Echo-4o", subfolder="Bagel"),
    "no name": outcome(resolve, "some/where/else"),
}))
"""
    home = tmp_path / "home"
    found = run(online, home, HF_ENDPOINT=hub)
    assert "ema.safetensors" not in found["config only"] and "llm_config.json" in found["config only"]
    assert (found["main"], found["v2"], found["model"], found["processor"]) == (0.5, 0.75, 8, 257)
    assert found["no repository"].startswith("OSError: 'someone/else' is no folder in ")
    assert "hf auth login" in found["no repository"]
    assert found["no revision"].startswith("OSError: 'someone/Echo-4o' (revision 'v3') is no folder in ")
    assert found["no subfolder"].startswith("FileNotFoundError: no checkpoint in someone/Echo-4o, subfolder 'Bagel'")
    assert found["no name"].startswith(
        "FileNotFoundError: 'some/where/else' is neither a folder nor a name on the Hub"
    )

    assert found["pipeline"].endswith("/vae")

    names = {request.split("/", 1)[1] for request in Hub.requested}
    assert {"model_index.json", "vae/config.json"} <= names and not names & {"model/model.safetensors", "other/x.bin"}
    assert {"Echo-4o/ema.safetensors", "Echo-4o/ae.safetensors", "Echo-4o/tokenizer.json"} <= names
    assert not names & {"README.md", "Echo-4o/optimizer.safetensors", "Echo-4o/training.bin"}
    assert len(Hub.requested) == len(set(Hub.requested)), "a file was downloaded twice"

    for file in (home / "hub").glob("models--*/snapshots/*/Echo-4o/ema.safetensors"):
        if file.parents[1].name == commit_of("v2"):
            file.unlink()
    offline = """
print(json.dumps({
    "main": outcome(scale),
    "interrupted": outcome(resolve, "someone/Echo-4o", revision="v2"),
    "not cached": outcome(resolve, "someone/else"),
}))
"""
    found = run(offline, home, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert found["main"] == 0.5
    assert found["interrupted"].startswith("OSError") and "Echo-4o/ema.safetensors" in found["interrupted"]
    assert found["not cached"].startswith("OSError: 'someone/else' is no folder in ")
    assert found["not cached"].endswith(
        ", the Hub's cache has nothing of it, and HF_HUB_OFFLINE is set: give the path of a folder, or download it "
        "with network"
    )

    no_network = """
print(json.dumps({
    "main": outcome(lambda: resolve("someone/Echo-4o").name),
    "interrupted": outcome(resolve, "someone/Echo-4o", revision="v2"),
    "not cached": outcome(resolve, "someone/else"),
}))
"""
    found = run(no_network, home, HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    assert found["main"] == "Echo-4o"
    assert found["interrupted"].startswith("OSError") and "Echo-4o/ema.safetensors" in found["interrupted"]
    assert found["not cached"].startswith("OSError") and "the Hub cannot be asked" in found["not cached"]
