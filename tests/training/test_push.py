"""A finished run on the Hub: a local server takes the uploads."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from echo4o_hf.miniature.dataset import write_dataset

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lora.yaml"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository of models; every file comes in the body of its commit."""

    repository: dict[str, bytes] = {}
    created: list[dict] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/me/shapes"
        answer: dict = {"url": address, "name": "me/shapes", "errors": [], "warnings": []}
        if self.path.endswith("/repos/create"):
            self.created.append(json.loads(body))
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repository[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{address}/commit/{COMMIT}"}
        self.reply(answer)

    def do_GET(self) -> None:
        self.reply({"id": "me/shapes", "sha": COMMIT, "siblings": [], "name": "me", "type": "user"})

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
def hub() -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_adapter_and_its_card_are_pushed(hub: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", 4)
    output = tmp_path / "out"
    flags = f"""--model echo4o-miniature --output_dir {output} --max_tokens 256
        --dataset echo-4o-image --dataset_config instruction_following --data_dir {tmp_path / "data"}
        --gradient_accumulation_steps 1 --dataloader_num_workers 0 --report_to none --max_steps 1 --save_steps 1
        --validation_inference_steps 1 --push_to_hub true --hub_model_id me/shapes --hub_private_repo true"""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_token", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "echo4o_hf.training.train", str(EXAMPLE), *flags.split()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "FutureWarning" not in run.stderr and "PAD/BOS/EOS" not in run.stderr
    (created,) = Hub.created
    assert (created["name"], created["visibility"]) == ("shapes", "private")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert Hub.repository[name] == (output / name).read_bytes()
    assert any((output / "_latents").rglob("*.safetensors"))
    kept_here = ("checkpoint-", "training_args", "validation", "runs", "_latents")
    assert not [name for name in Hub.repository if name.startswith(kept_here)]
