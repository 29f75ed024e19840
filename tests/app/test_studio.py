"""What the app does with the model: pictures that say how they were drawn, answers, stops, adapters, one at a time."""

import itertools
import shutil
import threading
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from echo4o_hf.app.studio import Drawing, Question, Studio, find_adapters, settings_of
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

PROMPT = "two red circles"
STEPS = {"num_inference_steps": 3}


def draw(studio: Studio, drawing: Drawing) -> list[Path]:
    return studio.draw(drawing, Event(), lambda done: None).paths


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def answer(studio: Studio, *conversation: str | Path, **options) -> str:
    *_, text = studio.answer(Question(conversation, **{"max_new_tokens": 20, **options}), Event())
    return text


def test_a_picture_holds_what_it_takes_to_draw_it_again(studio: Studio, picture: Path) -> None:
    arguments = {**STEPS, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.9), "width": 48, "thinking": True}
    paths = draw(studio, Drawing(PROMPT, [picture], [5, 6], {**arguments, "max_think_tokens": 5}))
    assert [path.parent for path in paths] == [studio.output] * 2
    for path, seed in zip(paths, (5, 6), strict=True):
        settings = settings_of(path)
        assert settings["prompt"] == PROMPT and settings["seed"] == seed and settings["plan"]
        parameters = settings["parameters"]
        (reference,) = parameters.pop("image")
        assert reference["file"] == "circle.png" and len(reference["sha256"]) == 64
        pipe = Echo4oPipeline.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
        again = pipe(PROMPT, image=Image.open(picture), generator=torch.Generator().manual_seed(seed), **parameters)
        # of two at once, so that floats are rounded otherwise
        assert np.abs(pixels(path).astype(int) - np.asarray(again.images[0])).max() <= 2
        assert settings["plan"] == again.texts[0]


def test_updates_are_told(studio: Studio) -> None:
    told: list[int] = []
    drawn = studio.draw(Drawing(PROMPT, [], [0], STEPS), Event(), told.append)
    assert told == [1, 2, 3] and drawn.num_updates == 3


def test_stop_ends_after_the_update_that_runs(studio: Studio) -> None:
    before = sorted(studio.output.iterdir())
    stop = Event()
    drawn = studio.draw(Drawing(PROMPT, [], [0], STEPS), stop, lambda done: stop.set() if done == 2 else None)
    assert drawn.paths == [] and drawn.num_updates == 2
    assert sorted(studio.output.iterdir()) == before
    assert studio.draw(Drawing(PROMPT, [], [0], STEPS), stop, lambda done: None).num_updates == 0
    assert draw(studio, Drawing(PROMPT, [], [0], STEPS)), "the next call is as ever"


def test_a_stop_at_the_last_update_keeps_the_picture(studio: Studio) -> None:
    stop = Event()
    drawn = studio.draw(Drawing(PROMPT, [], [0], STEPS), stop, lambda done: stop.set() if done == 3 else None)
    assert len(drawn.paths) == 1


def test_the_steps_of_the_next_visitor_are_not_counted(studio: Studio) -> None:
    class NextBegins(Event):
        """A stop at the last update; whoever asks for it, once the model is free, finds the next drawing begun."""

        def is_set(self) -> bool:
            if super().is_set() and not studio._lock.locked():
                draw(studio, Drawing(PROMPT, [], [1], {"num_inference_steps": 5}))
            return super().is_set()

    stop = NextBegins()
    drawn = studio.draw(Drawing(PROMPT, [], [0], STEPS), stop, lambda done: stop.set() if done == 3 else None)
    assert len(drawn.paths) == 1


def test_a_photograph_is_seen_upright(studio: Studio, tmp_path: Path) -> None:
    lying = Image.effect_noise((128, 64), 99).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as photo:
        ImageOps.exif_transpose(photo).save(tmp_path / "upright.png")
    photo, upright = (
        draw(studio, Drawing(PROMPT, [tmp_path / name], [0], STEPS))[0] for name in ("photo.jpg", "upright.png")
    )
    assert pixels(photo).shape == pixels(upright).shape and pixels(photo).shape[0] > pixels(photo).shape[1]
    assert (pixels(photo) == pixels(upright)).all()
    descriptions = [answer(studio, tmp_path / name, "Describe the picture.") for name in ("photo.jpg", "upright.png")]
    assert descriptions[0] == descriptions[1]


def test_a_plan_takes_what_the_prompt_leaves(studio: Studio) -> None:
    prompt = "two red circles " * 60
    drawn = studio.draw(
        Drawing(prompt, [], [0], {**STEPS, "thinking": True, "max_think_tokens": 512}), Event(), lambda done: None
    )
    assert drawn.plan and len(drawn.paths) == 1


def test_one_at_a_time(studio: Studio) -> None:
    told: list[str] = []
    threads = [
        threading.Thread(
            target=studio.draw,
            args=(Drawing(PROMPT, [], [0], STEPS), Event(), lambda done, name=name: told.append(name)),
        )
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == list("aaabbb")
    assert len(list(itertools.groupby(told))) == 2


def test_an_answer_is_what_the_model_generates(studio: Studio, picture: Path) -> None:
    processor, model = studio.pipeline.processor, studio.pipeline.model
    inputs = processor(text="Describe the picture.", images=[Image.open(picture)], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(ids, skip_special_tokens=True)[0]
    question = Question([picture, "Describe the picture."], max_new_tokens=20)
    texts = list(studio.answer(question, Event()))
    assert texts[-1] == expected and len(expected.split()) > 3
    assert len(set(texts)) > 3, "it came at once instead of bit by bit"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_an_answer_depends_on_what_was_said_before(studio: Studio, picture: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    question = (picture, "Describe the picture.")
    before = (tmp_path / "blue.png", "Describe the picture.", "a drawing of a red circle")
    assert answer(studio, *before, *question) != answer(studio, *question)


def test_stop_ends_an_answer(studio: Studio, picture: Path) -> None:
    stop = Event()
    texts = studio.answer(Question([picture, "Describe the picture."], max_new_tokens=100), stop)
    first = next(texts)
    stop.set()
    *_, last = [first, *texts]
    assert len(last) < len(answer(studio, picture, "Describe the picture.", max_new_tokens=100))


def test_an_answer_that_was_stopped_before_its_turn_is_not_begun(studio: Studio) -> None:
    stop = Event()
    stop.set()
    assert "".join(studio.answer(Question(["what is it?"], max_new_tokens=100), stop)) == ""


def test_a_reader_that_goes_leaves_the_model_free(studio: Studio, picture: Path) -> None:
    stop = Event()
    texts = studio.answer(Question([picture, "Describe the picture."], max_new_tokens=100), stop)
    next(texts)
    texts.close()
    assert stop.is_set()
    assert draw(studio, Drawing(PROMPT, [], [0], STEPS))


@pytest.mark.parametrize("conversation", [[" "], ["what is it?"] * 200, [Path("missing.png"), "what is it?"]])
def test_questions_that_cannot_be_answered(studio: Studio, conversation: list[str | Path]) -> None:
    with pytest.raises((ValueError, OSError), match="must hold text|begin a new one|missing.png"):
        answer(studio, *conversation)
    assert answer(studio, "what is it?")


def test_adapters_come_and_go(studio: Studio, adapters: Path) -> None:
    def drawn(adapter: str | None, weight: float = 1.0) -> np.ndarray:
        (path,) = draw(studio, Drawing(PROMPT, [], [0], STEPS, studio.find_adapter(adapter), weight))
        named = settings_of(path).get("lora")
        assert named == ([[str(adapters / "strong"), weight]] if adapter == "strong" else None)
        return pixels(path)

    base, strong, weak = drawn("none"), drawn("strong"), drawn("strong", 0.0)
    assert (strong != base).any()
    assert (weak == base).all()
    assert (drawn("strong") == strong).all()
    assert (drawn(None) == base).all()
    assert (drawn("none") == base).all()


@pytest.mark.parametrize("name", ["/etc", "some/typo", "", "strong "])
def test_only_adapters_of_the_list_are_found(studio: Studio, adapters: Path, name: str) -> None:
    with pytest.raises(ValueError) as refusal:
        studio.find_adapter(name)
    assert str(refusal.value) == f"there is no adapter {name!r}: choose one of none, strong"
    assert studio.find_adapter("strong") == str(adapters / "strong")


def test_an_adapter_that_does_not_fit_is_named_without_its_folder(
    studio: Studio, adapters: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(adapters / "strong", folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(ValueError, match="the adapter in other .* does not fit this model") as refusal:
        draw(studio, Drawing(PROMPT, [], [0], STEPS, str(folder)))
    assert str(tmp_path) not in str(refusal.value)
    assert draw(studio, Drawing(PROMPT, [], [0], STEPS))


def test_adapters_act_on_answers(studio: Studio, picture: Path, adapters: Path, tmp_path: Path) -> None:
    # those of the generation expert do not, so this one is renamed to act on understanding
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "understanding"
    shutil.copytree(adapters / "strong", folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(config.read_text().replace("_moe_gen", ""))
    save_file({name.replace("_moe_gen", ""): x for name, x in load_file(weights).items()}, weights, {"format": "pt"})
    plain = answer(studio, picture, "Describe the picture.")
    assert answer(studio, picture, "Describe the picture.", adapter=str(adapters / "strong")) == plain
    assert answer(studio, picture, "Describe the picture.", adapter=str(folder)) != plain


def test_find_adapters(adapters: Path, tmp_path: Path) -> None:
    copy = tmp_path / "more" / "strong"
    shutil.copytree(adapters / "strong", copy)
    shutil.copytree(adapters / "strong", copy / "checkpoint-1")
    assert find_adapters([adapters, copy]) == {
        "strong": str(adapters / "strong"),
        "more/strong": str(copy),
        "checkpoint-1": str(copy / "checkpoint-1"),
    }
    assert len(find_adapters([adapters, adapters])) == 1
    shutil.copytree(adapters / "strong", tmp_path / "more" / "none")
    assert "more/none" in find_adapters([tmp_path / "more" / "none"]), "none is the name of no adapter"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: there is no adapter_config\.json"):
        find_adapters([tmp_path / "empty"])
