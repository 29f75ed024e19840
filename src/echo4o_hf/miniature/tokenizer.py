"""The miniature's tokenizer: byte-level BPE in the Qwen2 class, trained on the sentences of the shapes world.

Made by `python -m echo4o_hf.miniature.tokenizer --output DIR`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from echo4o_hf.miniature.captions import CAPTION_NOISE, corrupt, sample_item
from echo4o_hf.miniature.dataset import draw_multi_reference, draw_surreal

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
VOCAB_SIZE = 640  # at most; the 256 bytes are always in it, so any text can be encoded
MAX_LENGTH = 256
QUESTIONS = (
    "What is in the picture?",
    "Describe the picture.",
    "How many objects are there?",
    "What color is the object?",
    "What shape is the object?",
    "Is there an object on the left, on the right, at the top or at the bottom?",
    "Yes, there is.",
    "No, there is not.",
)
NOISE = dict.fromkeys(CAPTION_NOISE, 0.4)  # every wording that leaves something unsaid, about as often


def build_tokenizer(seed: int = 0, sentences: int = 20_000) -> Qwen2Tokenizer:
    """Train the tokenizer; words of the captions, with the space before them, are single tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(seed, sentences), trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def save_tokenizer(tokenizer: Qwen2Tokenizer, output: str | Path) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json; each appears only when it is whole."""
    output = Path(output)
    partial = output / "partial"
    tokenizer.save_pretrained(partial)
    tokenizer.backend_tokenizer.model.save(str(partial))
    config = json.loads((partial / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        os.replace(file, output / file.name)
    partial.rmdir()


def _corpus(seed: int, sentences: int) -> Iterator[str]:
    """Clean and noisy captions, the other two subsets' instructions, and questions."""
    rng = np.random.default_rng(seed)
    for index in range(sentences):
        item = sample_item(rng)
        yield item.prompt
        yield corrupt(item, rng, NOISE)
        yield draw_surreal(rng).instruction
        yield draw_multi_reference(rng).instruction
        yield QUESTIONS[index % len(QUESTIONS)]


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description="Train the miniature's tokenizer.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save_tokenizer(build_tokenizer(arguments.seed), arguments.output)


if __name__ == "__main__":
    main()
