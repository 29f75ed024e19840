"""Training runs in several processes on a tiny model: `python distributed_process.py RUNS` (JSON).

A list of settings of `Echo4oTrainingArguments`, and of these: `processes`, how many; `sharded`, with FSDP2 as
examples/accelerate/fsdp2.yaml has it, and with changes to its environment; `packs`, rows of each pack; `resume`;
`kill_after`, a step after which they die. Or `argv`, for `python -m echo4o_hf.training.train`.

The processes are forks of one that has imported everything, with one thread: so they start at once. They talk through
gloo. Prints how they ended.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from echo4o_hf.training.train import main
from echo4o_hf.training.validation import ValidationCallback

SCRIPT = Path(__file__).with_name("training_process.py")
spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)
CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"


def launch_arguments(name, *flags):
    """What `accelerate launch` makes of a configuration and of flags that override it: the arguments and the file."""
    line = ["--config_file", str(CONFIGURATIONS / name), *flags, "-m", "echo4o_hf.training.train"]
    return _validate_launch_command(launch_command_parser().parse_args(line))[:2]


def launch_environment(name, *flags):
    """What `accelerate launch` tells its processes by their environment."""
    return prepare_multi_gpu_env(launch_arguments(name, *flags)[0])


def shard_on_cpu():
    """Let accelerate take FSDP on CPUs: it passes over the plugin where the processes have no GPUs."""
    initialize = AcceleratorState.__init__

    def with_plugin(self, *arguments, fsdp_plugin=None, **options):
        initialize(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin


def make_trainer(packs=None, **settings):
    trainer = process.make_trainer(**settings)
    trainer.data_collator.always_all_parts = True
    if packs is not None:
        trainer.train_dataset.packs = packs
        trainer._run = dataclasses.replace(trainer._run, packs=len(packs))
    elif trainer.args.streaming:
        trainer.train_dataset.settings |= {"rank": trainer.args.process_index, "world": trainer.args.world_size}
    if trainer.args.validation_prompts:
        trainer.add_callback(ValidationCallback(trainer))
    return trainer


def run(argv=None, kill_after=None, resume=False, **settings):
    if argv is not None:
        sys.exit(main(argv))
    trainer = make_trainer(**settings)
    if kill_after is not None:
        trainer.add_callback(process.KillAfter(kill_after))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters()) == trainer.is_fsdp_enabled


def start(rank, processes, port, sharded, function, settings):
    """A process of a group."""
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sharded:
        changes = {name: value for name, value in launch_environment("fsdp2.yaml").items() if "FSDP" in name}
        os.environ |= changes | (sharded if isinstance(sharded, dict) else {})
        shard_on_cpu()
    try:
        function(**settings)
        if processes > 1:
            torch.distributed.destroy_process_group()
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def run_in_forks(processes=1, sharded=False, function=run, **settings):
    """How the processes ended: exit codes, or minus the signal; the first to fail ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(processes):
        child = os.fork()
        if not child:
            start(rank, processes, port, sharded, function, settings)
        children[child] = rank
    codes = {}
    while len(codes) < processes:
        child, status = os.wait()
        codes[children[child]] = os.waitstatus_to_exitcode(status)
        if codes[children[child]]:
            for other, rank in children.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in range(processes)]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for settings in json.loads(sys.argv[1]):
        sys.stdout.write(f"ended: {run_in_forks(**settings)}\n")
        sys.stdout.flush()
