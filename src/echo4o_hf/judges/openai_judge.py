"""A judge behind any OpenAI-compatible endpoint: OpenAI, vLLM, `transformers serve` and others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import openai
from PIL import Image

from echo4o_hf.judges.chat import (
    BrokenReply,
    chat_messages,
    complete,
    hide,
    is_flagged,
    public_url,
    request_options,
    server_message,
)
from echo4o_hf.judges.judge import JudgeFailed, JudgeStopped, Reply, judge_prices

_CONNECT_SECONDS = 10.0
# Of a 400: the same request without the image would be refused too.
_HOPELESS = {"invalid_api_key", "model_not_found", "unsupported_parameter", "unsupported_value"}
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")


class OpenAIJudge:
    """Chat completions with images; may be called from many threads.

    The client of `openai` retries 408, 409, 429, 5xx, time-outs and broken connections, waiting as long as Retry-After
    says (two minutes at most) or else with exponential back-off and jitter.

    Args:
        model: Its name at the endpoint.
        base_url: Of the endpoint; by default `OPENAI_BASE_URL`, or OpenAI's.
        api_key: By default `OPENAI_API_KEY`; not needed by an endpoint of your own.
        temperature: None leaves it to the server, as some models want it.
        max_tokens: Limit of the reply; None leaves it to the server.
        response_format: Such as a JSON schema, as the API takes it.
        extra_body: Further fields of the request, such as `{"max_completion_tokens": 4096, "seed": 0}`.
        max_retries: After the first attempt.
        timeout: Seconds without any answer after which an attempt is given up.
        prices: Of a million input and a million output tokens, such as (2.0, 8.0), for the cost in results.

    Raises:
        JudgeStopped: there is no key, and the endpoint is OpenAI's.
        ValueError: an argument is not as above.
    """

    reads_system = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        response_format: Mapping[str, Any] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        max_retries: int = 6,
        timeout: float = 120.0,
        prices: Sequence[float] | None = None,
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self._key = api_key or os.environ.get("OPENAI_API_KEY")
        self._options = request_options(
            temperature,
            max_tokens,
            response_format,
            max_retries=max_retries,
            timeout=timeout,
            key=self._key,
            base_url=base_url,
        )
        if not isinstance(extra_body, Mapping | None):
            raise ValueError(f"extra_body must be an object; got {extra_body!r}")
        if not self._key and not base_url:
            raise JudgeStopped("there is no key: set OPENAI_API_KEY, or OPENAI_BASE_URL for an endpoint of your own")
        self.model = model
        self.name = f"openai:{model}"
        self.prices = prices
        judge_prices(self)  # wrong ones are told before anything is paid
        self._extra_body = dict(extra_body or {})
        self._client = openai.OpenAI(
            api_key=self._key or "none",  # the client wants one
            base_url=base_url,
            max_retries=max_retries,
            timeout=openai.Timeout(timeout, connect=_CONNECT_SECONDS),
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [_do_not_retry_without_quota]}),
        )
        self.endpoint = public_url(str(self._client.base_url))
        self._reached = False  # whether any request got an answer

    def __repr__(self) -> str:
        return f"OpenAIJudge({self.model!r}, base_url={self.endpoint!r})"

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides the replies besides the model's name: the endpoint too, for names are not unique."""
        return {"base_url": self.endpoint, **self._options, **self._extra_body}

    def __call__(self, system: str, prompt: str, images: list[Image.Image]) -> Reply:
        """One chat completion; a reply that is no completion is asked for again.

        Raises:
            JudgeStopped: key or model refused, quota used up, endpoint never reached.
            JudgeFailed: no reply after all retries.
        """
        messages = chat_messages(system, prompt, images)
        return complete(lambda: self._completion(messages), self._hide)

    def _completion(self, messages: list[dict[str, Any]]) -> Any:
        request: dict[str, Any] = {"model": self.model, "messages": messages, **self._options}
        try:
            response = self._client.chat.completions.with_raw_response.create(**request, extra_body=self._extra_body)
        except openai.APIStatusError as error:
            self._reached = True
            raise self._refused(error) from None  # its text may repeat the key
        except openai.APIConnectionError as error:
            raise self._unreachable(error) from None
        self._reached = True
        try:
            return json.loads(response.text)
        except ValueError as error:
            raise BrokenReply(f"the endpoint's answer is not JSON: {response.text!r}") from error

    def _refused(self, error: openai.APIStatusError) -> JudgeStopped | JudgeFailed:
        """What an error status means for the run."""
        status, code = error.status_code, str(error.code or error.type or "")
        said = f"{self.endpoint} says ({status}): {server_message(error.body or error.message, self._hide)}"
        if status == 401:
            return JudgeStopped(f"the key was refused; check OPENAI_API_KEY. {said}")
        if status == 403 and not is_flagged(error.body):
            return JudgeStopped(f"the key may not use {self.model}; check its permissions. {said}")
        if status == 402 or any(name in (error.code, error.type) for name in _QUOTA):
            return JudgeStopped(f"the quota is used up; add credit, then run again with the same store. {said}")
        if status == 404:
            return JudgeStopped(f"no model {self.model!r} there; check its name and OPENAI_BASE_URL. {said}")
        if status == 400 and code in _HOPELESS:
            return JudgeStopped(f"the request's options do not suit {self.model}. {said}")
        return JudgeFailed(said)

    def _unreachable(self, error: openai.APIConnectionError) -> JudgeStopped | JudgeFailed:
        cause = error.__cause__
        reason = f"{type(cause).__name__}: {self._hide(str(cause))}" if cause else self._hide(error.message)
        timed_out = isinstance(error, openai.APITimeoutError) and "Connect" not in type(cause).__name__
        if self._reached or timed_out:
            return JudgeFailed(f"no answer from {self.endpoint} ({reason})")
        return JudgeStopped(f"cannot reach {self.endpoint}; check the network and OPENAI_BASE_URL ({reason})")

    def _hide(self, text: str) -> str:
        return hide(text, self._key, str(self._client.base_url))


def _do_not_retry_without_quota(response: Any) -> None:
    """Tell the client, in the header that it obeys, that waiting brings no new quota."""
    if response.status_code == 429:
        response.read()
        if any(name in response.text for name in _QUOTA):
            response.headers["x-should-retry"] = "false"
