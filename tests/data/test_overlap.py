"""Training instructions that occur in benchmarks: exact, near, counted, shown, dropped."""

import html.parser
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import test_hub

from echo4o_hf.data.build import build
from echo4o_hf.data.instructions import read_instructions
from echo4o_hf.data.layout import SUBSETS
from echo4o_hf.data.overlap import (
    Prompts,
    compare,
    drop,
    jaccard,
    ngrams,
    normalise,
    overlap,
    read_prompts,
    table,
    write_html,
    write_report,
)
from echo4o_hf.miniature.dataset import write_dataset

UPSTREAM = Path(__file__).parents[3] / "shared/upstream-data"

Row = dict[str, str]


def row(id: str, instruction: str) -> Row:
    return {"id": id, "subset": id.split("/")[0], "instruction": instruction}


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A photo of two  Cats,\n and a dog!", "two cats and a dog"),
        ("two cats and a dog", "two cats and a dog"),
        ("An image of a cat", "a cat"),
        ("The photograph of a cat.", "a cat"),
        ("a cat beside a photo of a dog", "a cat beside a photo of a dog"),  # only at the beginning
        ("A photo of", "a photo of"),  # or nothing would be left
        ("ｆｕｌｌ ｗｉｄｔｈ STRASSE straße", "full width strasse strasse"),
        ("Cafe\u0301 over a snake_case", "café over a snake case"),
        ("…!? _", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_ngrams_and_jaccard() -> None:
    assert ngrams("a b c d", 3) == {"a b c", "b c d"}
    assert ngrams("a b c", 3) == {"a b c"}
    assert ngrams("a b", 3) == {"a b"}
    assert ngrams("", 3) == set()
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5


NEAR = "a red bus and a green truck and a blue skateboard in front of a house"


def test_exact_and_near() -> None:
    prompts = Prompts({"one": ["A photo of a bench", NEAR], "two": ["two cats", "TWO cats!"]})
    assert [tuple(match) for match in prompts.matches("a bench.")] == [("one", 0, True, 1.0)]
    (near,) = prompts.matches(NEAR + " today")
    assert tuple(near) == ("one", 1, False, 14 / 15)
    assert [tuple(match) for match in prompts.matches("Two cats")] == [("two", 0, True, 1.0), ("two", 1, True, 1.0)]
    assert not list(prompts.matches("a bench and a cow"))
    assert not list(prompts.matches("?!"))


def test_equal_ngrams_in_another_order_are_near_not_exact() -> None:
    (match,) = Prompts({"one": ["cats and dogs"]}, ngram=1).matches("dogs and cats")
    assert (match.exact, match.similarity) == (False, 1.0)


def test_the_threshold_itself_is_near() -> None:
    # 7 of 10 bigrams in common
    first = "a b c d e f g h x"
    second = "a b c d e f g h y z"
    assert jaccard(ngrams(first, 2), ngrams(second, 2)) == 0.7
    assert len(list(Prompts({"one": [second]}, threshold=0.7, ngram=2).matches(first))) == 1
    assert not list(Prompts({"one": [second]}, threshold=0.71, ngram=2).matches(first))


def sentences(number: int, rng: random.Random) -> list[str]:
    words = [a + b for a, b in itertools.product(("ba", "ce", "di", "fo", "gu"), ("lat", "men", "nip", "ros", "tuk"))]
    return [" ".join(rng.choices(words, k=rng.randint(3, 30))) for _ in range(number)]


def changed(sentence: str, rng: random.Random) -> str:
    """The sentence with one to three words replaced, left out or added."""
    words = sentence.split()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(words))
        words[at : at + rng.randint(0, 1)] = rng.choice(([], ["zap"], [words[0]]))
        words = words or ["zap"]
    return " ".join(words)


@pytest.mark.parametrize(("threshold", "ngram"), [(0.3, 3), (0.7, 3), (0.7, 1), (0.9, 2)])
def test_near_finds_what_all_comparisons_find(threshold: float, ngram: int) -> None:
    rng = random.Random(0)
    prompts = sentences(300, rng)
    instructions = [changed(prompt, rng) for prompt in prompts] + sentences(100, rng)
    index = Prompts({"one": prompts}, threshold, ngram)
    found = {(i, match.item) for i, text in enumerate(instructions) for match in index.matches(text)}
    prompt_grams = [ngrams(prompt, ngram) for prompt in prompts]
    expected = {
        (i, item)
        for i, text in enumerate(instructions)
        for item, grams in enumerate(prompt_grams)
        if jaccard(ngrams(text, ngram), grams) >= threshold
    }
    assert found <= expected  # no pair below the threshold
    assert len(expected) > 20
    assert len(found) >= 0.999 * len(expected)


@pytest.fixture
def report() -> dict[str, Any]:
    rows = [
        row("b/0", "a bench"),
        row("b/1", "A bench!"),
        row("b/2", NEAR + " today"),
        row("b/3", "nothing alike"),
        row("a/0", NEAR.upper()),
    ]
    prompts = Prompts({"one": ["a photo of a bench", NEAR, "a cow"], "two": ["the bench", "a bench"]})
    return {
        "threshold": 0.7,
        "ngram": 3,
        "benchmarks": {"one": {"file": "one.jsonl", "prompts": 3}, "two": {"file": "two.jsonl", "prompts": 2}},
        **compare(rows, prompts),
    }


def test_counts(report: dict[str, Any]) -> None:
    assert report["subsets"] == {"b": 4, "a": 1}
    columns = ("benchmark", "subset", "rows", "exact", "near", "share", "prompts", "prompts_exact", "prompts_near")
    assert [tuple(entry[column] for column in columns) for entry in report["counts"]] == [
        ("one", "b", 4, 2, 1, 0.75, 3, 1, 1),
        ("one", "a", 1, 1, 0, 1.0, 3, 1, 0),
        ("one", "all", 5, 3, 1, 0.8, 3, 2, 0),  # met nearly from b, exactly from a
        ("two", "b", 4, 2, 0, 0.5, 2, 1, 0),
        ("two", "a", 1, 0, 0, 0.0, 2, 0, 0),
        ("two", "all", 5, 2, 0, 0.4, 2, 1, 0),
    ]
    assert [(pair["id"], pair["benchmark"], pair["item"], pair["exact"]) for pair in report["pairs"]] == [
        ("b/0", "one", 0, True),
        ("b/0", "two", 1, True),
        ("b/1", "one", 0, True),
        ("b/1", "two", 1, True),
        ("b/2", "one", 1, False),
        ("a/0", "one", 1, True),
    ]
    assert json.loads(json.dumps(report)) == report


def test_the_most_similar_prompt_is_the_pair() -> None:
    prompts = [NEAR + " in the evening", NEAR + " now", NEAR + " then", "a cow"]
    (pair,) = compare([row("a/0", NEAR + " soon")], Prompts({"one": prompts}))["pairs"]
    assert (pair["prompt"], pair["item"], pair["similarity"]) == (NEAR + " now", 1, 14 / 16)
    (pair,) = compare([row("a/0", NEAR + " then")], Prompts({"one": prompts}))["pairs"]
    assert (pair["prompt"], pair["exact"]) == (NEAR + " then", True)


def test_one_subset_has_no_line_for_all() -> None:
    (entry,) = compare([row("a/0", "a cow")], Prompts({"one": ["a cow"]}))["counts"]
    assert entry["subset"] == "a"


def test_a_prompt_met_exactly_stays_so() -> None:
    texts = [NEAR + " today", NEAR, NEAR + " now"]
    (entry,) = compare([row(f"a/{n}", text) for n, text in enumerate(texts)], Prompts({"one": [NEAR]}))["counts"]
    assert (entry["exact"], entry["near"], entry["prompts_exact"], entry["prompts_near"]) == (1, 2, 1, 0)


def test_table(report: dict[str, Any]) -> None:
    lines = table(report).splitlines()
    assert len(lines) == 7
    assert lines[0].split()[:6] == ["benchmark", "subset", "rows", "exact", "near", "share"]
    assert lines[1].split() == ["one", "b", "4", "2", "1", "75.00%", "3", "1", "1"]
    assert len({len(line) for line in lines}) == 1


class Page(html.parser.HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(" ".join(data.split()))


def test_page(report: dict[str, Any], tmp_path: Path) -> None:
    write_html(report, tmp_path / "new/overlap.html")
    page = Page(tmp_path / "new/overlap.html")
    assert page.tags.count("details") == 3  # (one, a), (one, b), (two, b)
    assert page.tags.count("tr") == 1 + 6 + 3 + 6
    for expected in ("b/2", NEAR + " today", "0.93", "exact", "75.00%", "b in one"):
        assert expected in page.text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["overlap.html"]


def test_hostile_texts_stay_text_on_the_page(report: dict[str, Any], tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>{{ 7 * 7 }}"
    for pair in report["pairs"]:
        pair.update(id=hostile, instruction=hostile, prompt=hostile, subset=hostile, benchmark=hostile)
    for entry in report["counts"]:
        entry.update(subset=hostile, benchmark=hostile)
    report["benchmarks"] = {hostile: {"file": hostile, "prompts": 1}}
    write_html(report, tmp_path / "overlap.html")
    page = Page(tmp_path / "overlap.html")
    assert "script" not in page.tags
    assert page.text.count(hostile) == 2 * 6 + 3 * 6


def test_many_pairs_are_not_all_on_the_page(tmp_path: Path) -> None:
    rows = [row(f"a/{n}", NEAR if n == 299 else NEAR + " today") for n in range(300)]
    prompts = Prompts({"one": [NEAR]})
    counted = compare(rows, prompts)
    assert len(counted["pairs"]) == 300
    benchmarks = {"one": {"file": "one.jsonl", "prompts": 1}}
    write_html({"threshold": 0.7, "ngram": 3, "benchmarks": benchmarks, **counted}, tmp_path / "overlap.html")
    page = Page(tmp_path / "overlap.html")
    assert [text for text in page.text if text.startswith("a/")][:2] == ["a/299", "a/0"]
    assert sum(text.startswith("a/") for text in page.text) == 200
    assert "300 rows, the 200 most similar are shown" in page.text


def test_read_prompts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "items.jsonl", {"tag": "counting", "prompt": "Ein Ölfaß"}, {"instruction": "a cow"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n")
    assert read_prompts(path) == ["Ein Ölfaß", "a cow"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"a photo of a bench", "is not JSON"),
        (b'{"prompt": "a b', "is not JSON"),
        (b'{"prompt": "\xff"}', "is not JSON"),
        (b'["a photo of a bench"]', 'either "prompt" or "instruction", got [\'a photo of a bench\']'),
        (b'{"text": "a bench"}', "either \"prompt\" or \"instruction\", got {'text': 'a bench'}"),
        (b'{"prompt": "a", "instruction": "b"}', 'either "prompt" or "instruction"'),
        (b'{"prompt": ["a bench"]}', "\"prompt\" must be a text with words, got ['a bench']"),
        (b'{"instruction": " ?!"}', "\"instruction\" must be a text with words, got ' ?!'"),
    ],
)
def test_a_line_of_another_format_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"prompt": "a cow"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert f"{path}, line 3" in str(caught.value) and message in str(caught.value)


def test_a_file_without_prompts_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "items.jsonl")
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"benchmarks": {}}, "benchmarks must name at least one"),
        ({"threshold": 0.05}, "threshold must be a similarity from 0.1 to 1, got 0.05"),
        ({"threshold": 70}, "got 70"),
        ({"threshold": float("nan")}, "got nan"),
        ({"ngram": 0}, "ngram must be at least 1, got 0"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Prompts(**{"benchmarks": {"one": ["a cow"]}, **arguments})


def test_data_without_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        compare([], Prompts({"one": ["a cow"]}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "echo"
    write_dataset(folder, 12)
    return folder


def test_instructions_are_those_of_load_dataset(data: Path) -> None:
    loaded = datasets.load_dataset("echo-4o-image", "all", data_dir=str(data), split="train")
    expected = loaded.select_columns(["id", "subset", "instruction"]).to_list()
    assert list(read_instructions(data, None, None, "raise")) == expected
    chosen = list(read_instructions(data, ["multi_reference"], None, "raise"))
    assert chosen == [read for read in expected if read["subset"] == "multi_reference"]


def test_instructions_are_read_without_the_archives(data: Path, tmp_path: Path) -> None:
    for path in data.rglob("*.jsonl"):
        copy = tmp_path / "echo" / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert len(list(read_instructions(tmp_path / "echo", None, None, "raise"))) == 36


def test_mistakes_in_the_metadata(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "Surrel-Fantasy-Image"
    folder.mkdir()
    lines = (data / folder.name / "conflict.jsonl").read_bytes().splitlines()
    (folder / "conflict.jsonl").write_bytes(b"\n".join([*lines[:3], b"{broken", *lines[3:]]))
    with pytest.raises(ValueError, match=r"1 problems in .*\n.*conflict.jsonl:4"):
        list(read_instructions(tmp_path, ["surreal_fantasy"], None, "raise"))
    with caplog.at_level("WARNING", "datasets.echo_4o_image"):
        assert len(list(read_instructions(tmp_path, ["surreal_fantasy"], None, "skip"))) == 12
    with pytest.raises(ValueError, match="no folder for the subset multi_reference, only for surreal_fantasy"):
        list(read_instructions(tmp_path, None, None, "raise"))
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        list(read_instructions(tmp_path, None, None, "ignore"))


def test_overlap_and_a_copy_without_it(data: Path, tmp_path: Path) -> None:
    rows = list(read_instructions(data, None, None, "raise"))
    exact, near = rows[3], max(rows[12:24], key=lambda row: len(row["instruction"]))
    items = write_lines(
        tmp_path / "items.jsonl",
        {"prompt": f"A photo of {exact['instruction'].upper()}!"},
        {"prompt": near["instruction"] + " today"},
    )
    report = overlap(data, {"mine": items}, threshold=0.75)
    assert report["benchmarks"] == {"mine": {"file": "items.jsonl", "prompts": 2}}
    assert report["subsets"] == dict.fromkeys(SUBSETS, 12)
    found = {pair["id"]: pair["exact"] for pair in report["pairs"]}
    assert found[exact["id"]] is True and found[near["id"]] is False

    output = tmp_path / "clean"
    assert sum(drop(report, output, data).values()) == 36 - len(found)
    left = list(read_instructions(output, None, None, "raise"))
    assert left == [row for row in rows if row["id"] not in found]
    counts = overlap(output, {"mine": items}, threshold=0.75)["counts"]
    assert [(entry["exact"], entry["near"]) for entry in counts] == [(0, 0)] * 4
    by_subset = Counter(row["subset"] for row in left)
    assert [entry["rows"] for entry in counts] == [*(by_subset[subset] for subset in SUBSETS), len(left)]
    decoded = datasets.load_dataset(str(output), "multi_reference", split="train")
    assert decoded[0]["output_image"].size == (64, 64)
    card = (output / "README.md").read_text()
    assert "No figures stand here" not in card and "the rows found are left out of it" in card


def test_a_report_enters_the_card_of_a_copy_and_stays_there(data: Path, tmp_path: Path) -> None:
    items = write_lines(
        tmp_path / "items.jsonl", {"prompt": list(read_instructions(data, None, None, "raise"))[0]["instruction"]}
    )
    write_report(overlap(data, {"mine": items}, subsets=["surreal_fantasy"]), tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    build(tmp_path / "copy", data, subsets=["surreal_fantasy"], overlap=report)
    build(tmp_path / "copy", data, subsets=["multi_reference"])
    card = (tmp_path / "copy/README.md").read_text()
    [counts] = report["counts"]
    cells = ["mine", "surreal_fantasy", "12", str(counts["exact"]), str(counts["near"]), "1", "1", "0"]
    assert f"| {' | '.join(cells)} |" in card
    assert "Figures of this copy" in card and "left out" not in card.split("## Contamination")[1].split("##")[0]
    with pytest.raises(ValueError, match="must be a report of .*, this has no counts, pairs"):
        build(tmp_path / "copy", data, overlap={"threshold": 1, "ngram": 3})


def test_only_the_subsets_of_the_report_are_copied(data: Path, tmp_path: Path) -> None:
    items = write_lines(tmp_path / "items.jsonl", {"prompt": "a cow"})
    report = overlap(data, {"mine": items}, subsets=["surreal_fantasy"])
    assert drop(report, tmp_path / "clean", data) == {"surreal_fantasy": 12}
    assert not (tmp_path / "clean/multi_reference").exists()


def test_a_report_of_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    items = write_lines(tmp_path / "items.jsonl", {"prompt": "a cow"})
    report = overlap(data, {"mine": items}, subsets=["surreal_fantasy"])
    report["subsets"]["surreal_fantasy"] = 13
    with pytest.raises(ValueError, match="has 12 rows of surreal_fantasy where the report leaves 13"):
        drop(report, tmp_path / "clean", data)


hub = test_hub.hub


def test_over_the_hub_no_picture_is_fetched(hub: Any, tmp_path: Path) -> None:
    address, digests = hub
    script = """
from echo4o_hf.data.instructions import read_instructions
print(json.dumps([row["id"] for row in read_instructions(None, None, None, "raise")]))
"""
    ids = test_hub.run(script, tmp_path / "home", HF_ENDPOINT=address)
    assert sorted(ids) == [id for id, _ in digests]
    assert test_hub.Hub.requested and all(path.endswith(".jsonl") for path in test_hub.Hub.requested)


PROMPTS = {"Geneval++.jsonl": 280, "Imagine.jsonl": 270, "geneval_evaluation_metadata.jsonl": 553}


@pytest.mark.skipif(not UPSTREAM.is_dir(), reason="needs the benchmarks' own files")
def test_the_benchmarks_own_files() -> None:
    prompts = {name: read_prompts(UPSTREAM / name) for name in PROMPTS}
    assert {name: len(texts) for name, texts in prompts.items()} == PROMPTS
    index = Prompts(prompts)
    for name, texts in prompts.items():
        for item, text in enumerate(texts):
            assert any(m.exact and (m.benchmark, m.item) == (name, item) for m in index.matches(text.title() + " "))
