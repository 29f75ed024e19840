"""What the model can do besides drawing: seeing pictures and answering, through transformers' own ways of asking."""

import base64
import json
import logging
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from echo4o_hf.model.checkpoint import write_official
from echo4o_hf.model.context import Context
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration

from .conftest import make_vae

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
CAT, ROCKET = Image.fromarray(skimage.data.chelsea()), Image.fromarray(skimage.data.rocket())
ROWS = [("a red cat", [CAT]), ("two", []), ("two blue hats", [ROCKET, CAT, ROCKET.rotate(90, expand=True)])]
QUESTION = {"type": "text", "text": "a red cat"}


def new_ids(pipe, inputs, **options):
    return pipe.model.generate(**inputs, **{"do_sample": False, "eos_token_id": None, **options})[
        :, inputs["input_ids"].shape[1] :
    ]


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")
@pytest.mark.parametrize("case", ["c", "c_textonly"])
def test_answers_equal_the_official_ones(case, capsys):
    """From question and picture to streamed text, by the Auto classes, from the official layout."""
    model, processor = AutoModelForImageTextToText.from_pretrained(GOLDEN), AutoProcessor.from_pretrained(GOLDEN)
    assert isinstance(AutoModel.from_pretrained(GOLDEN), type(model))
    assert type(AutoConfig.from_pretrained(GOLDEN)) is type(model.config)
    facts, numbers = json.loads((GOLDEN / "golden.json").read_text()), load_file(GOLDEN / "golden.safetensors")
    # The recorded picture has its size already: these rules leave it as it is.
    rule = {"max": 70, "min": 14, "stride": 14}
    processor.image_processor = BagelImageProcessor(latent_size=rule, vision_size=rule)
    question = facts["meta"]["prompts"]["und"]
    content = [{"type": "text", "text": question}]
    if case == "c":
        pixels = (numbers["c.pixels"] * 127.5 + 127.5).round().to(torch.uint8)
        torch.testing.assert_close(processor.image_processor.vision_pixels(pixels), numbers["c.pixels"])
        content.insert(0, {"type": "image", "image": pixels})
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    asked = processor(text=question, images=content[0]["image"] if case == "c" else None)
    assert set(asked) == set(inputs) and all(torch.equal(asked[name], inputs[name]) for name in asked)

    expected = [*facts[case]["eight_greedy_ids"], facts[case]["ninth_prediction"]]
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    written = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=None, streamer=streamer)
    assert written[0, inputs["input_ids"].shape[1] :].tolist() == expected
    assert capsys.readouterr().out.strip() == processor.decode(expected).strip()
    end = facts[case]["with_end_token_id"]
    stopped = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=end, pad_token_id=end)
    stopped = stopped[0, inputs["input_ids"].shape[1] :].tolist()
    assert [model.config.bos_token_id, *stopped] == [*facts[case]["returned_with_end_token_id"], end]


def test_several_pictures_in_a_left_padded_batch_equal_single_calls(pipe):
    texts, images = zip(*ROWS, strict=True)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}):
        inputs = pipe.processor(text=list(texts), images=list(images))
        assert not inputs["attention_mask"].all()
        together = new_ids(pipe, inputs, max_new_tokens=6, **options)
        for row, text, of_row in zip(together, texts, images, strict=True):
            alone = new_ids(pipe, pipe.processor(text=text, images=of_row or None), max_new_tokens=6, **options)
            assert row.tolist() == alone[0].tolist()
    orders = [pipe.processor(text="a", images=pictures) for pictures in ([CAT, ROCKET], [ROCKET, CAT])]
    with torch.no_grad():
        first, second = (pipe.model(**inputs).logits[0, -1] for inputs in orders)
    assert (first - second).abs().max() > 1e-2


def test_streams_give_the_text_that_is_returned(pipe, capsys):
    inputs = pipe.processor(text="a red cat", images=[CAT, ROCKET])
    expected = pipe.processor.decode(new_ids(pipe, inputs, max_new_tokens=8)[0])
    new_ids(pipe, inputs, max_new_tokens=8, streamer=TextStreamer(pipe.processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == expected.split() and expected
    pieces = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True)
    new_ids(pipe, inputs, max_new_tokens=8, streamer=pieces)
    assert "".join(pieces).split() == expected.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "with a DynamicCache, not with NoneType and use_cache=False: leave use_cache"),
        ({"cache_implementation": "static"}, "with a DynamicCache, not with StaticCache"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation .* needs a prompt of text"),
        ({"output_hidden_states": True}, "output_hidden_states and output_attentions are not kept"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions are not kept"),
    ],
)
def test_ways_to_write_that_lose_the_pictures_are_refused(pipe, options, message):
    inputs = pipe.processor(text="a red cat", images=[CAT])
    with pytest.raises(ValueError, match=message):
        pipe.model.generate(**inputs, max_new_tokens=3, **options)


def test_guessing_ahead_writes_the_same_text(pipe):
    inputs = pipe.processor(text="a red cat a red")
    assert torch.equal(
        new_ids(pipe, inputs, max_new_tokens=9, prompt_lookup_num_tokens=2), new_ids(pipe, inputs, max_new_tokens=9)
    )


def test_going_on_from_a_cache_needs_positions(pipe):
    """A picture has more tokens than positions, so that tokens do not tell where the text goes on."""
    inputs = pipe.processor(text="a red cat", images=[CAT])
    first = pipe.model.generate(**inputs, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, inputs["input_ids"][:, -1:]], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    with pytest.raises(ValueError, match="past_key_values need position_ids"):
        pipe.model.generate(**more, past_key_values=first.past_key_values, max_new_tokens=3)

    begin = int(inputs["position_ids"][0, -1]) + 1
    positions = torch.arange(begin, begin + 4)[None]
    whole = {
        name: torch.cat([inputs[name], inputs[name][:, -1:].expand(1, 4)], 1)
        for name in inputs
        if inputs[name].ndim == 2
    }
    whole |= {"input_ids": ids, "position_ids": torch.cat([inputs["position_ids"], positions], 1)}
    expected = new_ids(pipe, {**inputs, **whole}, max_new_tokens=3)
    found = pipe.model.generate(
        **more, past_key_values=first.past_key_values, position_ids=positions, max_new_tokens=3
    )
    assert found[:, ids.shape[1] :].tolist() == expected.tolist()


def test_text_after_a_context_does_not_hang_on_the_settings_of_the_model(pipe):
    context = pipe.prefill(Context.empty(1), [[pipe.processor.text_segment("a red cat")]])
    expected = pipe.model.generate_from(context, 6, do_sample=False)
    for name, value in {"num_beams": 3, "return_dict_in_generate": True, "use_cache": False}.items():
        before = getattr(pipe.model.generation_config, name)
        setattr(pipe.model.generation_config, name, value)
        assert torch.equal(pipe.model.generate_from(context, 6, do_sample=False), expected)
        setattr(pipe.model.generation_config, name, before)
    with pytest.raises(TypeError, match="num_beams"):
        pipe.model.generate_from(context, 6, num_beams=2)


def test_sampling_options(pipe):
    inputs = pipe.processor(text="a red cat", images=[CAT])
    greedy = new_ids(pipe, inputs, max_new_tokens=8).tolist()

    def sample(seed=0, **options):
        torch.manual_seed(seed)
        return new_ids(pipe, inputs, max_new_tokens=8, do_sample=True, **options).tolist()

    assert sample(temperature=1e-4) == sample(top_p=1e-4) == sample(top_k=1) == greedy
    assert sample(temperature=5.0, seed=1) == sample(temperature=5.0, seed=1)
    assert len({str(sample(temperature=5.0, seed=seed)) for seed in range(4)}) > 1
    several = sample(temperature=5.0, num_return_sequences=3)
    assert len(several) == 3 and len({str(ids) for ids in several}) > 1
    with pytest.raises(ValueError, match="temperature"):
        sample(temperature=-1.0)


@torch.no_grad()
def test_beams_find_the_likeliest_answer(pipe):
    inputs = pipe.processor(text=["a red cat", "two"], images=[[CAT], []])
    size = pipe.model.config.text_config.vocab_size
    found = new_ids(pipe, inputs, max_new_tokens=2, num_beams=size, length_penalty=0.0)
    for row, (text, images) in zip(found, [("a red cat", [CAT]), ("two", [])], strict=True):
        context = Context.empty(1)
        for segment in [*map(pipe.processor.vision_segment, images), pipe.processor.text_segment(text)]:
            context = pipe.model.prefill(context, [segment])
        position, bos = context.next_position[:, None], torch.tensor([[pipe.processor.bos_token_id]])
        past = {"past_key_values": context.cache, "use_cache": True}
        first = pipe.model(input_ids=bos, position_ids=position, **past).logits[0, -1].log_softmax(0)
        both = torch.stack(
            [
                first[token]
                + pipe.model(
                    input_ids=torch.tensor([[token]]),
                    position_ids=position + 1,
                    past_key_values=Context(context.cache, context.attention_mask, position).copy().cache,
                ).logits[0, -1].log_softmax(0)
                for token in range(size)
            ]
        )  # fmt: skip
        assert row.tolist() == [int(both.argmax()) // size, int(both.argmax()) % size]


def test_a_chat_is_its_texts_and_pictures_in_order(pipe):
    processor = pipe.processor
    first = {"role": "user", "content": [{"type": "image", "image": CAT}, QUESTION]}
    chat = [
        {"role": "system", "content": "two hats"},
        first,
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image", "image": ROCKET}]},
    ]
    inputs = processor.apply_chat_template(chat)
    context = Context.empty(1)
    for item in ["two hats", CAT, "a red cat", "a cat", "two", ROCKET]:
        segment = processor.text_segment(item) if isinstance(item, str) else processor.vision_segment(item)
        context = pipe.model.prefill(context, [segment])
    with torch.no_grad():
        expected = pipe.model.generate_from(context, 6, do_sample=False, eos_token_id=None)
    assert new_ids(pipe, inputs, max_new_tokens=6).tolist() == expected.tolist()

    batch = processor.apply_chat_template([chat, [first]], processor_kwargs={"padding": True})
    for ids, one in zip(new_ids(pipe, batch, max_new_tokens=6).tolist(), (chat, [first]), strict=True):
        assert [ids] == new_ids(pipe, processor.apply_chat_template(one), max_new_tokens=6).tolist()
    open_end = processor.apply_chat_template([*chat[:2], chat[2]], continue_final_message=True)["input_ids"][0]
    closed = processor.apply_chat_template(chat[:3], add_generation_prompt=False)["input_ids"][0]
    assert open_end.tolist() == closed[:-1].tolist() and closed[-1] == processor.eos_token_id
    bos = processor.bos_token_id
    assert processor.apply_chat_template(chat[:3])["input_ids"][0].tolist() == [*closed.tolist(), bos]


def test_pictures_of_a_chat_come_in_every_form(pipe, tmp_path):
    small = CAT.resize((32, 32))
    small.save(tmp_path / "cat.png")
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "cat.png").read_bytes()).decode()
    parts = [
        {"type": "image", "image": small},
        {"type": "image", "path": str(tmp_path / "cat.png")},
        {"type": "image", "url": str(tmp_path / "cat.png")},
        {"type": "image", "url": data},
        {"type": "image", "base64": data.partition(",")[2]},
        {"type": "image_url", "image_url": {"url": data}},
    ]
    pixels = [
        pipe.processor.apply_chat_template([{"role": "user", "content": [part, QUESTION]}])["pixel_values"]
        for part in parts
    ]
    assert all(torch.equal(one, pixels[0]) for one in pixels)


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        ([], {}, "must be a list of messages, got"),
        ("a cat", {}, "must be a list of messages, got 'a cat'"),
        (["a cat"], {}, "a message must be a dict whose role is one of system, user, assistant, got 'a cat'"),
        ([{"role": "tool", "content": "a"}], {}, "whose role is one of"),
        ([{"role": "user"}], {}, "content, got None"),
        ([{"role": "user", "content": []}], {}, r"content, got \[\]"),
        ([{"role": "user", "content": " "}], {}, "must hold text"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
            {},
            "must be a text or an image.*video",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "must be a text or an image"),
        ([{"role": "user", "content": [{"type": "image", "path": "nowhere.png"}]}], {}, "no image at 'nowhere.png'"),
        ([{"role": "user", "content": "a"}], {"tools": []}, "no chat template: tools cannot be used"),
        ([{"role": "user", "content": "a"}], {"tokenize": False}, "tokenize=False"),
        (
            [{"role": "user", "content": [{"type": "image", "image": CAT}]}],
            {"continue_final_message": True},
            "with a text",
        ),
    ],
)
def test_chats_that_cannot_be_read(pipe, chat, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.processor.apply_chat_template(chat, **options)


def test_the_pipeline_of_transformers(pipe, tmp_path, caplog, monkeypatch):
    """By model and processor, and by the name of a folder in the official layout."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    components = {
        "model": pipe.model,
        "vae": make_vae(use_quant_conv=False, use_post_quant_conv=False),
        "processor": pipe.processor,
    }
    chat = [{"role": "user", "content": [{"type": "image", "image": CAT}, QUESTION]}]
    answer = pipe.processor.decode(
        new_ids(pipe, pipe.processor.apply_chat_template(chat), max_new_tokens=5)[0], skip_special_tokens=True
    )
    ask = pipeline("image-text-to-text", model=pipe.model, processor=pipe.processor)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5}
    full = ask(text=chat, generate_kwargs={**settings})[0]["generated_text"]
    assert full[:-1] == chat and full[-1] == {"role": "assistant", "content": full[-1]["content"]}
    assert full[-1]["content"].split() == answer.split() and answer
    assert not [record for record in caplog.records if "not supported" in record.message]
    both = ask(
        text=[chat, [{"role": "user", "content": "two hats"}]], return_full_text=False, generate_kwargs={**settings}
    )
    assert both[0][0]["generated_text"].split() == answer.split() and both[1][0]["generated_text"]
    plain = ask(images=CAT, text="a red cat", return_full_text=False, generate_kwargs={**settings})
    assert plain[0]["generated_text"].split() == answer.split()
    continued = ask(
        text=[*chat, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}], generate_kwargs={**settings}
    )
    assert continued[0]["generated_text"][-1]["content"][0]["text"].startswith("two")

    write_official(components, tmp_path / "official")
    by_name = pipeline("image-text-to-text", model=str(tmp_path / "official"))
    assert isinstance(by_name.model, BagelForConditionalGeneration)
    by_name.processor.image_processor = pipe.processor.image_processor
    assert (
        by_name(text=chat, return_full_text=False, generate_kwargs={**settings})[0]["generated_text"].split()
        == answer.split()
    )
