"""Training runs on a tiny model, each in a process that may be killed: `python training_process.py RUNS` (JSON).

A list of settings of `Echo4oTrainingArguments`, and of these: `rows`, how many; `kill_after`, a step after which the
process kills itself; `kill_while_saving`, a step in whose checkpoint it does so, with half of the files written;
`kill_within`, seconds after which it is killed from outside. Prints how each process ended.

The processes are forks of one that has imported everything, with one thread: so they start at once.
"""

import copy
import functools
import io
import json
import os
import signal
import sys
import time
import traceback
import warnings

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from echo4o_hf.model.checkpoint import load_components
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.collator import PackCollator
from echo4o_hf.training.latents import LatentEncoder
from echo4o_hf.training.packs import EagerPacks, StreamedPacks
from echo4o_hf.training.parameters import prepare_model
from echo4o_hf.training.samples import SampleBuilder, training_sizes
from echo4o_hf.training.trainer import Echo4oTrainer

MAX_TOKENS = 90
TEXTS = ("a red circle", "two blue squares left of a green star", "What is this?", "a big yellow triangle")


def picture(seed):
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@functools.cache
def make_rows(count):
    """Drawings from a text, every third from a picture too, and every fourth row an answer."""
    rows = []
    for number in range(count):
        asks = number % 4 == 3
        rows.append(
            {
                "id": f"r{number}",
                "instruction": TEXTS[number % len(TEXTS)],
                "input_images": [picture(1000 + number)] if asks or number % 3 == 0 else [],
                "output_image": None if asks else picture(number),
                "answer": "a circle" if asks else None,
            }
        )
    image = datasets.Image(decode=False)
    text = datasets.Value("string")
    features = {"id": text, "instruction": text, "input_images": datasets.List(image), "output_image": image}
    return datasets.Dataset.from_list(rows, features=datasets.Features({**features, "answer": text}))


@functools.cache
def load_miniature():
    """Loaded once, and never changed."""
    return load_components("bagel-miniature", dtype=torch.float32)


def make_model(config, seed=0):
    """The miniature, with fewer and smaller layers."""
    config = copy.deepcopy(config)
    for part, hidden in ((config.text_config, 48), (config.vision_config, 48)):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = hidden, 64, 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    torch.manual_seed(seed)
    return BagelForConditionalGeneration(config)


def make_trainer(rows=24, kind=Echo4oTrainer, **settings):
    defaults = {
        "model": "bagel-miniature",
        "dataset": "made here",
        "method": "full",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 6,
        "seed": 3,
    }
    args = Echo4oTrainingArguments(**defaults | settings)
    components = load_miniature()
    processor, vae, config = components["processor"], components["vae"], components["model"].config
    model = prepare_model(make_model(config), args)
    sizes = training_sizes(processor, config)
    builder = SampleBuilder(processor, config, vae.config, sizes=sizes, max_tokens=MAX_TOKENS, seed=args.seed)
    data = make_rows(rows)
    if args.streaming:
        packs = StreamedPacks(data.to_iterable_dataset(4), builder, MAX_TOKENS, args.seed, shuffle_window=4)
    else:
        packs = EagerPacks(data, builder, MAX_TOKENS, args.seed)
    return kind(
        model,
        args,
        train_dataset=packs,
        data_collator=PackCollator(builder),
        encoder=LatentEncoder(vae, config.latent_patch_size),
        processing_class=processor,
    )


class DyingTrainer(Echo4oTrainer):
    """Kills its process in the middle of a checkpoint."""

    kill_while_saving: int | None = None

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.kill_while_saving:
            assert len(os.listdir(output_dir)) > 3
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


class KillAfter(TrainerCallback):
    """Kills the process at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(kill_after=None, kill_while_saving=None, resume=False, **settings):
    """Train and save; the losses of all steps are in the trainer's state."""
    DyingTrainer.kill_while_saving = kill_while_saving
    trainer = make_trainer(kind=DyingTrainer, **settings)
    if kill_after is not None:
        trainer.add_callback(KillAfter(kill_after))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()


def run_in_fork(kill_within=None, **settings):
    """How a process that runs ends: its exit code, or minus the signal."""
    child = os.fork()
    if not child:
        try:
            run(**settings)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_within is not None:
        time.sleep(kill_within)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for settings in json.loads(sys.argv[1]):
        sys.stdout.write(f"ended: {run_in_fork(**settings)}\n")
