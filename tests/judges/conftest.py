from __future__ import annotations

import io
import json
import runpy
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def completion(text, finish="stop", **message):
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    head = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "system_fingerprint": "f"}
    return {**head, "choices": [choice], "usage": usage}


class ChatServer:
    """A chat completions endpoint on loopback: answers from `script`, then `{"correct": 1, …}`.

    An answer is a dict of `status`, `headers`, `body` (a dict, or bytes as they are), `delay` in seconds before it,
    and `cut`: the bytes of the body after which the connection is closed.
    """

    completion = staticmethod(completion)

    def __init__(self):
        self.script = deque()
        self.requests = []  # (time, headers, body)
        self.default = {"body": completion('{"correct": 1, "reason": "seen"}')}
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    headers = {key.lower(): value for key, value in self.headers.items()}
                    outer.requests.append((time.monotonic(), headers, body))
                    answer = outer.script.popleft() if outer.script else outer.default
                time.sleep(answer.get("delay", 0))
                data = answer["body"] if isinstance(answer["body"], bytes) else json.dumps(answer["body"]).encode()
                try:
                    self.send_response(answer.get("status", 200))
                    for key, value in {"content-type": "application/json", **answer.get("headers", {})}.items():
                        self.send_header(key, value)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: answer.get("cut")])
                    self.close_connection = "cut" in answer
                except OSError:
                    self.close_connection = True  # the client has given up

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def picture():
    return Image.fromarray(np.arange(12 * 8 * 3, dtype=np.uint8).reshape(8, 12, 3))


@pytest.fixture
def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory):
    """The folder of a vision-language model with random weights."""
    folder = tmp_path_factory.mktemp("tiny-vlm")
    runpy.run_path(str(Path(__file__).with_name("tiny_vlm.py")))["save_tiny_vlm"](folder)
    return folder
