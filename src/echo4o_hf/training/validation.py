"""Validation while training: the same prompts from the same noise, as a grid of pictures, and a benchmark's score.

In `output_dir/validation`:
    step-100.png            the pictures of `validation_prompts`, each above its prompt
    step-100/17_0.png       the pictures of `validation_benchmark`, named as `echo4o generate` names them
    step-100/results.json   their scores, as `echo4o evaluate` writes them: `echo4o report` makes a page of it
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..benchmarks import geneval_pp
from ..benchmarks.evaluation import BENCHMARKS, evaluate_images, load_judges
from ..benchmarks.items import load_items
from ..benchmarks.results import write_results
from ..judges.judge import Judge, JudgeStopped
from ..model.checkpoint import OFFICIAL_SHIFT
from ..model.packing import Grid
from ..pipeline.pipeline_echo4o import Echo4oPipeline
from ..pipeline.prompts import latent_grid
from ..pipeline.records import replaced
from ..pipeline.samples import noise_seed
from .grid import picture_grid

if TYPE_CHECKING:
    from .trainer import Echo4oTrainer

MOST_AT_ONCE = 32  # pictures
MOST_TOKENS = 16384  # of them, twice as many with guidance: less than a step of training takes

logger = logging.get_logger(__name__)


class ValidationCallback(TrainerCallback):
    """Draws before the first step, every `validation_steps`, and after the last one.

    All processes draw: pictures are shared among them, and one without a share left draws its last again. So each
    makes the same number of forward passes, in which FSDP needs all of them. The training is left as it was: its
    random numbers, the modes of its modules, its gradients; its losses are the same bits without validation.

    A judge that cannot work, such as an endpoint out of reach, costs a warning and the score, not the run.

    Args:
        trainer: whose model is drawn with: with the average of its weights, where there is one.

    Raises:
        ValueError: `validation_benchmark` or `validation_judge` is unknown.
        OSError: the items cannot be had.
        JudgeStopped: the judge cannot work.
    """

    def __init__(self, trainer: Echo4oTrainer) -> None:
        """See the class."""
        arguments = trainer.args
        self.trainer = trainer
        self.folder = Path(arguments.output_dir, "validation")
        self.prompts = list(arguments.validation_prompts or [])
        self.benchmark, self.items = read_benchmark(arguments.validation_benchmark)
        self.judges: list[Judge] = []
        if self.benchmark is not None and trainer.is_world_process_zero():
            self.judges = load_judges(str(arguments.validation_judge), self.benchmark)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw with the base, if this is not a resumed run."""
        if state.global_step == 0:
            self.validate(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw where it is due.

        The last time is here too: at the end of training the trackers are closed already.
        """
        every: int | None = self.trainer.args.validation_steps
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or (every and state.global_step % every == 0):
            self.validate(state.global_step)

    def validate(self, step: int) -> None:
        """Draw, write, score and log."""
        trainer, start = self.trainer, time.monotonic()
        with trainer.averaged(), undisturbed(trainer.model, trainer.args.device):
            pipeline = self._pipeline()
            pictures = self._draw(pipeline, dict(enumerate(self.prompts)))
            of_items = self._draw(pipeline, {number: prompt for number, (prompt, _) in self.items.items()})
        scores: list[dict[str, float]] = [{}]
        if trainer.is_world_process_zero():
            if pictures:
                self._show(pictures, step)
            if of_items:
                scores = [self._score(of_items, step)]
        broadcast_object_list(scores)
        if scores[0]:
            # Trainer's `log` takes this step's own logging for done.
            should_log = trainer.control.should_log
            trainer.log(dict(scores[0]))
            trainer.control.should_log = should_log
        trainer._last_log += time.monotonic() - start  # tokens per second are those of training

    def _pipeline(self) -> Echo4oPipeline:
        model = self.trainer.model
        # FSDP gathers what the root holds itself only in methods that it knows. `prefill` calls the model's forward,
        # which is the root's unless that is peft's wrapper.
        methods = ("prepare_noisy_block", "predict_velocity", *(["prefill"] if is_peft_model(model) else []))
        for method in methods:
            register_fsdp_forward_method(model, method)
        vae = self.trainer.encoder.vae.to(self.trainer.args.device)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=OFFICIAL_SHIFT)
        pipeline = Echo4oPipeline(model, vae, scheduler, self.trainer.processing_class)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _draw(self, pipeline: Echo4oPipeline, prompts: Mapping[int, str]) -> dict[int, bytes]:
        """Pictures as PNG by the numbers of their prompts, in every process."""
        accelerator, numbers = self.trainer.accelerator, list(prompts)
        rows, columns = self._grid(pipeline)
        size = min(max(MOST_TOKENS // (rows * columns), 1), MOST_AT_ONCE)
        batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        drawn: list[tuple[int, bytes]] = []
        for first in range(0, len(batches), accelerator.num_processes):
            place = first + accelerator.process_index
            batch = batches[min(place, len(batches) - 1)]
            images = self._draw_batch(pipeline, {number: prompts[number] for number in batch})
            if place < len(batches):
                drawn += zip(batch, map(to_png, images), strict=True)
        return dict(sorted(gather_object(drawn)))

    def _draw_batch(self, pipeline: Echo4oPipeline, prompts: Mapping[int, str]) -> list[Image.Image]:
        arguments = self.trainer.args
        rows, columns = self._grid(pipeline)
        stride = pipeline.model.config.latent_stride
        seeds = [noise_seed(arguments.validation_seed, number, 0) for number in prompts]
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16
        with torch.autocast(arguments.device.type, dtype, enabled=arguments.bf16 or arguments.fp16):
            latents: Any = pipeline(
                list(prompts.values()),
                height=rows * stride,
                width=columns * stride,
                num_inference_steps=arguments.validation_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # on the CPU: the same everywhere
                output_type="latent",
                return_dict=False,
            )[0]
        images: list[Image.Image] = pipeline.decode_latents(latents, rows * stride, columns * stride)
        return images

    def _grid(self, pipeline: Echo4oPipeline) -> Grid:
        """Tokens of a picture: a square as large as those that are learned."""
        size, config = self.trainer.args.image_size, pipeline.model.config
        side = None if size is None else max(size // config.latent_stride, 1) * config.latent_stride
        return latent_grid(None, side, side, config)

    def _show(self, pictures: Mapping[int, bytes], step: int) -> None:
        """The grid, to disk and to the trackers that are on."""
        images = [Image.open(io.BytesIO(picture)) for picture in pictures.values()]
        grid = picture_grid(images, self.prompts)
        path = self.folder / f"step-{step}.png"
        write(path, to_png(grid))
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
            elif isinstance(callback, WandbCallback):
                wandb = callback._wandb
                wandb.log({"validation": wandb.Image(str(path)), "train/global_step": step})
            elif isinstance(callback, TrackioCallback):
                trackio = callback._trackio
                trackio.log({"validation": trackio.Image(str(path)), "train/global_step": step})

    def _score(self, pictures: Mapping[int, bytes], step: int) -> dict[str, float]:
        """What to log of the benchmark."""
        assert self.benchmark is not None
        folder = self.folder / f"step-{step}"
        for number, picture in pictures.items():
            write(folder / f"{number}_0.png", picture)
        try:
            results = evaluate_images(
                self.benchmark,
                [[pictures[number]] for number in self.items],
                [item for _, item in self.items.values()],
                judge=self.judges,
                store=self.folder / "verdicts.sqlite",
                progress=False,
            )
        except JudgeStopped as error:
            logger.warning(f"no score at step {step}, for the judge cannot work: {error}")
            return {}
        for number, item in zip(self.items, results["items"], strict=True):
            item["images"][0]["path"] = f"{number}_0.png"  # beside the results, wherever they go
        write_results(results, folder / "results.json")
        names = (self.benchmark, "accuracy", "num_unscored")
        return {f"eval_{name}": value for name in names if (value := results["scores"].get(name)) is not None}


def read_benchmark(name: str | None) -> tuple[str | None, dict[int, tuple[str, dict[str, Any]]]]:
    """The benchmark whose form the items have, and prompt and item by the number of the item.

    Args:
        name: "geneval_pp", "imagine_bench", a file of items of such form, or None.

    Raises:
        ValueError: it is none of these, or the file holds something else.
        OSError: the items cannot be had.
    """
    if name is None:
        return None, {}
    if name in BENCHMARKS:
        benchmark, items = name, load_items(name)
    elif Path(name).is_file():
        with open(name, encoding="utf-8") as file:
            benchmark = geneval_pp.NAME if '"tag"' in file.readline() else "imagine_bench"
        items = load_items(benchmark, name)
    else:
        raise ValueError(f"validation_benchmark={name!r} is neither a file nor one of {', '.join(BENCHMARKS)}")
    key = "prompt" if benchmark == geneval_pp.NAME else "instruction"
    return benchmark, {item.get("id", place): (item[key], item) for place, item in enumerate(items)}


@contextmanager
def undisturbed(model: Any, device: torch.device) -> Iterator[None]:
    """Without gradients, in evaluation mode, and leaving modes and random numbers as they were."""
    modes = {module: module.training for module in model.modules()}
    attention = model.config._attn_implementation
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type), torch.no_grad():
        model.eval()
        if attention == "flex_attention":  # would be compiled anew for each length, up to a limit
            model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(attention)
            for module, training in modes.items():
                module.training = training


def to_png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_bytes(content)
