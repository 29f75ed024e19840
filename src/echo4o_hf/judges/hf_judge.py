"""A judge behind Hugging Face's Inference Providers, or an Inference Endpoint, through huggingface_hub."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from email.utils import mktime_tz, parsedate_tz
from typing import Any

import httpx2
from huggingface_hub import InferenceClient, get_token
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from PIL import Image

from echo4o_hf.judges.chat import (
    BrokenReply,
    chat_messages,
    complete,
    hide,
    public_url,
    request_options,
    server_message,
)
from echo4o_hf.judges.judge import JudgeFailed, JudgeStopped, Reply, judge_prices

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds of back-off
_LONGEST_RETRY_AFTER = 120.0


class HFJudge:
    """Chat completions with images; may be called from many threads.

    The client of huggingface_hub makes one attempt; here it is repeated after 408, 409, 429, 5xx, time-outs and broken
    connections, waiting as long as Retry-After says (two minutes at most), else with exponential back-off and jitter.

    Args:
        model: Its name on the Hub.
        provider: Such as `together`; `auto` lets the Hub choose by the user's settings.
        base_url: Of an Inference Endpoint, or of a server of your own; then no provider is used.
        token: By default the one that huggingface_hub is logged in with (`HF_TOKEN`, `hf auth login`).
        temperature: None leaves it to the server.
        max_tokens: Limit of the reply; None leaves it to the server.
        response_format: Such as a JSON schema, as the API takes it.
        max_retries: After the first attempt.
        timeout: Seconds without any answer after which an attempt is given up.
        prices: Of a million input and a million output tokens, such as (0.6, 2.4), for the cost in results.

    Raises:
        ValueError: an argument is not as above, or the provider is unknown.
    """

    reads_system = True

    def __init__(
        self,
        model: str,
        provider: str = "auto",
        *,
        base_url: str | None = None,
        token: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        response_format: Mapping[str, Any] | None = None,
        max_retries: int = 6,
        timeout: float = 120.0,
        prices: Sequence[float] | None = None,
    ) -> None:
        self.model = model
        self.name = f"hf:{model}"
        self.prices = prices
        judge_prices(self)  # wrong ones are told before anything is paid
        self.max_retries = max_retries
        self._options = request_options(
            temperature,
            max_tokens,
            response_format,
            max_retries=max_retries,
            timeout=timeout,
            key=token,
            base_url=base_url,
        )
        self._where = {"base_url": public_url(base_url)} if base_url else {"provider": provider}
        self._token = token
        self._client = InferenceClient(
            base_url=base_url,
            provider=None if base_url else provider,  # type: ignore[arg-type]
            token=token,
            timeout=timeout,
        )
        self._reached = False  # whether any request got an answer

    def __repr__(self) -> str:
        return f"HFJudge({self.model!r}, {', '.join(f'{key}={value!r}' for key, value in self._where.items())})"

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides the replies besides the model's name."""
        return {**self._where, **self._options}

    def __call__(self, system: str, prompt: str, images: list[Image.Image]) -> Reply:
        """One chat completion; a reply that is no completion is asked for again.

        Raises:
            JudgeStopped: token or model refused, credits used up, never reached.
            JudgeFailed: no reply after all retries.
        """
        messages = chat_messages(system, prompt, images)
        return complete(lambda: self._send(messages), self._hide)

    def _send(self, messages: list[dict[str, Any]]) -> Any:
        """The completion, after as many attempts as it takes."""
        for attempt in range(self.max_retries + 1):
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * (1 - 0.25 * random.random())
            try:
                request: dict[str, Any] = {"messages": messages, "model": self.model, **self._options}
                completion = self._client.chat_completion(**request)
                self._reached = True
                return completion
            except HfHubHTTPError as error:
                self._reached = True
                asked = _retry_after(error.response.headers.get("retry-after"))
                if attempt == self.max_retries or not _worth_a_retry(error.response.status_code, asked):
                    raise self._refused(error) from None  # its text may repeat the token
                wait = asked or wait
            except (InferenceTimeoutError, httpx2.TransportError) as error:
                if attempt == self.max_retries:
                    raise self._unreachable(error) from None
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
                self._reached = True
                raise BrokenReply(f"not a chat completion: {error}") from error
            except ValueError as error:  # of the client: about token, provider or model, or on some other JSON
                if self._reached:
                    raise BrokenReply(f"not a chat completion: {error}") from error
                raise JudgeStopped(f"cannot ask {self!r}: {self._hide(str(error))}") from None
            time.sleep(wait)
        raise AssertionError("the loop returns or raises")

    def _refused(self, error: HfHubHTTPError) -> JudgeStopped | JudgeFailed:
        """What an error status means for the run."""
        status = error.response.status_code
        try:
            body = error.response.json()
        except ValueError:
            body = error.response.text
        said = f"{self!r} got ({status}): {server_message(body, self._hide)}"
        if status == 401:
            return JudgeStopped(f"the token was refused; check HF_TOKEN or run `hf auth login`. {said}")
        if status == 402:
            return JudgeStopped(f"the credits are used up; add some, then run again with the same store. {said}")
        if status == 403:
            return JudgeStopped(f"the token may not call Inference Providers; check its permissions. {said}")
        if status == 404 or (status == 400 and "model_not_supported" in error.response.text):
            return JudgeStopped(f"no provider serves this model; check its name and the provider. {said}")
        return JudgeFailed(said)

    def _unreachable(self, error: Exception) -> JudgeStopped | JudgeFailed:
        reason = f"{type(error).__name__}: {self._hide(str(error))}"
        if self._reached or isinstance(error, InferenceTimeoutError):
            return JudgeFailed(f"no answer to {self!r} ({reason})")
        return JudgeStopped(f"{self!r} cannot be reached; check the network ({reason})")

    def _hide(self, text: str) -> str:
        return hide(text, self._token or get_token(), self._client.model)


def _worth_a_retry(status: int, asked: float | None) -> bool:
    return (status in (408, 409, 429) or status >= 500) and (asked or 0) <= _LONGEST_RETRY_AFTER


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which may be a date; None where there is none."""
    if not header:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        date = parsedate_tz(header)
        return max(mktime_tz(date) - time.time(), 0.0) if date else None
