"""A judge on this machine: a vision-language model through transformers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from echo4o_hf.judges.judge import Reply


class TransformersJudge:
    """Greedy decoding of a model's chat template, in batches, which change nothing but the rounding of floats.

    Args:
        model: Name on the Hub, or a folder.
        revision: Of the model on the Hub.
        device: By default the first of CUDA, MPS and CPU that there is.
        dtype: Such as `bfloat16`; `auto` takes the checkpoint's.
        batch_size: Requests at a time.
        max_new_tokens: Limit of a reply.

    Raises:
        OSError: there is no such model.
        ValueError: an argument is not as above, transformers has no image-text-to-text class for the model, or its
            processor no chat template.
    """

    reads_system = True

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        batch_size: int = 8,
        max_new_tokens: int = 512,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{name} must be a whole number from 1; got {number!r}")
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype must be auto, or one of torch such as bfloat16; got {dtype!r}")
        chosen = _checked(device or _best_device())
        self.name = f"transformers:{model}"
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.processor = AutoProcessor.from_pretrained(model, revision=revision)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"the processor of {model!r} has no chat template")
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(model, revision=revision, dtype=dtype).eval()
        self.model.to(chosen)
        self._version = _version(model, self.model.config)

    def __repr__(self) -> str:
        return (
            f"TransformersJudge({self.name.partition(':')[2]!r}, device={self.model.device}, dtype={self.model.dtype})"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides the replies besides the model's name: its version too."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"version": self._version, "dtype": dtype, "max_new_tokens": self.max_new_tokens}

    def __call__(self, system: str, prompt: str, images: list[Image.Image]) -> Reply:
        """The reply to one request."""
        return self.batch([(system, prompt, images)])[0]

    @torch.inference_mode()
    def batch(self, requests: Sequence[tuple[str, str, list[Image.Image]]]) -> list[Reply]:
        """The replies to several requests (system, prompt, images), in one call of `generate`."""
        start = time.perf_counter()
        inputs = self.processor.apply_chat_template(
            [_conversation(*request) for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        generated = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        replies = generated[:, inputs["input_ids"].shape[1] :].tolist()
        seconds = (time.perf_counter() - start) / len(requests)
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [self._reply(tokens, length, seconds) for tokens, length in zip(replies, lengths, strict=True)]

    def _reply(self, tokens: list[int], input_tokens: int, seconds: float) -> Reply:
        """The text up to the first end token; without one, the limit was reached."""
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        stop = next((index for index, token in enumerate(tokens) if token in ends), None)
        text = self.processor.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        return Reply(
            text.strip(),
            input_tokens=input_tokens,
            output_tokens=len(tokens) if stop is None else stop + 1,
            latency=seconds,
            truncated=stop is None,
        )


def _conversation(system: str, prompt: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """The prompt's text first, then the images, as the other judges send them."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    user = {"role": "user", "content": [*parts, *({"type": "image", "image": image} for image in images)]}
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, user] if system else [user]


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _checked(device: str | torch.device) -> torch.device:
    """The device, before a model is loaded in vain."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be one that is here, such as cpu or cuda:1; got {device!r} ({error})"
        ) from error


def _version(model: str, config: Any) -> str | None:
    """The commit of a model from the Hub; of a folder, a hash of its files' names, sizes and times of change."""
    if not Path(model).is_dir():
        return getattr(config, "_commit_hash", None)
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(model).iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
