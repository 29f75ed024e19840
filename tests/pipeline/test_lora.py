"""Adapters in the pipeline: as they were trained, mixed, merged, saved, from the Hub, and the wrong ones."""

import hashlib
import json
import shutil
import sys
import threading
import warnings
from copy import deepcopy
from http.server import ThreadingHTTPServer

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from echo4o_hf.cli import main
from echo4o_hf.model.checkpoint import write_official
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.pipeline.convert import convert
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.parameters import prepare_model, quantization_config

from ..model.test_hub import Hub, commit_of, run
from .conftest import make_config


def draw(pipe, output_type="latent", **settings):
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 3, "generator": generator, "output_type": output_type, **settings}
    return pipe("a red cat", **settings).images


def settings_of(folder, **changes):
    """Settings of a run."""
    defaults = {"model": "someone/base", "lora_rank": 4, "lora_alpha": 8, "bf16": False, "use_cpu": True}
    return Echo4oTrainingArguments(output_dir=str(folder), report_to="none", **{**defaults, **changes})


@pytest.fixture
def make_adapter(pipe, tmp_path):
    """Function (name, settings) -> the model with an adapter that has an effect, and the folder it is saved in."""

    def make(name="adapter", std=0.2, **changes):
        model = prepare_model(deepcopy(pipe.model), settings_of(tmp_path, **changes)).eval()
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()))
        for weight_name, weight in model.named_parameters():
            if "lora_" in weight_name:
                torch.nn.init.normal_(weight, std=std, generator=generator)
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


def state_of(pipe):
    return {name: weight.clone() for name, weight in pipe.model.state_dict().items()}


def assert_same_state(pipe, state, **tolerance):
    now = pipe.model.state_dict()
    assert now.keys() == state.keys()
    for name, weight in state.items():
        if tolerance:
            torch.testing.assert_close(now[name], weight, **tolerance)
        else:
            assert torch.equal(now[name], weight), name


# ------------------------------------------------------------------------------------------------- loading and mixing


@pytest.mark.parametrize("changes", [{}, {"lora_understanding": True, "lora_vision": True}, {"lora_dropout": 0.5}])
def test_draws_as_the_trained_model_and_unloads_without_a_trace(pipe, make_adapter, changes):
    trained, folder = make_adapter(**changes)
    as_trained = Echo4oPipeline(trained.get_base_model(), pipe.vae, pipe.scheduler, pipe.processor)
    as_trained.set_progress_bar_config(disable=True)
    base, state = draw(pipe, "pt"), state_of(pipe)

    pipe.load_lora_weights(folder)
    drawn = draw(pipe, "pt")
    assert torch.equal(drawn, draw(as_trained, "pt")) and not torch.equal(drawn, base)
    assert pipe.get_list_adapters() == {"model": ["default_0"]} and pipe.get_active_adapters() == ["default_0"]
    assert pipe.model.peft_config["default_0"].base_model_name_or_path == "someone/base"

    pipe.unload_lora_weights()
    assert_same_state(pipe, state)
    assert torch.equal(draw(pipe, "pt"), base) and pipe.get_list_adapters() == {}


def merged_by_hand(state, adapters):
    """Base weights plus `weight * alpha / rank * B A` of each (folder, weight)."""
    state = dict(state)
    for folder, weight in adapters:
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, first in tensors.items():
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                state[f"{module}.weight"] = (
                    state[f"{module}.weight"] + weight * 2 * tensors[name.replace("lora_A", "lora_B")] @ first
                )
    return state


def test_several_at_once_with_weights(pipe, make_adapter):
    (_, one), (_, two) = make_adapter("one"), make_adapter("two", lora_understanding=True, lora_rank=2, lora_alpha=4)
    base = deepcopy(pipe.model)
    by_hand = Echo4oPipeline(base, pipe.vae, pipe.scheduler, pipe.processor)
    by_hand.set_progress_bar_config(disable=True)
    state, plain = state_of(pipe), draw(pipe)
    pipe.load_lora_weights(one, "one")
    only_one = draw(pipe)
    pipe.load_lora_weights(two, "two")
    assert pipe.get_active_adapters() == ["two"]  # the last alone

    folders = {"one": one, "two": two}
    for names, weights, wanted in (
        (["one", "two"], [0.7, -0.4], {"one": 0.7, "two": -0.4}),
        (["two"], [1.0], {"two": 1.0}),
        ("one", 0.5, {"one": 0.5}),
        (["two", "one"], None, {"one": 1.0, "two": 1.0}),
    ):
        pipe.set_adapters(names, weights)
        base.load_state_dict(merged_by_hand(state, [(folders[name], wanted[name]) for name in wanted]))
        torch.testing.assert_close(draw(pipe), draw(by_hand), atol=1e-3, rtol=1e-3)
        assert not torch.allclose(draw(pipe), plain, atol=1e-2)

    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    assert not torch.equal(draw(pipe), plain)

    pipe.set_adapters("one")
    assert torch.equal(draw(pipe), only_one)
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters() == {"model": ["one"]} and torch.equal(draw(pipe), only_one)
    pipe.delete_adapters("one")
    assert_same_state(pipe, state)
    pipe.load_lora_weights(one)
    assert torch.equal(draw(pipe), only_one)


def test_names_that_are_left(pipe, make_adapter):
    _, folder = make_adapter()
    with warnings.catch_warnings(action="error"):
        for _ in range(3):
            pipe.load_lora_weights(folder)
    pipe.delete_adapters("default_1")
    pipe.load_lora_weights(folder)
    assert sorted(pipe.get_list_adapters()["model"]) == ["default_0", "default_1", "default_2"]


def test_in_the_dtype_of_the_model(pipe, make_adapter):
    _, folder = make_adapter()
    pipe.load_lora_weights(folder)
    expected = draw(pipe)
    pipe.unload_lora_weights()
    pipe.to(torch.bfloat16)
    plain = draw(pipe)
    pipe.load_lora_weights(folder)
    assert {weight.dtype for name, weight in pipe.model.named_parameters() if "lora" in name} == {torch.bfloat16}
    drawn = draw(pipe)
    assert (drawn - expected).norm() < 0.2 * (plain - expected).norm()


def test_on_a_model_that_is_offloaded(pipe, make_adapter):
    _, folder = make_adapter()
    pipe.load_lora_weights(folder)
    expected = draw(pipe)
    pipe.unload_lora_weights()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_lora_weights(folder)
    assert torch.equal(draw(pipe), expected)


def test_on_quantized_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    whole = Echo4oPipeline.from_pretrained("echo4o-miniature", dtype=torch.float32)
    model = prepare_model(deepcopy(whole.model), settings_of(tmp_path)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    quantized = Echo4oPipeline.from_pretrained(
        "echo4o-miniature",
        dtype=torch.float32,
        quantization_config=quantization_config(settings_of(tmp_path, quantization="4bit")),
    )
    changes = []
    for pipe in (whole, quantized):
        pipe.set_progress_bar_config(disable=True)
        before = draw(pipe)
        pipe.load_lora_weights(tmp_path)
        changes.append((draw(pipe) - before).flatten())
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), before)
    assert torch.cosine_similarity(*changes, dim=0) > 0.8


# ----------------------------------------------------------------------------------------------------- merging, saving


def test_fused_weights_draw_the_same_and_come_back(pipe, make_adapter):
    (_, one), (_, two) = make_adapter("one"), make_adapter("two")
    state = state_of(pipe)
    pipe.load_lora_weights(one, "one")
    pipe.load_lora_weights(two, "two")
    pipe.set_adapters(["one", "two"], [0.5, 0.8])
    both = draw(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"one", "two"} and pipe.num_fused_loras == 2
    torch.testing.assert_close(draw(pipe), both, atol=1e-3, rtol=1e-3)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    torch.testing.assert_close(draw(pipe), both, atol=1e-3, rtol=1e-3)

    # The named one alone, at a scale of its own, which does not stay.
    pipe.fuse_lora(lora_scale=0.25, adapter_names=["two"])
    fused = draw(pipe)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe), both, atol=1e-3, rtol=1e-3)
    pipe.set_adapters("two", 0.8 * 0.25)
    torch.testing.assert_close(draw(pipe), fused, atol=1e-3, rtol=1e-3)

    pipe.unload_lora_weights()
    assert_same_state(pipe, state, atol=1e-6, rtol=1e-5)


def test_fused_and_unloaded_is_a_model_of_its_own(pipe, make_adapter, tmp_path):
    _, folder = make_adapter()
    pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match=r"adapters \['default_0'\] are loaded: merge them for good with fuse_lora"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.fuse_lora()
    fused = draw(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), fused) and pipe.num_fused_loras == 0
    pipe.save_pretrained(tmp_path / "saved")
    loaded = Echo4oPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), fused)
    pipe.load_lora_weights(folder)  # on top of itself
    assert not torch.equal(draw(pipe), fused)


def test_saving_writes_what_was_loaded(pipe, make_adapter, tmp_path):
    (_, one), (_, two) = make_adapter("one"), make_adapter("two")
    base = deepcopy(pipe.model)
    pipe.load_lora_weights(one, "one")
    pipe.load_lora_weights(two, "two")
    pipe.save_lora_weights(tmp_path / "saved", "one")
    saved, loaded = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "saved", one))
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    saved, loaded = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "saved", one))
    assert saved == loaded
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    pipe.save_lora_weights(tmp_path / "active")
    again = PeftModel.from_pretrained(base, tmp_path / "active").eval()
    by_peft = Echo4oPipeline(again.get_base_model(), pipe.vae, pipe.scheduler, pipe.processor)
    by_peft.set_progress_bar_config(disable=True)
    assert torch.equal(draw(by_peft), draw(pipe))
    pipe.set_adapters(["one", "two"])
    with pytest.raises(ValueError, match=r"name the adapter to save: 2 are active, loaded are \['one', 'two'\]"):
        pipe.save_lora_weights(tmp_path / "both")


# ----------------------------------------------------------------------------------------------------------- convert


@pytest.fixture
def official(pipe, tmp_path):
    vae = AutoencoderKL.from_config(pipe.vae.config, use_quant_conv=False, use_post_quant_conv=False)
    write_official({**pipe.components, "vae": vae}, tmp_path / "official")
    return tmp_path / "official"


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_convert_merges_as_the_pipeline_does(official, make_adapter, tmp_path, dtype):
    _, folder = make_adapter()
    before = digests(official)
    convert(official, tmp_path / "merged", dtype=dtype, lora=folder)
    convert(official, tmp_path / "merged_official", dtype=dtype, to="official", lora=folder)
    assert digests(official) == before

    pipe = Echo4oPipeline.from_pretrained(official, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    expected = draw(pipe)
    for name in ("merged", "merged_official"):
        merged = Echo4oPipeline.from_pretrained(tmp_path / name)
        merged.set_progress_bar_config(disable=True)
        assert merged.model.dtype == pipe.model.dtype
        assert torch.equal(draw(merged), expected) and not torch.equal(expected, plain)


def test_convert_lora_on_the_command_line(official, make_adapter, tmp_path, capsys):
    _, folder = make_adapter()
    assert main(["convert", str(official), str(tmp_path / "merged"), "--lora", str(folder), "--to", "official"]) == 0
    convert(official, tmp_path / "expected", lora=folder, to="official")
    name = "ema.safetensors"
    merged, expected, base = (
        load_file(each / name) for each in (tmp_path / "merged", tmp_path / "expected", official)
    )
    assert all(torch.equal(merged[name], expected[name]) for name in base)
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert len(changed) == 2 * 7 and all("_moe_gen" in name for name in changed)

    assert main(["convert", str(official), str(tmp_path / "none"), "--lora", str(official)]) == 2
    assert "looked for adapter_config.json and adapter_model.safetensors; found" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------------------- the Hub

FROM_HUB = """
import sys
import torch
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

pipe = Echo4oPipeline.from_pretrained(BASE)

def first(*arguments, **options):
    pipe.load_lora_weights(*arguments, **options)
    layer = pipe.model.language_model.model.layers[0].self_attn.q_proj_moe_gen
    value = layer.lora_A[pipe.get_active_adapters()[0]].weight[0, 0].item()
    pipe.unload_lora_weights()
    return value
"""


@pytest.fixture
def hub(make_adapter, tmp_path):
    """Address of a server with an adapter in two revisions, the second one in a folder, and a repository without."""
    (_, one), (_, two) = make_adapter("one"), make_adapter("two")
    shutil.copytree(two, tmp_path / "v2" / "lora")
    (one / "optimizer.pt").write_text("not needed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    Hub.repositories = {
        "someone/lora": {"main": one, "v2": tmp_path / "v2"},
        "someone/else": {"main": tmp_path / "other"},
    }
    Hub.requested = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_from_the_hub(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    values = {
        name: load_file(folder / "adapter_model.safetensors")[
            "base_model.model.language_model.model.layers.0.self_attn.q_proj_moe_gen.lora_A.weight"
        ][0, 0].item()
        for name, folder in (("main", tmp_path / "one"), ("v2", tmp_path / "two"))
    }
    setup = f"BASE = {str(tmp_path / 'base')!r}\n" + FROM_HUB
    online = """
print(json.dumps({
    "main": first("someone/lora"),
    "v2": first("someone/lora", "name", revision="v2", subfolder="lora"),
    "no folder": outcome(first, "someone/lora", subfolder="lora"),
    "no adapter": outcome(first, "someone/else"),
    "no repository": outcome(first, "someone/nobody"),
}))
"""
    found = run(setup + online, tmp_path / "home", HF_ENDPOINT=hub)
    assert {name: found[name] for name in values} == values
    assert found["no folder"].startswith("FileNotFoundError: no adapter in someone/lora, subfolder 'lora'")
    assert found["no adapter"] == (
        "FileNotFoundError: no adapter in someone/else: looked for adapter_config.json and adapter_model.safetensors; "
        "found config.json"
    )
    assert found["no repository"].startswith("OSError: 'someone/nobody' is no folder in ")
    assert sorted(request.split("/", 1)[1] for request in Hub.requested if commit_of("main") in request) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    ]


# ------------------------------------------------------------------------------------------------------ wrong adapters


def spoil_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def spoil_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def drop(tensors):
    del tensors[min(tensors)]


def make_nan(tensors):
    tensors[min(tensors)][0, 0] = float("nan")


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            OSError,
            "no adapter in .*; found README.md, adapter_m",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            OSError,
            "no adapter in .*; found README.md, a",
        ),
        (cut, OSError, r"adapter_model.safetensors \([\d,]+ bytes\) is truncated"),
        (lambda folder: (folder / "adapter_config.json").write_text("["), ValueError, "is not valid JSON"),
        (lambda folder: spoil_config(folder, peft_type="LOHA"), ValueError, "peft_type='LOHA'; only 'LORA' is known"),
        (
            lambda folder: spoil_config(folder, modules_to_save=["llm2vae"]),
            ValueError,
            r"modules_to_save=\['llm2vae'\]",
        ),
        (
            lambda folder: spoil_config(folder, r=5),
            ValueError,
            r"28 tensors of another shape \(.*instead of \(5, 32\)",
        ),
        (
            lambda folder: spoil_config(folder, target_modules=["to_q"]),
            ValueError,
            r"the adapter in .* \(its base: someone/base\) does not fit this model: .*to_q.* not found",
        ),
        (
            lambda folder: spoil_weights(folder, drop),
            ValueError,
            r"1 tensors missing \(base_model.model.language_model",
        ),
        (
            lambda folder: spoil_weights(folder, make_nan),
            ValueError,
            "holds NaN or infinite values in 1 of 28 tensors",
        ),
    ],
)
def test_a_wrong_adapter_is_named_and_leaves_no_trace(pipe, make_adapter, spoil, error, message):
    _, folder = make_adapter()
    state = state_of(pipe)
    spoil(folder)
    with pytest.raises(error, match=message):
        pipe.load_lora_weights(folder)
    assert_same_state(pipe, state)
    assert pipe.get_list_adapters() == {}


def test_an_adapter_of_other_sizes(pipe, tmp_path):
    text = {**make_config().text_config.to_dict(), "hidden_size": 64}
    larger = BagelForConditionalGeneration(make_config(text_config=text))
    prepare_model(larger, settings_of(tmp_path, model="someone/larger")).save_pretrained(tmp_path / "larger")
    with pytest.raises(
        ValueError,
        match=r"\(its base: someone/larger\) does not fit this model: 22 tensors of another shape "
        r"\(.*down_proj.lora_B.weight \(64, 4\) instead of \(32, 4\)",
    ):
        pipe.load_lora_weights(tmp_path / "larger")


def test_an_adapter_of_a_language_model_with_the_same_names(pipe, tmp_path):
    text = deepcopy(pipe.model.config.text_config)
    from transformers import Qwen2ForCausalLM

    adapted = get_peft_model(Qwen2ForCausalLM(text), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "qwen")
    with pytest.raises(
        ValueError, match=r"12 tensors missing .*; 8 tensors unknown \(base_model.model.model.layers.0"
    ):
        pipe.load_lora_weights(tmp_path / "qwen")


def test_calls_out_of_order(pipe, make_adapter):
    _, folder = make_adapter()
    with pytest.raises(ValueError, match="no adapter given; loaded are none"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="no adapter is fused"):
        pipe.unfuse_lora()
    pipe.unload_lora_weights()  # nothing to do
    pipe.load_lora_weights(folder, "one")
    for call in (pipe.set_adapters, pipe.delete_adapters, lambda name: pipe.fuse_lora(adapter_names=[name])):
        with pytest.raises(ValueError, match=r"no adapter 'two'; loaded are \['one'\]"):
            call("two")
    with pytest.raises(ValueError, match="an adapter 'one' is loaded already"):
        pipe.load_lora_weights(folder, "one")
    pipe.fuse_lora()
    for call in (pipe.fuse_lora, lambda: pipe.load_lora_weights(folder), lambda: pipe.set_adapters("one")):
        with pytest.raises(ValueError, match=r"adapters \['one'\] are fused; call unfuse_lora\(\) first"):
            call()


def test_without_peft(pipe, make_adapter, monkeypatch):
    _, folder = make_adapter()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"load_lora_weights needs peft: pip install 'echo4o-hf\[train\]'"):
        pipe.load_lora_weights(folder)
