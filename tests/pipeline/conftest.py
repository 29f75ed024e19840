"""A pipeline of 64x64 images in the real classes, with random weights large enough for everything to matter."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.processing_bagel import SPECIAL_TOKENS, BagelProcessor
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.pipeline.prompts import THINKING_PROMPT

WORDS = ["[pad]", "[unk]", *sorted({"a", "red", "cat", "two", "blue", "hats", *THINKING_PROMPT.split()})]


def make_processor(config):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return BagelProcessor(BagelImageProcessor.from_bagel_config(config), tokenizer)


def make_config(**changes):
    first = len(WORDS)
    sizes = {
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": first + 4,
            "max_position_embeddings": 128,
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
        "max_latent_size": 4,
        "vit_max_num_patch_per_side": 4,
        "bos_token_id": first,
        "eos_token_id": first + 1,
        "start_of_image_token_id": first + 2,
        "end_of_image_token_id": first + 3,
    }
    return BagelConfig(**{**sizes, **changes})


def make_vae(**changes):
    sizes = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return AutoencoderKL(**{**sizes, **changes}).eval()


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    config = make_config()
    model = BagelForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = Echo4oPipeline(model, make_vae(), scheduler, make_processor(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe
