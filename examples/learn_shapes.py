"""Fine-tunes the shipped base on clean pictures of shapes, and draws how its score rises.

    python examples/learn_shapes.py OUTPUT

A LoRA adapter and all weights, on a CPU, each scored on Shapes-140 before, while and after it trains. OUTPUT gets both
runs, learning.png (the scores) and before_after.png (the adapter's pictures).
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from PIL import Image

from echo4o_hf.benchmarks.evaluation import read_results
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.curve import curve_picture
from echo4o_hf.training.train import train

PROMPTS = [
    "two red circles on the left and a blue star on the right",
    "three green hearts",
    "a yellow ring above a purple cross",
    "a large orange square on the right and a small black diamond on the left",
]
COMMON = {
    "model": "bagel-miniature",
    "dataset": "echo4o-miniature",
    "dataset_config": "instruction_following",
    "max_tokens": 768,
    "gradient_accumulation_steps": 2,
    "sample_posterior": False,
    "max_steps": 800,
    "lr_scheduler_type": "linear",
    "warmup_steps": 20,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
    "validation_prompts": PROMPTS,
    "validation_steps": 200,
    "validation_inference_steps": 20,
    "validation_benchmark": str(files("echo4o_hf.miniature") / "items.jsonl"),
    "validation_judge": "shapes",
}
RUNS = {
    "full": {"method": "full", "learning_rate": 6e-4},
    "lora": {"method": "lora", "learning_rate": 1.5e-3, "lora_understanding": True},  # binding is read from the prompt
}


def learn(name: str, folder: Path) -> dict[int, float]:
    """Train one of `RUNS` in `folder`; the score by the step."""
    settings = {**COMMON, **RUNS[name], "latent_cache": str(folder.parent / "latents")}
    train(Echo4oTrainingArguments(output_dir=str(folder), **settings))
    results = {int(path.parent.name.split("-")[1]): path for path in folder.glob("validation/step-*/results.json")}
    return {step: read_results(results[step])["scores"]["geneval_pp"] for step in sorted(results)}


def main() -> None:
    """Run both and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    scores = {name: learn(name, output / name) for name in RUNS}
    lines = [{"name": name, "steps": [*one], "values": [*one.values()]} for name, one in scores.items()]
    curve_picture(lines, "Shapes-140").save(output / "learning.png")
    last = COMMON["max_steps"]
    grids = [Image.open(output / "lora" / "validation" / f"step-{step}.png") for step in (0, last)]
    both = Image.new("RGB", (grids[0].width, sum(grid.height for grid in grids)), "white")
    both.paste(grids[0], (0, 0))
    both.paste(grids[1], (0, grids[0].height))
    both.save(output / "before_after.png")
    table = "\n".join(
        f"{name}: " + ", ".join(f"{one[step]:.3f} at {step}" for step in one) for name, one in scores.items()
    )
    print(table)


if __name__ == "__main__":
    main()
