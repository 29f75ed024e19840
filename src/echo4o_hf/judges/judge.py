"""What a judge is, what it replies, and the two ways in which it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

from PIL import Image

Judge: TypeAlias = Callable[[str, str, list[Image.Image]], str]
"""`judge(system, prompt, images) -> reply`; any callable will do.

`name` and `parameters` (what else decides the replies, as JSON) are read where it has them: stored replies are found
by them. It raises `JudgeFailed` for one request that must go unscored, `JudgeStopped` where no request can succeed.
`reads_system`, where it has it, says whether the system text decides its replies; `prices` are those of a million
input and a million output tokens, in any currency.
"""


class Reply(str):
    """A judge's text with what it cost; a plain `str` is as good.

    Attributes:
        input_tokens: Tokens of the request, images included; of all attempts, where some were paid for in vain.
        output_tokens: Likewise of the reply.
        latency: Seconds from the request to the reply, retries included.
        truncated: Whether the reply ended because it reached the limit of its length.
    """

    input_tokens: int | None
    output_tokens: int | None
    latency: float | None
    truncated: bool

    def __new__(
        cls,
        text: str,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        latency: float | None = None,
        truncated: bool = False,
    ) -> Self:
        """Make a reply of `text`."""
        reply = super().__new__(cls, text)
        reply.input_tokens = input_tokens
        reply.output_tokens = output_tokens
        reply.latency = latency
        reply.truncated = truncated
        return reply


@runtime_checkable
class BatchJudge(Protocol):
    """A judge that is faster with several requests at once."""

    batch_size: int

    def __call__(self, system: str, prompt: str, images: list[Image.Image]) -> str:
        """The reply to one request."""

    def batch(self, requests: Sequence[tuple[str, str, list[Image.Image]]]) -> Sequence[str]:
        """The replies to at most `batch_size` requests (system, prompt, images), in their order."""


class JudgeStopped(RuntimeError):
    """No request can succeed: key refused, quota used up, unknown model, server never reached.

    The message says what to do about it, and never contains the key.
    """


class JudgeFailed(RuntimeError):
    """This request failed, after all retries; its item stays unscored with the message as the reason.

    Attributes:
        input_tokens: Tokens that were paid for nevertheless.
        output_tokens: Likewise.
    """

    def __init__(self, message: str, *, input_tokens: int | None = None, output_tokens: int | None = None) -> None:
        super().__init__(message)
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens


def judge_name(judge: Judge) -> str:
    """`judge.name`, or the name of a function.

    Raises:
        ValueError: the judge has neither.
    """
    name = getattr(judge, "name", None) or getattr(judge, "__qualname__", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"a judge needs a name, a str that is not empty: set `name` on {type(judge).__name__}")
    return name


def judge_prices(judge: Judge) -> tuple[float, float] | None:
    """`judge.prices`, or None.

    Raises:
        ValueError: they are not two numbers from 0.
    """
    prices = getattr(judge, "prices", None)
    if prices is None:
        return None
    numbers = [*prices] if isinstance(prices, (list, tuple)) else [prices]
    if len(numbers) != 2 or not all(type(one) in (int, float) and 0 <= one < math.inf for one in numbers):
        raise ValueError(
            "prices are two numbers from 0, of a million input and of a million output tokens, such as [2, 8]; "
            f"got {prices!r}"
        )
    return float(numbers[0]), float(numbers[1])


def judge_parameters(judge: Judge) -> dict[str, Any]:
    """`judge.parameters`, or none.

    Raises:
        ValueError: they cannot be written as JSON.
    """
    parameters = getattr(judge, "parameters", {})
    if not isinstance(parameters, dict):
        raise ValueError(f"the parameters of {judge_name(judge)} must be a dict, got {type(parameters).__name__}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(parameters, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the parameters of {judge_name(judge)} cannot be written as JSON: {error}") from error
    return copy
