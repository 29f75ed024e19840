"""The card of a finished run for the Hub: `README.md` in its folder, with pictures in `card/`.

Limits, licence and sources are those of `model_card.md` beside this file, which a wheel holds; model_card/README.md in
the repository is a link to it. Only settings named here come into a card: none of them is a key or a folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from transformers import TrainerState

from ..benchmarks.evaluation import BENCHMARKS, ITEMS_SHA256, read_results
from ..benchmarks.statistics import compare
from ..model.checkpoint import BUNDLED_NAMES
from ..pipeline.records import replaced
from ..report.model_index import model_index
from ..report.runs import Comparison, Run
from ..report.tables import markdown_text, tables_text
from .arguments import Echo4oTrainingArguments
from .curve import curve_picture

HUB_NAMES = {"echo-4o-image": "Yejy53/Echo-4o-Image"}  # of datasets that this package has other names for
METHODS = {"full": "all weights", "generation": "the generation expert", "lora": "a LoRA adapter"}
SOFTWARE = ("echo4o-hf", "torch", "transformers", "diffusers", "peft")
LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_understanding", "lora_vision", "quantization")
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "muon",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "ema_decay",
    "gradient_accumulation_steps",
    "max_tokens",
    "oversize",
    "image_size",
    "reference_size",
    "vision_size",
    "aspect_ratio_buckets",
    "text_dropout",
    "vae_dropout",
    "vit_dropout",
    "timestep_shift",
    "sample_posterior",
    "flow_weight",
    "text_weight",
    "bf16",
    "trainable_dtype",
    "seed",
)
LOSSES = ("loss", "flow_loss", "text_loss")
EXAMPLE = "a crystal tomato on a wooden table"


def write_card(arguments: Echo4oTrainingArguments, state: TrainerState) -> Path:
    """Write the card of a finished run, in place of the one that peft or Trainer writes.

    Args:
        arguments: of the run; its `output_dir` holds what `ValidationCallback` wrote, if it did.
        state: at its end.

    Raises:
        OSError: a file cannot be read or written.
    """
    folder = Path(arguments.output_dir)
    (folder / "card").mkdir(parents=True, exist_ok=True)
    name = (arguments.hub_model_id or folder.resolve().name).split("/")[-1]
    runs = _runs(folder)
    rendered = _template().render(
        name=name,
        base=_linked(arguments.model),
        base_path=_public(arguments.model),
        path=arguments.hub_model_id or f"path/to/{name}",
        data=[_linked(dataset) for dataset in _datasets(arguments)],
        method=METHODS[arguments.method],
        adapter=arguments.method == "lora",
        on_cpu=arguments.device.type == "cpu",
        steps=state.global_step,
        prompt=json.dumps((arguments.validation_prompts or [EXAMPLE])[0], ensure_ascii=False),
        losses=_loss_curve(folder, state.log_history),
        settings=_settings(arguments, state),
        grids=_grids(folder),
        tables=_tables(runs),
    )
    ours = ModelCard(resources.files(__package__).joinpath("model_card.md").read_text(encoding="utf-8"))
    # Of the shapes world's checkpoints it would not be true.
    rest = "" if arguments.model in BUNDLED_NAMES else ours.text[ours.text.index("\n## Limits") :]
    metadata = _metadata(arguments, ours.data.to_dict(), [replace(run, name=name) for run in runs[-1:]])
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{rendered.strip()}\n{rest}")
    path = folder / "README.md"
    with replaced(path) as partial:
        partial.write_text(str(card), encoding="utf-8")
    return path


def _metadata(arguments: Echo4oTrainingArguments, ours: dict[str, Any], runs: Sequence[Run]) -> ModelCardData:
    """The YAML of the card, out of that of `model_card.md`."""
    adapter = arguments.method == "lora"
    fields = ours | {
        "library_name": "peft" if adapter else ours["library_name"],
        "base_model": arguments.model if _on_hub(arguments.model) else None,
        "base_model_relation": ("adapter" if adapter else "finetune") if _on_hub(arguments.model) else None,
        "datasets": [hub for name in _datasets(arguments) if _on_hub(hub := HUB_NAMES.get(name, name))] or None,
        "tags": [*ours["tags"], *(["lora"] if adapter else [])],
    }
    if runs and runs[0].results["scores"][runs[0].results["benchmark"]] is not None:
        index = model_index(runs, _published())
        fields |= {"model_name": index.model_name, "eval_results": index.eval_results}
    return ModelCardData(**fields)


def _settings(arguments: Echo4oTrainingArguments, state: TrainerState) -> dict[str, str]:
    """What the table of the card says; what is off or not given is left out."""
    settings: dict[str, Any] = {"steps": state.global_step, "processes": arguments.world_size}
    names = (*LORA_SETTINGS, *SETTINGS) if arguments.method == "lora" else SETTINGS
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            settings[name] = getattr(value, "value", value)  # of an Enum
    if torch.cuda.is_available():
        settings["device"] = torch.cuda.get_device_name()
    settings["software"] = ", ".join(f"{name} {version(name)}" for name in SOFTWARE)
    return {name.replace("_", " "): str(value) for name, value in settings.items()}


def _datasets(arguments: Echo4oTrainingArguments) -> list[str]:
    entries: Sequence[Mapping[str, Any]] = arguments.mixture or [{"dataset": arguments.dataset}]
    return list(dict.fromkeys(entry["dataset"] for entry in entries))


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _public(name: str) -> str:
    """A name on the Hub or of this package as it is; of a folder only its last part."""
    return name if _on_hub(name) or name in BUNDLED_NAMES else Path(name).resolve().name


def _linked(name: str) -> str:
    """A name for the card's text, with a link if it is on the Hub."""
    hub, kind = (HUB_NAMES[name], "datasets/") if name in HUB_NAMES else (name, "")
    if _on_hub(hub):
        return f"[{markdown_text(hub)}](https://huggingface.co/{kind}{hub})"
    return f"`{_public(hub)}`"


def _loss_curve(folder: Path, log: Sequence[Mapping[str, float]]) -> str | None:
    """Draw the losses of the log; None where there is none."""
    series = []
    for name in LOSSES:
        lines = [line for line in log if name in line]
        if lines:
            steps, values = [line["step"] for line in lines], [line[name] for line in lines]
            series.append({"name": name, "steps": steps, "values": values})
    if not series:
        return None
    with replaced(folder / "card" / "loss.png") as partial:
        curve_picture(series, "loss").save(partial, "PNG")
    return "card/loss.png"


def _steps(folder: Path, pattern: str) -> dict[int, Path]:
    """What validation left, first and last, by the step."""
    found = {int(re.findall(r"step-(\d+)", str(path))[-1]): path for path in folder.glob(f"validation/{pattern}")}
    return {step: found[step] for step in sorted({min(found), max(found)})} if found else {}


def _grids(folder: Path) -> dict[str, str]:
    grids = {}
    for step, path in _steps(folder, "step-*.png").items():
        with replaced(folder / "card" / path.name) as partial:
            shutil.copyfile(path, partial)
        grids[f"Step {step}"] = f"card/{path.name}"
    return grids


def _runs(folder: Path) -> list[Run]:
    """The scores at the first and the last step."""
    found = _steps(folder, "step-*/results.json").items()
    return [Run(f"step {step}", _without_folders(read_results(path)), path.parent) for step, path in found]


def _without_folders(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results whose judges are not called by the folders of their files, as `scripted:/home/me/replies.jsonl` is."""

    def short(text: str) -> str:
        return re.sub(r"(?<![\w.-])~?(?:[/\\][^\s/\\,]+)*[/\\](?=[^\s/\\])", "", text)

    return {
        **results,
        "deviations": [short(text) for text in results["deviations"]],
        "judges": [{**judge, "name": short(judge["name"])} for judge in results["judges"]],
        "per_judge": {short(name): scores for name, scores in results["per_judge"].items()},
    }


def _tables(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    comparisons = []
    if len(runs) == 2 and runs[0].question == runs[1].question:
        first, last = runs
        comparisons = [Comparison(first, last, compare(first.results, last.results, last.results["seed"]))]
    text = tables_text(runs, "markdown", published=_published(), comparisons=comparisons)
    return re.sub("^## ", "### ", text.strip(), flags=re.MULTILINE)


def _published() -> dict[tuple[str, str, str], Any]:
    return {(name, "official", ITEMS_SHA256[name]): module.PUBLISHED for name, module in BENCHMARKS.items()}


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader(__package__, ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = markdown_text
    return environment.get_template("fine_tuned.md.jinja")
