from __future__ import annotations

import base64
import io
import logging
import socket
import traceback

import openai._base_client
import pytest

from echo4o_hf.judges.ask import Request, ask
from echo4o_hf.judges.judge import JudgeFailed, JudgeStopped, judge_parameters
from echo4o_hf.judges.load import load_judge
from echo4o_hf.judges.openai_judge import OpenAIJudge
from echo4o_hf.judges.store import VerdictStore

KEY = "sk-secret-0123456789"
OK = '{"correct": 1, "reason": "seen"}'


@pytest.fixture(autouse=True)
def quick_back_off(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def judge(server):
    return OpenAIJudge("gpt-4.1", base_url=server.url, api_key=KEY, max_retries=3, timeout=5.0)


def error(status, message, **fields):
    return {"status": status, "body": {"error": {"message": message, **fields}}}


def test_the_request_is_the_official_one(server, judge, picture):
    reply = judge("be strict", "is it red?", [picture])
    assert reply == OK
    assert (reply.input_tokens, reply.output_tokens, reply.truncated) == (100, 7, False)
    assert 0 < reply.latency < 5
    ((_, headers, body),) = server.requests
    assert headers["authorization"] == f"Bearer {KEY}"
    system, user = body.pop("messages")
    assert body == {"model": "gpt-4.1", "temperature": 0.0, "max_tokens": 1024}
    assert system == {"role": "system", "content": "be strict"}
    text, image = user["content"]
    assert user["role"] == "user" and text == {"type": "text", "text": "is it red?"}
    head, data = image["image_url"]["url"].split(",")
    expected = io.BytesIO()
    picture.save(expected, "JPEG")
    assert head == "data:image/jpeg;base64" and base64.b64decode(data) == expected.getvalue()


def test_options_and_what_decides_the_replies(server, picture):
    judge = OpenAIJudge(
        "o9",
        base_url=server.url.replace("127", "me:pw@127") + "/?token=x",
        temperature=None,
        max_tokens=None,
        response_format={"type": "json_object"},
        extra_body={"max_completion_tokens": 9},
    )
    judge("", "p", [picture.convert("RGBA")])
    ((_, _, body),) = server.requests
    assert [message["role"] for message in body.pop("messages")] == ["user"]
    assert body == {"model": "o9", "response_format": {"type": "json_object"}, "max_completion_tokens": 9}
    expected = {"base_url": server.url, "response_format": {"type": "json_object"}, "max_completion_tokens": 9}
    assert judge_parameters(judge) == expected
    assert judge.name == "openai:o9"


def test_the_environment_names_endpoint_and_key(server, picture, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert load_judge("openai:local", max_tokens=5)("", "p", [picture]) == OK
    ((_, headers, body),) = server.requests
    assert headers["authorization"] == f"Bearer {KEY}" and body["max_tokens"] == 5


def test_without_key_openai_is_not_asked():
    with pytest.raises(JudgeStopped, match="OPENAI_API_KEY"):
        OpenAIJudge("gpt-4.1")


def test_retry_after_is_honoured(server, judge, picture):
    server.script.append({**error(429, "slow down", code="rate_limit_exceeded"), "headers": {"Retry-After": "1"}})
    reply = judge("", "p", [picture])
    (first, *_), (second, *_) = server.requests
    assert reply == OK and 1.0 <= second - first < 1.9
    assert reply.latency >= 1.0


@pytest.mark.parametrize(
    "answer",
    [
        error(500, "oops"),
        error(503, "busy"),
        error(429, "slow down", code="rate_limit_exceeded"),
        {"body": b'{"choices": [{"message": {"content": "half of it"', "cut": 20},
        {"body": b'{"choices": [{"message"'},
        {"body": b"<html>gateway</html>", "headers": {"content-type": "text/html"}},
        {"body": b"\xff\xfe\x00"},
        {"body": {"choices": []}},
        {"body": []},
        {"body": {"choices": [{"message": {"content": ["a", "b"]}}]}},
        {"body": {"choices": [{"message": {"content": "  "}, "finish_reason": "stop"}]}},
        {"body": {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}},
    ],
    ids=lambda answer: str(answer)[:60],
)
def test_what_may_pass_is_tried_again_and_not_for_ever(server, judge, picture, answer):
    server.script.append(answer)
    assert judge("", "p", [picture]) == OK
    assert len(server.requests) == 2
    server.requests.clear()
    server.default = answer
    with pytest.raises(JudgeFailed):
        judge("", "p", [picture])
    assert len(server.requests) in (3, 4)


def test_a_slow_answer_is_given_up(server, picture):
    judge = OpenAIJudge("m", base_url=server.url, max_retries=1, timeout=0.2)
    server.script.append({**server.default, "delay": 0.6})
    assert judge("", "p", [picture]) == OK
    server.script.extend([{**server.default, "delay": 0.6}] * 2)
    with pytest.raises(JudgeFailed, match="no answer"):
        judge("", "p", [picture])
    fresh = OpenAIJudge("m", base_url=server.url, max_retries=0, timeout=0.2)
    server.script.append({**server.default, "delay": 0.6})
    with pytest.raises(JudgeFailed, match="no answer"):
        fresh("", "p", [picture])


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (error(401, f"Incorrect API key provided: {KEY}", code="invalid_api_key"), "check OPENAI_API_KEY"),
        (error(403, f"{KEY} is not allowed"), "permissions"),
        (error(404, "no such model", code="model_not_found"), "check its name"),
        (error(402, "pay"), "add credit"),
        (error(429, "You exceeded your current quota", code="insufficient_quota"), "add credit"),
        (error(429, "You exceeded your current quota", type="insufficient_quota"), "add credit"),
        (error(400, "use max_completion_tokens", code="unsupported_parameter"), "options"),
    ],
    ids=lambda value: str(value)[:70],
)
def test_what_cannot_pass_stops_at_once(server, judge, picture, answer, advice):
    server.default = answer
    with pytest.raises(JudgeStopped, match=advice) as stopped:
        judge("", "p", [picture])
    assert len(server.requests) == 1
    assert KEY not in "".join(traceback.format_exception(stopped.value))


def test_a_refused_request_fails_alone(server, judge, picture):
    server.script.append(error(400, "the image is too small", code="invalid_image"))
    with pytest.raises(JudgeFailed, match="the image is too small"):
        judge("", "p", [picture])
    assert len(server.requests) == 1
    assert judge("", "p", [picture]) == OK


def test_an_endpoint_never_reached_stops_the_run_and_one_that_went_away_fails(server, judge, picture):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nowhere = OpenAIJudge("m", base_url=f"http://127.0.0.1:{port}/v1", max_retries=1)
    with pytest.raises(JudgeStopped, match="OPENAI_BASE_URL"):
        nowhere("", "p", [picture])
    server.default = {"body": b"{}", "cut": 0}
    server.script.append({"body": server.completion("hello")})
    assert judge("", "p", [picture]) == "hello"
    with pytest.raises(JudgeFailed, match="no answer"):
        judge("", "p", [picture])


def test_a_refusal_is_the_reply(server, judge, picture):
    server.default = {"body": server.completion(None, refusal="I cannot look at this.")}
    assert judge("", "p", [picture]) == "I cannot look at this."


def test_a_reply_cut_off_is_marked(server, judge, picture):
    server.script.append({"body": server.completion('{"correct": 1, "rea', finish="length")})
    reply = judge("", "p", [picture])
    assert reply == '{"correct": 1, "rea' and reply.truncated
    server.script.append({"body": server.completion("", finish="length")})
    with pytest.raises(JudgeFailed, match="max_tokens"):
        judge("", "p", [picture])
    server.script.append({"body": server.completion("", finish="content_filter")})
    with pytest.raises(JudgeFailed, match="filter"):
        judge("", "p", [picture])


def test_tokens_of_attempts_in_vain_are_counted(server, judge, picture):
    server.script.append({"body": server.completion("")})
    reply = judge("", "p", [picture])
    assert (reply.input_tokens, reply.output_tokens) == (200, 14)
    server.script.append({"body": server.completion("", finish="length")})
    with pytest.raises(JudgeFailed) as failed:
        judge("", "p", [picture])
    assert (failed.value.input_tokens, failed.value.output_tokens) == (100, 7)
    server.script.extend([{"body": server.completion("")}, error(400, "too small")])
    with pytest.raises(JudgeFailed, match="too small") as failed:
        judge("", "p", [picture])
    assert (failed.value.input_tokens, failed.value.output_tokens) == (100, 7)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "100",
        {},
        {"prompt_tokens": "100", "completion_tokens": 7.0},
        {"prompt_tokens": True},
        {"prompt_tokens": -1, "completion_tokens": 10**30},
    ],
)
def test_tokens_that_are_no_numbers_are_not_known(server, judge, picture, usage):
    server.script.append({"body": {**server.completion(OK), "usage": usage}})
    reply = judge("", "p", [picture])
    assert reply == OK and (reply.input_tokens, reply.output_tokens) == (None, None)
    assert len(server.requests) == 1


def test_prices_are_told_wrong_before_anything_is_paid():
    with pytest.raises(ValueError, match=r"such as \[2, 8\]; got 'cheap'"):
        OpenAIJudge("m", api_key=KEY, prices="cheap")


def test_what_a_router_flags_fails_alone(server, judge, picture):
    """OpenRouter answers so to a request that its moderation refuses."""
    server.script.append(error(403, "flagged", code=403, metadata={"reasons": ["violence"], "flagged_input": "a"}))
    with pytest.raises(JudgeFailed, match="flagged"):
        judge("", "p", [picture])
    assert judge("", "p", [picture]) == OK


def test_no_part_of_a_key_is_shown(server, picture):
    """Neither one that a cut message ends in, nor the address's; and without a key no word is hidden."""
    judge = OpenAIJudge(
        "m", base_url=server.url.replace("127", "me:pw@127") + "?code=c0de", api_key=KEY, max_retries=0
    )
    for cut in range(280, 310):
        server.script.append(error(400, "x" * (cut - len(KEY)) + KEY + "y" * 50))
        with pytest.raises(JudgeFailed) as failed:
            judge("", "p", [picture])
        assert KEY[:6] not in str(failed.value) and "***" in str(failed.value)
    server.default = {"body": ("x" * 70 + KEY).encode()}
    with pytest.raises(JudgeFailed) as failed:
        judge("", "p", [picture])
    assert "not JSON" in str(failed.value) and KEY[:6] not in str(failed.value)
    server.default = error(400, f"at {server.url.replace('127', 'me:pw@127')}?code=c0de none")
    with pytest.raises(JudgeFailed, match=r"at http://\*\*\*@127.*\?\*\*\* none"):
        judge("", "p", [picture])
    with pytest.raises(JudgeFailed, match="none"):
        OpenAIJudge("m", base_url=server.url)("", "p", [picture])


def test_a_bad_key_stops_the_run_and_is_nowhere_to_be_seen(server, judge, png, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server.default = error(401, f"Incorrect API key provided: {KEY}")
    path = tmp_path / "store.sqlite"
    with VerdictStore(path) as store:
        server.script.append({"body": server.completion("good")})
        ask(judge, [Request("", "first", [png])], store=store)
        with pytest.raises(JudgeStopped) as stopped:
            ask(judge, [Request("", f"p{i}", [png]) for i in range(100)], store=store, concurrency=4)
        assert len(server.requests) <= 10
        files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    shown = [repr(judge), str(judge.parameters), caplog.text, *capfd.readouterr()]
    shown += ["".join(traceback.format_exception(stopped.value)), files.decode("latin-1")]
    assert not [text for text in shown if KEY in text]
    assert "good" in files.decode("latin-1")


def test_many_threads_share_a_judge(server, png):
    server.default = {**server.default, "delay": 0.05}
    judge = OpenAIJudge("m", base_url=server.url)
    outcomes = ask(judge, [Request("", f"p{i}", [png]) for i in range(64)], concurrency=32, progress=False)
    assert {outcome.reply for outcome in outcomes} == {OK}
    assert len(server.requests) == 64
    asked = sorted(body["messages"][0]["content"][0]["text"] for *_, body in server.requests)
    assert asked == sorted(f"p{i}" for i in range(64))
