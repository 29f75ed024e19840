"""A Bagel small enough to write to disk in every test, in the real classes with random weights."""

import pytest
import torch
from diffusers import AutoencoderKL
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from echo4o_hf.model.checkpoint import write_official
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.processing_bagel import BagelProcessor

# Sizes that no default has.
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 264,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
}


def make_tokenizer():
    """Bytes, and two of the four special tokens; the processor adds the others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[], unk_token=None
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


@pytest.fixture
def make_components():
    """Function (sizes of text) -> model, vae and processor."""

    def make(**text):
        torch.manual_seed(0)
        processor = BagelProcessor(BagelImageProcessor(), make_tokenizer())
        names = ("bos_token_id", "eos_token_id", "start_of_image_token_id", "end_of_image_token_id")
        config = BagelConfig(
            text_config={**TEXT, **text},
            vision_config=VISION,
            latent_channels=4,
            latent_downsample=2,
            latent_patch_size=3,
            max_latent_size=8,
            vit_max_num_patch_per_side=4,
            **{name: getattr(processor, name) for name in names},
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=0.5,
            shift_factor=0.25,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        return {"model": BagelForConditionalGeneration(config).eval(), "vae": vae.eval(), "processor": processor}

    return make


@pytest.fixture
def components(make_components):
    return make_components()


@pytest.fixture
def official(components, tmp_path):
    """A folder in the official layout."""
    write_official(components, tmp_path / "official")
    return tmp_path / "official"
