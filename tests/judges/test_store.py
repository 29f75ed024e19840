from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo4o_hf.judges.judge import Reply
from echo4o_hf.judges.store import VerdictStore, request_key

REPLY = Reply("yes ✓", input_tokens=3, output_tokens=1, latency=0.5, truncated=True)


def run(scenario, folder):
    """What happens in a process of its own: see judging_process.py."""
    script = Path(__file__).with_name("judging_process.py")
    done = subprocess.run([sys.executable, str(script), scenario, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(path):
    connection = sqlite3.connect(path)
    try:
        return dict(connection.execute("SELECT key, reply FROM replies").fetchall())
    finally:
        connection.close()


def test_what_is_put_is_found_in_the_next_process_too(tmp_path):
    path = tmp_path / "new" / "store.sqlite"
    with VerdictStore(path) as store:
        assert store.get("a") is None and len(store) == 0
        assert store.put("a", REPLY, judge="j", parameters={"t": 0}) == store.get("a")
        store.put("b", "plain", judge="j", parameters={})
    with VerdictStore(path) as store:
        stored = store.get("a")
        assert stored.reply == REPLY and vars(stored.reply) == vars(REPLY)
        assert (stored.judge, stored.parameters, stored.verdict) == ("j", {"t": 0}, None)
        assert stored.created.endswith("+00:00")
        assert (store.get("b").reply, store.get("b").reply.latency, len(store)) == ("plain", None, 2)


def test_the_first_reply_stays(tmp_path):
    with VerdictStore(tmp_path / "s") as store:
        store.put("a", "first", judge="j", parameters={})
        assert store.put("a", "second", judge="k", parameters={}).reply == "first"
        assert (store.get("a").reply, store.get("a").judge, len(store)) == ("first", "j", 1)


def test_verdicts_are_noted_beside_replies(tmp_path):
    with VerdictStore(tmp_path / "s") as store:
        store.put("a", "x", judge="j", parameters={})
        store.put_verdicts({"a": {"score": 1.0}, "unknown": {"score": 0.0}})
        assert store.get("a").verdict == {"score": 1.0} and len(store) == 1


def test_threads_share_a_store(tmp_path):
    with VerdictStore(tmp_path / "s") as store:

        def work(start):
            for number in range(start, start + 40):
                store.put(str(number), f"r{number}", judge="j", parameters={})
                assert store.get(str(number)).reply == f"r{number}"

        threads = [threading.Thread(target=work, args=(start,)) for start in (0, 20, 40, 60)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(store) == 100


def test_what_is_no_store_is_left_alone(tmp_path):
    text, other, newer = tmp_path / "text", tmp_path / "other", tmp_path / "newer"
    text.write_text("some notes, long enough to be taken for a header of a database" * 20)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    VerdictStore(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 2")
    for path in (text, other, newer):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="is not a store"):
            VerdictStore(path)
        assert path.read_bytes() == before
    with pytest.raises(OSError, match="store"):
        VerdictStore(tmp_path)


def test_a_full_disk_is_an_error_of_the_file(tmp_path):
    with VerdictStore(tmp_path / "s") as store:
        store.put("a", "x", judge="j", parameters={})
        store._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(OSError, match="cannot use the store .*full"):
            for number in range(100):
                store.put(str(number), "x" * 1000, judge="j", parameters={})
        with pytest.raises(OSError, match="cannot use the store"):
            store.put_verdicts({"a": "x" * 100_000})
        assert store.get("a").reply == "x"


def test_a_store_that_cannot_be_written_is_told_at_once(tmp_path):
    folder = tmp_path / "s-journal"  # in the place of SQLite's journal
    folder.mkdir()
    start = time.monotonic()
    with pytest.raises(OSError, match="cannot write to the store"):
        VerdictStore(tmp_path / "s")
    assert time.monotonic() - start < 5


PARTS = {
    "system": "s",
    "prompt": "p",
    "image_bytes": [b"a", b"b"],
    "judge_name": "j",
    "judge_parameters": {"x": 1, "y": {"z": "é"}},
    "repeat": 0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"system": "sp", "prompt": ""},
        {"system": "p", "prompt": "s"},
        {"image_bytes": [b"ab"]},
        {"image_bytes": [b"b", b"a"]},
        {"image_bytes": []},
        {"image_bytes": [b"a", b"b", b""]},
        {"judge_name": "k"},
        {"judge_parameters": {"x": 1}},
        {"judge_parameters": {"x": 1.5, "y": {"z": "é"}}},
        {"repeat": 1},
    ],
)
def test_every_part_decides_the_key(change):
    assert request_key(**PARTS) != request_key(**{**PARTS, **change})


def test_keys_do_not_change_between_releases():
    assert request_key(**PARTS) == request_key(**{**PARTS, "judge_parameters": {"y": {"z": "é"}, "x": 1}})
    assert request_key(**PARTS) == "5e197a9c90c61cb719b8be5d8fb996191d41151f1763748a04f7520c1667d6ac"


@given(st.text(), st.text(), st.text(), st.text())
def test_texts_do_not_run_together(system, prompt, other_system, other_prompt):
    keys = {request_key(a, b, [], "j", {}, 0) for a, b in ((system, prompt), (other_system, other_prompt))}
    assert len(keys) == 1 + ((system, prompt) != (other_system, other_prompt))


def test_killed_at_20_moments_nothing_is_lost_or_doubled(tmp_path):
    seen = run("killed", tmp_path)
    assert seen["codes"] == [-9] * 20
    assert 0 < seen["arrived_before"] < seen["count"]
    result, stored = dict(seen["result"]), rows(tmp_path / "store.sqlite")
    # what an uninterrupted run gives: a reply to each request, in order
    assert [reply.split("-")[0] for _, reply in seen["result"]] == [f"p{index}" for index in range(seen["count"])]
    # what `put` had returned is there, with that reply, once
    arrived = [(line[1], line[2]) for line in seen["journal"] if line[0] == "stored"]
    assert max(Counter(key for key, _ in arrived).values()) == 1
    assert all(result[key] == reply for key, reply in arrived)
    assert stored == result
    # only what was under way when the process was killed has been asked again
    asked = Counter(line[1] for line in seen["journal"] if line[0] == "asked")
    assert len(asked) == seen["count"] and asked.total() - seen["count"] <= 20 * 16


def test_two_processes_share_a_store(tmp_path):
    seen = run("shared", tmp_path)
    assert seen["codes"] == [0, 0]
    first, second = seen["results"]
    assert first == second and len(first) == seen["count"]
    assert rows(tmp_path / "store.sqlite") == dict(first)
    # each goes by what the other has stored: both ask only what they come to at the same time
    asked = Counter(line[1] for line in seen["journal"] if line[0] == "asked")
    assert max(asked.values()) <= 2


def test_ctrl_c_keeps_what_was_asked(tmp_path):
    seen = run("interrupted", tmp_path)
    assert seen["codes"] == [130]
    asked = [line[1] for line in seen["journal"] if line[0] == "asked"]
    assert 0 < len(asked) < seen["count"]
    assert sorted(reply.split("-")[0] for reply in rows(tmp_path / "store.sqlite").values()) == sorted(asked)
