"""Rows of a dataset -> samples: segments, pictures for the VAE, and everything random about them.

A row is a mapping with `id` (str), `instruction` (str), `input_images` (a list, maybe empty), `output_image` and
`answer` (str), of which exactly one is not None. Images are as `datasets.Image(decode=False)` gives them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..model.configuration_bagel import BagelConfig
from ..model.image_processing_bagel import resized_size
from ..model.packing import IGNORE, Grid, Role, Segment, patchify
from ..model.processing_bagel import BagelProcessor
from .pictures import EncodedPicture, SampleError
from .sizes import Sizes, bucket_grids, count_tokens, fit_grids, nearest_bucket, training_sizes

if TYPE_CHECKING:
    from .latents import LatentStore

__all__ = ["OversizeError", "Picture", "Sample", "SampleBuilder", "SampleError", "Sizes", "training_sizes"]

Row = Mapping[str, Any]
Oversize = Literal["downscale", "skip", "error"]
MARKERS = 2  # tokens around an image


class OversizeError(SampleError):
    """A row that does not fit the budget of tokens."""


@dataclass
class Picture:
    """A picture for the VAE.

    Attributes:
        key: sha256 of its file and the size, "c" after it if it is cropped to that.
        grid: rows and columns of its latent tokens.
        start: its first token in the generation stream of the pack.
        pixels: (3, height, width) in [-1, 1]; None if the store has its moments.
        eps: (z, h, w), standard normal, for a sample of the posterior; None for the mean.
        moments: (2z, h, w) from the store.
    """

    key: str
    grid: Grid
    start: int = 0
    pixels: Tensor | None = None
    eps: Tensor | None = None
    moments: Tensor | None = None


@dataclass
class Sample:
    """What the model trains on.

    Attributes:
        id: of the row.
        segments: in the official order; latents are zeros where `Picture.moments` is None.
        pictures: one per segment with latents, in order.
        noise: (tokens, latent_dim) likewise; zeros for clean ones.
        timesteps: likewise, in [0, 1]; 0 for clean ones.
    """

    id: str
    segments: list[Segment]
    pictures: list[Picture] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)


@dataclass
class _Plan:
    """A row before anything is decoded: its texts, its pictures, and the grid of each use of a picture."""

    id: str
    texts: list[Segment]
    references: list[EncodedPicture]
    target: EncodedPicture | None
    grids: list[Grid] = field(default_factory=list)  # latents, vision per reference, target; or vision per picture

    @property
    def num_tokens(self) -> int:
        text_tokens = sum(len(segment.input_ids) for segment in self.texts)
        return text_tokens + MARKERS * len(self.grids) + count_tokens(self.grids)


class SampleBuilder:
    """Makes samples of rows, with everything random drawn from (seed, epoch, id) alone.

    Drawing, in the official order: of each reference its latents, then its vision patches from the original picture;
    the text; the target. A dropped image keeps its rope position, a dropped text does not. Answering: the pictures,
    the question, the answer, which alone has labels; nothing is dropped.

    Args:
        processor: of the model.
        config: of the model.
        vae_config: of the `AutoencoderKL`.
        sizes: see `training_sizes`.
        max_tokens: budget of one sample, understanding and generation together.
        oversize: a row over the budget: "downscale" shrinks its pictures by the rule of `fit_grids` (for questions, by
            one factor); "skip" and "error" raise `OversizeError`, as "downscale" does for a text that is too long.
        text_dropout: chance that the text of a drawing is dropped.
        vae_dropout: chance for the latents of each reference.
        vit_dropout: chance for the vision patches of each reference.
        timestep_shift: of the timesteps drawn; None takes the config's.
        sample_posterior: whether latents are a sample of the VAE's posterior, or its mean.
        aspect_ratio_buckets: targets are cropped to the nearest of `bucket_grids`.
        seed: of everything random.
        store: moments that are in it are not encoded again, nor their pictures decoded.

    Raises:
        ValueError: an unknown `oversize`, a chance outside [0, 1], a budget or shift that is not positive.
    """

    def __init__(
        self,
        processor: BagelProcessor,
        config: BagelConfig,
        vae_config: Mapping[str, Any],
        *,
        sizes: Sizes,
        max_tokens: int,
        oversize: Oversize = "downscale",
        text_dropout: float = 0.1,
        vae_dropout: float = 0.3,
        vit_dropout: float = 0.3,
        timestep_shift: float | None = None,
        sample_posterior: bool = True,
        aspect_ratio_buckets: bool = False,
        seed: int = 0,
        store: LatentStore | None = None,
    ) -> None:
        """See the class."""
        chances = {"text_dropout": text_dropout, "vae_dropout": vae_dropout, "vit_dropout": vit_dropout}
        wrong = {name: chance for name, chance in chances.items() if not 0 <= chance <= 1}
        if wrong:
            raise ValueError(f"chances of dropping must be between 0 and 1, got {wrong}")
        if oversize not in get_args(Oversize):
            raise ValueError(f"oversize={oversize!r} must be one of {', '.join(get_args(Oversize))}")
        shift = config.timestep_shift if timestep_shift is None else timestep_shift
        if max_tokens < 1 or shift <= 0:
            raise ValueError(f"{max_tokens=} and timestep_shift={shift} must be positive")
        self.processor, self.config, self.vae_config, self.sizes = processor, config, dict(vae_config), sizes
        self.max_tokens, self.oversize = max_tokens, oversize
        self.text_dropout, self.vae_dropout, self.vit_dropout = text_dropout, vae_dropout, vit_dropout
        self.timestep_shift, self.sample_posterior = shift, sample_posterior
        self.seed, self.store = seed, store
        self.markers = [processor.start_of_image_token_id, processor.end_of_image_token_id]
        self._buckets: list[Grid] = []
        if aspect_ratio_buckets:
            self._buckets = bucket_grids(sizes.target["max"] // sizes.target["stride"], config.max_latent_size)

    def num_tokens(self, row: Row) -> int:
        """Tokens of the sample when nothing is dropped; pictures are read as far as their headers.

        Raises:
            SampleError: a row that cannot be used.
            OversizeError: a row that does not fit.
        """
        return self._plan(row, upright=False).num_tokens  # all rules treat both sides alike

    def build(self, row: Row, epoch: int) -> Sample:
        """The sample of a row in an epoch.

        Raises:
            SampleError: a row that cannot be used.
            OversizeError: a row that does not fit.
        """
        plan = self._plan(row, upright=True)
        if plan.target is not None:
            return self._drawing(plan, plan.target, epoch)
        vision = [self._vision(picture, grid) for picture, grid in zip(plan.references, plan.grids, strict=True)]
        return Sample(plan.id, [*vision, *plan.texts])

    def pictures(self, row: Row) -> list[Picture]:
        """All pictures of a row for the VAE, to be encoded ahead: without noise, decoded where the store lacks them.

        Raises:
            SampleError: a row that cannot be used.
            OversizeError: a row that does not fit.
        """
        plan = self._plan(row, upright=True)
        if plan.target is None:
            return []
        references = zip(plan.references, plan.grids[:-1:2], strict=True)
        pictures = [self._picture(picture, grid) for picture, grid in references]
        return [*pictures, self._picture(plan.target, plan.grids[-1], cropped=bool(self._buckets))]

    def _plan(self, row: Row, upright: bool) -> _Plan:
        id, answer, output_image = row["id"], row["answer"], row["output_image"]
        if (answer is None) == (output_image is None):
            raise SampleError(id, "must have an output_image or an answer" + ("" if answer is None else ", not both"))
        images = row["input_images"] or []
        references = [EncodedPicture(id, f"input_images[{index}]", image) for index, image in enumerate(images)]
        texts = [self._text(id, "instruction", row["instruction"])]
        if answer is None:
            plan = _Plan(id, texts, references, EncodedPicture(id, "output_image", output_image))
        else:
            texts.append(self._text(id, "answer", answer))
            texts[1].labels = [*texts[1].input_ids[1:], IGNORE]
            plan = _Plan(id, texts, references, None)
        plan.grids = self._grids(plan, upright)
        if plan.num_tokens > self.max_tokens:
            self._fit(plan)
        return plan

    def _text(self, id: str, name: str, text: Any) -> Segment:
        try:
            return self.processor.text_segment(text)
        except ValueError as error:
            raise SampleError(id, f"{name}: {error}") from error

    def _grids(self, plan: _Plan, upright: bool) -> list[Grid]:
        def grid(picture: EncodedPicture, rule: dict[str, int], num_images: int = 1) -> Grid:
            size = picture.size if upright else picture.header_size
            height, width = resized_size(*size, **rule, num_images=num_images)
            return height // rule["stride"], width // rule["stride"]

        if plan.target is None:  # the official training shares the pixels of a question between its pictures
            return [grid(picture, self.sizes.question, len(plan.references)) for picture in plan.references]
        rules = (self.sizes.reference, self.sizes.vision)
        grids = [grid(picture, rule) for picture in plan.references for rule in rules]
        if self._buckets:
            size = plan.target.size if upright else plan.target.header_size
            return [*grids, nearest_bucket(self._buckets, *size)]
        return [*grids, grid(plan.target, self.sizes.target)]

    def _fit(self, plan: _Plan) -> None:
        """Shrink the grids of a plan that is over the budget."""
        if self.oversize != "downscale":
            raise OversizeError(
                plan.id,
                f"{plan.num_tokens} tokens are more than max_tokens={self.max_tokens}: raise it, lower image_size, "
                "reference_size or vision_size, or set oversize='downscale'",
            )
        fixed = plan.num_tokens - count_tokens(plan.grids)
        split = 0 if plan.target is None else len(plan.grids) - 1
        fitted = fit_grids(plan.grids[:split], plan.grids[split:], self.max_tokens - fixed)
        if fitted is None:
            raise OversizeError(
                plan.id,
                f"texts and image markers alone take {fixed} of max_tokens={self.max_tokens} tokens, which leaves no "
                f"room for {len(plan.grids)} images: raise it or shorten the text",
            )
        plan.grids = fitted

    def _drawing(self, plan: _Plan, target: EncodedPicture, epoch: int) -> Sample:
        # All is drawn whether it is used or not: a chance or a store changes nothing else of the sample.
        generator = self._generator(plan.id, epoch)
        drops = iter(torch.rand(2 * len(plan.references) + 1, generator=generator).tolist())
        grids = iter(plan.grids)
        sample = Sample(plan.id, [])
        for reference in plan.references:
            latents_grid, vision_grid = next(grids), next(grids)
            eps = self._eps(latents_grid, generator)
            if next(drops) < self.vae_dropout:
                sample.segments.append(Segment("text", [], advance=1))
            else:
                self._add_latents(sample, "latents", self._picture(reference, latents_grid, eps))
            dropped = next(drops) < self.vit_dropout
            sample.segments.append(Segment("text", [], advance=1) if dropped else self._vision(reference, vision_grid))
        if next(drops) >= self.text_dropout:
            sample.segments += plan.texts
        grid = next(grids)
        picture = self._picture(target, grid, self._eps(grid, generator), cropped=bool(self._buckets))
        timestep = torch.randn((), generator=generator).sigmoid()
        timestep = self.timestep_shift * timestep / (1 + (self.timestep_shift - 1) * timestep)
        noise = torch.randn(count_tokens([grid]), self.config.latent_dim, generator=generator)
        self._add_latents(sample, "target", picture, noise, timestep.item())
        return sample

    def _generator(self, id: str, epoch: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed} {epoch} {id}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def _eps(self, grid: Grid, generator: torch.Generator) -> Tensor | None:
        rows, columns = (side * self.config.latent_patch_size for side in grid)
        eps = torch.randn(self.config.latent_channels, rows, columns, generator=generator)
        return eps if self.sample_posterior else None

    def _picture(
        self, encoded: EncodedPicture, grid: Grid, eps: Tensor | None = None, cropped: bool = False
    ) -> Picture:
        height, width = (side * self.config.latent_stride for side in grid)
        picture = Picture(f"{encoded.sha256}-{height}x{width}{'c' if cropped else ''}", grid, eps=eps)
        if self.store is not None:
            picture.moments = self.store.get(picture.key)
        if picture.moments is None:
            picture.pixels = self._pixels(encoded, height, width, cropped)
        return picture

    def _pixels(self, encoded: EncodedPicture, height: int, width: int, cropped: bool = False) -> Tensor:
        image = encoded.image
        if cropped:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return self.processor.image_processor.pixels(image, height, width)

    def _vision(self, encoded: EncodedPicture, grid: Grid) -> Segment:
        patch_size = self.processor.image_processor.patch_size
        pixels = self._pixels(encoded, grid[0] * patch_size, grid[1] * patch_size)
        return Segment("vision", self.markers, patches=patchify(pixels, patch_size), grid=grid)

    def _add_latents(
        self, sample: Sample, role: Role, picture: Picture, noise: Tensor | None = None, timestep: float = 0.0
    ) -> None:
        shape = count_tokens([picture.grid]), self.config.latent_dim
        latents = torch.zeros(shape)
        if picture.moments is not None:
            from .latents import latents_from_moments  # brings diffusers

            latents = latents_from_moments(
                picture.moments, picture.eps, self.vae_config, self.config.latent_patch_size
            )
        sample.segments.append(Segment(role, self.markers, latents=latents, grid=picture.grid))
        sample.pictures.append(picture)
        sample.noise.append(torch.zeros(shape) if noise is None else noise)
        sample.timesteps.append(timestep)
