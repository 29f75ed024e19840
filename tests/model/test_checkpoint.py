import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, BitsAndBytesConfig
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.quantizers import PipelineQuantizationConfig
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig

import echo4o_hf
from echo4o_hf.model import checkpoint
from echo4o_hf.model.checkpoint import find_files, is_official_layout, layout, load_components, resolve
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.files import check_finite, new_folder
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.official import load_tokenizer, official_config_dict, vae_config, write_official
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.model.vae import load_vae, official_name

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")


def edit_json(file, **changes):
    """Change keys of a JSON file; None removes one."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


# ---------------------------------------------------------------------------------------------- the reference itself


@needs_golden
def test_reference_configuration():
    config = BagelConfig.from_pretrained(GOLDEN)
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (64, 3, 320)
    assert text.rope_parameters["rope_theta"] == 1e6
    assert vision.num_hidden_layers == 2  # one less than vit_config.json says
    assert (config.max_latent_size, config.vit_max_num_patch_per_side) == (16, 20)
    assert (config.latent_channels, config.latent_patch_size, config.latent_downsample) == (16, 2, 8)
    ids = json.loads((GOLDEN / "golden.json").read_text())["meta"]["new_token_ids"]
    assert [config.bos_token_id, config.eos_token_id] == [ids["bos_token_id"], ids["eos_token_id"]]
    assert [config.start_of_image_token_id, config.end_of_image_token_id] == [
        ids["start_of_image"],
        ids["end_of_image"],
    ]


@needs_golden
def test_reference_weights_load_by_name():
    model = BagelForConditionalGeneration.from_pretrained(GOLDEN)
    expected, loaded = load_file(GOLDEN / "ema.safetensors"), model.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


@needs_golden
@torch.no_grad()
def test_reference_vae():
    golden = load_file(GOLDEN / "golden.safetensors")
    vae = load_vae(GOLDEN, vae_config(GOLDEN))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    posterior = vae.encode(golden["b.image"]).latent_dist
    sample = posterior.mean + posterior.std * golden["b.eps"]
    decoded = vae.decode(golden["b.decode_in"] / scale + shift).sample
    for name, ours in {
        "b.moments": posterior.parameters,
        "b.latent_mode": scale * (posterior.mode() - shift),
        "b.latent_sample": scale * (sample - shift),
        "b.decode_out": decoded,
    }.items():
        torch.testing.assert_close(ours, golden[name], atol=2e-5, rtol=0)


@needs_golden
def test_reference_survives_the_way_there_and_back(tmp_path):
    write_official(load_components(GOLDEN), tmp_path / "back")
    for file in ("ema.safetensors", "ae.safetensors"):
        expected, written = load_file(GOLDEN / file), load_file(tmp_path / "back" / file)
        assert expected.keys() == written.keys()
        assert all(torch.equal(expected[name], written[name]) for name in expected)
    assert BagelConfig.from_pretrained(tmp_path / "back").to_dict() == BagelConfig.from_pretrained(GOLDEN).to_dict()
    for name in ("llm_config", "vit_config"):
        expected, written = (
            json.loads((folder / f"{name}.json").read_text()) for folder in (GOLDEN, tmp_path / "back")
        )
        # The official bos_token_id is <|endoftext|>, which Bagel does not use.
        for key in expected.keys() & written.keys() - {"bos_token_id"}:
            assert written[key] == expected[key], key


# ----------------------------------------------------------------------------------------------------- the VAE's names


@pytest.mark.parametrize(("widths", "blocks"), [((128, 256, 512, 512), 2), ((32, 64), 1), ((32, 32, 64, 32), 3)])
def test_vae_names_are_those_that_diffusers_converts(widths, blocks):
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=blocks,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    ours = vae.state_dict()
    official = {official_name(name, len(widths)): torch.tensor([index]) for index, name in enumerate(ours)}
    converted = convert_ldm_vae_checkpoint(official, dict(vae.config))
    assert {name: int(tensor) for name, tensor in converted.items()} == {name: i for i, name in enumerate(ours)}


def test_vae_of_an_unknown_architecture(official):
    def rename(tensors):
        tensors["encoder.quant_conv.weight"] = tensors.pop("decoder.conv_in.weight")

    edit_tensors(official / "ae.safetensors", rename)
    with pytest.raises(ValueError, match=r"ae.safetensors has no tensor 'decoder.conv_in.weight'"):
        load_vae(official)


def test_vae_tensors_that_do_not_fit(official):
    def damage(tensors):
        del tensors["decoder.mid.attn_1.q.weight"]
        tensors["quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
        tensors["decoder.norm_out.weight"] = torch.zeros(7)

    edit_tensors(official / "ae.safetensors", damage)
    with pytest.raises(ValueError, match=r"ae.safetensors") as error:
        load_vae(official)
    assert "1 missing (decoder.mid.attn_1.q.weight)" in str(error.value)
    assert "1 unexpected (quant_conv.weight)" in str(error.value)
    assert "decoder.norm_out.weight (7,) instead of (32,)" in str(error.value)


def test_vae_without_description_has_the_factors_of_flux(official):
    (official / "config.json").unlink()
    vae = load_components(official)["vae"]
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.3611, 0.1159)
    assert (vae.config.latent_channels, tuple(vae.config.block_out_channels)) == (4, (32, 64))


def test_vae_factor_that_is_no_number(official):
    with pytest.raises(ValueError, match=r"vae_config\['scale_factor'\] must be a number, got '0.3'"):
        load_vae(official, {"scale_factor": "0.3"})


def test_vae_that_the_official_layout_cannot_describe(components, tmp_path):
    components["vae"] = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    with pytest.raises(ValueError, match="quant convolutions"):
        write_official(components, tmp_path / "official")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ reading and writing


def test_round_trip(components, official):
    loaded = load_components(official)
    for name in ("model", "vae"):
        expected, tensors = components[name].state_dict(), loaded[name].state_dict()
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(expected[key], tensors[key]) for key in expected)
    assert loaded["scheduler"].config.shift == 3.0
    assert loaded["vae"].config.scaling_factor == 0.5
    config, expected = loaded["model"].config, components["model"].config
    assert config.text_config.rope_parameters == expected.text_config.rope_parameters
    assert config.text_config.rms_norm_eps == expected.text_config.rms_norm_eps
    assert config.vision_config.num_hidden_layers == expected.vision_config.num_hidden_layers
    for name in ("max_latent_size", "latent_dim", "latent_stride", "start_of_image_token_id", "end_of_image_token_id"):
        assert getattr(config, name) == getattr(expected, name)
    assert loaded["processor"].text_segment("cat") == components["processor"].text_segment("cat")
    assert loaded["processor"].image_processor.latent_size["max"] == 8 * 6


def test_official_code_finds_its_tokenizer_files(official):
    assert {"vocab.json", "merges.txt"} <= set(os.listdir(official))


def test_device_map(official, tmp_path):
    loaded = load_components(official, device_map="cpu")
    assert {loaded["model"].device.type, loaded["vae"].device.type} == {"cpu"}

    parts = [name for name, _ in loaded["model"].named_children()]
    places = {**dict.fromkeys(parts, "cpu"), "vit_model": "disk"}
    offloaded = BagelForConditionalGeneration.from_pretrained(
        official, device_map=places, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match=r"offloaded \(vit_model.*load the model without device_map"):
        write_official({**loaded, "model": offloaded}, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_what_the_official_layout_has_no_place_for(components, official, tmp_path):
    model = BagelForConditionalGeneration.from_pretrained(
        official, quantization_config=TransformersBitsAndBytesConfig(load_in_8bit=True)
    )
    with pytest.raises(ValueError, match="no quantized weights: load the model without quantization_config"):
        write_official({**components, "model": model}, tmp_path / "written")
    components["model"].add_adapter(LoraConfig(target_modules=["q_proj_moe_gen"]), "mine")
    with pytest.raises(ValueError, match=r"adapters \['mine'\] are loaded"):
        write_official(components, tmp_path / "written")
    components["vae"].enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk")
    )
    with pytest.raises(ValueError, match="AutoencoderKL are on disk.*without offload_to_disk_path"):
        write_official(components, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_quantization_of_other_parts_leaves_the_model_alone(official):
    config = PipelineQuantizationConfig(quant_mapping={"vae": BitsAndBytesConfig(load_in_8bit=True)})
    assert load_components(official, quantization_config=config)["model"].dtype == torch.float32


def test_vocabulary_and_merges_are_enough(official):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (official / file).unlink()
    tokenizer = load_tokenizer(official)
    assert isinstance(tokenizer, Qwen2Tokenizer) and tokenizer.tokenize("a cat") == ["a", "Ġ", "c", "a", "t"]


def test_tokenizers_of_another_class_are_kept(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "cat": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == {"a": 0, "cat": 1}


def test_dtype(official):
    loaded = load_components(official, dtype=torch.bfloat16)
    assert {loaded["model"].dtype, loaded["vae"].dtype} == {torch.bfloat16}
    assert load_components(official, dtype="float16")["vae"].dtype == torch.float16


def test_shapes_win_over_json(official):
    """None of these keys is written right on the Hub, or at all."""
    edit_json(official / "config.json", max_latent_size=64, latent_patch_size=2, vit_max_num_patch_per_side=70)
    edit_json(official / "llm_config.json", vocab_size=999)
    edit_json(official / "config.json", vae_config={"z_channels": 16, "downsample": 8})
    config = BagelConfig.from_pretrained(official)
    assert (config.max_latent_size, config.vit_max_num_patch_per_side) == (8, 4)
    assert (config.latent_patch_size, config.latent_channels, config.latent_downsample) == (3, 4, 2)
    assert config.text_config.vocab_size == 264


def test_without_weights_json_and_published_sizes_count(official):
    for file in official.glob("*.safetensors"):
        file.unlink()
    edit_json(official / "config.json", latent_patch_size=None, max_latent_size=None, vae_config=None)
    config = official_config_dict(official)
    assert (config["max_latent_size"], config["latent_patch_size"], config["latent_channels"]) == (64, 2, 16)
    assert config["vit_max_num_patch_per_side"] == 4
    edit_json(official / "config.json", max_latent_size=32)
    assert official_config_dict(official)["max_latent_size"] == 32
    assert "transformers_weights" not in config


@pytest.mark.parametrize("content", [None, "{not json", "[]"])
def test_config_json_is_not_needed(official, content):
    if content is None:
        (official / "config.json").unlink()
    else:
        (official / "config.json").write_text(content)
    assert load_components(official)["model"].config.max_latent_size == 8


def test_llm_config_wins_and_can_be_absent(official):
    edit_json(official / "llm_config.json", rms_norm_eps=1e-3)
    assert BagelConfig.from_pretrained(official).text_config.rms_norm_eps == 1e-3
    (official / "llm_config.json").unlink()
    assert BagelConfig.from_pretrained(official).text_config.rms_norm_eps == 1e-5  # config.json's


def test_auto_classes_take_the_official_layout(official):
    edit_json(official / "config.json", max_latent_size=64)  # AutoConfig reads this file only
    assert AutoConfig.from_pretrained(official).max_latent_size == 8
    model = AutoModel.from_pretrained(official, dtype=torch.bfloat16)
    assert isinstance(model, BagelForConditionalGeneration) and model.dtype == torch.bfloat16
    assert isinstance(AutoProcessor.from_pretrained(official), BagelProcessor)
    with pytest.raises(ValueError, match=r"use BagelConfig.from_pretrained\(folder\)"):
        BagelConfig.from_dict(json.loads((official / "config.json").read_text()))


def test_generation_is_greedy_whatever_the_folder_says(official):
    """The published generation_config.json is that of Qwen2.5, which samples."""
    (official / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "eos_token_id": [1, 2]}')
    settings = BagelForConditionalGeneration.from_pretrained(official).generation_config
    assert not settings.do_sample and settings.eos_token_id == 258


def test_the_official_loaders_choices_win_over_the_json(official):
    edit_json(official / "llm_config.json", tie_word_embeddings=True, use_sliding_window=True, torch_dtype="bfloat16")
    model = BagelForConditionalGeneration.from_pretrained(official)
    assert not model.config.tie_word_embeddings and model.dtype == torch.float32
    assert model.language_model.lm_head.weight is not model.language_model.model.embed_tokens.weight


def test_averaged_weights_are_preferred_and_shards_work(components, official):
    tensors = load_file(official / "ema.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, official / "model.safetensors")
    name = "llm2vae.bias"
    assert torch.equal(BagelForConditionalGeneration.from_pretrained(official).state_dict()[name], tensors[name])

    (official / "model.safetensors").unlink()
    (official / "ema.safetensors").unlink()
    half = len(tensors) // 2
    shards = {"model-1-of-2.safetensors": sorted(tensors)[:half], "model-2-of-2.safetensors": sorted(tensors)[half:]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, official / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = official / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = BagelForConditionalGeneration.from_pretrained(official)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in tensors.items())

    (official / "model-2-of-2.safetensors").unlink()
    with pytest.raises(OSError, match=r"model-2-of-2.safetensors is missing"):
        BagelForConditionalGeneration.from_pretrained(official)
    index.write_text("{}")
    with pytest.raises(ValueError, match="names no shards"):
        BagelForConditionalGeneration.from_pretrained(official)


def test_writing_is_whole_or_not_at_all(components, official, tmp_path):
    with pytest.raises(ValueError, match="not an empty folder"):
        write_official(components, official)
    with pytest.raises(RuntimeError, match="power"), new_folder(tmp_path / "new") as folder:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("power cut")
    assert [entry.name for entry in tmp_path.iterdir()] == ["official"]
    (tmp_path / "empty").mkdir()
    write_official(components, tmp_path / "empty")
    assert is_official_layout(tmp_path / "empty")


# ----------------------------------------------------------------------------------------------------- finding folders


def test_subfolder_is_found_or_chosen(official, tmp_path):
    repository = tmp_path / "repository"
    shutil.move(official, repository / "Echo-4o")
    (repository / "README.md").write_text("card")
    (repository / "assets").mkdir()
    assert resolve(repository) == resolve(repository, subfolder="Echo-4o") == repository / "Echo-4o"
    assert is_official_layout(repository) and not is_official_layout(repository, subfolder="assets")
    assert BagelConfig.from_pretrained(repository).max_latent_size == 8
    assert load_components(repository, subfolder="Echo-4o/")["model"].config.max_latent_size == 8

    shutil.copytree(repository / "Echo-4o", repository / "older")
    with pytest.raises(ValueError, match=r"several checkpoints: Echo-4o/, older/; choose one with subfolder="):
        resolve(repository)
    with pytest.raises(FileNotFoundError, match="subfolder 'assets'"):
        resolve(repository, subfolder="assets")


def test_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"looked for model_index.json .*ema.safetensors.*found notes.txt"):
        load_components(tmp_path)
    assert find_files(tmp_path, "model") is None
    assert layout(tmp_path) is None


def test_own_layout_is_left_to_transformers(components, tmp_path):
    components["model"].save_pretrained(tmp_path)
    assert resolve(tmp_path) == tmp_path and layout(tmp_path) == "model"
    assert find_files(tmp_path, "model") is None
    assert BagelForConditionalGeneration.from_pretrained(tmp_path).config.max_latent_size == 8


def test_bundled_names(official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "bundled")
    with pytest.raises(FileNotFoundError, match="echo4o-miniature is not part of this installation"):
        resolve("echo4o-miniature")
    shutil.copytree(official, tmp_path / "bundled" / "echo4o-miniature")
    assert resolve("echo4o-miniature") == tmp_path / "bundled" / "echo4o-miniature"
    shutil.copytree(official, tmp_path / "echo4o-miniature")
    assert resolve("echo4o-miniature").resolve() == tmp_path / "echo4o-miniature"


def test_parts_of_a_saved_pipeline_load_by_its_name(components, tmp_path, monkeypatch):
    components["model"].save_pretrained(tmp_path / "saved" / "model")
    components["processor"].save_pretrained(tmp_path / "saved" / "processor")
    (tmp_path / "saved" / "model_index.json").write_text("{}")
    assert BagelConfig.from_pretrained(tmp_path / "saved").max_latent_size == 8
    assert BagelProcessor.from_pretrained(tmp_path, subfolder="saved").bos_token_id == 257
    model = BagelForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(model.llm2vae.weight, components["model"].llm2vae.weight)


def test_bundled_pipelines_share_parts(official, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    monkeypatch.setattr(checkpoint, "SHARED", tmp_path / "shared")
    pipeline = tmp_path / "echo4o-miniature"
    for part in (pipeline / "model", tmp_path / "shared" / "vae"):
        part.mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    assert resolve("echo4o-miniature", component="model") == pipeline / "model"
    assert resolve("echo4o-miniature", component="vae") == tmp_path / "shared" / "vae"
    with pytest.raises(FileNotFoundError, match=r"has no processor/; it holds model/, model_index.json"):
        resolve("echo4o-miniature", component="processor")


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("size", [0, 4, 900, -1])
def test_truncated_file(official, file, size):
    content = (official / file).read_bytes()[:size]
    (official / file).write_bytes(content)
    with pytest.raises(OSError, match=rf"{file} \({len(content):,} bytes\) is truncated .*download it again"):
        load_components(official)


def test_git_lfs_pointer(official):
    (official / "ema.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(OSError, match="git lfs pull"):
        BagelForConditionalGeneration.from_pretrained(official)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("ema.safetensors", r"no weights in .*looked for ema.safetensors, model.safetensors.*found ae.safetensors"),
        ("ae.safetensors", r"ae.safetensors is missing"),
        ("tokenizer.json vocab.json", r"no tokenizer in .*looked for tokenizer.json, or vocab.json and merges.txt"),
        ("llm_config.json config.json", r"llm_config.json is missing, and config.json has no 'llm_config'"),
        ("vit_config.json config.json", r"vit_config.json is missing, and config.json has no 'vit_config'"),
    ],
)
def test_missing_file(official, file, message):
    for name in file.split():
        (official / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_components(official)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("llm_config.json", {"hidden_size": None}, r"llm_config .*\{'hidden_size': None\}"),
        ("llm_config.json", {"num_hidden_layers": "2"}, r"whole positive numbers, got \{'num_hidden_layers': '2'\}"),
        ("vit_config.json", {"patch_size": 0}, r"vit_config .*\{'patch_size': 0\}"),
        ("vit_config.json", {"image_size": 70}, r"image_size=70 / patch_size=14 gives 5 patches"),
        ("llm_config.json", {"num_attention_heads": 3}, r"hidden_size=32 must be a multiple of num_attention_heads=3"),
        ("config.json", {"vae_config": 3}, r"'vae_config' .* must be an object, got 3"),
        ("config.json", {"timestep_shift": -1.0}, r"timestep_shift=-1.0 must be positive"),
        ("config.json", {"connector_act": "nonsense"}, r"connector_act='nonsense' is no activation"),
        ("llm_config.json", {"hidden_act": "nonsense"}, r"text_config.hidden_act='nonsense' is no activation"),
    ],
)
def test_wrong_configuration(official, file, changes, message):
    edit_json(official / file, **changes)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        load_components(official)


def test_wrong_counts_where_no_tensor_tells(official):
    for file in official.glob("*.safetensors"):
        file.unlink()
    edit_json(official / "config.json", max_latent_size=-3)
    with pytest.raises(ValueError, match=r"max_latent_size must be a whole positive number, got -3"):
        official_config_dict(official)


def test_llm_config_that_is_no_json(official):
    (official / "llm_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"llm_config.json is not valid JSON"):
        load_components(official)


def test_tensors_that_do_not_fit(official):
    def damage(tensors):
        del tensors["llm2vae.bias"]
        tensors["time_embedder.mlp.2.bias"] = torch.zeros(5)
        for layer in range(2, 9):
            tensors[f"language_model.model.layers.{layer}.mlp.up_proj.weight"] = torch.zeros(1)

    edit_tensors(official / "ema.safetensors", damage)
    with pytest.raises(ValueError, match="do not fit the model") as error:
        BagelForConditionalGeneration.from_pretrained(official)
    assert "1 missing (llm2vae.bias)" in str(error.value)
    assert "7 unexpected (language_model.model.layers.2.mlp.up_proj.weight" in str(error.value)
    assert "and 2 more" in str(error.value)
    assert "time_embedder.mlp.2.bias (5,) instead of (32,)" in str(error.value)


def test_tables_of_positions_are_computed_if_absent(components, official):
    names = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
    edit_tensors(official / "ema.safetensors", lambda tensors: [tensors.pop(name) for name in names])
    loaded, expected = (
        BagelForConditionalGeneration.from_pretrained(official).state_dict(),
        components["model"].state_dict(),
    )
    assert all(torch.equal(loaded[name], expected[name]) for name in names)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("latent_pos_embed.pos_embed", (63, 32), r"latent_pos_embed.pos_embed has 63 rows"),
        ("vae2llm.weight", (32, 35), r"tokens of 35 values, which hold no square of latents with 4 channels"),
    ],
)
def test_tensors_of_impossible_shapes(official, name, shape, message):
    edit_tensors(official / "ema.safetensors", lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=message):
        load_components(official)


@pytest.mark.parametrize(
    ("file", "name"), [("ema.safetensors", "vae2llm.weight"), ("ae.safetensors", "decoder.conv_out.bias")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(official, file, name, value):
    edit_tensors(official / file, lambda tensors: tensors[name].view(-1)[1:2].fill_(value))
    with pytest.raises(ValueError, match=rf"NaN or infinite values in 1 of \d+ tensors \({name}\)"):
        load_components(official)


def test_sums_that_overflow_are_no_damage():
    module = torch.nn.Linear(300, 300, dtype=torch.float16)
    torch.nn.init.constant_(module.weight, 60000.0)
    assert not module.weight.sum().isfinite()
    check_finite(module, "module")


# ------------------------------------------------------------------------------------------------------------- memory

PEAK = """
import re, sys, torch
from echo4o_hf.model.checkpoint import load_components

def peak():  # ru_maxrss would count the parent process too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

load_components(sys.argv[1])
before = peak()
model = load_components(sys.argv[2], dtype=getattr(torch, sys.argv[3]))["model"]
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1.15), ("bfloat16", 1.65)])
def test_loading_holds_one_copy(make_components, official, tmp_path, dtype, limit):
    """Memory-mapped pages count as memory once they are read; a second copy would double them."""
    write_official(make_components(vocab_size=1_200_000), tmp_path / "large")  # 2 x 154 MB
    size = (tmp_path / "large" / "ema.safetensors").stat().st_size
    environment = {**os.environ, "PYTHONPATH": str(Path(echo4o_hf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, official, tmp_path / "large", dtype]
    peak = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert 300e6 < size and 0.5 * size < peak < limit * size, f"{peak / size:.2f} x the file"
