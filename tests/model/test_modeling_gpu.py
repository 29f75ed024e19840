"""The model on CUDA: its numbers, in bfloat16 and with every attention backend, are those of the CPU in float32."""

import copy

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from echo4o_hf.model.context import Context
from echo4o_hf.model.packing import IGNORE, Segment, collate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


@pytest.fixture
def model(make_components):
    model = make_components(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)["model"]
    for parameter in model.parameters():  # weights large enough for everything to matter
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def rows(model):
    torch.manual_seed(1)
    config = model.config
    markers = [config.start_of_image_token_id, config.end_of_image_token_id]
    text = Segment("text", [config.bos_token_id, 5, 6, 7, config.eos_token_id])
    answer = Segment(
        "text", [config.bos_token_id, 9, 8, config.eos_token_id], labels=[9, 8, config.eos_token_id, IGNORE]
    )
    vision = Segment("vision", markers, patches=torch.randn(6, config.patch_dim), grid=(2, 3))
    latents = Segment("latents", markers, latents=torch.randn(4, config.latent_dim), grid=(2, 2))
    target = Segment("target", markers, latents=torch.randn(42, config.latent_dim), grid=(6, 7))
    return [[vision, answer], [text, target], [latents, text, target]]


def error(actual, expected):
    return ((actual.float().cpu() - expected.float().cpu()).norm() / expected.float().cpu().norm()).item()


def on_device(model):
    return copy.deepcopy(model).to(DEVICE, torch.bfloat16)


def train(model, rows):
    """Losses, velocity and the gradients' norms, with noise and timesteps that do not depend on the device."""
    batch = collate(rows, packed=True)
    torch.manual_seed(2)
    noise = torch.randn_like(batch["latents"])
    timestep = torch.full(noise.shape[:2], 0.4)
    inputs = {**batch, "noise": noise, "timestep": timestep}
    output = model(
        **{name: value.to(DEVICE if model.device.type != "cpu" else "cpu") for name, value in inputs.items()}
    )
    output.loss.backward()
    gradients = torch.stack([p.grad.float().norm().cpu() for p in model.parameters() if p.grad is not None])
    return torch.stack([output.flow_loss, output.text_loss]).detach(), output.velocity.detach(), gradients


@torch.no_grad()
def draw(model, row):
    """Velocity of a guided batch: one row with a context, one without."""
    device = model.device
    context = Context.empty(1, device)
    for segment in row[:-1]:
        context = model.prefill(context, [segment])
    target = row[-1]
    latents = torch.stack([target.latents] * 2).to(device)
    block = model.prepare_noisy_block([context, Context.empty(1, device)], [target.grid] * 2)
    return model.predict_velocity(latents, torch.full((2,), 0.7, device=device), block)


@torch.no_grad()
def draw_alone(model, row):
    """Velocity of one row, whose context is one text: all that flash attention takes."""
    context = model.prefill(Context.empty(1, model.device), [row[0]])
    target = row[-1]
    timestep = torch.full((1,), 0.7, device=model.device)
    block = model.prepare_noisy_block([context], [target.grid])
    return model.predict_velocity(target.latents[None].to(model.device), timestep, block)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_training_is_close_to_float32_on_the_cpu(model, rows, attention):
    expected = train(model, rows)
    model.zero_grad()
    gpu = on_device(model)
    gpu.set_attn_implementation({"text_config": attention})
    for value, reference in zip(train(gpu, rows), expected, strict=True):
        assert error(value, reference) < 0.05


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_drawing_is_close_to_float32_on_the_cpu(model, rows, attention):
    gpu = on_device(model)
    gpu.set_attn_implementation({"text_config": attention})
    assert error(draw(gpu, rows[2]), draw(model, rows[2])) < 0.05


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "flash_attention_2"])
def test_backends_are_equal(model, rows, attention):
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    gpu = on_device(model)
    gpu.set_attn_implementation({"text_config": "eager"})
    expected = draw_alone(gpu, rows[1])
    gpu.set_attn_implementation({"text_config": attention})
    assert error(draw_alone(gpu, rows[1]), expected) < 0.02


def test_writing_is_the_same_in_float32(model, rows):
    ids = torch.tensor([rows[1][0].input_ids])
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    actual = copy.deepcopy(model).to(DEVICE).generate(input_ids=ids.to(DEVICE), max_new_tokens=8, do_sample=False)
    assert actual.tolist() == expected.tolist()


@torch.no_grad()
def test_an_update_can_be_recorded_as_a_cuda_graph(model, rows):
    """It waits for nothing on the CPU, and reads and writes the same memory each time."""
    gpu = on_device(model)
    text, target = rows[1]
    context = gpu.prefill(Context.empty(1, gpu.device), [text])
    block = gpu.prepare_noisy_block([context, Context.empty(1, gpu.device)], [target.grid] * 2)
    latents = torch.stack([target.latents] * 2).to(DEVICE)
    timestep = torch.full((2,), 0.7, device=DEVICE)
    gpu.predict_velocity(latents, timestep, block)  # a stream's first call allocates workspaces, which none may record
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gpu.predict_velocity(latents, timestep, block)
    for time in (0.7, 0.2):
        latents.normal_()
        timestep.fill_(time)
        graph.replay()
        assert error(recorded, gpu.predict_velocity(latents, timestep, block)) < 1e-3
