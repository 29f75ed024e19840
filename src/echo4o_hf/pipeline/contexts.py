"""The contexts of a batch: the whole one of each prompt, and those that guidance compares it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..model.context import Context


@dataclass
class PromptContexts:
    """Cached contexts, one row per prompt in each.

    Attributes:
        conditional: everything: texts, references and the plan.
        without_text: without the last text and without the plan.
        without_images: without references and without the plan; the remaining texts move to the front, as in the
            official code.
        text_differs: per prompt, whether `without_text` is another context than `conditional`.
        images_differ: the same for `without_images`, whose row has no meaning where it is False.
        plans: with thinking, the text that the model wrote for each prompt.
    """

    conditional: Context
    without_text: Context
    without_images: Context
    text_differs: list[bool]
    images_differ: list[bool]
    plans: list[str] | None = None
    _joined: tuple[object, Context] | None = field(default=None, repr=False)

    def join(self, rows: Sequence[int], text_rows: Sequence[int], image_rows: Sequence[int]) -> Context:
        """The given rows (prompts; may repeat) of the three contexts as one batch; kept until other rows are asked."""
        key = (tuple(rows), tuple(text_rows), tuple(image_rows))
        if self._joined is None or self._joined[0] != key:
            self._joined = None  # frees the memory first
            contexts = zip((self.conditional, self.without_text, self.without_images), key, strict=True)
            parts = [_select(context, chosen) for context, chosen in contexts if chosen]
            self._joined = key, parts[0] if len(parts) == 1 else Context.concatenate(parts)
        return self._joined[1]


def _select(context: Context, rows: tuple[int, ...]) -> Context:
    everything = tuple(range(len(context.next_position)))
    return context if rows == everything else context.select(rows)
