from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from echo4o_hf.miniature.captions import sample_item
from echo4o_hf.miniature.dataset import draw_multi_reference, draw_surreal
from echo4o_hf.miniature.tokenizer import MAX_LENGTH, SPECIAL_TOKENS, VOCAB_SIZE, build_tokenizer, save_tokenizer

SHIPPED = Path(str(files("echo4o_hf.miniature"))) / "checkpoints" / "shared" / "processor"


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return AutoTokenizer.from_pretrained(SHIPPED)


def test_words_are_single_tokens(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(200):
        for text in (sample_item(rng).prompt, draw_surreal(rng).instruction, draw_multi_reference(rng).instruction):
            assert len(tokenizer(text).input_ids) == len(text.replace(",", " ,").split()), text


@pytest.mark.parametrize("text", ["a red ring", "naïve 日本語 🙂\n\tx", "<|im_start|>a<|vision_end|>", ""])
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_single_and_known(tokenizer):
    assert isinstance(tokenizer, Qwen2Tokenizer)
    for token in SPECIAL_TOKENS:
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.decode(tokenizer(f"a {token}").input_ids, skip_special_tokens=True).strip() == "a"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert len(tokenizer) <= VOCAB_SIZE and tokenizer.model_max_length == MAX_LENGTH


def test_the_files_of_the_official_layout_are_enough(tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, tmp_path)
    text = "<|im_start|>Two red circles<|vision_start|> naïve"
    assert Qwen2Tokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_building_is_seeded_and_saving_leaves_whole_files(tmp_path):
    for name in ("first", "second"):
        save_tokenizer(build_tokenizer(seed=0, sentences=300), tmp_path / name)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert not (tmp_path / "first" / "partial").exists()
    config = json.loads((tmp_path / "first" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer"


@pytest.mark.slow
def test_the_shipped_tokenizer_is_the_seeded_one() -> None:
    assert build_tokenizer().get_vocab() == AutoTokenizer.from_pretrained(SHIPPED).get_vocab()
