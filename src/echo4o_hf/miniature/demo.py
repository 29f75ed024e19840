"""The whole journey in miniature: a base model, clean data, fine-tuning, pictures and scores."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from echo4o_hf.benchmarks.results import SCHEMA_VERSION
from echo4o_hf.miniature.items import SCORE_NAME, TAGS, load_items
from echo4o_hf.miniature.scoring import BENCHMARK, draw_and_score
from echo4o_hf.miniature.training import make_examples, train
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.report.report import write_report
from echo4o_hf.report.runs import Run

BASE, SHIPPED = "bagel-miniature", "echo4o-miniature"
TUNED, CONTROL = "fine-tuned", "control"
LEARNING_RATE = 2e-3
FULL = {"items_per_tag": 20, "examples": 8000, "steps": 500}
QUICK = {"items_per_tag": 5, "examples": 1200, "steps": 40}


def run_demo(output: Path, quick: bool = False, seed: int = 0, control: bool = False) -> dict[str, Any]:
    """Run the journey and write `summary.json`, `report.html`, the pictures and the fine-tuned model to `output`.

    A run that was stopped goes on where it was; other settings than before start over. The results of each model are
    in `NAME.scores.json`, as `echo4o evaluate` writes them.

    Args:
        output: Folder to write.
        quick: Fewer items and steps; shows the way, not the gain.
        seed: Of data, training and noise.
        control: Also train the same steps on the base's noisy captions.

    Returns:
        `runs`, the scores by the name of the run; `losses`; and `seconds`, of each stage.
    """
    size = QUICK if quick else FULL
    _start_over_if_changed(output, {**size, "seed": seed, "control": control, "schema_version": SCHEMA_VERSION})
    clock = time.monotonic()
    journey = _Journey(output, size, seed)
    runs = [journey.scored(BASE, BASE)]
    journey.fine_tuned(TUNED, noisy=False)
    runs.append(journey.scored(TUNED, str(output / TUNED)))
    if control:
        journey.fine_tuned(CONTROL, noisy=True)
        runs.append(journey.scored(CONTROL, str(output / CONTROL)))
    runs.append(journey.scored(SHIPPED, SHIPPED))
    results = {
        "seconds": journey.seconds,
        "runs": {run.name: run.results["scores"] for run in runs},
        "losses": journey.losses,
    }
    _write_json(output / "summary.json", results)
    write_report(
        runs,
        output / "report.html",
        title=f"Echo-4o in miniature: {SCORE_NAME}",
        losses=journey.losses,
        seconds=journey.seconds,
    )
    print(_table(runs))
    if quick:
        print(f"{size['steps']} steps are too few to learn; without --quick there are {FULL['steps']}")
    done = f"{time.monotonic() - clock:.0f} s" if journey.num_run else "all of it was there already"
    print(f"{done}; the pictures are in {output / 'report.html'}")
    return results


class _Journey:
    """The stages; each leaves a JSON file and is skipped when that is there."""

    def __init__(self, output: Path, size: dict[str, int], seed: int) -> None:
        self.output, self.size, self.seed = output, size, seed
        self.items = [item for tag in TAGS for item in _of_tag(tag)[: size["items_per_tag"]]]
        self.seconds: dict[str, float] = {}
        self.losses: list[dict[str, Any]] = []
        self.num_run = 0  # of the stages, by this call

    def scored(self, name: str, model: str) -> Run:
        """Draw and judge with a model."""
        file = self.output / f"{name}.scores.json"
        if not file.exists():
            self.num_run += 1
            start = time.monotonic()
            with tqdm(total=len(self.items), desc=f"{name}: pictures", unit="picture") as bar:
                results = draw_and_score(
                    _load(model), self.items, self.output, name, self.seed, lambda n: bar.update(n) and None
                )
            _write_json(file, {**results, "seconds": time.monotonic() - start})
        results = json.loads(file.read_text())
        self.seconds[f"{name}: pictures"] = results["seconds"]
        return Run(name, results, self.output)

    def fine_tuned(self, name: str, noisy: bool) -> None:
        """Fine-tune the base and save it as a pipeline of its own."""
        file = self.output / f"{name}.training.json"
        if not file.exists():
            self.num_run += 1
            start = time.monotonic()
            pipeline = _load(BASE)
            examples = make_examples(
                self.size["examples"], self.seed + 2, noisy, pipeline.vae, pipeline.processor, pipeline.model.config
            )
            with tqdm(total=self.size["steps"], desc=f"{name}: training", unit="step") as bar:
                losses = train(
                    pipeline.model,
                    examples,
                    steps=self.size["steps"],
                    learning_rate=LEARNING_RATE,
                    seed=self.seed,
                    checkpoint=self.output / f"{name}.state.safetensors",
                    on_step=lambda step: bar.update(step - bar.n) and None,
                )
            pipeline.save_pretrained(self.output / name)
            known = [None if loss != loss else loss for loss in losses]  # JSON has no NaN
            _write_json(file, {"losses": known, "seconds": time.monotonic() - start})
        stage = json.loads(file.read_text())
        self.seconds[f"{name}: training"] = stage["seconds"]
        values = [(step, loss) for step, loss in enumerate(stage["losses"], start=1) if loss is not None]
        self.losses.append({"name": name, "steps": [s for s, _ in values], "values": [v for _, v in values]})


def _of_tag(tag: str) -> list[Any]:
    return [item for item in load_items() if item.tag == tag]


def _load(model: str) -> Echo4oPipeline:
    pipeline = Echo4oPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.model.set_attn_implementation("eager")  # faster than sdpa at this size
    return pipeline


def _start_over_if_changed(output: Path, settings: dict[str, Any]) -> None:
    """Keep what earlier runs left only if they were asked for the same.

    Raises:
        ValueError: `output` holds files, but none of a demo.
    """
    file = output / "settings.json"
    if output.exists() and any(output.iterdir()):
        if not file.exists():
            raise ValueError(f"{output} holds files that are not a demo's; give an empty folder with --output")
        if json.loads(file.read_text()) != settings:
            shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    _write_json(file, settings)


def _write_json(file: Path, content: Any) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, file)


def _table(runs: list[Run]) -> str:
    scores = [run.results["scores"] for run in runs]
    head = f"{SCORE_NAME:26}" + "".join(f"{run.name:>18}" for run in runs)
    lines = [f"{tag:26}" + "".join(f"{one['per_tag'][tag]:18.2f}" for one in scores) for tag in TAGS]
    total = f"{'score':26}" + "".join(f"{one[BENCHMARK]:18.3f}" for one in scores)
    return "\n".join([head, *lines, total])
