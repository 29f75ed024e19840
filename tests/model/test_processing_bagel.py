import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.official import load_tokenizer
from echo4o_hf.model.processing_bagel import SPECIAL_TOKENS, BagelProcessor, images_per_text

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")

WORDS = ["[unk]", "[pad]", "a", "red", "cat", "what", "is", "this"]
PHOTO = Image.fromarray(skimage.data.chelsea())


def make_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


@pytest.fixture
def processor():
    images = BagelImageProcessor(
        latent_size={"max": 64, "min": 32, "stride": 16}, vision_size={"max": 56, "min": 28, "stride": 14}
    )
    return BagelProcessor(images, make_tokenizer(*SPECIAL_TOKENS))


@needs_golden
def test_tokens_equal_the_official_ones():
    golden = json.loads((GOLDEN / "golden.json").read_text())
    expected = golden["h"]["tokenizer"]
    tokenizer = load_tokenizer(GOLDEN)
    assert len(tokenizer) == expected["len_before"]
    processor = BagelProcessor(BagelImageProcessor(), tokenizer)
    assert len(processor.tokenizer) == expected["len_after"]
    assert {
        "bos_token_id": processor.bos_token_id,
        "eos_token_id": processor.eos_token_id,
        "start_of_image": processor.start_of_image_token_id,
        "end_of_image": processor.end_of_image_token_id,
    } == expected["new_token_ids"]
    for text, ids in golden["h"]["encode"].items():
        assert processor.text_segment(text).input_ids == [processor.bos_token_id, *ids, processor.eos_token_id]
    assert (
        processor.text_segment("<|im_start|>a<|im_end|><|vision_start|><|vision_end|>").input_ids[1:-1]
        == (golden["h"]["encode_specials"])
    )


def test_missing_special_tokens_are_added_at_the_end_in_order():
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>")
    processor = BagelProcessor(BagelImageProcessor(), tokenizer)
    assert [processor.bos_token_id, processor.eos_token_id] == [len(WORDS), len(WORDS) + 1]
    assert [processor.start_of_image_token_id, processor.end_of_image_token_id] == [len(WORDS) + 2, len(WORDS) + 3]
    assert len(tokenizer) == len(WORDS) + 4
    BagelProcessor(BagelImageProcessor(), tokenizer)  # finds them all
    assert len(tokenizer) == len(WORDS) + 4


def test_a_row_is_images_then_text_then_the_start_of_the_answer(processor):
    rows = processor(text=["what is this", "a cat"], images=[[PHOTO], None])
    bos, eos, start, end = len(WORDS), len(WORDS) + 1, len(WORDS) + 2, len(WORDS) + 3
    rows_of_patches, columns = rows["vision_grids"][0, 0].tolist()
    patches = rows_of_patches * columns
    assert rows["input_ids"][0].tolist() == [start, end, *[1] * patches, bos, 5, 6, 7, eos, bos]
    assert rows["input_ids"][1].tolist() == [1] * (patches + 3) + [bos, 2, 4, eos, bos]
    assert rows["position_ids"][0].tolist() == [0] * (patches + 2) + [1, 2, 3, 4, 5, 6]
    assert rows["position_ids"][1].tolist() == [0] * (patches + 3) + [0, 1, 2, 3, 4]
    assert rows["segment_ids"][0].tolist() == [0] * (patches + 2) + [1] * 5 + [2]
    assert rows["segment_ids"][1].tolist() == [-1] * (patches + 3) + [0] * 4 + [1]
    assert rows["attention_mask"].sum(1).tolist() == [patches + 8, 5]
    assert rows["vision_mask"].sum(1).tolist() == [patches, 0]
    assert rows["roles"][0].tolist() == [1] * (patches + 2) + [0] * 6
    assert rows["vision_grids"][1].tolist() == [[0, 0]]
    assert set(rows) == set(processor.model_input_names)
    assert rows["pixel_values"].shape == (2, patches, 3 * 14**2)
    expected = processor.vision_segment(PHOTO).patches
    assert torch.equal(rows["pixel_values"][0], expected) and not rows["pixel_values"][1].any()


def test_without_images_there_are_no_pixels(processor):
    rows = processor(text="what is this")
    assert "pixel_values" not in rows and "vision_grids" not in rows
    assert rows["input_ids"].shape == (1, 6)
    assert isinstance(processor(text="a cat", return_tensors="np")["input_ids"], np.ndarray)


def test_vision_patches_come_from_the_latent_resize_unless_from_the_original():
    # 90x58 becomes 96x64 for the VAE and 84x56 for the vision tower, whichever way; the pixels differ.
    images = BagelImageProcessor(
        latent_size={"max": 96, "min": 48, "stride": 16}, vision_size={"max": 84, "min": 42, "stride": 14}
    )
    processor = BagelProcessor(images, make_tokenizer())
    photo = PHOTO.resize((90, 58))
    inference, training = processor.vision_segment(photo), processor.vision_segment(photo, from_original=True)
    assert inference.grid == training.grid == (4, 6)
    assert torch.equal(inference.patches, processor.vision_segment(images.resize_for_latents(photo)).patches)
    assert not torch.equal(inference.patches, training.patches)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = BagelProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.bos_token_id == processor.bos_token_id and len(loaded.tokenizer) == len(processor.tokenizer)
    first, second = (p(text="a red cat", images=PHOTO) for p in (processor, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_saved_processor_without_its_vocabulary(processor, tmp_path):
    processor.save_pretrained(tmp_path / "inside")
    (tmp_path / "inside" / "tokenizer.json").unlink()
    for path, options in ((tmp_path / "inside", {}), (tmp_path, {"subfolder": "inside"})):
        with pytest.raises(FileNotFoundError, match="inside: looked for tokenizer.json, or vocab.json and merges.txt"):
            BagelProcessor.from_pretrained(path, **options)


@needs_golden
def test_the_official_layout_loads():
    processor = BagelProcessor.from_pretrained(GOLDEN)
    assert processor.image_processor.latent_size["max"] == 256 and processor.image_processor.vision_size["max"] == 280
    assert processor.bos_token_id == 286


def test_decoding_is_the_tokenizers(processor):
    ids = processor(text=["a cat"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a cat"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "must hold text, got ''"), ("  \n", "must hold text"), (3, "got int: 3"), (None, "got NoneType")],
)
def test_prompts_that_are_no_text(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor.text_segment(text)
    with pytest.raises(ValueError, match=message):
        processor(text=[text])


def test_a_prompt_over_the_limit_gives_both_numbers(processor):
    processor.tokenizer.model_max_length = 5
    processor.text_segment("a red cat")
    with pytest.raises(ValueError, match="has 6 tokens, the tokenizer's limit is 5"):
        processor.text_segment("a red red cat")


def test_rows_of_unequal_length_need_padding(processor):
    with pytest.raises(ValueError, match=r"\[5, 6\] tokens; pass padding=True"):
        processor(text=["a cat", "a red cat"], padding=False)
    with pytest.raises(ValueError, match="no text given"):
        processor(text=[])


def test_images_per_text():
    one, other = PHOTO, np.zeros((4, 4, 3), np.uint8)
    assert images_per_text(None, 2) == [[], []]
    assert images_per_text(one, 1) == [[one]]
    assert images_per_text([one, other], 1)[0][1] is other
    assert images_per_text([[one], None], 2) == [[one], []]
    with pytest.raises(ValueError, match="2 images for 2 texts: pass a list of lists"):
        images_per_text([one, other], 2)
    with pytest.raises(ValueError, match="1 images for 3 texts"):
        images_per_text(one, 3)
    with pytest.raises(ValueError, match="1 lists of images for 2 texts"):
        images_per_text([[one]], 2)
    with pytest.raises(ValueError, match="mixes lists and single images"):
        images_per_text([[one], other], 2)
    with pytest.raises(ValueError, match="got int"):
        images_per_text(3, 1)
