"""Finding pictures by their names, and encoding what callers hold."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo4o_hf.benchmarks.images import find_images, to_bytes

ITEMS = [{"prompt": name} for name in "abc"]
WITH_IDS = [{"id": number} for number in (3, 17, 40)]


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"never decoded here")
    return tmp_path


def found(folder: Path, items: list = ITEMS, **options: str) -> list[list[str]]:
    return [[str(path.relative_to(folder)) for path in paths] for paths in find_images(folder, items, **options)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.png", "2.png", "3.png"], [["1.png"], ["2.png"], ["3.png"]]),
        (["00000.jpg", "00001.JPEG", "00002.WebP"], [["00000.jpg"], ["00001.JPEG"], ["00002.WebP"]]),
        (["0.png", "2.png"], [["0.png"], [], ["2.png"]]),
        (["3.png"], [[], [], ["3.png"]]),
        (["1_0.webp", "1_1.webp", "1_10.webp", "1_9.webp", "3_0.webp"],
         [["1_0.webp", "1_1.webp", "1_9.webp", "1_10.webp"], [], ["3_0.webp"]]),
        (["00000/samples/00000.png", "00000/samples/00001.png", "00000/metadata.jsonl", "00002/samples/00000.png"],
         [["00000/samples/00000.png", "00000/samples/00001.png"], [], ["00002/samples/00000.png"]]),
        (["0.png", "notes.txt", "metadata.jsonl", "._0.png", "report/index.html"], [["0.png"], [], []]),
    ],
)  # fmt: skip
def test_layouts(names: list[str], expected: list[list[str]], tmp_path: Path) -> None:
    assert found(folder_of(tmp_path, *names)) == expected


def test_names_are_ids_where_items_have_them(tmp_path: Path) -> None:
    assert found(folder_of(tmp_path, "3.png", "40.png"), WITH_IDS) == [["3.png"], [], ["40.png"]]
    assert found(folder_of(tmp_path / "places", "0.png", "2.png"), WITH_IDS) == [["0.png"], [], ["2.png"]]


def test_open_numbering_is_an_error_until_it_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "1.png", "2.png")
    with pytest.raises(ValueError, match=r"numbers 1 to 2 for 3 items.*--numbering\), one of 0, 1"):
        find_images(folder, ITEMS)
    assert found(folder, numbering="0") == [[], ["1.png"], ["2.png"]]
    assert found(folder, numbering="1") == [["1.png"], ["2.png"], []]
    with pytest.raises(ValueError, match="numbering='id': must be one of 0, 1 for these items"):
        find_images(folder, ITEMS, numbering="id")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png", "3.png"], "there is no item 3; the 3 items"),
        (["99999999999999999999.png"], "there is no item 99999999999999999999"),
        (["1.png", "1.jpg"], "1.jpg and .*1.png are the same sample"),
        (["1.png", "00001.png"], "are the same sample of item 1"),
        (["1.png", "1_0.png"], "are the same sample of item 1"),
        (["0.png", "00000/samples/00000.png"], "two layouts, such as 0.png and"),
        (["cat.png"], "found cat.png"),
        (["１.png", "²_0.png", "1 .png", "-1.png", "1.0.png"], "no picture in .* is named after its item"),
        (["1.txt"], "found no picture"),
    ],
)
def test_what_cannot_be_read_is_an_error(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_images(folder_of(tmp_path, *names), ITEMS)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing is no folder"):
        find_images(tmp_path / "missing", ITEMS)


def test_other_names_are_ignored_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path, "0.png", "<script>alert(1).png", "1;rm -rf.png", "a\nb.jpg")
    (folder / "1.png").mkdir()
    with caplog.at_level(logging.WARNING):
        assert found(folder) == [["0.png"], [], []]
    assert "ignored 3 pictures not named after an item" in caplog.text


def test_every_form_of_a_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    file = (tmp_path / "a.png").read_bytes()
    assert to_bytes(tmp_path / "a.png") == to_bytes(str(tmp_path / "a.png")) == to_bytes(file) == file
    assert to_bytes({"bytes": file, "path": "elsewhere.png"}) == file
    assert to_bytes({"bytes": None, "path": str(tmp_path / "a.png")}) == file
    for form in (image, pixels, pixels / 255):
        encoded = Image.open(io.BytesIO(to_bytes(form)))
        assert encoded.format == "PNG" and np.array_equal(np.asarray(encoded), pixels)


def test_a_picture_changed_after_opening_is_not_read_from_its_file(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    image.putpixel((0, 0), (0, 0, 255))
    assert Image.open(io.BytesIO(to_bytes(image))).getpixel((0, 0)) == (0, 0, 255)


def test_modes() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        assert Image.open(io.BytesIO(to_bytes(Image.new(mode, (2, 2))))).mode == mode
    assert Image.open(io.BytesIO(to_bytes(Image.new("CMYK", (2, 2))))).mode == "RGB"
    assert Image.open(io.BytesIO(to_bytes(Image.new("PA", (2, 2))))).mode == "RGBA"
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode {mode} has no black"):
            to_bytes(Image.new(mode, (2, 2)))
    for shape in ((2, 3), (2, 3, 1)):
        assert Image.open(io.BytesIO(to_bytes(np.zeros(shape, np.uint8)))).size == (3, 2)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (7, "got int"),
        ({"url": "x"}, r"got the keys \['url'\]"),
        (np.zeros((3, 8, 8), np.uint8), r"got \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"got \(0, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got \(2, 8, 8, 3\)"),
        (np.full((8, 8, 3), 1.5), "from 0 to 1; got 1.5 to 1.5"),
        (np.full((8, 8, 3), np.nan), "from 0 to 1; got nan"),
        (np.zeros((8, 8, 3), np.int64), "got int64"),
    ],
)
def test_what_is_no_picture(form: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_bytes(form)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        to_bytes(tmp_path / "missing.png")
