"""Asks a judge many things: in parallel or in batches, from the store where the reply is known, in order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from echo4o_hf.judges.judge import BatchJudge, Judge, JudgeFailed, Reply, judge_name, judge_parameters
from echo4o_hf.judges.pictures import decode
from echo4o_hf.judges.store import StoredReply, VerdictStore, request_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One question to a judge.

    `images` are encoded files (PNG, JPEG, …) or paths to them, read only when their turn comes. Requests that differ
    in `repeat` alone are asked separately.
    """

    system: str
    prompt: str
    images: Sequence[bytes | str | PathLike[str]]
    repeat: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a request: `reply` or `failure` is None, and the other is not.

    Attributes:
        reply: The judge's text.
        failure: Why there is none.
        from_store: Whether no call was made, for the reply was stored, or asked for before in the same list.
        input_tokens: Tokens of the request, where the judge told; of a failure, those paid for in vain.
        output_tokens: Likewise of the reply.
        latency: Seconds that the call took.
        truncated: Whether the reply ended because it reached the limit of its length.
        key: What the reply is stored under; None where an image cannot be read.
    """

    reply: str | None
    failure: str | None
    from_store: bool
    input_tokens: int | None = None
    output_tokens: int | None = None
    latency: float | None = None
    truncated: bool = False
    key: str | None = None


@dataclass(frozen=True)
class _Task:
    """A request whose images have been read."""

    key: str
    system: str
    prompt: str
    images: tuple[bytes, ...]


def ask(
    judge: Judge,
    requests: Iterable[Request],
    *,
    store: VerdictStore | None = None,
    concurrency: int = 16,
    progress: bool = True,
) -> list[Outcome]:
    """Ask everything and return the outcomes in the order of the requests.

    Replies are stored as they arrive. Where the call ends early (`JudgeStopped`, Ctrl-C, an error in the judge), the
    calls under way are waited for and stored, the others are not made; with the same store, the next call goes on from
    there. The images of at most twice `concurrency` requests are in memory.

    Args:
        judge: A `BatchJudge` gets `batch_size` requests at a time, any other is called from `concurrency` threads.
        requests: Identical ones are asked once.
        store: Where replies are kept and looked up; failures are not kept, so that the next run tries again.
        concurrency: Calls at the same time, at least 1.
        progress: Show a bar.

    Raises:
        JudgeStopped: no request can succeed.
        ValueError: `concurrency` is below 1, or the judge has no name to store its replies under.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    run = _Run(judge, store)
    requests = list(requests)
    outcomes: list[Outcome | None] = [None] * len(requests)
    waiting: dict[str, list[int]] = {}  # key -> the requests that its reply answers
    known: dict[str, Outcome] = {}

    def tasks() -> Iterator[_Task]:
        """What has to be asked; everything else gets its outcome here."""
        for index, request in enumerate(requests):
            task = run.prepare(request)
            if isinstance(task, Outcome):
                finish([index], task)
            elif task.key in known:
                finish([index], _again(known[task.key]))
            elif task.key in waiting:
                waiting[task.key].append(index)
            elif store is not None and (stored := store.get(task.key)):
                known[task.key] = _outcome(task.key, stored.reply, from_store=True)
                finish([index], known[task.key])
            else:
                waiting[task.key] = [index]
                yield task

    def finish(indices: Sequence[int], outcome: Outcome) -> None:
        for position, index in enumerate(indices):
            outcomes[index] = _again(outcome) if position else outcome
        bar.update(len(indices))

    with tqdm(total=len(requests), desc=run.name, unit="call", disable=not progress) as bar:
        answers = run.batches(tasks()) if isinstance(judge, BatchJudge) else run.threads(tasks(), concurrency)
        with closing(answers):  # whatever ends the loop, the calls under way are waited for before `ask` ends
            for key, outcome in answers:
                known[key] = outcome
                finish(waiting.pop(key), outcome)
    return [outcome for outcome in outcomes if outcome is not None]


def _again(outcome: Outcome) -> Outcome:
    """The outcome of a request that an earlier one answers."""
    return replace(outcome, from_store=True)


def _outcome(key: str, reply: Reply, from_store: bool = False) -> Outcome:
    return Outcome(
        str(reply), None, from_store, reply.input_tokens, reply.output_tokens, reply.latency, reply.truncated, key
    )


def _failure(key: str, error: JudgeFailed) -> Outcome:
    return Outcome(None, str(error), False, error.input_tokens, error.output_tokens, key=key)


class _Run:
    """One judge and one store, for the length of a call of `ask`."""

    def __init__(self, judge: Judge, store: VerdictStore | None) -> None:
        self.judge, self.store = judge, store
        self.name, self.parameters = judge_name(judge), judge_parameters(judge)
        self._under_way, self._ended, self._changed = 0, False, threading.Condition()
        if store is not None and self.name.endswith("<lambda>"):
            raise ValueError("a lambda has no name to store its replies under; write a function, or set its `name`")

    def prepare(self, request: Request) -> _Task | Outcome:
        """Read the images and compute the key; an image that cannot be read is the request's outcome."""
        images = []
        for number, image in enumerate(request.images, start=1):
            try:
                images.append(image if isinstance(image, bytes) else Path(image).read_bytes())
            except OSError as error:
                return Outcome(None, f"image {number} cannot be read: {error}", from_store=False)
        key = request_key(request.system, request.prompt, images, self.name, self.parameters, request.repeat)
        return _Task(key, request.system, request.prompt, tuple(images))

    def threads(self, tasks: Iterator[_Task], concurrency: int) -> Generator[tuple[str, Outcome], None, None]:
        """Ask from threads; twice as many tasks as threads are ready, so that no thread waits for the next one."""
        executor = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
        pending: set[Future[tuple[str, Outcome]]] = set()
        try:
            for task in tasks:
                pending.add(executor.submit(self.ask_one, task))
                if len(pending) >= 2 * concurrency:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            if self._under_way:  # a call that waits for its next attempt may take minutes
                logger.warning("stopping; waiting for %d calls under way, to keep their replies", self._under_way)
            executor.shutdown(wait=True)
            # The executor does not wait for a thread whose start Ctrl-C has interrupted.
            with self._changed:
                self._ended = True
                self._changed.wait_for(lambda: self._under_way == 0)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call that the end of the run waits for; none begins after it."""
        with self._changed:
            if self._ended:
                raise CancelledError
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def ask_one(self, task: _Task) -> tuple[str, Outcome]:
        """Ask one thing and store the reply."""
        with self.call():
            return self._ask_one(task)

    def _ask_one(self, task: _Task) -> tuple[str, Outcome]:
        try:
            images = decode(task.images)
            start = time.perf_counter()
            reply = self.judge(task.system, task.prompt, images)
        except JudgeFailed as error:
            return task.key, _failure(task.key, error)
        return task.key, self._keep(task.key, reply, time.perf_counter() - start)

    def batches(self, tasks: Iterator[_Task]) -> Generator[tuple[str, Outcome], None, None]:
        """Ask in batches; latency is the batch's divided by its size where the judge does not say."""
        judge = self.judge
        assert isinstance(judge, BatchJudge)
        while batch := list(islice(tasks, judge.batch_size)):
            ready: list[tuple[str, tuple[str, str, list[Image.Image]]]] = []
            for task in batch:
                try:
                    ready.append((task.key, (task.system, task.prompt, decode(task.images))))
                except JudgeFailed as error:
                    yield task.key, _failure(task.key, error)
            if not ready:
                continue
            start = time.perf_counter()
            try:
                replies = judge.batch([request for _, request in ready])
            except JudgeFailed as error:
                for key, _ in ready:
                    yield key, _failure(key, error)
                continue
            seconds = (time.perf_counter() - start) / len(ready)
            for (key, _), reply in zip(ready, replies, strict=True):
                yield key, self._keep(key, reply, seconds)

    def _keep(self, key: str, text: str, seconds: float) -> Outcome:
        if not isinstance(text, str):
            raise ValueError(f"the judge {self.name} must return a str, got {type(text).__name__}")
        reply = text if isinstance(text, Reply) else Reply(text, latency=seconds)
        if self.store is not None:
            # Another process may have asked the same meanwhile: all go by the reply that was there first.
            stored: StoredReply = self.store.put(key, reply, judge=self.name, parameters=self.parameters)
            reply = stored.reply
        return _outcome(key, reply)
