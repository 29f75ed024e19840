"""The contexts of a batch: the whole one of each prompt, and those that guidance compares it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    def select(self, rows: Sequence[int], text_rows: Sequence[int], image_rows: Sequence[int]) -> list[Context]:
        """The given rows (prompts; may repeat) of the three contexts, those of which there are any."""
        contexts = zip(
            (self.conditional, self.without_text, self.without_images), (rows, text_rows, image_rows), strict=True
        )
        return [_select(context, tuple(chosen)) for context, chosen in contexts if chosen]


def _select(context: Context, rows: tuple[int, ...]) -> Context:
    everything = tuple(range(len(context.next_position)))
    return context if rows == everything else context.select(rows)
