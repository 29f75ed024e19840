"""Processes that judge with one store and are killed: `python judging_process.py SCENARIO FOLDER` prints all of it.

A process of its own, with one thread, that has imported everything: it can fork quickly and safely.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
import uuid
from pathlib import Path

from PIL import Image

from echo4o_hf.judges.ask import Request, ask
from echo4o_hf.judges.store import VerdictStore

KILLS = 20


class Journal:
    """Lines of several processes, each written whole."""

    def __init__(self, path):
        self.path = path
        self.file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def write(self, *words):
        os.write(self.file, (" ".join(words) + "\n").encode())

    def read(self):
        return [line.split(" ") for line in self.path.read_text().splitlines()]


class Judge:
    """Notes every call and its reply, which is never the same twice."""

    name = "noting"

    def __init__(self, journal, seconds):
        self.journal, self.seconds = journal, seconds

    def __call__(self, system, prompt, images):
        self.journal.write("asked", prompt)
        time.sleep(random.uniform(0.5, 1.5) * self.seconds)
        return f"{prompt}-{uuid.uuid4().hex}"


class NotingStore(VerdictStore):
    """Notes what `put` has said to be stored."""

    def __init__(self, path, journal):
        super().__init__(path)
        self.journal = journal

    def put(self, key, reply, **origin):
        stored = super().put(key, reply, **origin)
        self.journal.write("stored", key, stored.reply)
        return stored


def judge_all(folder, count, seconds, concurrency=16):
    """Judge in this process; returns keys and replies."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    requests = [Request("s", f"p{index}", [buffer.getvalue()]) for index in range(count)]
    journal = Journal(folder / "journal")
    with NotingStore(folder / "store.sqlite", journal) as store:
        outcomes = ask(Judge(journal, seconds), requests, store=store, concurrency=concurrency, progress=False)
    return [(outcome.key, outcome.reply) for outcome in outcomes]


def fork(folder, *arguments):
    """A process that judges, and writes what it got; returns its id."""
    child = os.fork()
    if child:
        return child
    random.seed()
    try:
        result = judge_all(folder, *arguments)
        (folder / f"result-{os.getpid()}").write_text(json.dumps(result))
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def wait_for_lines(journal, count):
    deadline = time.monotonic() + 30
    while len(journal.read()) < count:
        assert time.monotonic() < deadline, "nothing is judged"
        time.sleep(0.001)


def killed(folder, count=1500):
    """Killed at random moments, then left alone."""
    journal, rng, codes = Journal(folder / "journal"), random.Random(0), []
    for _ in range(KILLS):
        before = len(journal.read())
        child = fork(folder, count, 0.01)
        wait_for_lines(journal, before + 1)
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    arrived = len([line for line in journal.read() if line[0] == "stored"])
    return {"codes": codes, "arrived_before": arrived, "result": judge_all(folder, count, 0.001), "count": count}


def shared(folder, count=300):
    """Two processes at the same time, from the making of the store on."""
    children = [fork(folder, count, 0.01) for _ in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results = [json.loads((folder / f"result-{child}").read_text()) for child in children]
    return {"codes": codes, "results": results, "count": count}


def interrupted(folder, count=500):
    """Ctrl-C."""
    child = fork(folder, count, 0.02)
    wait_for_lines(Journal(folder / "journal"), 50)
    os.kill(child, signal.SIGINT)
    return {"codes": [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])], "count": count}


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    seen = globals()[sys.argv[1]](folder)
    sys.stdout.write(json.dumps({**seen, "journal": Journal(folder / "journal").read()}))
