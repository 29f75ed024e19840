"""Text and images -> token rows of the understanding stream.

transformers' processors expand placeholder tokens in one text; Bagel's rows carry rope ids and segments that follow
no tokenizer template, so `BagelProcessor` builds them itself.

Letters: B rows, U tokens of the longest row, P patches of the row with most, I images of the row with most.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from .checkpoint import HUB_OPTIONS, find_files, layout, load_processor
from .configuration_bagel import BagelConfig
from .image_processing_bagel import BagelImageProcessor, ImageLike
from .official import check_vocabulary
from .packing import PADDING, Segment, collate, patchify

# In the order in which the official code adds those that a tokenizer lacks.
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

ROLES = ("system", "user", "assistant")


class BagelProcessor(ProcessorMixin):
    """Tokenizer and image processor of Bagel.

    Args:
        image_processor: the two resize rules.
        tokenizer: Qwen2's. Special tokens that it lacks are added at its end.
    """

    def __init__(self, image_processor: BagelImageProcessor, tokenizer: PreTrainedTokenizerBase) -> None:
        """See the class."""
        super().__init__(image_processor, tokenizer)
        # `add_tokens` counts tokens that existed already (seen with transformers 5.23): ask before, trust no count.
        known = tokenizer.get_added_vocab()
        tokenizer.add_tokens([token for token in SPECIAL_TOKENS if token not in known], special_tokens=True)
        ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS]
        self.bos_token_id, self.eos_token_id, self.start_of_image_token_id, self.end_of_image_token_id = ids

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> BagelProcessor:
        """Loads what `save_pretrained` wrote, the processor of a saved pipeline, or that of the official layout.

        The library's own method asks `AutoImageProcessor`, which knows our class only after registration.

        Raises:
            OSError: files are missing or damaged, or there is no network.
        """
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        folder = find_files(pretrained_model_name_or_path, "processor", **hub_options)
        if folder is not None and layout(folder) == "official":
            return load_processor(folder, BagelConfig.from_pretrained(folder))
        if folder is not None:
            pretrained_model_name_or_path = folder
            kwargs = {name: value for name, value in kwargs.items() if name not in hub_options}
        if os.path.isdir(pretrained_model_name_or_path):
            check_vocabulary(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        image_processor = BagelImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(image_processor, tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
        row_names = ["input_ids", "attention_mask", "position_ids", "segment_ids", "roles", "sample_ids"]
        return row_names + ["vision_mask", "pixel_values", "vision_grids"]

    def text_segment(self, text: str) -> Segment:
        """[bos] + text + [eos].

        Raises:
            ValueError: not a string, empty, or longer than the tokenizer's `model_max_length`.
        """
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be a string, got {type(text).__name__}: {text!r:.80}")
        if not text.strip():
            raise ValueError(f"a prompt must hold text, got {text!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"a prompt must be valid Unicode, got half of a surrogate pair: {text!r:.80}")
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        limit = self.tokenizer.model_max_length
        if len(ids) + 2 > limit:
            raise ValueError(f"the prompt has {len(ids) + 2} tokens, the tokenizer's limit is {limit}: shorten it")
        return Segment(role="text", input_ids=[self.bos_token_id, *ids, self.eos_token_id])

    def vision_segment(self, image: ImageLike, from_original: bool = False) -> Segment:
        """[start of image] + patches + [end of image].

        Inference cuts the patches from the image *after* the latent resize, training from the original
        (`from_original`); both follow the official code.
        """
        if not from_original:
            image = self.image_processor.resize_for_latents(image)
        patch_size = self.image_processor.patch_size
        pixels = self.image_processor.vision_pixels(image)  # (3, height, width)
        return Segment(
            role="vision",
            input_ids=[self.start_of_image_token_id, self.end_of_image_token_id],
            patches=patchify(pixels, patch_size),
            grid=(pixels.shape[1] // patch_size, pixels.shape[2] // patch_size),
        )

    def __call__(
        self,
        text: str | list[str],
        images: ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]] | None = None,
        return_tensors: str = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Rows for `BagelForConditionalGeneration.generate`: the images, then the text, then the [bos] of the answer.

        Args:
            text: one question, or one per row.
            images: one image, the images of the one question, or one list per question.
            return_tensors: "pt" or "np".
            padding: False if all rows have the same length anyway.

        Returns:
            What `collate` makes of the segments, padded on the left: (B, U) input_ids, attention_mask, position_ids
            (rope), segment_ids, roles, sample_ids; with images also vision_mask (B, U), pixel_values
            (B, P, patch_dim) and vision_grids (B, I, 2). Patches and padding carry the tokenizer's padding id.

        Raises:
            ValueError: a prompt or image that cannot be used, counts that do not fit, rows of unequal length
                without padding.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no text given; pass a question or a list of questions")
        bos = Segment(role="text", input_ids=[self.bos_token_id])
        rows = [
            [*map(self.vision_segment, row_images), self.text_segment(row_text), bos]
            for row_text, row_images in zip(texts, images_per_text(images, len(texts)), strict=True)
        ]
        return self._stack(rows, return_tensors, padding)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> BatchFeature:
        """Rows for `generate` from chats in transformers' form: texts and images in any order, over several turns.

        Bagel has no template and no names of roles: each text and image of a chat is a segment, in their order.

        Args:
            conversation: messages {"role": ..., "content": a text or a list of parts}, or several such lists. Parts
                are {"type": "text", "text": ...}, {"type": "image", "image" or "url" or "path" or "base64": ...} and
                OpenAI's {"type": "image_url", ...}.
            add_generation_prompt: end with the [bos] of the answer.
            continue_final_message: leave the last text open instead, for the model to go on with it.
            tokenize: must be True: a row with images cannot be written as a text.
            return_dict: must be True, likewise.
            return_tensors: "pt" or "np".
            processor_kwargs: `padding` and `return_tensors`, as of `__call__`.
            **unknown: other options of transformers, which are refused.

        Returns:
            As `__call__`.

        Raises:
            ValueError: messages of another form, or options that Bagel does not have.
        """
        if not (tokenize and return_dict) or unknown:
            options = ", ".join(unknown) or "tokenize=False and return_dict=False"
            raise ValueError(f"Bagel has no chat template: {options} cannot be used")
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"a chat must be a list of messages, got {conversation!r:.80}")
        chats = conversation if isinstance(conversation[0], (list, tuple)) else [conversation]
        rows = [[self._part_segment(part) for message in chat for part in _parts(message)] for chat in chats]
        for row in rows:
            if continue_final_message:
                if not row or row[-1].role != "text":
                    raise ValueError("continue_final_message=True needs a chat that ends with a text")
                row[-1] = Segment(role="text", input_ids=row[-1].input_ids[:-1])  # without its [eos]
            elif add_generation_prompt:
                row.append(Segment(role="text", input_ids=[self.bos_token_id]))
        return self._stack(rows, **{"return_tensors": return_tensors, **(processor_kwargs or {})})

    def _part_segment(self, part: str | ImageLike) -> Segment:
        """A text, which is marked by its class, or an image."""
        return self.text_segment(part) if isinstance(part, _Text) else self.vision_segment(part)

    def _stack(self, rows: list[list[Segment]], return_tensors: str, padding: bool = True) -> BatchFeature:
        data = collate(rows, padding_side="left")
        is_text_id = attention_mask = data["segment_ids"] != PADDING  # (B, U)
        if not padding and not attention_mask.all():
            raise ValueError(f"the rows have {attention_mask.sum(1).tolist()} tokens; pass padding=True to stack them")
        if "vision_mask" in data:
            is_text_id = attention_mask & ~data["vision_mask"]
        data["input_ids"] = data["input_ids"].masked_fill(~is_text_id, self._placeholder_id)
        data["attention_mask"] = attention_mask.long()
        return BatchFeature(data, tensor_type=return_tensors)

    @property
    def _placeholder_id(self) -> int:
        pad_token_id: int | None = self.tokenizer.pad_token_id
        return self.eos_token_id if pad_token_id is None else pad_token_id


class _Text(str):
    """A text of a chat, where other strings are paths."""


def _parts(message: Any) -> list[_Text | ImageLike]:
    """The texts and images of a message."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise ValueError(f"a message must be a dict whose role is one of {', '.join(ROLES)}, got {message!r:.80}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError(f"a message must have a text or a list of parts as content, got {content!r:.80}")
    return [_read_part(part) for part in content]


def _read_part(part: Any) -> _Text | ImageLike:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _Text(part["text"])
    if kind == "image_url" and isinstance(part.get("image_url"), (str, Mapping)):  # OpenAI's form
        url = part["image_url"]
        part, kind = {"url": url if isinstance(url, str) else url.get("url")}, "image"
    image = (
        next((part[key] for key in ("image", "url", "path", "base64") if key in part), None)
        if kind == "image"
        else None
    )
    if image is None:
        raise ValueError(
            f"a part of a message must be a text or an image, as transformers writes them, got {part!r:.80}"
        )
    if "base64" in part or (isinstance(image, str) and image.startswith(("http://", "https://", "data:"))):
        return load_image(image)
    return cast(ImageLike, image)


def images_per_text(images: Any, num_texts: int) -> list[list[ImageLike]]:
    """One list of images per text, from any of the accepted forms.

    Args:
        images: None, one image, the images of the one text, or one list (or None) per text.
        num_texts: how many texts there are.

    Raises:
        ValueError: the images cannot be told apart between several texts, or there are too many or too few lists.
    """
    if images is None:
        return [[] for _ in range(num_texts)]
    if isinstance(images, (Image.Image, np.ndarray, torch.Tensor, str, os.PathLike)):
        images = [images]
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images must be an image, a list of images or a list of lists, got {type(images).__name__}")
    nested = [item is None or isinstance(item, (list, tuple)) for item in images]
    if any(nested) and not all(nested):
        raise ValueError("images mixes lists and single images; pass one list of images per text")
    if not any(nested):
        if num_texts != 1:
            raise ValueError(f"{len(images)} images for {num_texts} texts: pass a list of lists, one list per text")
        return [list(images)]
    if len(images) != num_texts:
        raise ValueError(f"{len(images)} lists of images for {num_texts} texts; pass one list per text")
    return [list(item or []) for item in images]
