"""Chat completions, the request and the reply that OpenAI-compatible endpoints and Inference Providers share."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from echo4o_hf.judges.judge import JudgeFailed, Reply

BROKEN_REPLIES = 3  # so often is a request repeated whose reply arrived and says nothing
_SHOWN = 300  # characters of a server's message


class BrokenReply(ValueError):
    """A reply that arrived and is not a completion; another attempt may give one."""


def chat_messages(system: str, prompt: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """A system message, unless it is empty, and a user message: the text, then the images as JPEG data URLs.

    JPEG at Pillow's default quality is what the official scripts send.
    """
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    parts += [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    user = {"role": "user", "content": parts}
    return [{"role": "system", "content": system}, user] if system else [user]


def read_completion(completion: Any, seconds: float) -> Reply:
    """The text of a chat completion, with its tokens.

    A refusal in a field of its own is the reply: it is what the judge said. A reply cut off at `max_tokens` is marked
    as truncated; what of it counts is up to the reader.

    Raises:
        BrokenReply: this is no completion, or it is empty.
        JudgeFailed: it is empty because the limit was reached before it began, or a filter held it back.
    """
    try:
        choice = completion["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content") or message.get("refusal") or ""
        usage = completion.get("usage") or {}
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise BrokenReply(f"not a chat completion: {str(completion)[:_SHOWN]!r}") from error
    if not isinstance(text, str):
        raise BrokenReply(f"the completion's text is no text: {str(text)[:_SHOWN]!r}")
    if not text.strip():
        if finish == "length":
            raise JudgeFailed("the reply is empty: max_tokens was used up before it began, raise it")
        if finish == "content_filter":
            raise JudgeFailed("the reply is empty: the provider's content filter held it back")
        raise BrokenReply("the reply is empty")
    return Reply(text, input_tokens=tokens[0], output_tokens=tokens[1], latency=seconds, truncated=finish == "length")


def server_message(body: Any) -> str:
    """What a server says about an error, in its JSON body or in plain text; at most a few lines."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, Mapping) else inner
    return str(body)[:_SHOWN].strip()


def hide(text: str, secret: str | None) -> str:
    """`text` without the key, which some servers repeat in their messages."""
    return text.replace(secret, "***") if secret else text


def public_url(url: str) -> str:
    """An endpoint's address without user, password and query, which may be secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    (image if image.mode == "RGB" else image.convert("RGB")).save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getbuffer()).decode('ascii')}"
