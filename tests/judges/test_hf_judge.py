from __future__ import annotations

import logging
import socket
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.inference._providers as providers
import pytest

from echo4o_hf.judges import hf_judge
from echo4o_hf.judges.judge import JudgeFailed, JudgeStopped, judge_parameters, judge_prices
from echo4o_hf.judges.load import load_judge

TOKEN = "hf_secret0123456789"
OK = '{"correct": 1, "reason": "seen"}'


@pytest.fixture(autouse=True)
def loopback_is_online(monkeypatch):
    """The tests' HF_HUB_OFFLINE also keeps huggingface_hub from loopback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.setattr(hf_judge, "_FIRST_WAIT", 0.01)
    yield
    monkeypatch.undo()
    huggingface_hub.close_session()


@pytest.fixture
def judge(server):
    return load_judge("hf:Qwen/Qwen3-VL", base_url=server.url, token=TOKEN, max_retries=2, timeout=5.0)


def error(status, message, **fields):
    return {"status": status, "body": {"error": {"message": message, **fields}}}


def test_the_request_and_the_reply(server, judge, picture):
    reply = judge("be strict", "is it red?", [picture])
    assert reply == OK
    assert (reply.input_tokens, reply.output_tokens, reply.truncated) == (100, 7, False)
    ((_, headers, body),) = server.requests
    assert headers["authorization"] == f"Bearer {TOKEN}"
    system, user = body["messages"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("Qwen/Qwen3-VL", 0.0, 1024)
    assert system == {"role": "system", "content": "be strict"}
    assert user["content"][0] == {"type": "text", "text": "is it red?"}
    assert user["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert judge.name == "hf:Qwen/Qwen3-VL"
    assert judge_parameters(judge) == {"base_url": server.url, "temperature": 0.0, "max_tokens": 1024}


def test_the_router_of_the_hub_gets_the_model_by_its_name(server, picture, monkeypatch):
    monkeypatch.setattr(providers.CONVERSATIONAL_AUTO_ROUTER, "base_url", server.url.removesuffix("/v1"))
    judge = load_judge("hf:Qwen/Qwen3-VL", token=TOKEN, max_tokens=None)
    assert judge("", "p", [picture]) == OK
    ((_, headers, body),) = server.requests
    assert headers["authorization"] == f"Bearer {TOKEN}" and body["model"] == "Qwen/Qwen3-VL"
    assert judge_parameters(judge) == {"provider": "auto", "temperature": 0.0}


def test_retry_after_is_honoured(server, judge, picture):
    server.script.append({**error(429, "slow down"), "headers": {"Retry-After": "1"}})
    assert judge("", "p", [picture]) == OK
    (first, *_), (second, *_) = server.requests
    assert 1.0 <= second - first < 1.9


def test_retry_after_may_be_a_date(server, judge, picture):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)  # in whole seconds
    server.script.append({**error(429, "slow down"), "headers": {"Retry-After": date}})
    assert judge("", "p", [picture]) == OK
    (first, *_), (second, *_) = server.requests
    assert 1.5 <= second - first < 4


@pytest.mark.parametrize("header", ["soon", "Sun, 06 Nov 1994 08:49:37 GMT", "-3"])
def test_a_retry_after_that_says_nothing_is_passed_over(server, judge, picture, header):
    server.script.append({**error(503, "busy"), "headers": {"Retry-After": header}})
    assert judge("", "p", [picture]) == OK


def test_tokens_and_prices(server, picture):
    judge = load_judge("hf:m", base_url=server.url, token=TOKEN, prices=[0.5, 2])
    assert judge_prices(judge) == (0.5, 2.0)
    server.script.append({"body": server.completion("")})
    assert judge("", "p", [picture]).input_tokens == 200
    with pytest.raises(ValueError, match="prices"):
        load_judge("hf:m", token=TOKEN, prices=[1])


def test_an_address_with_a_password_is_not_shown(server, picture):
    url = server.url.replace("127", "me:pw@127")
    judge = load_judge("hf:m", base_url=url, token=TOKEN, max_retries=0, timeout=0.1)
    server.default = {**server.default, "delay": 0.5}
    with pytest.raises(JudgeFailed, match="timed out") as failed:
        judge("", "p", [picture])
    assert "pw" not in str(failed.value)


@pytest.mark.parametrize(
    "answer",
    [
        error(500, "oops"),
        error(503, "busy"),
        {"body": b'{"choices": [{"message": {"content": "half of it"', "cut": 20},
        {"body": b'{"choices": [{"message"'},
        {"body": b"<html>gateway</html>", "headers": {"content-type": "text/html"}},
        {"body": b"\xff\xfe\x00"},
        {"body": {}},
        {"body": []},
        {"body": {"choices": []}},
        {"body": {"choices": [{"message": {"role": "assistant", "content": " "}, "finish_reason": "stop"}]}},
    ],
    ids=lambda answer: str(answer)[:60],
)
def test_what_may_pass_is_tried_again_and_not_for_ever(server, judge, picture, answer):
    server.script.extend([server.default, answer])
    assert [judge("", "p", [picture]) for _ in range(2)] == [OK, OK]
    assert len(server.requests) == 3
    server.requests.clear()
    server.default = answer
    with pytest.raises(JudgeFailed):
        judge("", "p", [picture])
    assert len(server.requests) == 3


def test_a_slow_answer_is_given_up(server, picture):
    judge = load_judge("hf:m", base_url=server.url, token=TOKEN, max_retries=1, timeout=0.2)
    server.script.extend([{**server.default, "delay": 0.6}] * 2)
    with pytest.raises(JudgeFailed, match="no answer"):
        judge("", "p", [picture])


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (error(401, f"Invalid token {TOKEN}"), "hf auth login"),
        (error(402, "You have exceeded your monthly included credits"), "credits are used up"),
        (error(403, f"{TOKEN} lacks permissions"), "permissions"),
        (error(404, "not found"), "check its name"),
        (error(400, "not supported by any provider", code="model_not_supported"), "check its name"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_pass_stops_at_once(server, judge, picture, answer, advice, caplog):
    caplog.set_level(logging.DEBUG)
    server.default = answer
    with pytest.raises(JudgeStopped, match=advice) as stopped:
        judge("", "p", [picture])
    assert len(server.requests) == 1
    shown = [
        "".join(traceback.format_exception(stopped.value)),
        caplog.text,
        repr(judge),
        str(judge.parameters),
    ]
    assert not [text for text in shown if TOKEN in text]


def test_a_refused_request_fails_alone(server, judge, picture):
    server.script.append(error(400, "the image is too small"))
    with pytest.raises(JudgeFailed, match="too small"):
        judge("", "p", [picture])


def test_a_reply_cut_off_is_marked(server, judge, picture):
    server.script.append({"body": server.completion('{"correct"', finish="length")})
    assert judge("", "p", [picture]).truncated


def test_without_token_or_provider_nothing_is_sent(server, picture, monkeypatch):
    monkeypatch.setattr(huggingface_hub.inference._providers._common, "get_token", lambda: None)
    with pytest.raises(JudgeStopped, match="api_key"):
        load_judge("hf:Qwen/Qwen3-VL")("", "p", [picture])
    with pytest.raises(JudgeStopped, match="nobody"):
        load_judge("hf:Qwen/Qwen3-VL", provider="nobody", token=TOKEN)("", "p", [picture])
    assert server.requests == []


def test_a_server_never_reached_stops_the_run(picture):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    judge = load_judge("hf:m", base_url=f"http://127.0.0.1:{port}/v1", token=TOKEN, max_retries=1)
    with pytest.raises(JudgeStopped, match="cannot be reached"):
        judge("", "p", [picture])
