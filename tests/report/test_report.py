import base64
import dataclasses
import hashlib
import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_results import PUBLISHED, Page, entry, results_of, verdict

from echo4o_hf.report.report import write_report
from echo4o_hf.report.runs import Comparison, Run

HOSTILE = (
    "\"'><script>alert(1)</script></script></style></title></textarea><img src=x onerror=alert(1)>&lt;&amp;"
    "{{ 7 * 7 }}<!-- ]]> \u202eabc\u2066 \u200bzero\u200b \U000e0041 \ud800 שלום مرحبا \x00"
)
SHOWN = (
    "\"'><script>alert(1)</script></script></style></title></textarea><img src=x onerror=alert(1)>&lt;&amp;"
    "{{ 7 * 7 }}<!-- ]]> [U+202E]abc[U+2066] [U+200B]zero[U+200B] [U+E0041] [U+D800] שלום مرحبا [U+0000]"
)


def write(runs: list[Run], tmp_path: Path, **options: Any) -> Page:
    write_report(runs, tmp_path / "report.html", title="A report", **options)
    return Page(tmp_path / "report.html")


def after(page: Page, heading: str) -> list[str]:
    """The texts that follow a heading."""
    return [text for text in page.text[page.text.index(heading) + 1 :] if text]


def test_one_run_beside_published_scores(run: Run, tmp_path: Path) -> None:
    page = write([run], tmp_path, published=PUBLISHED)
    ranking = after(page, "GenEval++")[1:]
    assert ranking[:7] == ["GPT-4o", "0.739", "ours", "0.500", "0.250 to 0.750", "Echo-4o", "0.200"]
    assert after(page, "By tag")[:8] == [  # the paper's columns, in its order
        *("Color", "color_attr", "ours", "–"),
        *("Count", "counting", "ours", "0.500"),
    ]
    table = after(page, "Table")
    assert table[:6] == ["model", "Color", "Count", "overall", "items", "unscored"]
    assert table[6:14] == ["ours", "–", "0.500", "0.100 to 0.900", "0.500", "0.250 to 0.750", "3", "1"]
    assert table[14:22] == ["GPT-4o", "0.900", "0.675", "0.739", "Echo-4o", "–", "0.575", "0.200"]
    assert after(page, "Unscored")[4:7] == ["no image", "1", "2"]
    for text in ("three red cats", "✓ right", "✗ wrong", "three cats", "reply: one dog", "no picture", "1234"):
        assert text in page.text
    assert "Comparison" not in page.text and "Agreement of the judges" not in page.text


def test_what_judging_cost(run: Run, tmp_path: Path) -> None:
    text = after(write([run], tmp_path), "How it was judged")
    start = text.index("tokens in")
    assert text[start + 2 : start + 7] == [
        "prices per",
        "million tokens",
        "estimated cost",
        "with what was",
        "in the store",
    ]
    assert text[start + 12 : start + 17] == ["1234", "56", "2.0 in, 8.0 out", "0.0029", "12.50"]
    (judge,) = run.results["judges"]
    judge.update(prices=None, cost=None, total_cost=None)
    assert "estimated cost" not in write([run], tmp_path).text


def test_bars_have_the_lengths_of_the_scores(run: Run, tmp_path: Path) -> None:
    page = write([run], tmp_path)
    assert [bar["width"] for bar in page.all("rect")[:5]] == ["100%", "50.0%", "100%", "100%", "50.0%"]
    assert [(line["x1"], line["x2"]) for line in page.all("line")[:3]] == [
        ("25.0%", "75.0%"),
        ("25.0%", "25.0%"),
        ("75.0%", "75.0%"),
    ]


def test_published_scores_stand_only_beside_the_same_questions(run: Run, tmp_path: Path) -> None:
    strict = {**run.results, "protocol": "strict"}
    strict["scores"] = {"geneval_pp_strict": 0.5, **run.results["scores"]}
    other_items = {**run.results, "items_sha256": "beef"}
    both = {**strict, "items_sha256": "beef"}
    page = write(
        [dataclasses.replace(run, results=one) for one in (strict, other_items, both)], tmp_path, published=PUBLISHED
    )
    assert "GPT-4o" not in page.text
    titles = [
        "GenEval++, strict protocol",
        "GenEval++'s protocol, other items",
        "GenEval++'s strict protocol, other items",
    ]
    assert len(page.all("h2")) == 3 and set(titles) <= set(page.text)


def test_models_stand_in_the_same_order_overall_and_by_tag(run: Run, other: Run, tmp_path: Path) -> None:
    page = write([run, other], tmp_path, published=PUBLISHED)
    before, by_tag = page.text[: page.text.index("By tag")], after(page, "By tag")
    order = ["theirs", "ours"]
    assert [name for name in before if name in order] == order
    assert [name for name in by_tag[: by_tag.index("Table")] if name in order] == order * 2


def test_a_part_of_shapes_140_is_called_one(run: Run, tmp_path: Path) -> None:
    scores = {**run.results["scores"], "shapes_140": 0.5}
    results = {**run.results, "benchmark": "shapes_140", "scores": scores}
    whole = {**results, "items": [{**results["items"][0], "id": place} for place in range(140)]}
    for items, title in ((results, "Shapes-140, 3 of its items"), (whole, "Shapes-140")):
        assert title in write([dataclasses.replace(run, results=items)], tmp_path).text


def test_several_models_side_by_side_with_a_paired_test(run: Run, other: Run, tmp_path: Path) -> None:
    found = {
        "difference": 0.25,
        "confidence_interval": [-0.05, 0.5],
        "test": "McNemar exact",
        "p_value": 0.0625,
        "discordant": {"only_a": 0, "only_b": 1},
        "smallest_detectable_difference": 0.075,
        "per_group": {"counting": 0.5, "color_attr": None},
        "num_items": 2,
        "num_left_out": 1,
        "same_judges": False,
    }
    page = write([run, other], tmp_path, comparisons=[Comparison(run, other, found)])
    text = after(page, "Comparison")
    assert text[9:21] == [
        *("theirs", "−", "ours", "+0.250", "\N{MINUS SIGN}0.050 to +0.500", "0.062", "McNemar exact"),
        *("gained 1, lost 0", "0.075", "2", "1", "different: no fair comparison"),
    ]
    assert len(page.cards()) == 3 and len(page.all("img")) == 5
    assert [card["data-states"] for card in page.cards()] == ["right", "wrong right models", "unscored"]
    assert [card["data-group"] for card in page.cards()] == ["1", "1", "0"]


def test_judges_agreement_with_confusion(run: Run, tmp_path: Path) -> None:
    pair = {
        "judges": ["a", "b"],
        "num_images": 2,
        "num_left_out": 1,
        "percent_agreement": 50.0,
        "kappa": None,
        "mean_absolute_difference": 0.5,
        "confusion": {"all": [[0, 0], [1, 1]], "counting": [[0, 0], [1, 1]]},
    }
    changes = {
        "agreement": {"levels": [0, 1], "pairs": [pair]},
        "self_agreement": {"a": {"levels": [0, 1], "pairs": [{**pair, "kappa": -0.25}]}},
        "per_judge": {"a": run.results["scores"], "b": run.results["scores"]},
    }
    run.results["items"][0]["images"][0]["judgements"].append(
        {"judge": "b", "repeat": 0, "reply": "no", **verdict(0.0)}
    )
    page = write([dataclasses.replace(run, results={**run.results, **changes})], tmp_path)
    assert after(page, "ours: between judges")[7:15] == ["a", "–", "b", "2", "1", "50.0 %", "–", "0.500"]
    assert "\N{MINUS SIGN}0.250" in after(page, "ours: a with itself")
    cells = [cell["class"] for cell in page.all("td") if "heat" in str(cell.get("class"))]
    assert cells[:4] == ["heat-0", "heat-0", "heat-5", "heat-5"] and len(cells) == 16
    assert page.cards()[0]["data-states"] == "right judges"


def test_imagine_bench_has_a_scale_of_ten(run: Run, pictures: list[Path], tmp_path: Path) -> None:
    images = [entry(pictures[0], verdict(score)) for score in (7.24, 4.5, 1.0)]
    images[0]["verdict"] = {**images[0]["verdict"], "parts": {"fantasy_fulfillment": 7.333, "aesthetic_quality": 10.0}}
    scores = {
        "imagine_bench": 4.2,
        "per_type": {"counting": 5.87, "color_attr": 1.0},
        "per_dimension": {"aesthetic_quality": 6.5},
        "released_script_score": 4.321,
        "num_items": 3,
        "num_unscored": 0,
        "confidence_interval": None,
        "per_type_confidence_interval": {"counting": None, "color_attr": None},
    }
    results = results_of(images, 0.5, benchmark="imagine_bench", scores=scores)
    results["items"][0].update(checklist=None, item={"note": "the note"})
    page = write([Run("ours", results, tmp_path), run], tmp_path)
    assert after(page, "Imagine-Bench")[1:3] == ["ours", "4.20"]
    assert page.all("rect")[1]["width"] == "42.0%"
    assert [card["data-states"] for card in page.cards()][:3] == ["high", "middle", "low"]
    card = after(page, "every verdict")
    assert card[card.index("7.24 of 10") + 1 :][:4] == ["fantasy fulfillment", "7.33", "aesthetic quality", "10"]
    for text in ("7.24 of 10", "the note", "6.50", "4.32", "By type", "GenEval++"):
        assert text in page.text


def test_hostile_strings_stay_text(run: Run, other: Run, pictures: list[Path], tmp_path: Path) -> None:
    for one in (run, other):
        results: Any = one.results
        results["deviations"] = [HOSTILE]
        results["created"] = HOSTILE
        results["software"] = {HOSTILE: HOSTILE}
        results["judges"][0].update(name=HOSTILE, parameters={HOSTILE: HOSTILE})
        results["scores"]["per_tag"] = {HOSTILE: 0.5}
        for item in results["items"]:
            item.update(id=f"{HOSTILE}{item['id']}", group=HOSTILE, prompt=HOSTILE, checklist=HOSTILE)
            for image in item["images"]:
                image["verdict"] = {**image["verdict"], "reason": HOSTILE, "parts": {HOSTILE: HOSTILE}}
                image["judgements"] = [
                    {"judge": HOSTILE, "repeat": 1, "reply": HOSTILE, **verdict(None, HOSTILE, HOSTILE)}
                ]
        results["items"][0]["images"][0]["path"] = HOSTILE
        results["items"][1]["images"][0]["verdict"] = verdict(None, HOSTILE, HOSTILE)
    runs = [dataclasses.replace(one, name=f"{HOSTILE}{place}") for place, one in enumerate((run, other))]
    more = ("accuracy", "per_tag", "per_tag_confidence_interval")
    kept = {name: value for name, value in run.results["scores"].items() if name not in more}
    scores = {**kept, "imagine_bench": 5.0, "per_type": {HOSTILE: 5.0}, "per_dimension": {HOSTILE: 5.0}}
    runs.append(Run(HOSTILE, {**run.results, "benchmark": "imagine_bench", "scores": scores}, tmp_path))
    page = write(runs, tmp_path, losses=[{"name": HOSTILE, "steps": [0, 1], "values": [1, 0]}], seconds={HOSTILE: 1})
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("title")) == 1
    assert all(str(image["src"]).startswith("data:image/") and "onerror" not in image for image in page.all("img"))
    assert not [
        name for _, attributes in page.elements for name in attributes if name.startswith("on") or name == "style"
    ]
    whole = "".join(page.text)
    assert whole.count(SHOWN) > 40
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x00]", whole)


def test_the_policy_allows_what_is_there_and_nothing_else(run: Run, tmp_path: Path) -> None:
    page = write([run], tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; img-src data:; ")
    for element in ("script", "style"):
        (inside,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in str(policy)
    assert not page.all("link") and not page.all("iframe") and "http:" not in text and "https:" not in text


def test_thumbnails(run: Run, tmp_path: Path) -> None:
    page = write([run], tmp_path)
    urls = [str(image["src"]) for image in page.all("img")]
    shown = [Image.open(io.BytesIO(base64.b64decode(url.split("base64,")[1]))) for url in urls]
    assert [(one.size, one.format) for one in shown] == [((64, 64), "PNG"), ((512, 256), "JPEG")]
    assert shown[0].getpixel((0, 0)) == (255, 0, 0)
    assert [image.get("class") for image in page.all("img")] == ["tiny", None]


def test_pictures_of_sixteen_bits_are_shown_as_they_were_judged(run: Run, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "grey.png")
    results: Any = run.results
    results["items"][0]["images"][0] = entry(tmp_path / "grey.png", verdict(1.0))
    url = str(write([run], tmp_path).all("img")[0]["src"])
    assert Image.open(io.BytesIO(base64.b64decode(url.split("base64,")[1]))).getpixel((0, 0)) == (128, 128, 128)


def test_pictures_that_cannot_be_shown_are_told(run: Run, pictures: list[Path], tmp_path: Path) -> None:
    pictures[0].unlink()
    pictures[1].write_bytes(b"other")
    problems = write_report([run], tmp_path / "report.html", title="A report")
    assert problems == [f"no such file: {pictures[0]}", f"changed since it was judged: {pictures[1]}"]
    assert set(problems) < set(Page(tmp_path / "report.html").text)


def test_a_file_that_is_no_picture_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    results: Any = run.results
    results["items"][0]["images"][0] = entry(tmp_path / "secret.txt", verdict(1.0))
    (problem,) = write_report([run], tmp_path / "report.html", title="A report")
    assert problem.startswith(f"does not decode: {tmp_path / 'secret.txt'}")


def test_paths_may_start_at_the_folder_of_the_results(run: Run, tmp_path: Path) -> None:
    results: Any = run.results
    results["items"][0]["images"][0]["path"] = "images/0.png"
    assert write_report([run], tmp_path / "elsewhere/report.html", title="A report") == []


def test_loss_curve(run: Run, tmp_path: Path) -> None:
    losses = [{"name": "clean", "steps": [0, 10, 20], "values": [1.0, 0.5, 0.25]}]
    page = write([run], tmp_path, losses=losses, seconds={"fine-tuning": 12.34})
    (line,) = page.all("polyline")
    points = [tuple(map(float, point.split(","))) for point in str(line["points"]).split()]
    # from the top left corner of the plot to its bottom right one; half the steps, two thirds of the way down
    assert points == [(52.0, 12.0), (340.0, 153.3), (628.0, 224.0)]
    labels = re.findall(r'text-anchor="\w+">([\d.]+)<', (tmp_path / "report.html").read_text())
    assert labels == ["0.4", "0.6", "0.8", "1", "0", "5", "10", "15", "20"]
    assert after(page, "Seconds") == ["fine-tuning", "12.3", page.text[-3] or page.text[-2]]


def test_a_flat_loss(run: Run, tmp_path: Path) -> None:
    page = write([run], tmp_path, losses=[{"name": "flat", "steps": [3], "values": [0.5]}])
    assert page.all("polyline")[0]["points"] == "340.0,118.0"


def test_two_runs_of_one_name_and_none(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are called 'ours'"):
        write([run, run], tmp_path)
    with pytest.raises(ValueError, match="got none"):
        write([], tmp_path)


@pytest.mark.parametrize(
    "scores",
    [{}, {"geneval_pp": "<b>"}, {"geneval_pp": float("nan")}, {"per_tag": 3}, {"confidence_interval": [1]}],
    ids=str,
)
def test_scores_that_do_not_fit_are_named_and_nothing_is_written(
    run: Run, tmp_path: Path, scores: dict[str, Any]
) -> None:
    results = {**run.results, "scores": {**run.results["scores"], **scores} if scores else {}}
    with pytest.raises(ValueError, match="the scores of 'ours' are not those of geneval_pp"):
        write([dataclasses.replace(run, results=results)], tmp_path)
    assert not list(tmp_path.glob("report.html*"))


@pytest.mark.slow
def test_1120_pictures_are_quick_and_small(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shape = (1024, 1024, 3)
    images = []
    for place in range(8):
        smooth = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(shape[:2])
        noisy = np.asarray(smooth) + random.normal(0, 12, shape)
        path = tmp_path / f"{place}.{'png' if place % 2 else 'jpg'}"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
        images.append(entry(path, verdict(float(place % 2), "a reason of a judge")))
    results = results_of(images[:3], 0.5)
    items = [
        {**results["items"][0], "id": place, "images": [dict(images[(place + k) % 8]) for k in range(4)]}
        for place in range(280)
    ]
    start = time.process_time()  # of all threads: another process's load does not count
    write_report([Run("ours", {**results, "items": items}, tmp_path)], tmp_path / "report.html", title="A report")
    assert time.process_time() - start < 120
    assert (tmp_path / "report.html").stat().st_size < 60e6
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<img ") == 1120
