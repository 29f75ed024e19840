from __future__ import annotations

import io
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image

from echo4o_hf.judges.ask import Request, ask
from echo4o_hf.judges.judge import JudgeFailed, JudgeStopped, Reply
from echo4o_hf.judges.scripted import ScriptedJudge
from echo4o_hf.judges.store import VerdictStore


def echo(system, prompt, images):
    return f"{system}{prompt}{[image.size for image in images]}"


def requests(count, png):
    return [Request("s", f"p{index}", [png]) for index in range(count)]


@pytest.fixture
def store(tmp_path):
    with VerdictStore(tmp_path / "store.sqlite") as store:
        yield store


def test_outcomes_are_in_the_order_of_the_requests(png, caplog):
    rng = np.random.default_rng(0)
    seconds = {f"p{index}": second for index, second in enumerate(rng.uniform(0, 0.02, 80))}

    def judge(system, prompt, images):
        time.sleep(seconds[prompt])
        return prompt

    outcomes = ask(judge, requests(80, png), concurrency=8, progress=False)
    assert [outcome.reply for outcome in outcomes] == [f"p{index}" for index in range(80)]
    assert caplog.text == ""
    assert all(outcome.failure is None and not outcome.from_store for outcome in outcomes)
    latencies = [outcome.latency - seconds[outcome.reply] for outcome in outcomes]
    assert 0 <= min(latencies) and np.median(latencies) < 0.05


def test_so_many_calls_at_a_time_and_no_more(png):
    running, most, lock = 0, 0, threading.Lock()

    def judge(system, prompt, images):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return "yes"

    ask(judge, requests(60, png), concurrency=6, progress=False)
    assert most == 6


def test_images_are_read_when_their_turn_comes(png):
    alive, most, lock = 0, 0, threading.Lock()

    class Pictures(list):
        """Counts the requests whose images have been read, and have not been answered."""

        def __iter__(self):
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            return super().__iter__()

    def judge(system, prompt, images):
        nonlocal alive
        time.sleep(0.002)
        with lock:
            alive -= 1
        return "yes"

    ask(judge, [Request("", f"{i}", Pictures([png])) for i in range(100)], concurrency=3, progress=False)
    assert alive == 0 and most <= 2 * 3 + 1


def test_pictures_come_in_rgb_from_bytes_and_files(tmp_path, picture):
    seen = []
    path = tmp_path / "a.webp"
    picture.convert("RGBA").save(path, lossless=True)
    buffer = io.BytesIO()
    picture.convert("P").save(buffer, "GIF")

    def judge(system, prompt, images):
        seen.extend((image.mode, image.size) for image in images)
        return "yes"

    ask(judge, [Request("", "", [path, str(path), buffer.getvalue()])], progress=False)
    assert seen == [("RGB", (12, 8))] * 3


def test_failures_say_what_was_paid(png):
    def judge(system, prompt, images):
        raise JudgeFailed("empty", input_tokens=9, output_tokens=4)

    (outcome,) = ask(judge, requests(1, png), progress=False)
    assert (outcome.failure, outcome.input_tokens, outcome.output_tokens) == ("empty", 9, 4)


def test_a_second_run_asks_nothing(store, png):
    judge = ScriptedJudge(lambda s, p, i: Reply(p, input_tokens=5, output_tokens=2, latency=0.25, truncated=True))
    first = ask(judge, requests(20, png), store=store, progress=False)
    again = ask(judge, requests(20, png), store=store, progress=False)
    assert judge.calls == 20 and len(store) == 20
    assert [outcome.from_store for outcome in first + again] == [False] * 20 + [True] * 20
    for before, after in zip(first, again, strict=True):
        assert (before.reply, before.key, before.latency) == (after.reply, after.key, after.latency)
        assert (after.input_tokens, after.output_tokens, after.latency, after.truncated) == (5, 2, 0.25, True)


def test_the_store_is_asked_by_key_not_by_its_length(tmp_path, png):
    """An empty store is false, and a thread or another process may fill it between two questions."""

    class Uncounted(VerdictStore):
        def __len__(self):
            raise AssertionError("counted")

    with Uncounted(tmp_path / "store.sqlite") as store:
        first, second = (ask(echo, [Request("s", "p", [png])], store=store, progress=False)[0] for _ in range(2))
    assert (first.from_store, second.from_store) == (False, True)


def test_whatever_decides_the_reply_is_asked_again(store, png, picture):
    calls = []
    other = io.BytesIO()
    picture.rotate(180).save(other, "PNG")

    def judge(system, prompt, images):
        calls.append(prompt)
        return "yes"

    base = Request("s", "p", [png])
    variants = [
        base,
        Request("S", "p", [png]),
        Request("s", "P", [png]),
        Request("sp", "", [png]),
        Request("s", "p", [other.getvalue()]),
        Request("s", "p", [png, png]),
        Request("s", "p", []),
        Request("s", "p", [png], repeat=1),
    ]
    ask(judge, variants, store=store, progress=False)
    assert len(calls) == len(variants)
    for parameters in ({"temperature": 0}, {"temperature": 1}):
        judge.parameters = parameters
        ask(judge, [base], store=store, progress=False)
    judge.name = "another"
    ask(judge, [base], store=store, progress=False)
    assert len(calls) == len(variants) + 3
    ask(judge, [base], store=store, progress=False)
    assert len(calls) == len(variants) + 3


@pytest.mark.parametrize("concurrency", [1, 16])
def test_identical_requests_are_asked_once(png, concurrency):
    judge = ScriptedJudge(lambda s, p, i: p)
    twice = [request for request in requests(10, png) for _ in range(3)] * 2
    outcomes = ask(judge, twice, concurrency=concurrency, progress=False)
    assert judge.calls == 10
    assert sum(not outcome.from_store for outcome in outcomes) == 10
    assert [outcome.reply for outcome in outcomes] == [request.prompt for request in twice]


def test_broken_images_are_failures_of_their_request_alone(tmp_path, store, png):
    judge = ScriptedJudge("yes")
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noise, "PNG")
    broken = [b"", b"no picture", png[:40], noise.getvalue()[:-200], tmp_path / "missing.png", tmp_path]
    wanted = [Request("", "p", [image]) for image in broken] + [
        Request("", "p", [png, b"no"]),
        Request("", "p", [png]),
    ]
    outcomes = ask(judge, wanted, store=store, progress=False)
    assert [outcome.reply for outcome in outcomes] == [None] * 7 + ["yes"]
    assert all("image 1" in outcome.failure for outcome in outcomes[:6]) and "image 2" in outcomes[6].failure
    assert "0x" not in "".join(outcome.failure for outcome in outcomes[:7])
    assert judge.calls == 1 and len(store) == 1


def test_failures_are_told_and_tried_again_next_time(store, png):
    failing = {"p3", "p4"}

    def judge(system, prompt, images):
        if prompt in failing:
            raise JudgeFailed("server error 500")
        return "yes"

    first = ask(judge, requests(6, png), store=store, progress=False)
    assert [outcome.failure for outcome in first] == [None] * 3 + ["server error 500"] * 2 + [None]
    failing.clear()
    second = ask(judge, requests(6, png), store=store, progress=False)
    assert [outcome.reply for outcome in second] == ["yes"] * 6
    assert [outcome.from_store for outcome in second] == [True] * 3 + [False] * 2 + [True]


@pytest.mark.parametrize("error", [JudgeStopped("no credit"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_run_that_ends_early_keeps_what_arrived(store, png, error, caplog):
    answered, lock, later = [], threading.Lock(), threading.Event()

    def judge(system, prompt, images):
        if prompt == "p20":
            threading.Timer(1.0, later.set).start()
            raise error
        if int(prompt[1:]) > 20:
            later.wait()  # time enough to cancel what has not begun
        time.sleep(0.01)
        with lock:
            answered.append(prompt)
        return prompt

    with pytest.raises(type(error)):
        ask(judge, requests(100, png), store=store, concurrency=4, progress=False)
    assert re.search("waiting for [1-4] calls under way", caplog.text)
    # three under way, and one that took the place of the failed one; three more were waiting
    assert 15 <= len(answered) <= 25
    assert len(store) == len(answered)
    time.sleep(0.05)
    assert len(store) == len(answered)  # nobody goes on behind the scenes
    error = JudgeFailed("still broken")
    outcomes = ask(judge, requests(100, png), store=store, concurrency=4, progress=False)
    assert len(answered) == 99 == len(set(answered))
    assert [index for index, outcome in enumerate(outcomes) if outcome.failure] == [20]


class Batched:
    name, batch_size = "batched", 4

    def __init__(self):
        self.sizes = []

    def __call__(self, system, prompt, images):
        raise AssertionError("has batches")

    def batch(self, asked):
        self.sizes.append(len(asked))
        if any(prompt == "p9" for _, prompt, _ in asked):
            raise JudgeFailed("out of memory")
        return [echo(*request) for request in asked]


def test_batches(store, png):
    judge = Batched()
    wanted = [*requests(10, png), Request("s", "broken", [b"no"]), Request("s", "p0", [png])]
    outcomes = ask(judge, wanted, store=store, progress=False)
    assert judge.sizes == [4, 4, 2]
    assert [outcome.reply for outcome in outcomes] == [f"sp{i}[(12, 8)]" for i in range(8)] + [None] * 3 + [
        "sp0[(12, 8)]"
    ]
    assert [outcome.failure for outcome in outcomes[8:10]] == ["out of memory"] * 2
    assert "image 1" in outcomes[10].failure and outcomes[11].from_store
    assert len(store) == 8


def test_bad_calls_are_refused(store, png):
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        ask(echo, [], concurrency=0)
    with pytest.raises(ValueError, match="lambda"):
        ask(lambda s, p, i: "", requests(1, png), store=store)
    with pytest.raises(ValueError, match="must return a str, got int"):
        ask(ScriptedJudge(lambda s, p, i: 1), requests(1, png), progress=False)
    assert ask(echo, []) == []


def test_the_bar_counts_every_request(png, capsys):
    ask(echo, requests(5, png) * 2)
    assert "echo: 100%" in capsys.readouterr().err
    ask(echo, requests(5, png), progress=False)
    assert capsys.readouterr().err == ""
