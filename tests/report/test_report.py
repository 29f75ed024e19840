import base64
import copy
import html.parser
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echo4o_hf.report.report import check_results, write_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images/0.png")
    Image.new("RGB", (2048, 1024), "blue").save(tmp_path / "images/1.jpg")
    return tmp_path


@pytest.fixture
def results() -> dict[str, Any]:
    items = [
        {
            "prompt": "a red circle",
            "tag": "counting",
            "image": "images/0.png",
            "correct": True,
            "reason": "one circle",
        },
        {
            "prompt": "a blue star",
            "tag": "color",
            "image": "images/1.jpg",
            "correct": None,
            "reason": "judge timed out",
        },
    ]
    run = {
        "name": "base",
        "score": 0.5,
        "per_tag": {"counting": 1 / 3, "color": None},
        "num_items": 2,
        "confidence_interval": [0.25, 0.75],
        "items": items,
    }
    return {
        "title": "A report",
        "created": "2026-11-21",
        "seconds": {"fine-tuning": 12.34},
        "tags": ["counting", "color"],
        "runs": [run, {**run, "name": "tuned", "score": 0.75, "confidence_interval": None}],
        "losses": [{"name": "clean", "steps": [0, 10, 20], "values": [1.0, 0.5, 0.25]}],
    }


class Page(html.parser.HTMLParser):
    """Text, elements and attributes of a page, as a browser sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_scores_verdicts_and_times_are_shown(folder: Path, results: dict[str, Any]) -> None:
    write_report(results, folder / "report.html")
    text = Page(folder / "report.html").text
    # header, per tag, overall, interval: each with the two runs
    start = text.index("tag")
    cells = [cell for cell in text[start:] if cell]
    assert cells[:3] == ["tag", "base", "tuned"]
    assert cells[3:9] == ["counting", "0.333", "0.333", "color", "–", "–"]
    assert cells[9:15] == ["overall", "0.500", "0.750", "95 % interval", "0.250 to 0.750", "–"]
    assert cells[15:21] == ["items", "2", "2", "of these unscored", "1", "1"]
    for expected in ("a red circle", "one circle", "✓ pass", "unscored", "judge timed out", "fine-tuning", "12.3"):
        assert expected in text


def test_the_page_is_self_contained(folder: Path, results: dict[str, Any]) -> None:
    write_report(results, folder / "report.html")
    page = Page(folder / "report.html")
    assert not page.all("script") and not page.all("link")
    addresses = [attributes[name] for _, attributes in page.elements for name in ("src", "href") if name in attributes]
    assert len(addresses) == 4
    pictures = [Image.open(io.BytesIO(base64.b64decode(str(url).split("base64,")[1]))) for url in addresses]
    assert [picture.size for picture in pictures] == [(64, 64), (64, 64), (512, 256), (512, 256)]
    assert pictures[0].getpixel((0, 0)) == (255, 0, 0)


def test_pictures_of_one_prompt_stand_side_by_side(folder: Path, results: dict[str, Any]) -> None:
    write_report(results, folder / "report.html")
    assert len(Page(folder / "report.html").all("section")) == 2  # prompts, not pictures


def test_hostile_strings_stay_text(folder: Path, results: dict[str, Any]) -> None:
    hostile = "\"><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    results["title"] = results["created"] = results["losses"][0]["name"] = hostile
    results["seconds"] = {hostile: 1.0}
    results["tags"][0] = hostile
    for run in results["runs"]:
        run["name"] = hostile
        run["per_tag"] = {hostile: 1.0}
        run["items"] = [{**run["items"][0], "tag": hostile, "prompt": hostile, "reason": hostile}]
    write_report(results, folder / "report.html")
    page = Page(folder / "report.html")
    assert not page.all("script")
    assert len(page.all("img")) == 2
    for image in page.all("img"):
        assert str(image["src"]).startswith("data:image/png;base64,") and "onerror" not in image
    assert page.text.count(hostile) > 8


def test_loss_curve(folder: Path, results: dict[str, Any]) -> None:
    write_report(results, folder / "report.html")
    (line,) = Page(folder / "report.html").all("polyline")
    points = [tuple(map(float, point.split(","))) for point in str(line["points"]).split()]
    # from the top left corner of the plot to its bottom right one; half the steps, two thirds of the way down
    assert points == [(52.0, 12.0), (340.0, 153.3), (628.0, 224.0)]
    labels = re.findall(r'text-anchor="\w+">([\d.]+)<', (folder / "report.html").read_text())
    assert labels == ["0.4", "0.6", "0.8", "1", "0", "5", "10", "15", "20"]


def test_a_flat_loss_and_no_loss(folder: Path, results: dict[str, Any]) -> None:
    results["losses"] = [{"name": "flat", "steps": [3], "values": [0.5]}]
    write_report(results, folder / "report.html")
    assert Page(folder / "report.html").all("polyline")[0]["points"] == "340.0,118.0"
    results["losses"] = []
    write_report(results, folder / "report.html")
    assert not Page(folder / "report.html").all("svg")


def test_pictures_below_another_folder(folder: Path, results: dict[str, Any]) -> None:
    write_report(results, folder / "elsewhere/report.html", folder=folder)
    assert len(Page(folder / "elsewhere/report.html").all("img")) == 4


def test_a_missing_picture_is_named_and_nothing_is_written(folder: Path, results: dict[str, Any]) -> None:
    (folder / "images/1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"'images/1.jpg' of the results is not in"):
        write_report(results, folder / "report.html")
    assert not list(folder.glob("report.html*"))


def test_a_broken_picture_is_named(folder: Path, results: dict[str, Any]) -> None:
    (folder / "images/0.png").write_bytes((folder / "images/0.png").read_bytes()[:60])
    with pytest.raises(OSError, match=r"images/0.png' does not decode"):
        write_report(results, folder / "report.html")


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png"])
def test_a_picture_outside_the_folder_is_refused(folder: Path, results: dict[str, Any], name: str) -> None:
    inside = folder / "inside"
    inside.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "secret.png")
    results["runs"][0]["items"][0]["image"] = name.format(folder=folder)
    with pytest.raises(ValueError, match="lies outside"):
        write_report(results, inside / "report.html")


def without(results: dict[str, Any], *path: str | int) -> dict[str, Any]:
    """A copy of the results that lacks the entry at `path`."""
    copied: Any = copy.deepcopy(results)
    inner = copied
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return copied


@pytest.mark.parametrize(
    "path",
    [("tags",), ("runs", 1, "score"), ("runs", 0, "items", 1, "correct"), ("losses", 0, "values")],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_missing_key_is_named_with_its_place(results: dict[str, Any], path: tuple[str | int, ...]) -> None:
    *places, key = path
    where = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places).lstrip(".")
    with pytest.raises(ValueError, match=re.escape(f"{where or 'the results'} must have '{key}'")):
        check_results(without(results, *path))


def test_values_that_do_not_fit_are_named(results: dict[str, Any]) -> None:
    item = results["runs"][0]["items"][1]
    item["correct"] = "1"
    with pytest.raises(ValueError, match=r"runs\[0\].items\[1\].correct must be true, false or null, got '1'"):
        check_results(results)
    item["correct"], item["tag"] = False, "size"
    with pytest.raises(ValueError, match=r"runs\[0\].items\[1\].tag has 'size', which is not one of the tags"):
        check_results(results)
    item["tag"] = "color"
    results["losses"][0]["values"] = [1.0, float("nan"), 0.5]
    with pytest.raises(ValueError, match=r"losses\[0\].values must be finite"):
        check_results(results)
    results["losses"][0]["values"] = [1.0]
    with pytest.raises(ValueError, match=r"losses\[0\] has 3 steps and 1 values"):
        check_results(results)
