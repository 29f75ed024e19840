"""The settings of a run: defaults, files, flags, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from echo4o_hf.training.arguments import Echo4oTrainingArguments, parse_arguments


def write(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return str(folder / "run.yaml")


def test_defaults_that_differ_from_upstream() -> None:
    ours, upstream = Echo4oTrainingArguments(use_cpu=True), TrainingArguments(use_cpu=True)
    changed = {
        name: getattr(ours, name) for name in upstream.to_dict() if getattr(ours, name) != getattr(upstream, name)
    }
    assert changed == {
        "per_device_train_batch_size": 1,
        "remove_unused_columns": False,
        "learning_rate": 2e-5,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-15,
        "logging_steps": 10,
        "hub_strategy": "end",
    }
    assert ours.average_tokens_across_devices
    assert ours.weight_decay == 0


def test_every_field_of_ours_has_a_help_text() -> None:
    for name in Echo4oTrainingArguments.__annotations__:
        assert Echo4oTrainingArguments.__dataclass_fields__[name].metadata["help"], name


@pytest.mark.parametrize(
    ("given", "dataset"),
    [
        ({}, "echo-4o-image"),
        ({"model": "echo4o-miniature"}, "echo4o-miniature"),
        ({"model": "echo4o-miniature", "dataset": "echo-4o-image"}, "echo-4o-image"),
        ({"model": "echo4o-miniature", "mixture": [{"dataset": "a"}]}, None),
    ],
)
def test_a_dataset_that_goes_with_the_model(given: dict[str, Any], dataset: str | None) -> None:
    assert Echo4oTrainingArguments(**given).dataset == dataset


def test_bf16_is_off_on_a_cpu_unless_asked_for() -> None:
    assert Echo4oTrainingArguments(use_cpu=True).bf16 is False
    assert Echo4oTrainingArguments(use_cpu=True, trainable_dtype="bfloat16").trainable_dtype == "float32"
    found = parse_arguments(["--use_cpu", "--bf16", "--trainable_dtype", "bfloat16"])
    assert found.bf16 is True and found.trainable_dtype == "bfloat16"


FILE = """
# all kinds of values
model: a
learning_rate: 1e-4          # YAML takes this for a text
max_tokens: 1024
text_dropout: 0              # a number without a point for one with
bf16:
sample_posterior: false
report_to: [tensorboard, wandb]
optim: adamw_torch
lr_scheduler_type: cosine_with_restarts
lr_scheduler_kwargs: {num_cycles: 2}
validation_prompts: ["--a cat", "a dog: two eyes"]
validation_steps: 5
resume_from_checkpoint: true
dataset_config: 3
"""


def test_a_file(tmp_path: Path) -> None:
    found = parse_arguments([write(tmp_path, FILE)])
    assert found.model == "a" and found.dataset_config == "3"
    assert found.learning_rate == 1e-4 and found.max_tokens == 1024 and found.text_dropout == 0
    assert isinstance(found.text_dropout, float)
    assert found.sample_posterior is False
    assert found.report_to == ["tensorboard", "wandb"]
    assert found.optim == "adamw_torch" and found.lr_scheduler_type == "cosine_with_restarts"
    assert found.lr_scheduler_kwargs == {"num_cycles": 2}
    assert found.validation_prompts == ["--a cat", "a dog: two eyes"]
    assert found.resume_from_checkpoint == "True"
    assert parse_arguments([write(tmp_path, "# nothing\n")]).to_dict().keys() == found.to_dict().keys()


def test_flags_override_the_file(tmp_path: Path) -> None:
    flags = ["--learning_rate", "3e-4", "--max-tokens=2048", "--sample_posterior", "--no_dataloader_pin_memory"]
    found = parse_arguments([write(tmp_path, FILE), *flags, "--validation_prompts", "a", "b"])
    assert found.learning_rate == 3e-4 and found.max_tokens == 2048
    assert found.sample_posterior is True and found.dataloader_pin_memory is False
    assert found.validation_prompts == ["a", "b"]
    assert found.model == "a" and found.validation_steps == 5
    flags = ["--precompute-latents", "--latent-cache", str(tmp_path)]
    assert parse_arguments(flags).precompute_latents


def test_where_latents_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "output_dir: out\nlatent_cache: true\n")
    assert parse_arguments([path]).latent_cache == "out/_latents"
    assert parse_arguments([path, "--output_dir", "other"]).latent_cache == "other/_latents"
    assert parse_arguments([path, "--latent_cache", "kept"]).latent_cache == "kept"
    assert parse_arguments([path, "--latent_cache", "false"]).latent_cache is None
    with pytest.raises(ValueError, match="precompute_latents needs latent_cache"):
        parse_arguments([path, "--latent_cache", "false", "--precompute_latents"])


MIXTURE = """
model: Yejy53/Echo-4o
model_revision: abc
mixture:
  - {dataset: echo-4o-image, dataset_config: surreal_fantasy, weight: 0.25}
  - {dataset: imagefolder, data_dir: pictures, caption_column: text, weight: 2}
"""


def test_a_mixture_and_a_dataset_instead_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, MIXTURE)
    found = parse_arguments([path])
    assert found.mixture == [
        {"dataset": "echo-4o-image", "dataset_config": "surreal_fantasy", "weight": 0.25},
        {"dataset": "imagefolder", "data_dir": "pictures", "caption_column": "text", "weight": 2},
    ]
    assert found.model_revision == "abc"
    found = parse_arguments([path, "--dataset", "echo4o-miniature", "--model", "echo4o-miniature"])
    assert found.mixture is None and found.dataset == "echo4o-miniature" and found.model_revision is None


def test_a_dataset_takes_nothing_from_the_one_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path, "{dataset: a, dataset_config: b, data_dir: c, dataset_split: d, image_column: e, streaming: false}"
    )
    found = parse_arguments([path, "--dataset", "z", "--caption_column", "y"])
    assert (found.dataset, found.dataset_config, found.data_dir, found.image_column) == ("z", None, None, None)
    assert (found.dataset_split, found.caption_column) == ("train", "y")
    assert parse_arguments([path, "--data_dir", "z"]).dataset_config == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_token: 3", "there is no 'max_token'; did you mean max_tokens?"),
        ("lora-rank: 3", "there is no 'lora-rank'; did you mean lora_rank?"),
        ("gradient_accumulation: 3", "did you mean gradient_accumulation_steps?"),
        ("zzz: 3", "there is no 'zzz'; echo4o train --help lists all settings"),
        ("max_tokens: many", "--max_tokens/--max-tokens: invalid int value: 'many'"),
        ("max_tokens: 2.5", "invalid int value: '2.5'"),
        ("max_tokens: true", "invalid int value: 'True'"),
        ("max_tokens: [1, 2]", "max_tokens cannot be [1, 2]"),
        ("learning_rate:", "learning_rate cannot be None"),
        ("muon: 7", "--muon: Truthy value expected: got 7"),
        ("model: {name: a}", "model cannot be {'name': 'a'}"),
        ("validation_prompts: [a, [b]]", "validation_prompts cannot be"),
        ("method: lore", "invalid choice: 'lore' (choose from"),
        ("- method", "must hold `name: value` lines, not a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_file_name_it(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        parse_arguments([path])
    assert path in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_token", "3"], "there is no --max_token; did you mean --max_tokens?"),
        (["--max-token=3"], "did you mean --max_tokens?"),
        (["--max_tokens"], "expected one argument"),
        (["--max_tokens", "many"], "invalid int value: 'many'"),
        (["--model", "a", "b"], "'b' belongs to no flag"),
        (["--mixture", "a"], "write it into the YAML file"),
        (["--optim", "adam"], "invalid choice: 'adam'"),
    ],
)
def test_mistakes_in_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_arguments(flags)
    assert message in str(error.value)


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        parse_arguments(["missing.yaml"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lore"}, "method must be one of full, generation, lora; got 'lore'"),
        ({"quantization": "2bit"}, "quantization must be one of 4bit, 8bit"),
        ({"oversize": "crop"}, "oversize must be one of downscale, skip, error"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip"),
        ({"trainable_dtype": "float16"}, "trainable_dtype must be one of float32, bfloat16"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size=2: a batch is one pack"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"text_dropout": 1.1}, "text_dropout must be between 0 and 1, got 1.1"),
        ({"vit_dropout": -0.1}, "vit_dropout must be between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens must be positive, got 0"),
        ({"lora_rank": 0}, "lora_rank must be positive"),
        ({"timestep_shift": 0.0}, "timestep_shift must be positive"),
        ({"ema_decay": 1.0}, "ema_decay must be above 0 and below 1"),
        ({"flow_weight": 0.0, "text_weight": 0.0}, "flow_weight and text_weight"),
        ({"method": "full", "quantization": "4bit"}, "quantization goes only with method: lora, not with full"),
        ({"method": "generation", "lora_vision": True}, "lora_vision goes only with method: lora"),
        ({"streaming": True}, "streaming needs max_steps"),
        ({"precompute_latents": True}, "precompute_latents needs latent_cache"),
        ({"validation_steps": 3}, "validation_steps needs validation_prompts"),
        ({"validation_benchmark": "geneval_pp", "validation_steps": 3}, "validation_judge go together"),
        ({"mixture": []}, "mixture must be a list of mappings, got []"),
        ({"mixture": ["a"]}, "mixture must be a list of mappings, got ['a']"),
        ({"mixture": [{"dataset": "a"}, {"datset": "b"}]}, "entry 2: there is no 'datset'; did you mean dataset?"),
        ({"mixture": [{"weight": 1}]}, "entry 1: dataset is missing"),
        ({"mixture": [{"dataset": 1}]}, "entry 1: dataset must be a text, got 1"),
        ({"mixture": [{"dataset": "a", "weight": 0}]}, "entry 1: weight must be a positive number, got 0"),
        ({"mixture": [{"dataset": "a"}], "dataset": "b"}, "dataset and mixture are both given"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Echo4oTrainingArguments(**settings)
    assert message in str(error.value)


def test_settings_can_be_saved_as_json(tmp_path: Path) -> None:
    found = parse_arguments([write(tmp_path, MIXTURE)])
    assert json.loads(found.to_json_string())["mixture"] == found.mixture


def test_help_lists_ours_and_upstreams(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["run.yaml", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: echo4o train [RUN.yaml]")
    assert "--max_tokens" in out and "--gradient_accumulation_steps" in out and "(default: 64)" in out
