"""From prompts and references to images with Bagel or Echo-4o.

diffusers has no pipeline whose denoiser is also its text and image encoder; this one prefills the model's cache once
per prompt and lets the scheduler integrate the velocity that the model predicts from it.

Letters: B images, N latent tokens of the largest image, D values of a token.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..model.checkpoint import HUB_OPTIONS, load_components
from ..model.configuration_bagel import SPECIAL_TOKEN_IDS
from ..model.context import Context
from ..model.modeling_bagel import BagelForConditionalGeneration
from ..model.packing import Grid, Segment, patchify, real_tokens, unpatchify
from ..model.processing_bagel import BagelProcessor
from ..model.vae import encode_mean
from .arguments import (
    check_callback,
    check_choice,
    check_count,
    check_flag,
    check_generator,
    check_latents,
    read_callback,
)
from .caching import StepCacheMixin
from .contexts import PromptContexts
from .denoiser import Denoiser
from .guidance import read_guidance
from .lora import LoraMixin
from .memory import with_advice
from .prompts import THINKING_PROMPT, Item, count_positions, last_image, latent_grid, read_prompts

IMAGE_TYPES = ("pil", "np", "pt")
OUTPUT_TYPES = (*IMAGE_TYPES, "latent")
UPDATES_PER_CHECK = 8  # reading a device's memory waits for all that it still computes
PARTS = ("model", "vae", "scheduler", "processor")
# Casting a VAE, diffusers warns of its layers that have to stay in float32, even of none.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "kept in float32: []" not in record.getMessage()
)


@dataclass
class Echo4oPipelineOutput(BaseOutput):
    """What `Echo4oPipeline` returns.

    Attributes:
        images: "pil": a list; "np" (B, height, width, 3) and "pt" (B, 3, height, width) in [0, 1], a list if sizes
            differ; "latent" (B, N, D), padded with zeros if sizes differ, which `decode_latents` makes images of.
        texts: with thinking, the plan of each image.
    """

    images: list[Image.Image] | list[np.ndarray] | list[Tensor] | np.ndarray | Tensor
    texts: list[str] | None


class Echo4oPipeline(LoraMixin, StepCacheMixin, DiffusionPipeline):
    """Text-to-image, references, editing and thinking.

    Args:
        model: predicts velocities, and reads and writes text.
        vae: between pixels and latents.
        scheduler: the official schedule is `shift=3.0`.
        processor: tokenizer and resize rules.

    Raises:
        ValueError: the VAE's latents or the processor's special tokens are not those of the model, or another
            scheduler.
    """

    model_cpu_offload_seq = "model->vae"
    _callback_tensor_inputs = ["latents"]

    model: BagelForConditionalGeneration
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler
    processor: BagelProcessor

    def __init__(
        self,
        model: BagelForConditionalGeneration,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        processor: BagelProcessor,
    ) -> None:
        """See the class."""
        super().__init__()
        self._interrupt = False
        self.register_modules(model=model, vae=vae, scheduler=scheduler, processor=processor)
        config = model.config
        of_vae = (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
        if of_vae != (config.latent_channels, config.latent_downsample):
            raise ValueError(
                f"the VAE has {of_vae[0]} latent channels and {of_vae[1]} pixels a latent, but the model expects "
                f"{config.latent_channels} and {config.latent_downsample}"
            )
        if not 0 < vae.config.scaling_factor < math.inf:
            raise ValueError(f"the VAE's scaling_factor must be positive, got {vae.config.scaling_factor}")
        of_processor = {name: getattr(processor, name) for name in SPECIAL_TOKEN_IDS}
        of_model = {name: getattr(config, name) for name in SPECIAL_TOKEN_IDS}
        if of_processor != of_model:
            raise ValueError(f"the processor has {of_processor}, but the model {of_model}: they do not go together")
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"the scheduler must be diffusers' FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}"
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        device_map: Any = None,
        max_memory: dict[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> Echo4oPipeline:
        """Loads our layout or the official one, from a folder, the Hub or a bundled name.

        Args:
            pretrained_model_name_or_path: folder, Hub name, "echo4o-miniature" or "bagel-miniature".
            dtype: of model and VAE; None keeps those of the files. diffusers' older `torch_dtype` is taken too.
            revision: branch, tag or commit on the Hub.
            subfolder: where the checkpoint is inside.
            device_map: where the model goes, as in transformers.
            max_memory: for `device_map="auto"`, as in transformers: {0: "20GiB", "cpu": "64GiB"}.
            offload_folder: for parts that `device_map` puts on "disk".
            quantization_config: transformers' for the model, or diffusers' `PipelineQuantizationConfig`.
            attn_implementation: as in `set_attention_backend`.
            **options: parts that are there already (`model`, `vae`, `scheduler`, `processor`); of the Hub,
                `cache_dir`, `token`, `local_files_only`, `force_download`; diffusers' `use_safetensors=True`, which
                is so anyway.

        Raises:
            OSError: files are missing or damaged, or there is no network.
            ValueError: files that do not fit each other, or an unknown attention.
            ImportError: a package for the attention or the quantization is missing.
        """
        dtype = options.pop("torch_dtype", dtype)
        given = {name: options.pop(name) for name in PARTS if name in options}
        if options.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False: weights are read from safetensors files only")
        unknown = sorted(set(options) - set(HUB_OPTIONS))
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained does not take {', '.join(unknown)}")
        components = load_components(
            pretrained_model_name_or_path,
            dtype=dtype,
            revision=revision,
            subfolder=subfolder,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            quantization_config=quantization_config,
            attn_implementation=attn_implementation,
            given=given,
            **options,
        )
        return cls(**components)

    @with_advice
    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        return super().to(*args, **kwargs)

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention of the model: "sdpa", "eager", "flex_attention", "flash_attention_2" ....

        The same as `pipe.model.set_attn_implementation`.

        Raises:
            ValueError: there is no such attention.
            ImportError: its package is missing.
        """
        self.model.set_attn_implementation(backend)

    def compile(self, **options: Any) -> None:
        """Compile the layers that denoise images, with `torch.compile`.

        One graph serves all layers, all updates and prompts of any length. The second number of images, or size,
        makes one for all numbers or sizes; references, updates without guidance, another dtype, attention or adapter
        make their own. Texts and references are still read, and texts written, uncompiled.

        Args:
            **options: of `torch.compile`.
        """
        for layer in self.model.language_model.model.layers:
            layer.compile(**{"recompile_limit": 64, **options})

    @with_advice
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | Image.Image | Sequence[str | Image.Image]],
        image: Image.Image | list[Image.Image] | list[list[Image.Image]] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 49,
        guidance_scale: float = 4.0,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_renorm: str | None = None,
        guidance_renorm_min: float = 0.0,
        thinking: bool = False,
        max_think_tokens: int = 1000,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ["latents"],  # noqa: B006 (diffusers' convention)
        return_dict: bool = True,
    ) -> Echo4oPipelineOutput | tuple[Any, ...]:
        """Draw images.

        Args:
            prompt: a text, or one per image; a list that mixes texts and images is one prompt, a list of such lists
                several.
            image: references: one, a list for a single prompt, or one list per prompt. They come before the text.
            height: pixels, a multiple of `config.latent_stride`; by default that of the last reference after
                resizing, or the largest that the model draws.
            width: likewise.
            num_inference_steps: updates (the official `num_timesteps` counts one more), at most the scheduler's
                `num_train_timesteps`.
            guidance_scale: by text; 1 or less turns all guidance off.
            image_guidance_scale: by references; None is 2.0 with references, 1.0 without.
            guidance_interval: timesteps at which guidance acts, open below and closed above; None is (0.0, 1.0) with
                references, (0.4, 1.0) without.
            guidance_renorm: "global", "channel" or "text_channel" (see `Guidance`); None is "text_channel" with
                references, "global" without.
            guidance_renorm_min: the guided velocity is not shrunk by a smaller factor.
            thinking: let the model write a plan first, which the image then follows.
            max_think_tokens: tokens of the plan at most, or as many as the model has positions left.
            num_images_per_prompt: images of each prompt, in a row in the output.
            generator: of the noise; one, or one per image.
            latents: initial noise (B, N, D), tokens row by row; shorter images padded at the end.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called with pipeline, step, timestep and tensors; may return changed ones, and stop
                after this update with `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: names of those tensors: "latents".
            return_dict: False for a tuple (images, texts).

        Raises:
            ValueError: prompts, references, sizes or settings that cannot work, or numbers that are not finite.
            torch.OutOfMemoryError: a note on it says what needs less.
        """
        # 1. Check the inputs.
        self._interrupt = False
        for name, flag in (("thinking", thinking), ("return_dict", return_dict)):
            check_flag(name, flag)
        check_count("num_images_per_prompt", num_images_per_prompt)
        if thinking:
            check_count("max_think_tokens", max_think_tokens, advice=" with thinking=True")
        prompts = read_prompts(prompt, image, self.processor.image_processor.resize_for_latents)
        grids = [
            latent_grid(last_image(items), height, width, self.model.config)
            for items in prompts
            for _ in range(num_images_per_prompt)
        ]
        settings = (guidance_scale, image_guidance_scale, guidance_interval, guidance_renorm, guidance_renorm_min)
        guidances = [read_guidance(last_image(items) is not None, *settings) for items in prompts]
        self.check_inputs(
            prompts,
            grids,
            num_inference_steps,
            thinking,
            generator,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 2. Read references and prompts, once each.
        contexts = self.encode_contexts(prompts, max_think_tokens if thinking else None)

        # 3. Draw the noise.
        latents = self.prepare_latents(grids, generator, latents)

        # 4. Set the timesteps.
        timesteps = self.prepare_timesteps(num_inference_steps)

        # 5. Integrate the velocity from noise to data.
        owners = [index // num_images_per_prompt for index in range(len(grids))]  # the prompt of each image
        denoiser = Denoiser(self.model, contexts, owners, grids, guidances, self._new_step_cache())
        finite_until = torch.zeros(len(grids), dtype=torch.long, device=latents.device)
        steps_done = 0
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                velocity = denoiser(latents, self.scheduler.sigmas[step])
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = read_callback(callback_on_step_end(self, step, timestep, tensors), latents)
                finite_until += (finite_until == steps_done) & latents.isfinite().all(dim=2).all(dim=1)
                steps_done += 1
                progress_bar.update()
                if steps_done % UPDATES_PER_CHECK == 0:
                    self.check_finite(finite_until.tolist(), steps_done)
        self.check_finite(finite_until.tolist(), steps_done)

        # 6. Decode.
        stride = self.model.config.latent_stride
        heights, widths = ([side * stride for side in sides] for sides in zip(*grids, strict=True))
        images = latents if output_type == "latent" else self.decode_latents(latents, heights, widths, output_type)
        texts = None if contexts.plans is None else [contexts.plans[owner] for owner in owners]
        self.maybe_free_model_hooks()
        return Echo4oPipelineOutput(images=images, texts=texts) if return_dict else (images, texts)

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs shall make no further updates."""
        return self._interrupt

    def check_finite(self, finite_until: list[int], steps_done: int) -> None:
        """Raise a ValueError if an image's latents were finite after fewer updates than were made."""
        for index, count in enumerate(finite_until):
            if count < steps_done:
                raise ValueError(
                    f"the latents of image {index} are NaN or infinite from update {count + 1} of {steps_done} on: "
                    f"the weights are, or {self.model.dtype} overflows; check the checkpoint, or load it with "
                    "dtype=torch.bfloat16 or torch.float32"
                )

    def check_inputs(
        self,
        prompts: list[list[Item]],
        grids: list[Grid],
        num_inference_steps: int,
        thinking: bool,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback: Callable[..., Any] | None,
        tensor_inputs: Sequence[str],
    ) -> None:
        """Refuse what cannot work before anything is computed.

        Raises:
            ValueError: with the value seen and what to do.
        """
        check_count("num_inference_steps", num_inference_steps, self.scheduler.config.num_train_timesteps)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_callback(callback, tensor_inputs, self._callback_tensor_inputs)
        check_generator(generator, len(grids))
        most_tokens = max(rows * columns for rows, columns in grids)
        check_latents(latents, (len(grids), most_tokens, self.model.config.latent_dim))
        for index, left in enumerate(self.positions_left(prompts, thinking)):
            if left < (1 if thinking else 0):
                limit = self.model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
                num_references = sum(not isinstance(item, str) for item in prompts[index])
                plan = ", and a plan" if thinking else ""
                raise ValueError(
                    f"prompt {index} needs {limit - left} positions, of them {2 * num_references} for references"
                    f"{plan}; the model has {limit}: shorten it"
                )

    def positions_left(self, prompts: list[list[Item]], thinking: bool) -> list[int]:
        """Of each prompt and its image, how many of the model's positions are free for a plan."""
        limit: int = self.model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
        return [limit - count_positions(items, self.processor, thinking) for items in prompts]

    @with_advice
    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> Segment:
        """Clean latents of a reference.

        The posterior's mean: the official sample would tie the image to how often the generator was used before.
        """
        config = self.model.config
        pixels = self.processor.image_processor.latent_pixels(image)[None]  # (1, 3, height, width)
        latents = encode_mean(self.vae, pixels.to(self._execution_device))[0]  # (z, h, w)
        return Segment(
            role="latents",
            input_ids=[self.processor.start_of_image_token_id, self.processor.end_of_image_token_id],
            latents=patchify(latents, config.latent_patch_size),
            grid=(latents.shape[1] // config.latent_patch_size, latents.shape[2] // config.latent_patch_size),
        )

    def encode_item(self, item: Item) -> list[Segment]:
        """A text is one segment, a reference two: its latents, then its vision patches."""
        if isinstance(item, str):
            return [self.processor.text_segment(item)]
        # The image is resized already, which the official code does before both transforms.
        return [self.encode_image(item), self.processor.vision_segment(item, from_original=True)]

    def encode_written(self, text: str, most_tokens: int) -> Segment:
        """What the model wrote as a text of its own, which may have more tokens than it wrote: all beyond are cut."""
        ids = self.processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:most_tokens]
        return Segment(role="text", input_ids=[self.processor.bos_token_id, *ids, self.processor.eos_token_id])

    @torch.no_grad()
    def encode_contexts(self, prompts: list[list[Item]], max_think_tokens: int | None = None) -> PromptContexts:
        """Prefill the three contexts of all prompts (official `InterleaveInferencer`).

        Args:
            prompts: as `read_prompts` makes them.
            max_think_tokens: let the model write a plan of so many tokens at most.
        """
        thinking = max_think_tokens is not None
        lead = [THINKING_PROMPT] if thinking else []
        samples = [[segment for item in [*lead, *items] for segment in self.encode_item(item)] for items in prompts]
        # Guidance by text compares with what comes before a last text, guidance by images with the texts alone.
        before_text = [sample[:-1] if sample[-1].role == "text" else sample for sample in samples]
        last_text = [sample[len(before) :] for sample, before in zip(samples, before_text, strict=True)]
        all_texts = [[segment for segment in sample if segment.role == "text"] for sample in samples]
        has_images = [len(texts) < len(sample) for texts, sample in zip(all_texts, samples, strict=True)]

        empty = Context.empty(len(samples), self._execution_device)
        without_text = self.prefill(empty.copy(), before_text)
        conditional = self.prefill(without_text.copy(), last_text)
        without_images = self.prefill(empty, all_texts) if any(has_images) else conditional.copy()

        plans = [""] * len(samples)
        if max_think_tokens is not None:
            left = self.positions_left(prompts, thinking)
            written = self.think(conditional, [min(max_think_tokens, most) for most in left])
            plans = [text.strip() for text in written]
            segments = [
                [self.encode_written(text, most)] if plan else []
                for text, most, plan in zip(written, left, plans, strict=True)
            ]
            conditional = self.prefill(conditional, segments)
        return PromptContexts(
            conditional,
            without_text,
            without_images,
            text_differs=[bool(text or plan) for text, plan in zip(last_text, plans, strict=True)],
            images_differ=[images or bool(plan) for images, plan in zip(has_images, plans, strict=True)],
            plans=plans if thinking else None,
        )

    def prefill(self, context: Context, samples: list[list[Segment]]) -> Context:
        """Append the segments of each sample to its row of the context."""
        for segments in zip_longest(*samples):
            context = self.model.prefill(context, segments)
        return context

    def think(self, context: Context, max_tokens: Sequence[int]) -> list[str]:
        """What the model writes after each row of the context, without sampling, until interrupted."""
        end = self.processor.eos_token_id
        limits = torch.tensor(max_tokens, device=context.attention_mask.device)
        before = len(context) + 1  # `generate` counts the cached tokens, and the [bos] that the plan begins with

        def is_done(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return (ids.shape[1] - before >= limits) | self.interrupt

        ids = self.model.generate_from(
            context,
            max(max_tokens),
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            stopping_criteria=[is_done],
        )
        plans: list[str] = self.processor.batch_decode(ids, skip_special_tokens=True)
        return plans

    def prepare_latents(
        self, grids: list[Grid], generator: torch.Generator | Sequence[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Noise (B, N, D) in float32, drawn image by image and in the order of tokens, as the official code does."""
        if latents is None:
            generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(grids)
            noise = [
                torch.randn(
                    rows * columns,
                    self.model.config.latent_dim,
                    generator=one,
                    device="cpu" if one is None else one.device,
                ).to(self._execution_device)
                for (rows, columns), one in zip(grids, generators, strict=True)
            ]
            return torch.nn.utils.rnn.pad_sequence(noise, batch_first=True)
        latents = latents.to(self._execution_device, torch.float32)
        lengths = torch.tensor([rows * columns for rows, columns in grids], device=latents.device)
        return latents.masked_fill(~real_tokens(lengths, latents.shape[1])[..., None], 0)

    def prepare_timesteps(self, num_inference_steps: int) -> Tensor:
        """The scheduler's timesteps, kept on the CPU so that no step waits for the device: (steps,)."""
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1])
        self.scheduler.set_begin_index(0)
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    @with_advice
    @torch.no_grad()
    def decode_latents(
        self,
        latents: Tensor,
        height: int | list[int] | None = None,
        width: int | list[int] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Images from what `output_type="latent"` gives, one by one to save memory; see `Echo4oPipelineOutput`.

        Args:
            latents: (B, N, D).
            height: pixels, as in the call; a list if the images have heights of their own.
            width: likewise.
            output_type: "pil", "np" or "pt".

        Raises:
            ValueError: sizes that the latents do not have, or images that are not finite.
        """
        check_choice("output_type", output_type, IMAGE_TYPES)
        config, vae, vae_dtype = self.model.config, self.vae.config, self.vae.dtype
        heights, widths = (side if isinstance(side, list) else [side] * len(latents) for side in (height, width))
        grids = [latent_grid(None, *size, config) for size in zip(heights, widths, strict=True)]
        check_latents(latents, (len(grids), max(map(math.prod, grids)), config.latent_dim))
        images = []
        for index, (tokens, (rows, columns)) in enumerate(zip(latents, grids, strict=True)):
            tokens = tokens[: rows * columns]
            x = unpatchify(tokens, (rows, columns), config.latent_patch_size, config.latent_channels)  # (z, h, w)
            x = x / vae.scaling_factor + (vae.shift_factor or 0.0)
            image = self.vae.decode(x[None].to(self._execution_device, vae_dtype), return_dict=False)[0][0].float()
            if not image.isfinite().all():
                raise ValueError(
                    f"image {index} out of the VAE holds NaN or infinite values: its weights do, or {vae_dtype} "
                    "overflows; check the checkpoint, or load it with dtype=torch.bfloat16 or torch.float32"
                )
            image = (image * 0.5 + 0.5).clamp(0, 1)  # (3, height, width)
            images.append(image)
        if output_type == "pt":
            return torch.stack(images) if len(set(grids)) == 1 else images
        arrays = [image.permute(1, 2, 0).cpu().numpy() for image in images]
        if output_type == "np":
            return np.stack(arrays) if len(set(grids)) == 1 else arrays
        return [Image.fromarray((array * 255).astype(np.uint8)) for array in arrays]  # cut, as the official code does
