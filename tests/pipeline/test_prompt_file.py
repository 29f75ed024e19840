"""Files of prompts, and what is refused before a model is there."""

import json
from pathlib import Path

import pytest
from PIL import Image

from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.pipeline.prompt_file import Request, check_request, read_prompt_file


def write(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.txt"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_texts_and_json(tmp_path: Path) -> None:
    settings = {"prompt": "two cats", "images": ["a.png", "/b.png"], "seed": 7, "guidance_interval": [0, 1]}
    path = write(tmp_path, "\ufeff a red cat\u2028 ", "", settings, "ein Hütchen, 帽子", {"prompt": "# a cat"})
    assert read_prompt_file(path) == [
        Request("a red cat", 1),
        Request("two cats", 3, (tmp_path / "a.png", Path("/b.png")), 7, {"guidance_interval": [0, 1]}),
        Request("ein Hütchen, 帽子", 4),
        Request("# a cat", 5),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("# a cat", 'there are no comments; .* write {"prompt": "# a cat"}'),
        ("{prompt: a cat}", "no JSON, though it starts with a brace"),
        ({}, '"prompt" must be a text, got None'),
        ({"prompt": " "}, '"prompt" must be a text'),
        ({"prompt": "a cat", "images": "a.png"}, '"images" must be a list of files'),
        ({"prompt": "a cat", "image": ["a.png"]}, 'pictures are listed in "images"'),
        ({"prompt": "a cat", "seed": "7"}, "a seed must be a whole number"),
        ({"prompt": "a cat", "seed": -1}, "a seed must be a whole number"),
        ({"prompt": "a cat", "guidance": 3}, "takes no guidance; did you mean guidance_"),
        ({"prompt": "a cat", "latents": []}, "latents is set by this command"),
    ],
)
def test_a_bad_line_is_named(line: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"prompts.txt, line 3: .*{message}"):
        read_prompt_file(write(tmp_path, "a cat", "", line, "{"))


def test_files_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts.txt holds no prompts"):
        read_prompt_file(write(tmp_path, "", " "))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="picture.png is no text in UTF-8"):
        read_prompt_file(tmp_path / "picture.png")
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        read_prompt_file(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 must be at most 1000"),
        ({"height": 33}, "height=33"),
        ({"width": "wide"}, "width='wide'"),
        ({"guidance_scale": "high"}, "guidance_scale='high'"),
        ({"image_guidance_scale": -1}, "image_guidance_scale=-1"),
        ({"guidance_interval": [1, 0]}, "guidance_interval"),
        ({"guidance_renorm": "none"}, "guidance_renorm='none' is unknown"),
        ({"guidance_renorm_min": 2}, "guidance_renorm_min=2"),
        ({"thinking": "no"}, "thinking='no'"),
        ({"thinking": True, "max_think_tokens": 0}, "max_think_tokens=0"),
    ],
)
def test_values_that_the_pipeline_refuses(arguments: dict, message: str, pipe: Echo4oPipeline) -> None:
    config, processor = pipe.model.config, pipe.processor
    check_request(Request("a cat"), {}, config, processor)
    with pytest.raises(ValueError, match=message):
        check_request(Request("a cat"), arguments, config, processor)
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **{"num_inference_steps": 1, **arguments})


def test_prompts_that_leave_no_place_for_a_plan(pipe: Echo4oPipeline) -> None:
    config, processor, prompt = pipe.model.config, pipe.processor, "a " * 110
    check_request(Request("a cat"), {"thinking": True, "max_think_tokens": 1000}, config, processor)  # a shorter plan
    check_request(Request(prompt), {}, config, processor)
    with pytest.raises(ValueError, match="positions, the model has 128"):
        check_request(Request(prompt), {"thinking": True}, config, processor)
    with pytest.raises(ValueError, match="positions.* the model has 128"):
        pipe(prompt, thinking=True, num_inference_steps=1)


def test_pictures_that_cannot_be_read(pipe: Echo4oPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    for name in ("half.png", "missing.png", "."):
        request = Request("a cat", references=(tmp_path / "whole.png", tmp_path / name))
        with pytest.raises(OSError, match="cannot be read as a picture"):
            check_request(request, {}, pipe.model.config, pipe.processor)
