from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo4o_hf.miniature.dataset import draw_instruction, draw_multi_reference, draw_surreal, write_dataset
from echo4o_hf.miniature.items import is_held_out
from echo4o_hf.miniature.judge import find_objects


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, 12, seed=0)
    return folder


def test_equal_arguments_give_equal_bytes(folder, tmp_path):
    write_dataset(tmp_path / "again", 12, seed=0)
    write_dataset(tmp_path / "other", 12, seed=1)
    assert digests(folder) == digests(tmp_path / "again")
    assert digests(folder) != digests(tmp_path / "other")


def test_the_layout_is_that_of_echo4o_image(folder):
    assert set(digests(folder)) == {
        "Surrel-Fantasy-Image/conflict.jsonl",
        "Surrel-Fantasy-Image/images/0-5000.tar.gz",
        "Instruction-Following-Image/Instruction-Following-Image.jsonl",
        "Instruction-Following-Image/images/0-5000.tar.gz",
        "Multi-Reference-Image/multi-ic/obj_obj.jsonl",
        "Multi-Reference-Image/multi-ic/obj_obj_obj.jsonl",
        "Multi-Reference-Image/multi_refer_images_input/object/object.tar.gz",
        "Multi-Reference-Image/multi_refer_images_output/obj_obj/obj_obj.tar.gz",
        "Multi-Reference-Image/multi_refer_images_output/obj_obj_obj/obj_obj_obj.tar.gz",
    }


def test_every_named_image_is_in_an_archive(folder):
    members: dict[str, Image.Image] = {}
    for path in folder.rglob("*.tar.gz"):
        with tarfile.open(path) as archive:
            for member in archive:
                data = archive.extractfile(member).read()
                subset, kind = path.relative_to(folder).parts[:2]
                key = f"{subset}/{kind}/{member.name.removeprefix('images/')}"
                members[key] = Image.open(io.BytesIO(data))
    named = []
    for path in folder.rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            named += [record["output_image"], *record.get("input_images", [])]
    assert {name.removeprefix("/Echo-4o-Image/") for name in named} == set(members)
    assert all(image.size == (64, 64) for image in members.values())


def test_references_hold_what_the_output_holds():
    rng = np.random.default_rng(0)
    for _ in range(30):
        sample = draw_multi_reference(rng)
        shown = {(o.shape, o.color) for scene in sample.references for o in scene.objects}
        assert shown == {(o.shape, o.color) for o in sample.scene.objects}
        assert 2 <= len(sample.references) <= 3
        assert all(o.shape in sample.instruction for o in sample.scene.objects)


def test_surreal_and_instruction_samples():
    rng = np.random.default_rng(0)
    samples = [draw_surreal(rng) for _ in range(60)]
    assert {sample.category for sample in samples} == {"T1", "T2", "T4"}
    assert all(sample.scene.objects[0].second_color in sample.instruction for sample in samples)
    samples = [draw_instruction(rng) for _ in range(100)]
    assert {sample.category for sample in samples} == {"easy", "medium", "hard"}
    assert not any(is_held_out(sample.instruction) for sample in samples)


def test_jpeg_does_not_hide_objects_from_the_judge(folder):
    records = (folder / "Instruction-Following-Image/Instruction-Following-Image.jsonl").read_text().splitlines()
    with tarfile.open(folder / "Instruction-Following-Image/images/0-5000.tar.gz") as archive:
        for line in records:
            record = json.loads(line)
            data = archive.extractfile(Path(record["output_image"]).name).read()
            for found in find_objects(Image.open(io.BytesIO(data))):
                assert found.shape in record["instruction"] and found.color in record["instruction"]


def test_a_wrong_number_of_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="positive, got 0"):
        write_dataset(tmp_path, 0)
