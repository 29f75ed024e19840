"""What each method trains, in which dtypes, and that nothing else moves."""

import re
import sys

import pytest
import torch
from peft import PeftModel

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.context import Context
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import IGNORE, Segment, collate
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.parameters import lora_config, prepare_model, quantization_config

MARKERS = [3, 4]
TINY = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
    },
    "latent_channels": 4,
    "max_latent_size": 4,
    "vit_max_num_patch_per_side": 4,
    **dict(zip(("bos_token_id", "eos_token_id"), (1, 2), strict=True)),
    **dict(zip(("start_of_image_token_id", "end_of_image_token_id"), MARKERS, strict=True)),
}

EXPERT_LAYERS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
EXPERT_LAYERS |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
GENERATION = {f"{name}_moe_gen" for name in EXPERT_LAYERS if "attn" in name}
GENERATION |= {name.replace("mlp", "mlp_moe_gen") for name in EXPERT_LAYERS if "mlp" in name}
VISION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"}
OF_EXPERT = "language_model.model.layers.{}.{}".format
OF_VISION = "vit_model.vision_model.encoder.layers.{}.{}".format


@pytest.fixture
def settings(tmp_path):
    """Function (changes) -> the settings of a run."""

    def make(**changes):
        defaults = {"model": "echo4o-miniature", "lora_rank": 4, "lora_alpha": 8, "bf16": False, "use_cpu": True}
        return Echo4oTrainingArguments(output_dir=str(tmp_path), report_to="none", **{**defaults, **changes})

    return make


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = BagelForConditionalGeneration(BagelConfig(**TINY))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def batch():
    """A picture from a text and a reference, and an answer about a picture, packed; noise and timesteps fixed."""
    generator = torch.Generator().manual_seed(0)

    def latents(role):
        return Segment(role, MARKERS, latents=torch.randn(6, 16, generator=generator), grid=(2, 3))

    def vision():
        return Segment("vision", MARKERS, patches=torch.randn(4, 588, generator=generator), grid=(2, 2))

    answer = [1, 9, 30, 31, 2]
    draw = [latents("latents"), vision(), Segment("text", [1, 7, 8, 2]), latents("target")]
    describe = [vision(), Segment("text", answer, labels=[*answer[1:], IGNORE])]
    inputs = collate([draw, describe], packed=True)
    inputs["noise"] = torch.randn(inputs["latents"].shape, generator=generator)
    inputs["timestep"] = torch.full(inputs["latents"].shape[:2], 0.6)
    return inputs


def train(model, batch, steps=3, bf16=False):
    """Losses of a few steps."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def gradients(model, batch, bf16=False):
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def randomize(model):
    """Give each adapter an effect: the second factor is zero at first."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)


def adapted(names):
    """Modules that adapter weights of these names belong to."""
    return {re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.default\.weight", name)[1] for name in names}


# --------------------------------------------------------------------------------------------------- what is trained


def test_full_trains_everything(model, batch, settings):
    names = {name for name, _ in model.named_parameters()}
    assert gradients(prepare_model(model, settings(method="full")), batch).keys() == names


def test_generation_trains_what_draws(model, batch, settings):
    names = {name for name, _ in model.named_parameters()}
    prepared = prepare_model(model, settings(method="generation"))
    assert prepared is model
    trained = gradients(model, batch).keys()
    layer = {
        *(f"self_attn.{name}_moe_gen.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"self_attn.{name}_moe_gen.bias" for name in ("q_proj", "k_proj", "v_proj")),
        *(f"mlp_moe_gen.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
        *(f"{name}_moe_gen.weight" for name in ("input_layernorm", "post_attention_layernorm")),
    }
    heads = {"vae2llm", "llm2vae", "time_embedder.mlp.0", "time_embedder.mlp.2"}
    assert trained == {
        "language_model.model.norm_moe_gen.weight",
        *(OF_EXPERT(index, name) for index in range(2) for name in layer),
        *(f"{head}.{kind}" for head in heads for kind in ("weight", "bias")),
    }
    assert trained < names


def understand(model):
    """Greedy answer about a picture, and the logits of a text after it."""
    picture = torch.randn(8, 588, generator=torch.Generator().manual_seed(5))
    segments = [Segment("vision", MARKERS, patches=picture, grid=(4, 2)), Segment("text", [1, 12, 13, 14, 2])]
    context = Context.empty(1, "cpu")
    with torch.no_grad():
        for segment in segments:
            context = model.prefill(context, [segment])
        answer = model.generate_from(context, 6, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = model(**collate([segments])).logits
    return answer, logits


def test_generation_leaves_understanding_bit_for_bit(model, batch, settings):
    model.eval()
    before, velocity = understand(model), model(**batch).velocity
    losses = train(prepare_model(model, settings(method="generation")), batch)
    assert losses[-1] < losses[0]
    assert not torch.equal(model(**batch).velocity, velocity)
    for now, then in zip(understand(model), before, strict=True):
        assert torch.equal(now, then)


def test_full_does_move_understanding(model, batch, settings):
    before = understand(model.eval())
    train(prepare_model(model, settings(method="full")), batch)
    assert not torch.equal(understand(model)[1], before[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {OF_EXPERT(index, name) for index in range(2) for name in GENERATION}),
        (
            {"lora_understanding": True},
            {OF_EXPERT(index, name) for index in range(2) for name in GENERATION | EXPERT_LAYERS},
        ),
        (
            {"lora_vision": True},
            {OF_EXPERT(index, name) for index in range(2) for name in GENERATION}
            | {OF_VISION(index, name) for index in range(2) for name in VISION}
            | {"connector.fc1", "connector.fc2"},
        ),
    ],
)
def test_lora_trains_adapters_alone(model, batch, settings, options, expected):
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    prepared = prepare_model(model, settings(**options))
    assert adapted(gradients(prepared, batch)) == expected
    losses = train(prepared, batch)
    assert losses[-1] < losses[0]
    with prepared.disable_adapter():
        for name, weight in prepared.unload().state_dict().items():
            assert torch.equal(weight, base[name]), name


def test_adapters_begin_the_same_with_the_same_seed(settings):
    def begin(seed):
        torch.manual_seed(0)
        model = BagelForConditionalGeneration(BagelConfig(**TINY))
        state = torch.get_rng_state()
        prepared = prepare_model(model, settings(seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([weight.flatten() for name, weight in prepared.named_parameters() if "lora_A" in name])

    assert torch.equal(begin(0), begin(0)) and not torch.equal(begin(0), begin(1))


def count_trained(settings, **options):
    """Trained parameters of the published model."""
    with torch.device("meta"):
        model = prepare_model(BagelForConditionalGeneration(BagelConfig()), settings(**options))
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_counts_at_the_published_sizes(settings):
    hidden, kv, inner, layers = 3584, 512, 18944, 28
    sides = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    expert = 64 * layers * sum(rows + columns for rows, columns in sides)
    assert expert == 161_480_704
    rank = {"lora_rank": 64}
    assert count_trained(settings, **rank) == expert
    assert count_trained(settings, **rank, lora_understanding=True) == 2 * expert
    vision = 64 * (26 * (4 * 2 * 1152 + 2 * (1152 + 4304)) + 1152 + hidden + 2 * hidden)
    assert count_trained(settings, **rank, lora_vision=True) == expert + vision
    assert count_trained(settings, method="generation") == 6_539_861_056


# ------------------------------------------------------------------------------------------------------------- dtypes


def dtypes(model):
    def of(trained):
        return {weight.dtype for weight in model.parameters() if weight.requires_grad == trained}

    return of(True), of(False)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "trained", "frozen"),
    [
        ({}, {torch.float32}, {torch.float32}),
        ({"method": "generation"}, {torch.float32}, {torch.float32}),
        ({"method": "full", "bf16": True}, {torch.float32}, set()),
        ({"method": "generation", "bf16": True}, {torch.float32}, {torch.bfloat16}),
        ({"method": "generation", "bf16": True, "trainable_dtype": "bfloat16"}, {torch.bfloat16}, {torch.bfloat16}),
        ({"bf16": True}, {torch.float32}, {torch.bfloat16}),
        ({"bf16": True, "trainable_dtype": "bfloat16"}, {torch.float32}, {torch.bfloat16}),
    ],
)
def test_dtypes(model, settings, loaded, options, trained, frozen):
    for weight in model.parameters():
        weight.data = weight.data.to(loaded)
    arguments = settings(**options)
    prepared = prepare_model(model, arguments)
    assert dtypes(prepared) == (trained, frozen)
    frequencies = prepared.get_submodule(f"{'base_model.model.' * (arguments.method == 'lora')}language_model.model")
    assert frequencies.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("method", ["full", "generation", "lora"])
def test_bfloat16_under_autocast_is_close_to_float32(model, batch, settings, method):
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses, grads = {}, {}
    for bf16 in (False, True):
        copy = BagelForConditionalGeneration(BagelConfig(**TINY))
        copy.load_state_dict(state)
        prepared = prepare_model(copy, settings(method=method, bf16=bf16))
        randomize(prepared)
        grads[bf16] = gradients(prepared, batch, bf16)
        losses[bf16] = train(prepared, batch, bf16=bf16)
    assert {grad.dtype for grad in grads[True].values()} == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.03) and losses[True] != losses[False]
    flat = [torch.cat([grads[bf16][name].flatten() for name in sorted(grads[bf16])]) for bf16 in (False, True)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


# ------------------------------------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"lora_understanding": True, "lora_vision": True}, {"method": "generation"}, {"method": "full"}]
)
def test_gradients_through_checkpoints(model, batch, settings, options, use_reentrant):
    kwargs = {"use_reentrant": use_reentrant}
    arguments = settings(**options, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    prepared = prepare_model(model, arguments)
    randomize(prepared)
    expected = {name: grad.clone() for name, grad in gradients(prepared, batch).items()}
    prepared.zero_grad()
    prepared.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # as Trainer does
    runs = []
    layer = model.language_model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    actual = gradients(prepared, batch)
    assert len(runs) == 2, "the layer was not run again in the backward pass"
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.any(), name
        torch.testing.assert_close(actual[name], grad, msg=name)


# ------------------------------------------------------------------------------------------------------ saved adapters


def test_a_saved_adapter_is_one_for_any_peft(model, batch, settings, tmp_path):
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    prepared = prepare_model(model, settings(model="Yejy53/Echo-4o", model_revision="v1"))
    train(prepared, batch)
    prepared.save_pretrained(tmp_path)
    expected = prepared(**batch)

    base = BagelForConditionalGeneration(BagelConfig(**TINY))
    base.load_state_dict(state)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(**batch).velocity, expected.velocity)
    assert torch.equal(loaded(**batch).loss, expected.loss)
    config = loaded.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision, config.r, config.lora_alpha) == (
        "Yejy53/Echo-4o",
        "v1",
        4,
        8,
    )


# ---------------------------------------------------------------------------------------------------------- quantized


@pytest.mark.parametrize(
    ("quantization", "layer", "bf16"),
    [("4bit", "Linear4bit", False), ("4bit", "Linear4bit", True), ("8bit", "Linear8bitLt", True)],
)
def test_an_adapter_on_quantized_weights_fits_the_whole_ones(settings, tmp_path, quantization, layer, bf16):
    pytest.importorskip("bitsandbytes")
    arguments = settings(quantization=quantization, bf16=bf16, lora_rank=8, lora_alpha=16)
    model = BagelForConditionalGeneration.from_pretrained(
        arguments.model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        quantization_config=quantization_config(arguments),
    )
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    quantized = {name for name, kind in kinds.items() if kind == layer}
    assert quantized == {OF_EXPERT(index, name) for index in range(6) for name in GENERATION | EXPERT_LAYERS}

    prepared = prepare_model(model, arguments)
    assert {weight.dtype for weight in prepared.parameters() if weight.requires_grad} == {torch.float32}
    generator = torch.Generator().manual_seed(0)
    target = Segment("target", [1, 2], latents=torch.randn(16, model.config.latent_dim, generator=generator))
    target.grid = (4, 4)
    inputs = collate([[Segment("text", list(range(10, 20))), target]], packed=True)
    inputs["noise"] = torch.randn(inputs["latents"].shape, generator=generator)
    inputs["timestep"] = torch.full(inputs["latents"].shape[:2], 0.5)
    grads = {}
    for drawn in (False, True):  # gradients are the same after a text that stands alone
        if drawn:
            with torch.no_grad():
                prepared.eval()(input_ids=inputs["input_ids"])
        prepared.zero_grad()
        grads[drawn] = gradients(prepared, inputs, bf16)
    assert all(torch.equal(grads[True][name], grad) for name, grad in grads[False].items())
    prepared.zero_grad()
    losses = train(prepared, inputs, bf16=bf16)
    assert losses[2] < losses[1] < losses[0]
    prepared.save_pretrained(tmp_path)

    whole = BagelForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    before = whole(**inputs).loss
    after = PeftModel.from_pretrained(whole, tmp_path).eval()(**inputs).loss
    assert after < 0.9 * before
    assert after.item() == pytest.approx(prepared(**inputs).loss.item(), rel=0.1)


# -------------------------------------------------------------------------------------------------------------- errors


def test_settings_that_exclude_each_other(model, settings):
    with pytest.raises(ValueError, match="trainable_dtype='bfloat16' needs bf16=True"):
        prepare_model(model, settings(method="full", trainable_dtype="bfloat16"))
    with pytest.raises(ValueError, match="quantization='4bit', but the model is not quantized"):
        prepare_model(model, settings(quantization="4bit"))


def test_quantized_weights_are_not_trained(settings):
    pytest.importorskip("bitsandbytes")
    model = BagelForConditionalGeneration.from_pretrained(
        "echo4o-miniature", quantization_config=quantization_config(settings(quantization="8bit"))
    )
    with pytest.raises(ValueError, match="quantization=None, but the model is quantized"):
        prepare_model(model, settings(method="full"))


@pytest.mark.parametrize(
    ("package", "ask", "message"),
    [
        ("peft", lora_config, r"method='lora' needs peft: pip install 'echo4o-hf\[train\]'"),
        ("bitsandbytes", quantization_config, r"'4bit' needs bitsandbytes: pip install 'echo4o-hf\[qlora\]'"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, settings, package, ask, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        ask(settings(quantization="4bit"))
