"""The estimate of memory against what the tensors really take."""

import pytest
import torch

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import Segment, collate
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.memory import GIB, describe, memory_lines
from echo4o_hf.training.parameters import prepare_model, quantization_config

METHODS = [
    {"method": "full"},
    {"method": "generation"},
    {"method": "lora"},
    {"method": "full", "bf16": True},
    {"method": "generation", "bf16": True},
    {"method": "generation", "bf16": True, "trainable_dtype": "bfloat16"},
    {"method": "lora", "bf16": True},
]
# The proportions of the published model, and long enough that layers outweigh their ends.
NARROW = {
    "text_config": {
        "hidden_size": 224,
        "intermediate_size": 1184,
        "num_hidden_layers": 8,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
    },
    "latent_channels": 4,
    "max_latent_size": 20,
    "vit_max_num_patch_per_side": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "start_of_image_token_id": 3,
    "end_of_image_token_id": 4,
}


@pytest.fixture
def settings(tmp_path):
    """Function (changes) -> the settings of a run."""

    def make(**changes):
        defaults = {"model": "echo4o-miniature", "lora_rank": 4, "bf16": False, "use_cpu": True}
        return Echo4oTrainingArguments(output_dir=str(tmp_path), report_to="none", **{**defaults, **changes})

    return make


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def estimate(model, arguments, max_tokens=100):
    return {line.name: line.num_bytes for line in memory_lines(model, arguments, max_tokens)}


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_weights_gradients_and_states_are_those_of_a_step(settings, options):
    arguments = settings(**options, ema_decay=0.99)
    model = prepare_model(BagelForConditionalGeneration(BagelConfig(**NARROW)), arguments)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [state for of_weight in optimizer.state.values() for name, state in of_weight.items() if name != "step"]

    found = estimate(model, arguments)
    assert found["weights"] == num_bytes(model.parameters())
    assert found["gradients"] == num_bytes(weight.grad for weight in trained)
    assert found["optimizer"] == num_bytes(states)
    assert found["average"] == 4 * sum(weight.numel() for weight in trained)
    assert found.get("autocast", 0) == (
        2 * sum(weight.numel() for weight in trained if weight.dtype == torch.float32) if arguments.bf16 else 0
    )


def saved_for_backward(model, arguments, grid):
    """Tokens of a pack, and bytes that autograd keeps of its forward pass beside weights and masks."""
    target = Segment("target", [3, 4], latents=torch.randn(grid[0] * grid[1], 16), grid=grid)
    batch = collate([[Segment("text", list(range(5, 60))), target]], packed=True)
    batch["noise"], batch["timestep"] = torch.zeros_like(batch["latents"]), torch.full(batch["latents"].shape[:2], 0.5)
    tokens = batch["segment_ids"].shape[1]
    weights = {tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2}
    weights |= {shape[::-1] for shape in weights}
    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in weights and tensor.shape[-1:] != (tokens,):
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16),
    ):
        model.train()(**batch)
    return tokens, sum(size for size, _ in saved.values())


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_activations_are_about_what_autograd_keeps(settings, options):
    arguments = settings(**options)
    model = prepare_model(BagelForConditionalGeneration(BagelConfig(**NARROW)), arguments)
    tokens, saved = saved_for_backward(model, arguments, (18, 20))
    assert estimate(model, arguments, tokens)["activations"] == pytest.approx(saved, rel=0.2)


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_behind_checkpoints(settings, bf16):
    arguments = settings(bf16=bf16, activation_checkpointing=True)
    model = prepare_model(BagelForConditionalGeneration(BagelConfig(**NARROW)), arguments)
    model.activation_checkpointing_enable()
    tokens, saved = saved_for_backward(model, arguments, (18, 20))
    one_layer = estimate(model, settings(bf16=bf16), tokens)["activations"] / 8
    assert estimate(model, arguments, tokens)["activations"] - one_layer == pytest.approx(saved, rel=0.35)


@pytest.mark.parametrize(("quantization", "tolerance"), [("4bit", 0.002), ("8bit", 0.01)])
def test_quantized_weights(settings, quantization, tolerance):
    pytest.importorskip("bitsandbytes")
    arguments = settings(quantization=quantization)
    whole = BagelForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    model = BagelForConditionalGeneration.from_pretrained(
        arguments.model, dtype=torch.float32, quantization_config=quantization_config(arguments)
    )
    stored = num_bytes(model.parameters())
    if quantization == "4bit":
        states = [weight.quant_state for weight in model.parameters() if type(weight).__name__ == "Params4bit"]
        stored += num_bytes([table for state in states for table in (state.absmax, state.state2.absmax)])
    assert estimate(model, arguments)["weights"] == pytest.approx(stored, rel=tolerance)
    prepared = prepare_model(model, arguments)
    adapters = sum(weight.numel() for weight in prepared.parameters() if weight.requires_grad)
    count = sum(weight.numel() for weight in whole.parameters()) + adapters
    assert f" {count / 1e6:,.1f} " in describe(prepared, arguments, 100).split("trained: ")[1].splitlines()[0]


def test_other_optimizers(settings):
    arguments = settings(method="generation")
    model = prepare_model(BagelForConditionalGeneration(BagelConfig(**NARROW)), arguments)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    values = sum(weight.numel() for weight in trained)
    for optim, size in {"adamw_bnb_8bit": 2, "paged_adamw_32bit": 8, "lion_8bit": 1, "sgd": 0}.items():
        assert estimate(model, settings(method="generation", optim=optim))["optimizer"] == size * values
    assert "not known for adafactor" in describe(model, settings(method="generation", optim="adafactor"), 100)

    matrices = [
        weight
        for name, weight in model.named_parameters()
        if "layers" in name and "_proj" in name and weight.ndim == 2
    ]
    in_layers = num_bytes(weight for weight in matrices if weight.requires_grad)
    with_muon = estimate(model, settings(method="generation", muon=True))
    assert with_muon["muon"] == in_layers and with_muon["optimizer"] == 2 * (4 * values - in_layers)


def test_the_text_at_the_published_sizes(settings):
    arguments = settings(lora_rank=64, bf16=True, activation_checkpointing=True)
    with torch.device("meta"):
        model = prepare_model(BagelForConditionalGeneration(BagelConfig()), arguments)
    lines = describe(model, arguments, 28672).splitlines()
    parts = {line[2:24].strip(): [float(word.replace(",", "")) for word in line[24:].split()] for line in lines[1:8]}
    assert parts == {
        "embedding, text head": [1090.0, 0.0],
        "understanding expert": [6525.6, 0.0],
        "generation expert": [6525.6, 0.0],
        "adapters": [161.5, 161.5],
        "vision encoder": [419.5, 0.0],
        "latent heads": [14.2, 0.0],
        "trained: 1.1%": [14736.5, 161.5],
    }
    memory = {line.split()[0]: float(line.split()[1]) for line in lines[9:]}
    assert memory["weights"] == pytest.approx((14575.0e6 * 2 + 161.5e6 * 4) / GIB, abs=0.01)
    assert memory["optimizer"] == pytest.approx(161.5e6 * 8 / GIB, abs=0.01)
    assert memory.pop("sum") == pytest.approx(sum(memory.values()), abs=0.05)
    assert memory["activations"] == pytest.approx(12.47, abs=0.01)
