"""The two resize rules of Bagel: one for the VAE (latents), one for the vision tower.

transformers' own image processors resize to fixed sizes or by their own rules; none follows Bagel's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

if TYPE_CHECKING:
    from .configuration_bagel import BagelConfig

ImageLike = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]

OFFICIAL_MAX_PIXELS = 14 * 14 * 9 * 1024
OFFICIAL_LATENT_SIZE = {"max": 1024, "min": 512, "stride": 16, "max_pixels": OFFICIAL_MAX_PIXELS}
OFFICIAL_VISION_SIZE = {"max": 980, "min": 224, "stride": 14, "max_pixels": OFFICIAL_MAX_PIXELS}


class BagelImageProcessor(BaseImageProcessor):
    """Images -> pixels for the VAE and for the vision tower.

    Args:
        latent_size: the resize rule before the VAE: `max`, `min`, `stride` and `max_pixels`, see `resized_size`.
        vision_size: the same for the vision tower; its `stride` is the patch size.
        patch_size: side of a vision patch in pixels.
        image_mean: per channel, subtracted from pixels in [0, 1].
        image_std: per channel, divides after that.
    """

    model_input_names = ["pixel_values", "vision_grids"]

    def __init__(
        self,
        latent_size: dict[str, int] | None = None,
        vision_size: dict[str, int] | None = None,
        patch_size: int = 14,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        super().__init__(**kwargs)
        self.latent_size = _checked_size("latent_size", {**OFFICIAL_LATENT_SIZE, **(latent_size or {})})
        self.vision_size = _checked_size("vision_size", {**OFFICIAL_VISION_SIZE, **(vision_size or {})})
        self.patch_size = patch_size
        self.image_mean = list(image_mean or [0.5, 0.5, 0.5])
        self.image_std = list(image_std or [0.5, 0.5, 0.5])
        if self.vision_size["stride"] % patch_size:
            raise ValueError(f"vision_size['stride'] is {self.vision_size['stride']}, not a multiple of {patch_size=}")

    @classmethod
    def from_bagel_config(cls, config: BagelConfig) -> BagelImageProcessor:
        """The rules a model of these position tables can take; the published sizes for the published model."""
        latent_stride = config.latent_stride
        patch_size = int(config.vision_config.patch_size)  # type: ignore[union-attr]
        latent_max = config.max_latent_size * latent_stride
        vision_max = config.vit_max_num_patch_per_side * patch_size
        latent_min = _rounded_to(latent_max / 2, latent_stride)
        vision_min = _rounded_to(vision_max * 224 / 980, patch_size)
        return cls(
            latent_size={"max": latent_max, "min": latent_min, "stride": latent_stride},
            vision_size={"max": vision_max, "min": vision_min, "stride": patch_size},
            patch_size=patch_size,
        )

    def resize_for_latents(self, image: ImageLike) -> Image.Image:
        """The image as the VAE sees it, RGB; a second call changes nothing for all sizes met in practice."""
        return _resize(image, self.latent_size)

    def resize_for_vision(self, image: ImageLike) -> Image.Image:
        """The image as the vision tower sees it, RGB."""
        return _resize(image, self.vision_size)

    def latent_pixels(self, image: ImageLike) -> torch.Tensor:
        """(3, height, width) float32 in [-1, 1] for the VAE, resized by its rule."""
        return self._normalize(self.resize_for_latents(image))

    def vision_pixels(self, image: ImageLike) -> torch.Tensor:
        """(3, height, width) float32 in [-1, 1] for the vision tower, resized by its rule."""
        return self._normalize(self.resize_for_vision(image))

    def preprocess(self, images: ImageLike | list[ImageLike], **kwargs: Any) -> BatchFeature:
        """Vision pixels of one image or of a list: `pixel_values`, a list of (3, height, width) of their own sizes."""
        if kwargs:
            raise ValueError(f"{type(self).__name__} takes images only, got {sorted(kwargs)}")
        images = images if isinstance(images, list) else [images]
        return BatchFeature({"pixel_values": [self.vision_pixels(image) for image in images]})

    def pixels(self, image: ImageLike, height: int, width: int) -> torch.Tensor:
        """(3, height, width) float32 in [-1, 1], resized to this size whatever the rules say."""
        return self._normalize(to_rgb(image).resize((width, height), Image.Resampling.BICUBIC))

    def _normalize(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (3, height, width)
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


def resized_size(
    height: int, width: int, *, max: int, min: int, stride: int, max_pixels: int, num_images: int = 1
) -> tuple[int, int]:
    """Size (height, width) that the official code resizes an image to.

    The image is shrunk until its long side is `max`, or grown until its short side is `min` (growing wins), and both
    sides are rounded to `stride`. Over `max_pixels` (shared by `num_images`) the *sides* are scaled by the ratio of
    areas, without a square root: smaller than needed, kept because the model was trained so.

    Raises:
        ValueError: a side below one pixel.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels (height x width) has no content to resize")

    def scaled(scale: float) -> tuple[int, int]:
        return _rounded_to(round(height * scale), stride), _rounded_to(round(width * scale), stride)

    long_side, short_side = (height, width) if height > width else (width, height)
    shrink = max / long_side if long_side > max else 1.0
    grow = min / short_side
    height, width = scaled(grow if grow > shrink else shrink)
    pixels_allowed = max_pixels / num_images
    if height * width > pixels_allowed:
        height, width = scaled(pixels_allowed / (height * width))
    if height > max or width > max:
        height, width = scaled(max / (height if height > width else width))
    return height, width


def to_rgb(image: ImageLike) -> Image.Image:
    """Any accepted image as PIL RGB, upright; transparent pixels become white.

    Args:
        image: PIL, numpy (height, width[, channels]), torch ([channels, ]height, width), or a path. Arrays are uint8,
            or floats in [0, 1].

    Raises:
        ValueError: not an image, a file that does not decode, or values of another range.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _read(image)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a PIL image, an array, a tensor, or a path, got {type(image).__name__}")
    if image.mode[0] in "IF":
        raise ValueError(
            f"the image has mode {image.mode!r} (more than 8 bits a channel), which does not say what is white; scale "
            "it: of 16 bits, image=np.asarray(image) / 65535"
        )
    try:
        image = ImageOps.exif_transpose(image)  # cameras store photographs sideways with a note; viewers turn them
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL decodes late; a broken PNG raises SyntaxError
        name = getattr(image, "filename", "") or "the image"
        raise ValueError(f"{name} (mode {image.mode}) does not decode: {error}") from error


def _read(path: str | os.PathLike[str]) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise ValueError(f"there is no image at {os.fspath(path)!r}") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} does not decode as an image: {error}") from error


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    layout = "(height, width, channels)"
    if isinstance(array, torch.Tensor):
        layout = "(channels, height, width)"
        shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
        array = array.detach().float() if array.is_floating_point() else array  # numpy has no bfloat16
        array = array.movedim(0, -1).cpu().numpy() if array.ndim == 3 else array.cpu().numpy()
    else:
        shape, dtype = array.shape, str(array.dtype)
    if "float" in dtype and 0 <= array.min(initial=0) and array.max(initial=0) <= 1:  # not so for NaN
        array = (array * 255).round().astype(np.uint8)
    elif dtype != "uint8":
        raise ValueError(f"image arrays must be uint8 (0 to 255), or floats in [0, 1], got {dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"expected an image of shape {layout} with 1, 3 or 4 channels, got {shape}")
    return Image.fromarray(array)


def _resize(image: ImageLike, size: dict[str, int]) -> Image.Image:
    image = to_rgb(image)
    height, width = resized_size(image.height, image.width, **size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _rounded_to(value: float, stride: int) -> int:
    return max(stride, round(value / stride) * stride)  # half to even, as the official code


def _checked_size(name: str, size: dict[str, int]) -> dict[str, int]:
    unknown = sorted(set(size) - set(OFFICIAL_LATENT_SIZE))
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}; it takes {sorted(OFFICIAL_LATENT_SIZE)}")
    if not 0 < size["stride"] <= size["min"] <= size["max"] or size["max_pixels"] < size["stride"] ** 2:
        raise ValueError(f"{name} must have 0 < stride <= min <= max and max_pixels >= stride**2, got {size}")
    return size
