"""A mirror of the benchmarks' files on loopback, and judge texts in files of the official form, in other words."""

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from echo4o_hf.benchmarks import items

GENEVAL_PP_SCRIPT = '''
SYSTEM_PROMPT = """You check images.
Reply with {"correct": 1 or 0, "reason": "why"}.
"""
raise SystemExit("a judge text is read, never run")
'''

IMAGINE_BENCH_SCRIPT = '''
def build_messages(prompt_data: dict, image_base64: str) -> list:
    return [
        {"role": "system", "content": [{"type": "text", "text": "You grade images."}]},
        {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": f"""Three scores, please.
Asked for: "{prompt_data['instruction']}"
Meant: "{prompt_data['note']}" {{as noted}}
""",
                },
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
            ],
        },
    ]
raise SystemExit("a judge text is read, never run")
'''


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Serve files as the pinned ones, by a function (table, benchmark, content); the cache is empty."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv(items.SOURCE_VARIABLE, f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))

    def put(table: dict[str, items.PinnedFile], name: str, content: bytes, sha256: str | None = None) -> Path:
        pinned = replace(table[name], sha256=sha256 or hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(table, name, pinned)
        target = folder / pinned.repository / pinned.revision / pinned.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return target

    yield put
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge_texts(mirror: Callable[..., Path]) -> None:
    """The official protocol works: both judge texts can be had, in words of these tests."""
    mirror(items.JUDGE_TEXTS, "geneval_pp", GENEVAL_PP_SCRIPT.encode())
    mirror(items.JUDGE_TEXTS, "imagine_bench", IMAGINE_BENCH_SCRIPT.encode())
