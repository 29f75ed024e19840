"""Several processes do what one does, to rounding; on a CPU, through gloo.

With DDP losses and weights are the same bits: gloo adds up two processes as one process adds up two packs. With FSDP2
losses differ by at most 1e-5 and weights by 1e-6 (learning rate 1e-3): the norm that clips the gradient is added up of
shares.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from PIL import Image
from safetensors.torch import load_file

from echo4o_hf import Echo4oPipeline
from echo4o_hf.miniature.dataset import write_dataset
from echo4o_hf.training.checkpoints import newest_checkpoint
from echo4o_hf.training.optimizers import layer_matrices
from echo4o_hf.training.packs import PackSampler

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parents[1] / "examples"
SCRIPT = TESTS / "distributed_process.py"
spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
distributed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distributed)

# Rows 3, 7 and 11 are answers, which draw nothing; 1, 2, 4, 5 and 8 are drawings from a text, which see nothing.
PACKS = [[3], [1, 2], [7], [4], [0], [11], [3, 7], [1], [5, 8]]
ANSWERS, FROM_TEXT = {3, 7, 11}, {1, 2, 4, 5, 8}
SAME_BATCH = {"gradient_accumulation_steps": 2}
TWO = {"processes": 2}
FSDP = {"processes": 2, "sharded": True}
ROUNDING = {"loss": 1e-5, "weight": 1e-6}
FULL, LORA = {"method": "full"}, {"method": "lora", "lora_rank": 4}
DIED = -9


def run(tmp_path, **runs):
    """Each in its folder, or that of `output`; how their processes ended."""
    settings = []
    for name, options in runs.items():
        folder = str(tmp_path / options.get("output", name))
        options = {key: value for key, value in options.items() if key != "output"}
        settings.append(options if "argv" in options else {"output_dir": folder} | options)
    output = subprocess.run([sys.executable, SCRIPT, json.dumps(settings)], capture_output=True, text=True)
    ended = [json.loads(line[7:]) for line in output.stdout.splitlines() if line.startswith("ended: ")]
    codes = {code for processes in ended for code in processes}
    assert len(ended) == len(runs) and codes <= {0, DIED}, output.stdout + output.stderr
    return dict(zip(runs, ended, strict=True))


def losses(folder):
    lines = [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]
    assert len(lines) == 6
    names = ("loss", "flow_loss", "text_loss")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def weights(folder):
    """The result, but for key biases of the vision encoder: their gradients are rounding, for softmax undoes them."""
    paths = [folder / name for name in ("model.safetensors", "adapter_model.safetensors")]
    (tensors,) = [load_file(path) for path in paths if path.exists()]
    return {name: tensor for name, tensor in tensors.items() if "vit" not in name or "k_proj.bias" not in name}


def compare(one, other, loss=0.0, weight=0.0):
    ours, theirs = losses(one), losses(other)
    assert ours == pytest.approx(theirs, abs=loss, rel=0)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    apart = {name: (tensor - theirs[name]).abs().max().item() for name, tensor in ours.items()}
    assert max(apart.values()) <= weight, max(apart.items(), key=lambda item: item[1])


def test_some_steps_have_answers_alone_in_one_process_and_drawings_from_texts_alone_in_the_other(tmp_path):
    trainer = distributed.make_trainer(packs=PACKS, output_dir=str(tmp_path))
    packs = [set(PACKS[index]) for _, index in PackSampler(trainer.train_dataset, 2)]
    steps = [*zip(packs[::2], packs[1::2], strict=True), *zip(packs[1::2], packs[::2], strict=True)]
    assert any(one <= ANSWERS and other <= FROM_TEXT for one, other in steps)


def test_ddp_does_what_one_process_does(tmp_path):
    run(tmp_path, one={**SAME_BATCH, "packs": PACKS}, two={**TWO, "packs": PACKS})
    compare(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("method", [FULL, {"method": "generation"}, LORA], ids=lambda method: method["method"])
def test_ddp_and_fsdp2_do_what_one_process_does(tmp_path, method):
    settings = {**method, "packs": PACKS}
    run(tmp_path, one=settings | SAME_BATCH, ddp=settings | TWO, fsdp=settings | FSDP)
    compare(tmp_path / "one", tmp_path / "ddp")
    compare(tmp_path / "one", tmp_path / "fsdp", **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FULL, LORA], ids=lambda method: method["method"])
def test_activation_checkpointing(tmp_path, method):
    settings = {**method, "packs": PACKS}
    less = {**settings, "activation_checkpointing": True}
    run(tmp_path, plain=settings | SAME_BATCH, ddp=less | TWO, fsdp=less | FSDP)
    compare(tmp_path / "plain", tmp_path / "ddp", **ROUNDING)
    compare(tmp_path / "plain", tmp_path / "fsdp", **ROUNDING)


@pytest.mark.slow
def test_bfloat16_rounds_weights_alone(tmp_path):
    """With accelerate's own policy, which rounds inputs and losses, they are 9e-3 apart."""
    settings = {**LORA, "packs": PACKS, "bf16": True}
    run(tmp_path, ddp=settings | TWO, fsdp=settings | FSDP)
    assert losses(tmp_path / "ddp") == pytest.approx(losses(tmp_path / "fsdp"), abs=5e-4)


@pytest.mark.slow
def test_muon_takes_whole_matrices(tmp_path):
    """Its bfloat16 iterations blow up the rounding of flat directions; of shares alone it makes other matrices."""
    settings = {"muon": True, "packs": PACKS}
    run(tmp_path, one=settings | SAME_BATCH, fsdp=settings | FSDP)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "fsdp"), abs=5e-4)
    model = distributed.process.make_model(distributed.process.load_miniature()["model"].config)
    matrices = {id(matrix) for matrix in layer_matrices(model)}
    start = {name: weight.detach() for name, weight in model.named_parameters() if id(weight) in matrices}
    one, fsdp = weights(tmp_path / "one"), weights(tmp_path / "fsdp")
    apart = [(one[name] - fsdp[name]).norm() / (one[name] - weight).norm() for name, weight in start.items()]
    assert len(apart) > 30 and torch.stack(apart).median() < 0.1


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {**TWO, "packs": PACKS, "ema_decay": 0.6},
        {**TWO, **LORA, "streaming": True, "lora_dropout": 0.1},
        {**FSDP, "packs": PACKS, "ema_decay": 0.6},
        {**FSDP, **LORA, "packs": PACKS, "ema_decay": 0.6, "lora_dropout": 0.1},
        {**FSDP, "packs": PACKS, "sharded": {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}},
        {**FSDP, **LORA, "packs": PACKS, "sharded": {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}},
    ],
    ids=["ddp", "ddp-stream-lora", "fsdp", "fsdp-lora", "fsdp-whole", "fsdp-whole-lora"],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, settings):
    settings = settings | {"save_steps": 2}
    ended = run(
        tmp_path,
        whole=settings,
        killed=settings | {"kill_after": 3},
        resumed=settings | {"output": "killed", "resume": True},
    )
    assert ended == {"whole": [0, 0], "killed": [DIED, DIED], "resumed": [0, 0]}
    compare(tmp_path / "whole", tmp_path / "killed")
    averages = [newest_checkpoint(tmp_path / name) / "average.safetensors" for name in ("whole", "killed")]
    assert [path.exists() for path in averages] == ["ema_decay" in settings] * 2
    if "ema_decay" in settings:
        assert averages[0].read_bytes() == averages[1].read_bytes()


# --------------------------------------------------------------------------------------------------------- validation


@pytest.mark.slow
@pytest.mark.parametrize("method", [FULL, LORA], ids=lambda method: method["method"])
def test_validation_draws_what_one_process_draws_and_leaves_the_training_as_it_was(tmp_path, method):
    """After every step, with averaged weights: what FSDP has gathered of those must not be trained on."""
    settings = {**method, "packs": PACKS, "ema_decay": 0.6}
    prompts = ["a red circle", "two blue squares", "a star"]  # one process draws twice
    drawing = {**settings, "validation_prompts": prompts, "validation_steps": 1, "validation_inference_steps": 3}
    run(tmp_path, plain=settings | FSDP, one=drawing | SAME_BATCH, ddp=drawing | TWO, fsdp=drawing | FSDP)
    compare(tmp_path / "plain", tmp_path / "fsdp")
    compare(tmp_path / "one", tmp_path / "ddp")
    pictures = {}
    for name in ("one", "ddp", "fsdp"):
        paths = [tmp_path / name / "validation" / f"step-{step}.png" for step in range(7)]
        pictures[name] = np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])
    assert (pictures["one"] == pictures["ddp"]).all()
    assert np.abs(pictures["one"] - pictures["fsdp"]).max() <= 1
    assert (pictures["one"][0] != pictures["one"][6]).any()


# ------------------------------------------------------------------------------------------- from settings to results


@pytest.mark.slow
def test_the_pipeline_loads_what_several_processes_trained(tmp_path):
    write_dataset(tmp_path / "data", 8)
    data = ["--dataset", "echo-4o-image", "--dataset_config", "instruction_following"]
    data += ["--data_dir", str(tmp_path / "data"), "--model", "bagel-miniature", "--use_cpu", "true"]
    quick = "--max_tokens 256 --dataloader_num_workers 0 --report_to none --max_steps 3 --save_steps 2"
    quick += " --warmup_steps 0 --learning_rate 1e-3 --validation_inference_steps 1"

    def argv(example, name, accumulation=1):
        folders = ["--output_dir", str(tmp_path / name), "--latent_cache", str(tmp_path / "latents")]
        steps = ["--gradient_accumulation_steps", str(accumulation)]
        return {"argv": [str(EXAMPLES / example), *data, *quick.split(), *folders, *steps]}

    run(
        tmp_path,
        full=argv("train_full.yaml", "full", 2),
        full_fsdp=argv("train_full.yaml", "full_fsdp") | FSDP,
        lora=argv("train_lora.yaml", "lora", 2),
        lora_ddp=argv("train_lora.yaml", "lora_ddp") | TWO,
        lora_fsdp=argv("train_lora.yaml", "lora_fsdp") | FSDP,
    )
    one, fsdp = (Echo4oPipeline.from_pretrained(tmp_path / name) for name in ("full", "full_fsdp"))
    base = Echo4oPipeline.from_pretrained("bagel-miniature", dtype=torch.float32)
    for (name, ours), theirs in zip(one.model.state_dict().items(), fsdp.model.state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0, msg=name)
    assert not torch.equal(one.model.llm2vae.weight, base.model.llm2vae.weight)
    for file in ("model_index.json", "model/config.json", "model/generation_config.json"):
        assert (tmp_path / "full" / file).read_text() == (tmp_path / "full_fsdp" / file).read_text(), file
    pictures = []
    for name in ("lora", "lora_ddp", "lora_fsdp", None):
        if name is not None:
            base.load_lora_weights(tmp_path / name)
        generator = torch.Generator().manual_seed(0)
        pictures.append(np.asarray(base("a red circle", num_inference_steps=3, generator=generator).images[0], int))
        if name is not None:
            base.unload_lora_weights()
    assert [np.abs(picture - pictures[0]).max() <= 1 for picture in pictures] == [True, True, True, False]


# ------------------------------------------------------------------------------------------- examples for accelerate


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_reads_the_configurations(name):
    path = EXAMPLES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert config.distributed_type == kinds.get(name, DistributedType.DEEPSPEED)
    assert config.mixed_precision == "bf16" and config.num_processes == 8
    text = path.read_text()
    assert f"--config_file examples/accelerate/{name}.yaml -m echo4o_hf.training.train examples/train_" in text


def test_fsdp2_of_the_example(monkeypatch):
    for name, value in distributed.launch_environment("fsdp2.yaml", "--num_processes", "2").items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.transformer_cls_names_to_wrap == ["BagelDecoderLayer", "SiglipEncoderLayer"]
    assert "SHARDED" in str(plugin.state_dict_type)


def test_zero3_of_the_example():
    """Without DeepSpeed, what accelerate makes of the file."""
    arguments, config = distributed.launch_arguments("deepspeed_zero3.yaml", "--num_processes", "2")
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"]
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
