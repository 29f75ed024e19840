"""Training examples of the shapes world as segments: drawing from a text, from pictures, and describing a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from echo4o_hf.miniature.captions import corrupt, sample_item, scene_for
from echo4o_hf.miniature.dataset import draw_multi_reference, draw_surreal
from echo4o_hf.miniature.world import render
from echo4o_hf.model.packing import IGNORE, Segment, patchify
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.model.vae import encode_mean

Task = Literal["text", "references", "describe"]
QUESTION = "Describe the picture."
DROPOUT = {"text": 0.1, "latents": 0.3, "vision": 0.3}  # of conditions, as the official trainer has it
_ENCODE_BATCH = 250
_SURREAL_SHARE = 0.15


@dataclass
class Example:
    """One picture with its text, and the pictures that it was made from."""

    text: str
    picture: Image.Image
    references: tuple[Image.Image, ...] = ()
    latents: Tensor | None = None
    reference_latents: tuple[Tensor, ...] = ()


def draw_examples(task: Task, count: int, seed: int, noisy: bool = False) -> list[Example]:
    """Draw pictures with their texts.

    Args:
        task: "text" and "describe": a caption and its picture; "references": pictures put together.
        count: Number of examples.
        seed: The same arguments give the same examples.
        noisy: Whether attributes of the captions are wrong or missing; only clean data holds surreal pictures.
    """
    rng = np.random.default_rng([seed, ("text", "references", "describe").index(task)])
    examples = []
    for _ in range(count):
        if task == "references":
            sample = draw_multi_reference(rng)
            references = tuple(render(scene, rng) for scene in sample.references)
            examples.append(Example(sample.instruction, render(sample.scene, rng), references))
        elif task == "text" and not noisy and rng.random() < _SURREAL_SHARE:
            sample = draw_surreal(rng)
            examples.append(Example(sample.instruction, render(sample.scene, rng)))
        else:
            item = sample_item(rng)
            text = corrupt(item, rng) if noisy else item.prompt
            examples.append(Example(text, render(scene_for(item, rng), rng)))
    return examples


@torch.no_grad()
def add_latents(examples: list[Example], vae: AutoencoderKL, processor: BagelProcessor, patch_size: int) -> None:
    """Encode every picture once: the posterior's mean as tokens (rows * columns, latent_dim)."""
    pictures = [picture for example in examples for picture in (example.picture, *example.references)]
    tokens: list[Tensor] = []
    for start in range(0, len(pictures), _ENCODE_BATCH):
        pixels = [
            processor.image_processor.latent_pixels(picture) for picture in pictures[start : start + _ENCODE_BATCH]
        ]
        tokens += patchify(encode_mean(vae, torch.stack(pixels)), patch_size).unbind()
    each = iter(tokens)
    for example in examples:
        example.latents = next(each)
        example.reference_latents = tuple(next(each) for _ in example.references)


class Examples:
    """Examples of all tasks, and the batches that they give."""

    def __init__(self, tasks: dict[Task, list[Example]], processor: BagelProcessor, grid: tuple[int, int]) -> None:
        self.tasks = tasks
        self.processor = processor
        self.grid = grid
        self._ids: dict[str, list[int]] = {}

    def batch(self, task: Task, size: int, noise_draws: int, rng: np.random.Generator) -> list[list[Segment]]:
        """Samples of one task; each picture to draw is a target `noise_draws` times, which share their context."""
        pool = self.tasks[task]
        chosen = [pool[int(index)] for index in rng.integers(len(pool), size=size)]
        if task == "describe":
            return [self._describe(example) for example in chosen]
        return [[*self._conditions(example, rng), *self._targets(example, noise_draws)] for example in chosen]

    def _conditions(self, example: Example, rng: np.random.Generator) -> Iterator[Segment]:
        markers = [self.processor.start_of_image_token_id, self.processor.end_of_image_token_id]
        for picture, latents in zip(example.references, example.reference_latents, strict=True):
            pair = (
                Segment("latents", markers, latents=latents, grid=self.grid),
                self.processor.vision_segment(picture),
            )
            for segment in pair:  # a dropped image keeps its rope position, a dropped text does not
                dropped = rng.random() < DROPOUT[segment.role]
                yield Segment("text", [], advance=1) if dropped else segment
        if rng.random() >= DROPOUT["text"]:
            yield self._text(example.text)

    def _targets(self, example: Example, noise_draws: int) -> list[Segment]:
        markers = [self.processor.start_of_image_token_id, self.processor.end_of_image_token_id]
        return [Segment("target", markers, latents=example.latents, grid=self.grid)] * noise_draws

    def _describe(self, example: Example) -> list[Segment]:
        answer = self._text(example.text)
        answer.labels = [*answer.input_ids[1:], IGNORE]
        return [self.processor.vision_segment(example.picture), self._text(QUESTION), answer]

    def _text(self, text: str) -> Segment:
        if text not in self._ids:
            self._ids[text] = self.processor.text_segment(text).input_ids
        return Segment("text", self._ids[text])
