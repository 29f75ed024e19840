"""The Space of a metric: `evaluate.load` takes the folder, the card is one, the app is Python."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import evaluate
import pytest
from huggingface_hub import SpaceCard

from echo4o_hf.benchmarks import geneval_pp, imagine_bench
from echo4o_hf.benchmarks.metrics import NAMES
from echo4o_hf.benchmarks.space import _EXAMPLES, write_space

FILES = ["README.md", "app.py", "requirements.txt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", ["{name}", "other-name"])
def test_evaluate_loads_the_folder(name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder.format(name=name)
    written = write_space(name, folder)
    assert sorted(path.name for path in written) == sorted({*FILES, f"{name}.py", f"{folder}.py"})
    assert sorted(Path(folder).iterdir()) == sorted(path.relative_to(tmp_path) for path in written)
    for path in (folder, f"./{folder}", str(tmp_path / folder), str(tmp_path / folder / f"{name}.py")):
        assert evaluate.load(path).name == name


@pytest.mark.parametrize("name", NAMES)
def test_card_app_and_requirements(name: str, tmp_path: Path) -> None:
    write_space(name, tmp_path / name)
    card = SpaceCard.load(tmp_path / name / "README.md")
    assert card.data.sdk == "gradio" and card.data.app_file == "app.py" and "metric" in card.data.tags
    assert f'evaluate.load("{name}")' in card.text and "{{" not in card.text
    compile((tmp_path / name / "app.py").read_text(), "app.py", "exec")
    assert (tmp_path / name / "requirements.txt").read_text().startswith("echo4o-hf[judges]>=")


def test_examples_are_items() -> None:
    for module in (geneval_pp, imagine_bench):
        module.validate_item(_EXAMPLES[module.NAME], "example")


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "app.py").write_text("old")
    write_space("geneval_pp", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "app.py").read_text() != "old"


def test_unknown_metric_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metric is called 'bleu'"):
        write_space("bleu", tmp_path / "bleu")
    assert not (tmp_path / "bleu").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_space("geneval_pp", tmp_path / "file")


class Hub(BaseHTTPRequestHandler):
    """What of the Hub an upload of small files needs."""

    seen: list[tuple[str, bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, body))
        answer: dict = {"url": "http://127.0.0.1/spaces/me/judge", "name": "me/judge"}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            }
        elif "/commit/" in self.path:
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/c/" + "0" * 40}
        self.reply(answer)

    def do_GET(self) -> None:
        self.reply({"sha": "0" * 40, "id": "me/judge", "siblings": []})

    def reply(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bytes]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Hub.seen.clear()
    yield Hub.seen
    server.shutdown()
    server.server_close()


def test_push(hub: list[tuple[str, bytes]], tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("mine")
    write_space("geneval_pp", tmp_path, push_to_hub="me/judge")
    created = json.loads(next(body for path, body in hub if path.endswith("/repos/create")))
    assert created["type"] == "space" and created["sdk"] == "gradio" and created["name"] == "judge"
    (commit,) = [body for path, body in hub if "/spaces/me/judge/commit/" in path]
    entries = [json.loads(line) for line in commit.splitlines()]
    sent = {entry["value"]["path"] for entry in entries if entry["key"] == "file"}
    assert sent == {*FILES, "geneval_pp.py", "judge.py"}


def test_push_offline(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="offline"):
        write_space("geneval_pp", tmp_path / "geneval_pp", push_to_hub="me/geneval_pp")
