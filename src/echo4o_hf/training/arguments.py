"""The settings of a run: from a YAML file, from flags, or both."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..model.checkpoint import BUNDLED_NAMES

logger = logging.get_logger(__name__)

COLUMNS = ("image_column", "caption_column", "references_column", "answer_column", "id_column")
MIXTURE_KEYS = ("dataset", "dataset_config", "dataset_split", "data_dir", *COLUMNS, "weight")
# What a file says about one dataset or model says nothing about another one.
REPLACED_BY = {
    "dataset": ("mixture", "dataset_config", "dataset_split", "data_dir", *COLUMNS),
    "model": ("model_revision", "model_subfolder"),
}


@dataclass
class Echo4oTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` and what Bagel adds; each field's `help` says what it is.

    Other defaults than upstream's: `per_device_train_batch_size`, `remove_unused_columns`, `learning_rate`,
    `adam_beta2`, `adam_epsilon`, `logging_steps`, `hub_strategy`, and `bf16`, which is decided by the device.

    Raises:
        ValueError: settings out of range, or that contradict each other.
    """

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Always 1: one pack of samples."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always false: the collator needs them."})
    learning_rate: float = field(default=2e-5, metadata={"help": "The peak of the learning rate."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Decay of the second moments, as the paper has it."})
    adam_epsilon: float = field(default=1e-15, metadata={"help": "As the paper has it."})
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two lines of the log; below 1, a share of all steps."}
    )
    hub_strategy: str = field(
        default="end",
        metadata={"help": "With push_to_hub: push the result and its card; or also at `every_save` ..."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16; by default on devices that can, else everything is float32.",
            "nargs": "?",
            "const": True,
        },
    )

    # The model.
    model: str = field(
        default="Yejy53/Echo-4o",
        metadata={"help": "Where training starts: a folder, a name on the Hub, or echo4o-miniature."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch on the Hub."})
    model_subfolder: str | None = field(default=None, metadata={"help": "Where the checkpoint is inside."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flex_attention or eager; by default flex_attention on CUDA, else sdpa."}
    )

    # The data.
    dataset: str | None = field(
        default=None,
        metadata={"help": "What load_dataset takes; by default the model's own: echo-4o-image, or echo4o-miniature."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, or subset."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    data_dir: str | None = field(default=None, metadata={"help": "Its folder, where it takes one."})
    streaming: bool = field(default=False, metadata={"help": "Start at once, and shuffle inside a window."})
    mixture: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Several datasets, in the YAML file only: a list of mappings with dataset, weight, and where "
            "needed dataset_config, dataset_split, data_dir and columns."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "The picture to draw."})
    caption_column: str | None = field(default=None, metadata={"help": "What to draw, or the question."})
    references_column: str | None = field(default=None, metadata={"help": "The pictures it is drawn from."})
    answer_column: str | None = field(default=None, metadata={"help": "The answer to a question about references."})
    id_column: str | None = field(default=None, metadata={"help": "A name for each row; by default its number."})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "What to do with broken rows: stop and name them, or leave out and list."}
    )
    shuffle_window: int = field(default=256, metadata={"help": "Rows that are shuffled and packed, when streaming."})

    # What is trained.
    method: Literal["full", "generation", "lora"] = field(
        default="lora", metadata={"help": "Everything, the generation expert with its heads, or a peft adapter."}
    )
    lora_rank: int = field(default=64, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=128, metadata={"help": "Their scale, times the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before them."})
    lora_understanding: bool = field(default=False, metadata={"help": "Also adapt the understanding expert."})
    lora_vision: bool = field(default=False, metadata={"help": "Also adapt the vision encoder."})
    quantization: Literal["4bit", "8bit"] | None = field(
        default=None, metadata={"help": "Of the frozen weights under an adapter; needs bitsandbytes."}
    )
    trainable_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the trained weights with bf16; adapters are always float32."}
    )

    # A batch: one pack of samples for each process.
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Of a pack; by default room for a sample with four references (30720 at the full size)."},
    )
    oversize: Literal["downscale", "skip", "error"] = field(
        default="downscale", metadata={"help": "What to do with samples that a pack cannot hold."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Longest side to draw, in pixels; by default the model's largest."}
    )
    reference_size: int | None = field(
        default=None, metadata={"help": "Longest side of references' latents; by default the model's largest."}
    )
    vision_size: int | None = field(
        default=None,
        metadata={
            "help": "Longest side that the vision encoder sees; by default 518 of references, 980 of questions."
        },
    )
    aspect_ratio_buckets: bool = field(
        default=False, metadata={"help": "Crop pictures to the nearest of some sizes of equal area."}
    )
    text_dropout: float = field(default=0.1, metadata={"help": "Share of samples without their text."})
    vae_dropout: float = field(default=0.3, metadata={"help": "Share of references without their latents."})
    vit_dropout: float = field(default=0.3, metadata={"help": "Share of references without their vision tokens."})

    # The loss.
    timestep_shift: float | None = field(default=None, metadata={"help": "By default the model's own."})
    sample_posterior: bool = field(
        default=True, metadata={"help": "Draw latents from the VAE's posterior, instead of its mean."}
    )
    flow_weight: float = field(default=1.0, metadata={"help": "Of the flow matching loss."})
    text_weight: float = field(default=1.0, metadata={"help": "Of the loss of answers."})

    # Latents made once.
    latent_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the VAE's output; true: _latents in output_dir."}
    )
    precompute_latents: bool = field(default=False, metadata={"help": "Fill that folder, and train nothing."})

    # The optimizer.
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the trained weights, such as 0.9999; the average is the result."}
    )
    muon: bool = field(default=False, metadata={"help": "Muon for the layers' matrices, `optim` for the rest."})

    # Validation.
    validation_prompts: list[str] | None = field(default=None, metadata={"help": "What to draw while training."})
    validation_steps: int | None = field(
        default=None, metadata={"help": "Steps between validations; by default at both ends."}
    )
    validation_seed: int = field(default=0, metadata={"help": "Of the validation's noise."})
    validation_inference_steps: int = field(default=49, metadata={"help": "Updates of the latents."})
    validation_benchmark: str | None = field(
        default=None, metadata={"help": "geneval_pp, imagine_bench, or a file of items to score."}
    )
    validation_judge: str | None = field(
        default=None, metadata={"help": "Of that benchmark, such as openai:gpt-4.1 or shapes."}
    )

    def __post_init__(self) -> None:
        """Check our fields, then do upstream's part."""
        if str(self.latent_cache).lower() == "false":
            self.latent_cache = None
        _check_choices(self)
        _check_ranges(self)
        _check_combinations(self)
        if self.dataset is None and self.mixture is None:
            self.dataset = "echo4o-miniature" if self.model in BUNDLED_NAMES else "echo-4o-image"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
            if not self.bf16:
                self.trainable_dtype = "float32"  # as everything: one file serves both kinds of devices
        super().__post_init__()
        if str(self.latent_cache).lower() == "true":
            self.latent_cache = str(Path(self.output_dir, "_latents"))  # which is never pushed, as all of "_*"
        if self.n_gpu > 1:
            logger.warning("one of %d GPUs is used; accelerate launch uses them all", self.n_gpu)
            self._n_gpu = 1  # upstream would split a pack over them
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # upstream warns that it does nothing


def _check_choices(arguments: Echo4oTrainingArguments) -> None:
    hints = get_type_hints(Echo4oTrainingArguments)
    for name in Echo4oTrainingArguments.__annotations__:
        value = getattr(arguments, name)
        for kind in _kinds(hints[name]):
            if get_origin(kind) is Literal and value is not None and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {value!r}")


def _check_ranges(arguments: Echo4oTrainingArguments) -> None:
    shares = ("text_dropout", "vae_dropout", "vit_dropout", "lora_dropout")
    positive = (
        *("lora_rank", "lora_alpha", "max_tokens", "image_size", "reference_size", "vision_size", "timestep_shift"),
        *("shuffle_window", "validation_steps", "validation_inference_steps"),
    )
    for name in shares:
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(arguments, name)}")
    for name in positive:
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if arguments.ema_decay is not None and not 0 < arguments.ema_decay < 1:
        raise ValueError(f"ema_decay must be above 0 and below 1, got {arguments.ema_decay}")
    weights = (arguments.flow_weight, arguments.text_weight)
    if min(weights) < 0 or max(weights) == 0:
        raise ValueError(f"flow_weight and text_weight must not be negative, nor both 0; got {weights}")
    if arguments.per_device_train_batch_size != 1:
        raise ValueError(
            f"per_device_train_batch_size={arguments.per_device_train_batch_size}: a batch is one pack of samples, so "
            "it must be 1; max_tokens makes packs larger, gradient_accumulation_steps puts several into one step"
        )
    if arguments.remove_unused_columns:
        raise ValueError("remove_unused_columns must be false: the collator needs all columns")


def _check_combinations(arguments: Echo4oTrainingArguments) -> None:
    only_lora = ("quantization", "lora_understanding", "lora_vision")
    if arguments.method != "lora" and (given := [name for name in only_lora if getattr(arguments, name)]):
        raise ValueError(f"{given[0]} goes only with method: lora, not with {arguments.method}")
    if arguments.mixture is not None:
        _check_mixture(arguments.mixture)
        if given := [name for name in ("dataset", "dataset_config", "data_dir") if getattr(arguments, name)]:
            raise ValueError(f"{given[0]} and mixture are both given; it belongs into the entries of mixture")
    if arguments.streaming and arguments.max_steps <= 0:
        raise ValueError("streaming needs max_steps: how many rows there are is not known")
    if arguments.precompute_latents and arguments.latent_cache is None:
        raise ValueError("precompute_latents needs latent_cache, the folder to fill")
    if arguments.validation_steps and not (arguments.validation_prompts or arguments.validation_benchmark):
        raise ValueError("validation_steps needs validation_prompts or validation_benchmark: what to draw")
    if (arguments.validation_benchmark is None) != (arguments.validation_judge is None):
        raise ValueError("validation_benchmark and validation_judge go together")


def _check_mixture(mixture: Any) -> None:
    if not isinstance(mixture, list) or not mixture or not all(isinstance(entry, Mapping) for entry in mixture):
        raise ValueError(f"mixture must be a list of mappings, got {mixture!r}")
    for number, entry in enumerate(mixture):
        where = f"mixture, entry {number + 1}"
        if unknown := [key for key in entry if key not in MIXTURE_KEYS]:
            raise ValueError(f"{where}: there is no {unknown[0]!r}{_nearest(unknown[0], MIXTURE_KEYS)}")
        if "dataset" not in entry:
            raise ValueError(f"{where}: dataset is missing")
        if wrong := [key for key in entry if key != "weight" and not isinstance(entry[key], str | None)]:
            raise ValueError(f"{where}: {wrong[0]} must be a text, got {entry[wrong[0]]!r}")
        weight = entry.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
            raise ValueError(f"{where}: weight must be a positive number, got {weight!r}")


# ------------------------------------------------------------------------------------------------- files and flags


class _Parser(HfArgumentParser):
    """Upstream's, with errors that are raised: its own leave the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_arguments(argv: Sequence[str]) -> Echo4oTrainingArguments:
    """The settings that a command line says: `[RUN.yaml] [--flag value ...]`.

    Flags override the file. `--dataset` also replaces the file's `mixture`, and what it says about its own dataset:
    configuration, split, folder and columns; `--model` likewise its revision and subfolder.

    Raises:
        ValueError: a name that is no setting (with the nearest that is), a value that does not fit, or settings that
            do not go together.
        OSError: the file cannot be read.
    """
    usage = "echo4o train [RUN.yaml] [--flag value ...]"
    parser = _Parser(Echo4oTrainingArguments, usage=usage, allow_abbrev=False)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    names = [item.name for item in fields(Echo4oTrainingArguments) if item.init]
    parser.set_defaults(**dict.fromkeys(names))  # so that what is given can be told
    settings: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        settings = _read_file(parser, Path(argv[0]), names)
        argv = argv[1:]
    flags = _read_flags(parser, argv, names)
    replaced = {name for flag, others in REPLACED_BY.items() if flag in flags for name in others}
    return Echo4oTrainingArguments(**{key: settings[key] for key in settings if key not in replaced} | flags)


def _read_flags(parser: _Parser, argv: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    if any(word.partition("=")[0] == "--mixture" for word in argv):
        raise ValueError("mixture is a list of mappings: write it into the YAML file")
    found, rest = parser.parse_known_args(list(argv))
    if rest:
        flag = next((word for word in rest if word.startswith("--")), None)
        if flag is None:
            raise ValueError(f"{rest[0]!r} belongs to no flag; the YAML file goes first")
        name = flag.removeprefix("--").partition("=")[0]
        raise ValueError(f"there is no --{name}{_nearest(name.replace('-', '_'), names, '--')}")
    return {name: value for name, value in vars(found).items() if value is not None}


def _read_file(parser: _Parser, path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not a {type(settings).__name__}")
    hints = get_type_hints(Echo4oTrainingArguments)
    for name in settings:
        if name not in names:
            raise ValueError(f"{path}: there is no {name!r}{_nearest(str(name), names)}")
    return {name: _read_value(parser, path, name, value, hints[name]) for name, value in settings.items()}


def _read_value(parser: _Parser, path: Path, name: str, value: Any, hint: Any) -> Any:
    """What the flag of that name would make of a value in a file."""
    kinds = _kinds(hint)
    inside = {get_origin(kind) or kind for kind in kinds}
    if name == "mixture" or (value is None and type(None) in kinds):
        return value
    if isinstance(value, dict) and dict in inside:
        return value
    values = value if isinstance(value, list) and list in inside else [value]
    if any(item is None or isinstance(item, dict | list) for item in values):
        raise ValueError(f"{path}: {name} cannot be {value!r}")
    try:
        read = [getattr(parser.parse_known_args([f"--{name}={item}"])[0], name) for item in values]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(value, list):
        return [part for item in read for part in (item if isinstance(item, list) else [item])]
    return read[0]


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _nearest(name: str, names: Sequence[str], prefix: str = "") -> str:
    matches = get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{matches[0]}?" if matches else "; echo4o train --help lists all settings"
