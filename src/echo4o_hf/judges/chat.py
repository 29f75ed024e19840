"""Chat completions, the request and the reply that OpenAI-compatible endpoints and Inference Providers share."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from echo4o_hf.judges.judge import JudgeFailed, Reply
from echo4o_hf.judges.pictures import as_rgb

BROKEN_REPLIES = 3  # attempts at a request whose replies arrive and say nothing
_SHOWN = 300  # characters of a server's message


class BrokenReply(ValueError):
    """A reply that arrived and is not a completion; another attempt may give one."""


def request_options(
    temperature: float | None,
    max_tokens: int | None,
    response_format: Mapping[str, Any] | None,
    **others: Any,
) -> dict[str, Any]:
    """The options that go into a request; None leaves one out.

    Args:
        temperature: From 0.
        max_tokens: From 1.
        response_format: As the API takes it.
        others: `max_retries`, `timeout`, `key` and `base_url`, only to be checked.

    Raises:
        ValueError: one of them is something else; a key is not shown.
    """
    found = {"temperature": temperature, "max_tokens": max_tokens, "response_format": response_format}
    expected = {
        "temperature": ("a number from 0, or null", lambda one: type(one) in (int, float) and 0 <= one < math.inf),
        "max_tokens": ("a whole number from 1, or null", lambda one: type(one) is int and one >= 1),
        "response_format": ("an object, or null", lambda one: isinstance(one, Mapping)),
        "max_retries": ("a whole number from 0", lambda one: type(one) is int and one >= 0),
        "timeout": ("a number of seconds above 0", lambda one: type(one) in (int, float) and 0 < one < math.inf),
        "key": ("a text", lambda one: isinstance(one, str)),
        "base_url": ("an address such as http://localhost:8000/v1", _is_address),
    }
    for name, value in {**found, **others}.items():
        text, holds = expected[name]
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {text}; got {type(value).__name__ if name == 'key' else repr(value)}")
    return {name: value for name, value in found.items() if value is not None}


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and urlsplit(value).scheme in ("http", "https") and bool(urlsplit(value).netloc)


def chat_messages(system: str, prompt: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """A system message, unless it is empty, and a user message: the text, then the images as JPEG data URLs.

    JPEG at Pillow's default quality is what the official scripts send.
    """
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    parts += [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    user = {"role": "user", "content": parts}
    return [{"role": "system", "content": system}, user] if system else [user]


def complete(send: Callable[[], Any], hide: Callable[[str], str]) -> Reply:
    """The reply in the completion that `send` gets; one that says nothing is asked for again.

    Raises:
        JudgeFailed: none came, or it is empty because the limit was reached before it began or a filter held it back.
    """
    start = time.perf_counter()
    paid: dict[str, int | None] = {"input_tokens": None, "output_tokens": None}
    for attempt in range(1, BROKEN_REPLIES + 1):
        try:
            completion = send()
            for name, tokens in _tokens(completion).items():
                paid[name] = tokens if (before := paid[name]) is None else before + (tokens or 0)
            text, truncated = _read(completion)
            return Reply(text, **paid, latency=time.perf_counter() - start, truncated=truncated)
        except BrokenReply as error:
            if attempt == BROKEN_REPLIES:
                raise JudgeFailed(f"{hide(str(error))[:_SHOWN]} ({attempt} attempts)", **paid) from None
        except JudgeFailed as error:
            raise JudgeFailed(str(error), **paid) from None
    raise AssertionError("the loop returns or raises")


def _tokens(completion: Any) -> dict[str, int | None]:
    """What the endpoint says of tokens; None where it says no whole number."""
    usage = completion.get("usage") if isinstance(completion, Mapping) else None
    given = usage if isinstance(usage, Mapping) else {}
    counted = {"input_tokens": given.get("prompt_tokens"), "output_tokens": given.get("completion_tokens")}
    return {name: value if type(value) is int and 0 <= value < 2**53 else None for name, value in counted.items()}


def _read(completion: Any) -> tuple[str, bool]:
    """The text of a chat completion, and whether it was cut off at the limit of its length.

    A refusal in a field of its own is the reply: it is what the judge said. What of a text cut off counts is up to
    the reader.
    """
    try:
        choice = completion["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content") or message.get("refusal") or ""
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise BrokenReply(f"not a chat completion: {completion!r}") from error
    if not isinstance(text, str):
        raise BrokenReply(f"the completion's text is no text: {text!r}")
    if not text.strip():
        if finish == "length":
            raise JudgeFailed("the reply is empty: max_tokens was used up before it began, raise it")
        if finish == "content_filter":
            raise JudgeFailed("the reply is empty: the provider's content filter held it back")
        raise BrokenReply("the reply is empty")
    return text, finish == "length"


def server_message(body: Any, hide: Callable[[str], str]) -> str:
    """What a server says about an error, in its JSON body or in plain text; at most a few lines, the key hidden."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, Mapping) else inner
    return hide(str(body))[:_SHOWN].strip()


def is_flagged(body: Any) -> bool:
    """Whether a router that moderates requests (OpenRouter: status 403) refused this one for what is in it."""
    inner = body.get("error", body) if isinstance(body, Mapping) else None
    metadata = inner.get("metadata") if isinstance(inner, Mapping) else None
    return isinstance(metadata, Mapping) and not metadata.keys().isdisjoint({"reasons", "flagged_input"})


def hide(text: str, secret: str | None, url: str | None) -> str:
    """`text` without the key and what may be secret in the endpoint's address: some servers and errors repeat them.

    Before `text` is shortened, or half a key may stay.
    """
    text = text.replace(secret, "***") if secret else text
    parts = urlsplit(url or "")
    if user := parts.netloc.rpartition("@")[0]:
        text = text.replace(f"{user}@", "***@")
    return text.replace(f"?{parts.query}", "?***") if parts.query else text


def public_url(url: str) -> str:
    """An endpoint's address without user, password and query, which may be secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    as_rgb(image).save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getbuffer()).decode('ascii')}"
