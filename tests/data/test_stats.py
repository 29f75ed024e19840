"""What the statistics count, how they are shown, and which rows are the sample."""

import base64
import html.parser
import io
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echo4o_hf.data.layout import SUBSETS
from echo4o_hf.data.stats import measure, stats, summarize, table, write_html
from echo4o_hf.miniature.dataset import write_dataset


def picture(width: int, height: int, image_format: str = "JPEG", color: str = "red") -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (width, height), color).save(data, image_format)
    return {"bytes": data.getvalue(), "path": None}


def row(id: str, category: str, instruction: str, *pictures: dict[str, Any]) -> dict[str, Any]:
    """A row whose last picture is the output."""
    return {
        "id": id,
        "subset": id.split("/")[0],
        "category": category,
        "instruction": instruction,
        "input_images": list(pictures[:-1]),
        "output_image": pictures[-1],
    }


WIDE, TALL, SMALL = picture(1536, 1024), picture(1024, 1536, "PNG", "blue"), picture(20, 30, "WEBP", "lime")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        row("surreal_fantasy/0", "T1", "a white banana", WIDE),
        row("surreal_fantasy/1", "T1", "ein großer  blauer\nTomatenvogel", WIDE),
        row("surreal_fantasy/2", "T2", "crystal", TALL),
        row("multi_reference/a/0", "a", "put both together", SMALL, TALL, WIDE),
        row("multi_reference/a/1", "a", "put all three together", SMALL, SMALL, SMALL, TALL),
    ]


def test_counts(rows: list[dict[str, Any]]) -> None:
    result = measure(rows, sample=0)
    surreal, multi = result["subsets"]["surreal_fantasy"], result["subsets"]["multi_reference"]
    assert (result["all"]["rows"], surreal["rows"], multi["rows"]) == (5, 3, 2)
    assert {name: group["rows"] for name, group in surreal["categories"].items()} == {"T1": 2, "T2": 1}
    assert surreal["references"] == {"0": 3} and multi["references"] == {"2": 1, "3": 1}
    assert result["all"]["references"] == {"0": 3, "2": 1, "3": 1}
    assert surreal["output_images"]["sizes"] == {"1536x1024": 2, "1024x1536": 1}
    assert surreal["output_images"]["formats"] == {"JPEG": 2, "PNG": 1}
    assert multi["input_images"]["sizes"] == {"20x30": 4, "1024x1536": 1}
    assert multi["input_images"]["formats"] == {"WEBP": 4, "PNG": 1}
    assert surreal["input_images"] == {
        "number": 0,
        "bytes": {"total": 0, "min": 0, "max": 0, "mean": 0},
        "sizes": {},
        "formats": {},
    }
    wide, tall = len(WIDE["bytes"]), len(TALL["bytes"])
    assert surreal["output_images"]["bytes"] == {
        "total": 2 * wide + tall,
        "min": min(wide, tall),
        "max": max(wide, tall),
        "mean": round((2 * wide + tall) / 3, 1),
    }
    words = surreal["words"]
    assert (words["min"], words["median"], words["mean"], words["max"]) == (1, 3, 2.67, 4)
    assert (surreal["characters"]["min"], surreal["characters"]["max"]) == (7, 31)
    assert json.loads(json.dumps(result)) == result


def test_a_picture_is_counted_by_its_header_alone(rows: list[dict[str, Any]]) -> None:
    rows[0]["output_image"] = {"bytes": WIDE["bytes"][:700], "path": None}
    assert measure(rows, sample=0)["all"]["output_images"]["sizes"]["1536x1024"] == 3


def test_a_picture_without_header_is_named(rows: list[dict[str, Any]]) -> None:
    rows[3]["input_images"][1] = {"bytes": b"no picture", "path": None}
    with pytest.raises(ValueError, match="a picture of multi_reference/a/0 cannot be read"):
        measure(rows, sample=0)


def test_a_sampled_picture_that_does_not_decode_is_named(rows: list[dict[str, Any]]) -> None:
    rows[1]["output_image"] = {"bytes": WIDE["bytes"][:700], "path": None}
    with pytest.raises(ValueError, match="a picture of surreal_fantasy/1 does not decode"):
        measure(rows)


def test_no_rows_and_a_negative_sample() -> None:
    with pytest.raises(ValueError, match="no rows"):
        measure([])
    with pytest.raises(ValueError, match="sample must not be negative, got -1"):
        stats("nowhere", sample=-1)


@pytest.mark.parametrize(
    "values", [[3], [3, 4], [0, 0, 7], [5, 1, 1, 9, 200, 37], [41, 59, 60], list(range(1, 400, 3))]
)
def test_summarize(values: list[int]) -> None:
    summary = summarize(Counter(values))
    ordered, half = sorted(values), len(values) // 2
    median = ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
    assert (summary["min"], summary["median"], summary["max"]) == (ordered[0], median, ordered[-1])
    assert summary["mean"] == round(sum(values) / len(values), 2)
    bins = summary["histogram"]
    assert len(bins) <= 20
    assert [count for *_, count in bins] == [sum(low <= value < high for value in values) for low, high, _ in bins]
    assert sum(count for *_, count in bins) == len(values)
    assert all(first[1] == second[0] for first, second in zip(bins, bins[1:], strict=False))
    (width,) = {high - low for low, high, _ in bins}
    assert re.fullmatch("[125]0*", str(width)) and bins[0][0] % width == 0


def test_histogram_bins() -> None:
    assert summarize(Counter([41, 59, 60]))["histogram"][:2] == [[41, 42, 1], [42, 43, 0]]
    assert summarize(Counter([41, 61]))["histogram"][0] == [40, 42, 1]


def thumbnails(result: dict[str, Any], subset: str) -> list[str]:
    return [kept["id"] for kept in result["samples"][subset]]


def test_the_sample_depends_on_ids_and_seed_alone() -> None:
    rows = [row(f"surreal_fantasy/{n}", "T1", "a cat", SMALL) for n in range(60)]
    first = measure(rows, 5)
    assert len(set(thumbnails(first, "surreal_fantasy"))) == 5
    random.Random(0).shuffle(rows)
    assert measure(rows, 5)["samples"] == first["samples"]
    assert thumbnails(measure(rows, 6), "surreal_fantasy")[:5] == thumbnails(first, "surreal_fantasy")
    assert thumbnails(measure(rows, 5, seed=1), "surreal_fantasy") != thumbnails(first, "surreal_fantasy")


def test_the_sample_is_fair() -> None:
    rows = [row(f"surreal_fantasy/{n}", "T1", "a cat", SMALL) for n in range(20)]
    times = Counter(id for seed in range(100) for id in thumbnails(measure(rows, 5, seed), "surreal_fantasy"))
    # 25 of 100 each, standard deviation 4.3
    assert len(times) == 20 and all(10 <= number <= 40 for number in times.values())


def decode(url: str) -> Image.Image:
    kind, data = url.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_thumbnails(rows: list[dict[str, Any]]) -> None:
    samples = measure(rows)["samples"]
    assert sorted(kept["id"] for kept in samples["surreal_fantasy"]) == [f"surreal_fantasy/{n}" for n in range(3)]
    kept = {kept["id"]: kept for kept in samples["multi_reference"]}["multi_reference/a/0"]
    assert (kept["category"], kept["instruction"]) == ("a", "put both together")
    output, small, tall = map(decode, (kept["output_image"], *kept["input_images"]))
    assert (output.size, small.size, tall.size) == ((256, 171), (20, 30), (75, 112))
    red, green, blue = tall.getpixel((30, 60))
    assert red < 30 and green < 30 and blue > 220
    assert measure(rows, sample=0)["samples"] == {"surreal_fantasy": [], "multi_reference": []}


def test_pictures_of_other_modes_become_thumbnails() -> None:
    for mode in ("RGBA", "P", "L", "1", "I;16", "LA"):
        data = io.BytesIO()
        Image.new(mode, (8, 8)).save(data, "PNG")
        image = {"bytes": data.getvalue(), "path": None}
        (kept,) = measure([row("surreal_fantasy/0", "T1", "a cat", image)])["samples"]["surreal_fantasy"]
        assert decode(kept["output_image"]).mode == "RGB"


def test_table(rows: list[dict[str, Any]]) -> None:
    lines = table(measure(rows, sample=0)).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["surreal_fantasy", "T1", "2"],
        ["surreal_fantasy", "T2", "1"],
        ["surreal_fantasy", "all", "3"],
        ["multi_reference", "a", "2"],
        ["multi_reference", "all", "2"],
        ["all", "all", "5"],
    ]
    assert re.split("  +", lines[3].strip())[3:6] == ["0", "1 / 3 / 4", "7 / 14 / 31"]
    assert lines[3].endswith("1536x1024 67%, 1024x1536 33%") and " 2-3 " in lines[4]
    assert len(table(measure(rows[:3])).splitlines()) == 4  # one subset: no line for all


def test_many_sizes_are_summed_up_in_the_table() -> None:
    rows = [row(f"surreal_fantasy/{n}", "T1", "a cat", picture(10, 10 + n)) for n in range(5)]
    assert table(measure(rows)).splitlines()[-1].endswith("10x10 20%, 10x11 20%, 10x12 20%, 2 more")


class Page(html.parser.HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_page(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_html(measure(rows), tmp_path / "new/stats.html")
    page = Page(tmp_path / "new/stats.html")
    assert len(page.all("svg")) == 6 + 8  # two more where there are references
    assert len(page.all("figure")) == 5 and len(page.all("img")) == 5 + 5
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not page.all("script") and not page.all("link")
    for expected in ("Words in an instruction", "put both together", "multi_reference/a/0 · a", "1536x1024"):
        assert expected in page.text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["stats.html"]


def test_charts_are_to_scale(tmp_path: Path) -> None:
    rows = [row(f"surreal_fantasy/{n}", "T1" if n < 3 else "T2", "cat " * (1 + n % 2), SMALL) for n in range(4)]
    rows.append(row("surreal_fantasy/4", "T2", "cat " * 4, SMALL))
    write_html(measure(rows, sample=0), tmp_path / "stats.html")
    bars = Page(tmp_path / "stats.html").all("rect")
    # words: 2 rows of one, 2 of two, none of three, 1 of four; the plot is 156 high and starts at 10
    assert [(bar["y"], bar["height"]) for bar in bars[:4]] == [
        ("10.0", "156.0"),
        ("10.0", "156.0"),
        ("166.0", "0.0"),
        ("88.0", "78.0"),
    ]
    categories = [bar["width"] for bar in bars if bar["x"] == "112"][:2]
    assert categories == ["200.0", "133.3"]  # 3 rows and 2


def test_many_names_share_a_bar(tmp_path: Path) -> None:
    rows = [row(f"surreal_fantasy/{n}", f"c{min(n, 13):02d}", "a cat", SMALL) for n in range(16)]
    write_html(measure(rows, sample=0), tmp_path / "stats.html")
    page = Page(tmp_path / "stats.html")
    assert (
        "5 others" in page.text and page.text.count("c13") == 3
    )  # in the table; label and its full name in the chart


def test_hostile_texts_stay_text(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    hostile = "\"><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    for n, changed in enumerate(rows):
        changed.update(id=f"{hostile}{n}", subset=hostile, category=hostile, instruction=hostile)
    write_html(measure(rows), tmp_path / "stats.html")
    page = Page(tmp_path / "stats.html")
    assert not page.all("script") and len(page.all("img")) == 10
    assert not any("onerror" in image for image in page.all("img"))
    assert page.text.count(hostile) >= 5


def test_the_data_is_read_by_subset(tmp_path: Path) -> None:
    write_dataset(tmp_path, 6)
    result = stats(tmp_path, sample=2)
    assert {name: group["rows"] for name, group in result["subsets"].items()} == dict.fromkeys(SUBSETS, 6)
    assert result["all"]["output_images"]["sizes"] == {"64x64": 18}
    assert result["subsets"]["multi_reference"]["references"].keys() <= {"2", "3"}
    assert [len(samples) for samples in result["samples"].values()] == [2, 2, 2]
    chosen = stats(tmp_path, subsets=["surreal_fantasy"], sample=0)
    assert chosen["subsets"] == {"surreal_fantasy": result["subsets"]["surreal_fantasy"]}


def test_a_folder_of_the_dataset_s_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", 2)
    (tmp_path / "echo-4o-image").mkdir()
    monkeypatch.chdir(tmp_path)
    assert stats("data", subsets=["surreal_fantasy"])["all"]["rows"] == 2


def test_what_is_skipped_is_not_counted(tmp_path: Path) -> None:
    write_dataset(tmp_path, 6)
    metadata = tmp_path / "Surrel-Fantasy-Image/conflict.jsonl"
    metadata.write_text(metadata.read_text().replace("00002.jpg", "missing.jpg"))
    with pytest.raises(ValueError, match="missing.jpg"):
        stats(tmp_path, subsets=["surreal_fantasy"])
    assert stats(tmp_path, subsets=["surreal_fantasy"], on_error="skip")["all"]["rows"] == 5
