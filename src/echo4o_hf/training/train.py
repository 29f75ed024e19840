"""Fine-tuning from settings to an adapter or a checkpoint.

    echo4o train RUN.yaml [--flag value ...]
    accelerate launch -m echo4o_hf.training.train RUN.yaml [--flag value ...]

The first is one process, the second one for each GPU.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi
from transformers import GenerationConfig, Qwen2Config

from ..model.checkpoint import component_folder, load_autoencoder, load_processor, load_scheduler, resolve
from ..model.configuration_bagel import BagelConfig
from ..model.modeling_bagel import BagelForConditionalGeneration
from ..model.processing_bagel import BagelProcessor
from ..pipeline.pipeline_echo4o import Echo4oPipeline
from .arguments import Echo4oTrainingArguments, parse_arguments
from .card import write_card
from .checkpoints import last_checkpoint, newest_checkpoint
from .collator import PackCollator
from .latents import LatentEncoder, LatentStore, precompute, vae_id
from .memory import describe
from .packs import EagerPacks, StreamedPacks
from .parameters import prepare_model, quantization_config
from .rows import Rows, load_rows
from .samples import MARKERS, SampleBuilder, SampleError
from .sizes import Sizes, training_sizes
from .trainer import Echo4oTrainer
from .validation import ValidationCallback

if TYPE_CHECKING:
    from peft import PeftModel

MOST_REFERENCES = 4  # of a row of Echo-4o-Image
TEXT_TOKENS = 4096  # room for the text of a row, or for those of seven targets of the full size
NOT_UPLOADED = ["_*", "checkpoint-*", "validation/*", "runs/*", "training_args.bin"]


class Base(NamedTuple):
    """What training starts from, without the model's weights."""

    folder: Path
    config: BagelConfig
    processor: BagelProcessor
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler


def train(arguments: Echo4oTrainingArguments) -> None:
    """Load, build, train, save, push; with `precompute_latents`, only fill the cache of latents.

    Raises:
        ValueError: settings, data or a checkpoint that cannot be used; a loss that is not finite.
        OSError: files that cannot be read or written.
        ImportError: a package that the settings need is missing.
        KeyboardInterrupt: Ctrl-C, with the last checkpoint named.
    """
    resume = resumption(arguments)
    # 1. Load.
    base = load_base(arguments)
    builder = sample_builder(arguments, base)
    with arguments.main_process_first(desc="loading the data"):
        rows = load_rows(arguments)
    # 2. Build.
    encoder = LatentEncoder(base.vae.to(arguments.device), base.config.latent_patch_size, builder.store)
    if arguments.precompute_latents:
        fill_latent_cache(arguments, rows, builder, encoder)
        return
    packs = make_packs(arguments, rows, builder)
    model = load_model(arguments, base)
    configs = deepcopy((model.config, model.generation_config))
    if arguments.process_index == 0:
        print(describe(model, arguments, builder.max_tokens), flush=True)
    trainer = Echo4oTrainer(
        model,
        arguments,
        train_dataset=packs,
        data_collator=PackCollator(builder, arguments.on_error, always_all_parts=True),
        encoder=encoder,
        processing_class=base.processor,
    )
    if arguments.validation_prompts or arguments.validation_benchmark:
        trainer.add_callback(ValidationCallback(trainer))
    # 3. Train.
    try:
        with workers_errors_in_short(), without_news_of_tokens():
            trainer.train(resume)
    except KeyboardInterrupt:
        last = last_checkpoint(arguments.output_dir)
        raise KeyboardInterrupt(f"interrupted. {last} To go on: --resume_from_checkpoint true") from None
    # 4. Save.
    save(trainer, base, *configs)
    # 5. Push.
    if arguments.push_to_hub:
        push(trainer)


def resumption(arguments: Echo4oTrainingArguments) -> str | bool | None:
    """What `Trainer.train` shall go on from: a folder, the newest checkpoint (True), or nothing.

    Raises:
        ValueError: the run is new, but its folder has the checkpoints of an earlier one, which later resuming would
            take for its own.
        FileNotFoundError: there is no such folder.
    """
    resume = arguments.resume_from_checkpoint
    if resume is not None and resume.lower() == "true":
        return True
    if resume is not None and resume.lower() != "false":
        if not Path(resume).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint={resume!r} is no folder")
        return resume
    earlier = newest_checkpoint(arguments.output_dir)
    if earlier is not None and not arguments.precompute_latents:
        raise ValueError(
            f"{earlier} is of an earlier run: go on with --resume_from_checkpoint true, or choose another output_dir"
        )
    return None


def load_base(arguments: Echo4oTrainingArguments) -> Base:
    """Everything of the checkpoint but the model's weights.

    Raises:
        OSError: files are missing or damaged, or there is no network.
        ValueError: files that do not fit each other.
    """
    folder = resolve(arguments.model, arguments.model_revision, arguments.model_subfolder)
    config = BagelConfig.from_pretrained(component_folder(folder, "model"))
    return Base(folder, config, load_processor(folder, config), load_autoencoder(folder), load_scheduler(folder))


def sample_builder(arguments: Echo4oTrainingArguments, base: Base) -> SampleBuilder:
    """What makes samples of rows; decides `arguments.max_tokens` if that is open.

    Raises:
        ValueError: sizes that the model cannot take.
    """
    sizes = training_sizes(
        base.processor, base.config, arguments.image_size, arguments.reference_size, arguments.vision_size
    )
    if arguments.max_tokens is None:
        arguments.max_tokens = default_max_tokens(base.config, sizes)
    store = LatentStore(arguments.latent_cache, vae_id(base.vae)) if arguments.latent_cache else None
    return SampleBuilder(
        base.processor,
        base.config,
        base.vae.config,
        sizes=sizes,
        max_tokens=arguments.max_tokens,
        oversize=arguments.oversize,
        text_dropout=arguments.text_dropout,
        vae_dropout=arguments.vae_dropout,
        vit_dropout=arguments.vit_dropout,
        timestep_shift=arguments.timestep_shift,
        sample_posterior=arguments.sample_posterior,
        aspect_ratio_buckets=arguments.aspect_ratio_buckets,
        seed=arguments.seed,
        store=store,
    )


def default_max_tokens(config: BagelConfig, sizes: Sizes) -> int:
    """Room for four references of the largest sizes, the target and its text, in whole 1024s."""
    reference, vision, target = (
        min((rule["max"] // rule["stride"]) ** 2, rule["max_pixels"] // rule["stride"] ** 2) + MARKERS
        for rule in (sizes.reference, sizes.vision, sizes.target)
    )
    text = min(TEXT_TOKENS, cast(Qwen2Config, config.text_config).max_position_embeddings)
    return -(-(MOST_REFERENCES * (reference + vision) + target + text) // 1024) * 1024


def fill_latent_cache(
    arguments: Echo4oTrainingArguments, rows: Rows, builder: SampleBuilder, encoder: LatentEncoder
) -> None:
    """Encode every picture that training will ask for, and say which rows were left out.

    Raises:
        ValueError: rows that cannot be used.
        OSError: the cache cannot be written.
    """
    with workers_errors_in_short():
        workers = arguments.dataloader_num_workers
        left_out = precompute(rows, builder, encoder, on_error=arguments.on_error, num_workers=workers)
    if arguments.process_index == 0:
        for id, reason in left_out:
            print(f"left out: {id}: {reason}")
        print(arguments.latent_cache, flush=True)


def make_packs(arguments: Echo4oTrainingArguments, rows: Rows, builder: SampleBuilder) -> EagerPacks | StreamedPacks:
    """The rows in packs of `max_tokens`.

    Raises:
        ValueError: rows that cannot be used.
    """
    if arguments.streaming:
        return StreamedPacks(
            rows,
            builder,
            builder.max_tokens,
            arguments.seed,
            arguments.on_error,
            arguments.shuffle_window,
            rank=arguments.process_index,
            world=arguments.world_size,
        )
    with arguments.main_process_first(desc="counting tokens"):
        workers = arguments.dataloader_num_workers or None
        return EagerPacks(rows, builder, builder.max_tokens, arguments.seed, arguments.on_error, num_proc=workers)


def load_model(arguments: Echo4oTrainingArguments, base: Base) -> BagelForConditionalGeneration | PeftModel:
    """The model with its weights, of which what shall be trained is trainable.

    Raises:
        OSError: files are missing or damaged.
        ValueError: configuration and weights do not fit.
        ImportError: peft or bitsandbytes is missing.
    """
    on_cuda = arguments.device.type == "cuda"
    sharded = "ACCELERATE_USE_FSDP" in os.environ or arguments.fsdp or arguments.deepspeed_plugin is not None
    model = BagelForConditionalGeneration.from_pretrained(
        component_folder(base.folder, "model"),
        attn_implementation=arguments.attn_implementation or ("flex_attention" if on_cuda else "sdpa"),
        device_map={"": arguments.device} if on_cuda and not sharded else None,  # host memory never holds it all
        quantization_config=quantization_config(arguments),
    )
    return prepare_model(model, arguments)


def save(trainer: Echo4oTrainer, base: Base, config: BagelConfig, generation_config: GenerationConfig) -> None:
    """The result into `output_dir`: an adapter as peft has it, else a pipeline; and its card.

    Args:
        trainer: after training.
        base: for the other parts of the pipeline.
        config: of the model before training, for which upstream changes it.
        generation_config: likewise.

    Raises:
        OSError: it cannot be written.
    """
    arguments, folder = trainer.args, Path(trainer.args.output_dir)
    adapter = arguments.method == "lora"
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not adapter:
        model.config, model.generation_config = config, generation_config
    trainer.save_model(str(folder if adapter else folder / "model"), _internal_call=True)  # pushes nothing
    if not trainer.is_world_process_zero():
        return
    if not adapter:
        base.vae.save_pretrained(folder / "vae")
        base.scheduler.save_pretrained(folder / "scheduler")
        base.processor.save_pretrained(folder / "processor")
        with torch.device("meta"):
            model = BagelForConditionalGeneration(config)  # FSDP has changed the class of the one that was trained
        Echo4oPipeline(model, base.vae, base.scheduler, base.processor).save_config(folder)
    write_card(arguments, trainer.state)
    print(folder, flush=True)


def push(trainer: Echo4oTrainer) -> None:
    """Upload `output_dir` without its checkpoints.

    Raises:
        OSError: the Hub refuses, or there is no network.
    """
    if trainer.is_world_process_zero():
        trainer._finish_current_push()
        HfApi(token=trainer.args.hub_token).upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=trainer.args.output_dir,
            commit_message="Fine-tuned with echo4o-hf",
            revision=trainer.args.hub_revision,
            ignore_patterns=NOT_UPLOADED,
        )
    trainer.accelerator.wait_for_everyone()


@contextmanager
def workers_errors_in_short() -> Iterator[None]:
    """A `SampleError` of a DataLoader's worker says what is wrong, without the worker's traceback."""
    try:
        yield
    except SampleError as error:
        last = str(error).strip().splitlines()[-1]  # after the traceback: module.SampleError: id: reason
        raise ValueError(re.sub(r"^[\w.]+Error: ", "", last)) from error


@contextmanager
def without_news_of_tokens() -> Iterator[None]:
    """Upstream writes the tokenizer's ids into the configuration and warns of it; `save` takes the one from before."""
    logger = logging.getLogger("transformers.trainer_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "new PAD/BOS/EOS tokens" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a command line says.

    Returns:
        The exit code: 0, 2 for what the user can mend (one line on stderr says what), 130 after Ctrl-C.
    """
    try:
        train(parse_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, ImportError) as error:
        print(f"echo4o train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"echo4o train: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # accelerate launch -m echo4o_hf.training.train
    sys.exit(main())
