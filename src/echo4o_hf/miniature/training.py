"""Train the miniature: the official classes at tiny size, on noisy captions (the base) or clean ones (fine-tuning).

    python -m echo4o_hf.miniature.training base --output DIR --steps 4000
    python -m echo4o_hf.miniature.training fine-tune --model DIR --output DIR --steps 400

`--captions noisy` on fine-tuning is the control: the same steps on more of the base's data. A run that was stopped
goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from echo4o_hf.miniature.examples import Example, Examples, Task, add_latents, draw_examples
from echo4o_hf.miniature.muon import Muon
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import collate
from echo4o_hf.model.processing_bagel import BagelProcessor

SHARED = Path(__file__).parent / "checkpoints" / "shared"
BATCH_SIZE = 32
NOISE_DRAWS = 4
CHECKPOINT_STEPS = 100
EMA_DECAY = 0.998
WARMUP_STEPS = 100
DECAY_SHARE = 0.4  # of the steps, at the end, with a falling learning rate
_SEVEN_TEXTS: tuple[Task, ...] = ("text",) * 7
TASK_CYCLE: tuple[Task, ...] = ("describe", *_SEVEN_TEXTS, "references", *_SEVEN_TEXTS)


def miniature_config(processor: BagelProcessor) -> BagelConfig:
    """A Bagel of 6 M parameters for pictures of 64x64 pixels, 4x4 latent tokens and 4x4 vision patches."""
    return BagelConfig(
        text_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "patch_size": 16,
            "image_size": 64,
        },
        max_latent_size=4,
        vit_max_num_patch_per_side=4,
        timestep_shift=3.0,
        bos_token_id=processor.bos_token_id,
        eos_token_id=processor.eos_token_id,
        start_of_image_token_id=processor.start_of_image_token_id,
        end_of_image_token_id=processor.end_of_image_token_id,
    )


def make_examples(
    count: int, seed: int, noisy: bool, vae: AutoencoderKL, processor: BagelProcessor, config: BagelConfig
) -> Examples:
    """Pictures and texts of all tasks with their latents; the references and descriptions are a sixth each."""
    counts: dict[Task, int] = {"text": count, "references": count // 6, "describe": count // 6}
    tasks: dict[Task, list[Example]] = {}
    for task, number in counts.items():
        tasks[task] = draw_examples(task, number, seed, noisy)
        if task != "describe":
            add_latents(tasks[task], vae, processor, config.latent_patch_size)
    return Examples(tasks, processor, (config.max_latent_size, config.max_latent_size))


def train(
    model: BagelForConditionalGeneration,
    examples: Examples,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train all parameters and leave their moving average in the model.

    Args:
        model: Changed in place.
        examples: What to learn from.
        steps: Batches; one in eight is of descriptions or of references.
        learning_rate: Of both optimizers: Muon for the matrices of the layers, AdamW for the rest.
        seed: Decides batches, noise and timesteps.
        checkpoint: State, written every `CHECKPOINT_STEPS` steps and read at the start: a stopped run goes on.
        on_step: Called with the number of steps done, for a progress bar.

    Returns:
        The flow-matching loss of each step, NaN on steps that describe.

    Raises:
        ValueError: The loss is not finite.
    """
    model.train()
    average = AveragedModel(model, avg_fn=_moving_average)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = _optimizers(model, learning_rate)
    losses = _resume(checkpoint, model, average, optimizers)
    for step in range(len(losses), steps):
        torch.manual_seed(seed * 1_000_003 + step)
        rng = np.random.default_rng([seed, step])
        task = TASK_CYCLE[step % len(TASK_CYCLE)]
        samples = examples.batch(task, BATCH_SIZE, NOISE_DRAWS, rng)
        output = model(**collate(samples), logits_to_keep=1)
        if not torch.isfinite(output.loss):
            raise ValueError(f"the loss is {output.loss.item()} at step {step}; lower learning_rate={learning_rate}")
        output.loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * _schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        losses.append(float("nan") if output.flow_loss is None else output.flow_loss.item())
        on_step(step + 1)
        if checkpoint is not None and (step + 1) % CHECKPOINT_STEPS == 0:
            _save_state(checkpoint, model, average, optimizers, losses)
    model.load_state_dict(average.module.state_dict())
    model.eval()
    return losses


def _optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if ".layers." in name and parameter.ndim == 2 else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, learning_rate), adamw]


def _moving_average(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """Exponential, over a tenth of the steps at first: a short run would else end close to where it began."""
    return torch.lerp(average, current, max(1 - EMA_DECAY, 9 / (10 + int(count))))


def _schedule(step: int, steps: int) -> float:
    warmup = min(WARMUP_STEPS, max(1, steps // 4))
    return min(1.0, (step + 1) / warmup, max(0.02, (steps - step) / (DECAY_SHARE * steps)))


def _resume(
    checkpoint: Path | None, model: nn.Module, average: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> list[float]:
    """Restore what `_save_state` wrote, if anything, and return the losses of the steps done."""
    if checkpoint is None or not checkpoint.exists():
        return []
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    with safe_open(checkpoint, framework="pt") as file:
        losses = json.loads(file.metadata()["losses"])
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part, _, key = name.partition("/")
            parts[part][key] = file.get_tensor(name)
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    for number, optimizer in enumerate(optimizers):
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in parts[f"optimizer{number}"].items():
            index, _, moment = key.partition(".")
            moments[int(index)][moment] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return [float("nan") if loss is None else loss for loss in losses]


def _save_state(
    checkpoint: Path,
    model: nn.Module,
    average: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    losses: list[float],
) -> None:
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{number}/{index}.{name}": value for name, value in moments.items()}
    known = [None if loss != loss else loss for loss in losses]  # JSON has no NaN
    partial = checkpoint.with_suffix(".partial")
    save_file(tensors, partial, metadata={"losses": json.dumps(known)})
    os.replace(partial, checkpoint)


def main() -> None:
    """Train one of the two checkpoints, or the control."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "fine-tune"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--model", type=Path, help="folder of the base to fine-tune")
    parser.add_argument("--captions", choices=["noisy", "clean"], help="noisy for the base, clean for fine-tuning")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--examples", type=int, default=30_000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the layers: minutes at first, then faster")
    arguments = parser.parse_args()
    if (arguments.what == "fine-tune") != (arguments.model is not None):
        parser.error("--model goes with fine-tune, and only with it")

    start = time.monotonic()
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKL.from_pretrained(SHARED / "vae", torch_dtype=torch.float32)
    processor = BagelProcessor.from_pretrained(SHARED / "processor")
    if arguments.model is None:
        model = BagelForConditionalGeneration(miniature_config(processor))
    else:
        model = BagelForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    model.set_attn_implementation("eager")  # faster than sdpa at this size
    if arguments.compile:
        for layer in model.language_model.model.layers:
            layer.compile()
    noisy = arguments.captions == "noisy" or (arguments.captions is None and arguments.what == "base")
    examples = make_examples(arguments.examples, arguments.seed + 1, noisy, vae, processor, model.config)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=arguments.steps, unit="step") as bar:
        losses = train(
            model,
            examples,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            checkpoint=arguments.output / "training_state.safetensors",
            on_step=lambda step: bar.update(step - bar.n) and None,
        )
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    minutes = (time.monotonic() - start) / 60
    print(f"{arguments.steps} steps in {minutes:.1f} minutes; last losses {np.nanmean(losses[-100:]):.4f}")


if __name__ == "__main__":
    main()
