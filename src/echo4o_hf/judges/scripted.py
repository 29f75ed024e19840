"""A judge with fixed answers: for tests, for examples, and to see a whole evaluation without a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from echo4o_hf.judges.judge import JudgeFailed

Answer: TypeAlias = str | Exception  # an exception is raised


class ScriptedJudge:
    """Gives the answers that it was made with.

    >>> ScriptedJudge({"a red dog": '{"correct": 1, "reason": "it is red"}'})("", "Instruction: a red dog", [])
    '{"correct": 1, "reason": "it is red"}'

    Args:
        answers: One text for every request; or a sequence, the first request getting the first (call `ask` with
            `concurrency=1`, or their order is up to the threads); or a mapping, a request getting the answer of the
            longest key that its prompt contains; or a function (system, prompt, images) -> answer. An exception among
            the answers is raised.
        name: Replies are stored under it.
    """

    def __init__(
        self,
        answers: Answer | Sequence[Answer] | Mapping[str, Answer] | Callable[[str, str, list[Image.Image]], Answer],
        *,
        name: str = "scripted",
    ) -> None:
        self.answers = answers
        self.name = name
        self.calls = 0
        self._lock = threading.Lock()

    @classmethod
    def from_file(cls, path: str | Path) -> ScriptedJudge:
        """Answers from lines `{"prompt": …, "reply": …}`; `prompt` is a part of the request's prompt.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line is not of this form; the message carries the file and the line number.
        """
        answers = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            strings = isinstance(row, dict) and all(isinstance(value, str) for value in row.values())
            if not strings or row.keys() != {"prompt", "reply"}:
                raise ValueError(f'{path}, line {number}: expected {{"prompt": text, "reply": text}}, got {line}')
            answers[row["prompt"]] = row["reply"]
        return cls(answers, name=f"scripted:{Path(path).name}")

    @property
    def reads_system(self) -> bool | None:
        """False, but for a function among the answers, which may."""
        return None if callable(self.answers) else False

    @property
    def parameters(self) -> dict[str, Any]:
        """A hash of the answers, so that another script is another judge."""
        if callable(self.answers):
            return {"answers": getattr(self.answers, "__qualname__", type(self.answers).__qualname__)}
        text = json.dumps(self.answers, default=repr, sort_keys=True)
        return {"answers": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def __call__(self, system: str, prompt: str, images: list[Image.Image]) -> str:
        """The next answer, or the one for this prompt.

        Raises:
            JudgeFailed: there is none.
        """
        with self._lock:
            call, self.calls = self.calls, self.calls + 1
        answer = self._find(call, system, prompt, images)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _find(self, call: int, system: str, prompt: str, images: list[Image.Image]) -> Answer:
        if callable(self.answers):
            return self.answers(system, prompt, images)
        if isinstance(self.answers, str | Exception):
            return self.answers
        if isinstance(self.answers, Mapping):
            keys = [key for key in self.answers if key in prompt]
            if not keys:
                raise JudgeFailed(f"the script has no answer for the prompt {prompt[:80]!r}")
            return self.answers[max(keys, key=len)]
        if call >= len(self.answers):
            raise JudgeFailed(f"the script has {len(self.answers)} answers, this is request {call + 1}")
        return self.answers[call]
