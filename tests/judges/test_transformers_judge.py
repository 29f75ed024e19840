from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from echo4o_hf.judges.ask import Request, ask
from echo4o_hf.judges.judge import judge_parameters
from echo4o_hf.judges.load import load_judge
from echo4o_hf.judges.transformers_judge import TransformersJudge

LIMIT = 24


@pytest.fixture(scope="module")
def judge(tiny_vlm):
    return load_judge(f"transformers:{tiny_vlm}", device="cpu", batch_size=4, max_new_tokens=LIMIT)


def noise(seed, width=40, height=30):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


REQUESTS = [
    ("", "short", [noise(0)]),
    ("be strict", "a much longer question about the picture", [noise(1, 80, 20)]),
    ("be strict", "two pictures", [noise(2), noise(3, 20, 90)]),
    ("s", "no picture", []),
]


def test_a_batch_gives_what_single_requests_give(judge):
    together = judge.batch(REQUESTS)
    alone = [judge(*request) for request in REQUESTS]
    assert together == alone
    assert len(set(alone)) == 4
    for one, other in zip(together, alone, strict=True):
        assert (one.input_tokens, one.output_tokens) == (other.input_tokens, other.output_tokens)
        assert one.latency > 0


def test_the_picture_the_prompt_and_the_system_text_are_seen(judge):
    replies = {
        judge(*request)
        for request in (
            ("s", "p", [noise(0)]),
            ("s", "p", [noise(1)]),
            ("s", "q", [noise(0)]),
            ("t", "p", [noise(0)]),
            ("", "p", [noise(0)]),
        )
    }
    assert len(replies) == 5


def test_a_reply_ends_at_the_end_token_or_is_truncated(judge, monkeypatch):
    outputs, generate = [], judge.model.generate
    monkeypatch.setattr(judge.model, "generate", lambda **inputs: outputs.append(generate(**inputs)) or outputs[-1])
    reply = judge(*REQUESTS[0])
    assert reply.truncated and reply.output_tokens == LIMIT
    tokens = outputs[0][0, -LIMIT:].tolist()
    # Now its tenth token ends a reply; in a batch the others go on.
    monkeypatch.setattr(judge.model.generation_config, "eos_token_id", [tokens[9]])
    ended, *others = judge.batch(REQUESTS)
    place = tokens.index(tokens[9])
    assert not ended.truncated and ended.output_tokens == place + 1
    assert ended == judge.processor.tokenizer.decode(tokens[:place], skip_special_tokens=True).strip()
    assert max(other.output_tokens for other in others) > place + 1


def test_tokens_are_counted_without_padding(judge):
    text = "<|im_start|>user\nshort<|vision_start|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    words = len(judge.processor.tokenizer(text).input_ids)
    pixels = judge.processor.image_processor(noise(0), return_tensors="pt")["image_grid_thw"].prod().item()
    for reply in (judge(*REQUESTS[0]), judge.batch(REQUESTS)[0]):
        assert reply.input_tokens == words + pixels // 4


def test_ask_goes_in_batches(judge, monkeypatch):
    sizes, batch = [], judge.batch
    monkeypatch.setattr(judge, "batch", lambda requests: sizes.append(len(requests)) or batch(requests))
    requests = []
    for number in range(6):
        buffer = io.BytesIO()
        noise(number).save(buffer, "PNG")
        requests.append(Request("s", f"question {number}", [buffer.getvalue()]))
    outcomes = ask(judge, requests, progress=False)
    assert sizes == [4, 2]
    assert [o.reply for o in outcomes] == [batch([("s", f"question {n}", [noise(n)])])[0] for n in range(6)]
    assert any(outcome.truncated for outcome in outcomes)


def test_what_decides_the_replies(tiny_vlm, tmp_path):
    first = TransformersJudge(str(tiny_vlm), device="cpu", max_new_tokens=3)
    parameters = judge_parameters(first)
    assert parameters.pop("version") and parameters == {"dtype": "float32", "max_new_tokens": 3}
    assert first.name == f"transformers:{tiny_vlm}"
    again = TransformersJudge(str(tiny_vlm), device="cpu", max_new_tokens=3, batch_size=1)
    assert again.parameters == first.parameters
    copy = shutil.copytree(tiny_vlm, tmp_path / "copy")
    assert TransformersJudge(str(copy), device="cpu", max_new_tokens=3).parameters == first.parameters
    os.utime(copy / "model.safetensors", (1, 1))
    assert TransformersJudge(str(copy), device="cpu", max_new_tokens=3).parameters != first.parameters


def test_dtype_is_chosen(tiny_vlm):
    judge = TransformersJudge(str(tiny_vlm), device="cpu", dtype="bfloat16", max_new_tokens=2)
    assert judge.model.dtype == torch.bfloat16
    assert judge.parameters["dtype"] == "bfloat16"
    assert judge(*REQUESTS[0]).output_tokens == 2


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_transformers_serve_is_an_endpoint_for_the_openai_judge(tiny_vlm, judge, tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs transformers[serving]")
    pytest.importorskip("uvicorn", reason="transformers serve needs transformers[serving]")
    port = free_port()
    script = Path(__file__).with_name("serve_tiny_vlm.py")
    command = [
        sys.executable,
        script,
        "serve",
        tiny_vlm,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 180
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            remote = load_judge(f"openai:{tiny_vlm}", base_url=f"http://127.0.0.1:{port}/v1", max_tokens=LIMIT)
            reply = remote(*REQUESTS[3])
            assert reply == judge(*REQUESTS[3])
            assert (reply.output_tokens, reply.truncated) == (LIMIT, True)
            # JPEG changes the picture, so that its reply may differ.
            seen = {remote("s", "p", [noise(seed, 112, 112)]) for seed in range(3)}
            assert len(seen) == 3
        finally:
            process.terminate()


def test_bad_models_are_refused(tiny_vlm, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        TransformersJudge(str(tmp_path / "nowhere"))
    for name, value in (
        ("batch_size", 0),
        ("batch_size", "4"),
        ("max_new_tokens", 2.5),
        ("dtype", "float7"),
        ("dtype", "nn"),
        ("device", "gpu"),
        ("device", "cuda:99"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*; got {value!r}"):
            TransformersJudge(str(tiny_vlm), **{name: value})
    copy = shutil.copytree(tiny_vlm, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        TransformersJudge(str(copy))
