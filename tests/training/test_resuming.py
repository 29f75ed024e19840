"""Going on from a checkpoint: killed at any moment, a run ends with the bits of one that never was."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echo4o_hf.training.checkpoints import newest_checkpoint

SCRIPT = Path(__file__).with_name("training_process.py")
spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)

DIED = -9


def run(*runs):
    """Each in a process of its own; how they ended."""
    output = subprocess.run([sys.executable, SCRIPT, json.dumps(runs)], capture_output=True, text=True)
    ended = [int(line.split()[1]) for line in output.stdout.splitlines() if line.startswith("ended: ")]
    assert len(ended) == len(runs) and set(ended) <= {0, DIED}, output.stdout + output.stderr
    return ended


def same_results(one, other):
    """Compare the result, the state and the losses of each step bit for bit."""
    logs = []
    for folder in (one, other):
        state = json.loads((folder / "trainer_state.json").read_text())
        lines = [line for line in state["log_history"] if "loss" in line]
        logs.append([{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines])
    assert logs[0] == logs[1] and logs[0]
    last = [newest_checkpoint(folder) for folder in (one, other)]
    assert last[0].name == last[1].name
    pairs = [(one / name, other / name) for name in ("model.safetensors", "adapter_model.safetensors")]
    pairs += [(path, last[1] / path.name) for path in last[0].iterdir() if path.suffix == ".safetensors"]
    assert sum(path.exists() for path, _ in pairs) >= 2
    for path, twin in pairs:
        assert path.exists() == twin.exists() and (not path.exists() or path.read_bytes() == twin.read_bytes()), path
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in last]
    torch.testing.assert_close(*states, atol=0, rtol=0)


def test_a_run_that_is_killed_at_a_step_and_while_saving_ends_with_the_same_bits(tmp_path):
    settings = {"save_steps": 2, "max_steps": 7, "gradient_accumulation_steps": 2, "ema_decay": 0.9}
    killed = settings | {"output_dir": str(tmp_path / "killed")}
    ended = run(
        settings | {"output_dir": str(tmp_path / "whole")},
        killed | {"kill_after": 3},
        killed | {"resume": True, "kill_while_saving": 4},
        killed | {"resume": True},
    )
    assert ended == [0, DIED, DIED, 0]
    same_results(tmp_path / "whole", tmp_path / "killed")


LORA = {"method": "lora", "lora_rank": 4, "lora_dropout": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full", "logging_steps": 3},
        {"method": "full", "muon": True, "ema_decay": 0.9, "dataloader_num_workers": 2},
        {"method": "generation", "optim": "adamw_bnb_8bit", "gradient_accumulation_steps": 3},
        {**LORA, "ema_decay": 0.9, "activation_checkpointing": True},
        {**LORA, "muon": True, "dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {**LORA, "streaming": True, "logging_steps": 3},
        {**LORA, "streaming": True, "dataloader_num_workers": 2, "ema_decay": 0.9},
        {"method": "full", "streaming": True, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_killed_at_random_moments(tmp_path, settings):
    """At random steps, while saving, and at any moment from outside; over the ends of epochs."""
    settings = {"save_steps": 3, "max_steps": 17, "rows": 9, "save_total_limit": 2} | settings
    rng = random.Random(repr(settings))
    killed = settings | {"output_dir": str(tmp_path / "killed")}
    runs = [settings | {"output_dir": str(tmp_path / "whole")}, killed | {"kill_after": rng.randint(1, 8)}]
    runs.append(killed | {"resume": True, "kill_while_saving": rng.choice((9, 12))})
    runs += [killed | {"resume": True, "kill_within": rng.uniform(0.5, 3)} for _ in range(4)]
    run(*runs, killed | {"resume": True})
    same_results(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture
def make_trainer(tmp_path):
    """Function (settings) -> trainer on tiny packs; everything goes to `tmp_path`."""

    def make(**settings):
        return process.make_trainer(**{"output_dir": str(tmp_path)} | settings)

    return make


def history(trainer):
    """What was logged of each step."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def same_weights(one, other):
    pairs = zip(one.model.named_parameters(), other.model.named_parameters(), strict=True)
    return all(name == twin and torch.equal(weight, other) for (name, weight), (twin, other) in pairs)


def test_logs_between_which_a_run_was_resumed_are_of_all_their_steps(make_trainer, tmp_path):
    settings = {"logging_steps": 4, "save_steps": 3, "max_steps": 8}
    whole = make_trainer(**settings, output_dir=str(tmp_path / "a"))
    whole.train()
    make_trainer(**settings, output_dir=str(tmp_path / "b")).train()
    shutil.rmtree(tmp_path / "b" / "checkpoint-8")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "b"))
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(whole) and same_weights(resumed, whole)


def test_rotation_keeps_the_newest(make_trainer, tmp_path):
    make_trainer(save_steps=1, max_steps=5, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_a_finished_run_has_nothing_left_to_do(make_trainer, tmp_path):
    for streaming in (False, True):
        settings = {"output_dir": str(tmp_path / str(streaming)), "max_steps": 5, "streaming": streaming}
        trainer = make_trainer(**settings)
        trainer.train()
        again = make_trainer(**settings)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 5 and same_weights(again, trainer)


def test_without_a_checkpoint_training_starts_at_the_first_step(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr("echo4o_hf.training.trainer.logger.warning", said.append)
    trainer = make_trainer(max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and "no checkpoint" in said[0]


def test_a_checkpoint_is_not_gone_on_from_with_other_steps(make_trainer, tmp_path):
    make_trainer(max_steps=2).train()
    other = make_trainer(max_steps=4, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps at 1"):
        other.train(resume_from_checkpoint=True)
    other = make_trainer(max_steps=4, gradient_accumulation_steps=2, ignore_data_skip=True)
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 4


def test_a_checkpoint_of_the_model_alone_is_refused(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_only_model=True).train()
    with pytest.raises(OSError, match=r"checkpoint-2 .* no position_0.pt"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=True)
