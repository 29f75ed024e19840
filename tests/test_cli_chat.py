"""`echo4o chat`, run for real on the bundled checkpoint: what it says means little, but is always the same."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

from echo4o_hf import Echo4oPipeline
from echo4o_hf.cli import main
from echo4o_hf.cli.chat import Conversation

MODEL = "echo4o-miniature"
QUESTIONS = ("Describe the picture.", "What color is it?")
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = [sys.executable, "-c", f"{LISTEN}; import sys; from echo4o_hf.cli import main; sys.exit(main())", "chat"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def chat(*arguments: object) -> int:
    return main(["chat", *map(str, arguments), "--model", MODEL])


def answer(pipe: Echo4oPipeline, images: list[Path], texts: list[str], max_new_tokens: int) -> str:
    """To the last text, from one forward over all that was said, without any cache of it."""
    segments = [pipe.processor.vision_segment(Image.open(path)) for path in images]
    segments += [pipe.processor.text_segment(text) for text in texts]
    from echo4o_hf.model.context import Context

    with torch.no_grad():
        context = pipe.prefill(Context.empty(1), [segments])
        end = pipe.processor.eos_token_id
        ids = pipe.model.generate_from(context, max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    return pipe.processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_a_question_gets_the_answer_of_generate(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(picture, picture, "--question", QUESTIONS[0], "--max-new-tokens", 20) == 0
    pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
    inputs = pipe.processor(text=QUESTIONS[0], images=[Image.open(picture)] * 2, return_tensors="pt")
    ids = pipe.model.generate(**inputs, max_new_tokens=20, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = pipe.processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert expected.strip() and capsys.readouterr().out == expected + "\n"


def test_photographs_are_turned_upright(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (128, 32), "white")
    image.paste("red", (0, 0, 60, 32))
    image.save(picture)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=turned)
    said = []
    for path in (picture, tmp_path / "photo.png"):
        assert chat(path, "--question", QUESTIONS[0], "--max-new-tokens", 40) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_later_answers_follow_from_all_that_was_said(picture: Path) -> None:
    text = f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n{QUESTIONS[0]}"
    options = [str(picture), "--model", MODEL, "--max-new-tokens", "8"]
    run = subprocess.run([*COMMAND, *options], input=text, capture_output=True, text=True, start_new_session=True)
    assert run.returncode == 0, run.stderr
    pipe, said, answers = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32), [], []
    for question in (*QUESTIONS, QUESTIONS[0]):
        answers.append(answer(pipe, [picture], [*said, question], 8))
        said += [question, answers[-1]] if answers[-1].strip() else [question]
    assert run.stdout == "".join(f"{text}\n" for text in answers)
    assert answers[0] != answers[2]


def test_sampling_follows_the_seed(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for options in (("--seed", 1), ("--seed", 1), ("--seed", 2), ("--top-k", 1), ("--top-p", 1e-6)):
        assert chat(picture, "--question", "?", "--max-new-tokens", 8, "--temperature", 3, *options) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert chat(picture, "--question", "?", "--max-new-tokens", 8) == 0
    assert said[3] == said[4] == capsys.readouterr().out != said[0]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(picture: Path) -> None:
    options = [str(picture), "--model", MODEL, "--temperature", "100", "--max-new-tokens", "450"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, *options], **pipes, start_new_session=True, bufsize=0) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"Describe the picture.\n")
        first = process.stdout.read(1)  # it is speaking
        process.send_signal(signal.SIGINT)
        while not first.endswith(b"\n"):
            read = process.stdout.read(1)
            assert read, first.decode()
            first += read
        process.stdin.write(b"And now?\n")
        process.stdin.close()
        second = process.stdout.read()
    assert process.returncode == 0
    assert second.endswith(b"\n") and len(first) < len(second) / 2  # the second had nobody to stop it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--question", " "), "a prompt must hold text"),
        (("--max-new-tokens", 0), "--max-new-tokens 0 must be at least 1"),
        (("--temperature", -1), "--temperature -1.0 must be 0, or 0.01 or more"),
        (("--temperature", "nan"), "--temperature nan must be 0, or 0.01 or more"),
        (("--temperature", 1e-40), "--temperature 1e-40 must be 0, or 0.01 or more"),
        (("--temperature", 1, "--top-p", 0), "--top-p 0.0 must be above 0"),
        (("--temperature", 1, "--top-k", 0), "--top-k 0 must be at least 1"),
        (("--top-p", 0.5), "they want a --temperature above 0"),
        (("--seed", -1), "a seed must be a whole number"),
        (("--lora", "no-such-adapter"), "no-such-adapter"),
        (("--device", "abacus"), "'abacus'"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    options: tuple, message: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(picture, *options) == 2
    output = capsys.readouterr().err
    last = output.splitlines()[-1]
    assert last.startswith("echo4o: error: ") and message in last and "Loading weights" not in output


def test_pictures_that_cannot_be_read(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("missing.png", __file__):
        assert chat(picture, name, "--question", "?") == 2
        assert f"{name} cannot be read as a picture" in capsys.readouterr().err


def test_answers_that_are_longer_when_read_again_fill_the_context(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a letter of UTF-8 is one token, and decodes to a letter of three."""
    pipe = Echo4oPipeline.from_pretrained(MODEL)
    pipe.model.config.text_config.max_position_embeddings = 60
    monkeypatch.setattr(pipe.processor, "batch_decode", lambda ids, **options: ["star " * 300])
    with torch.no_grad():
        conversation = Conversation(pipe, [Image.open(picture)], 4, {"do_sample": False})
        conversation.ask(QUESTIONS[0])
    assert int(conversation.context.next_position) == 60
    with pytest.raises(ValueError, match="start anew"):
        conversation.ask("?")


def test_a_full_context(picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(("star " * 245 + "\n") * 3))
    assert chat(picture, "--max-new-tokens", 4) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2 and "with this question the conversation needs" in captured.err
