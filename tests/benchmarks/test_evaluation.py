"""From pictures to results: the store, resuming, deviations, the text of the judge, the schema."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from echo4o_hf.benchmarks.evaluation import ITEMS_SHA256, evaluate_images, load_judges
from echo4o_hf.benchmarks.items import JUDGE_TEXTS, items_sha256, load_items, pinned_path
from echo4o_hf.benchmarks.results import read_results, write_results
from echo4o_hf.judges.judge import JudgeFailed, JudgeStopped, Reply
from echo4o_hf.judges.openai_judge import OpenAIJudge
from echo4o_hf.judges.scripted import ScriptedJudge

UPSTREAM = Path(__file__).parents[3] / "shared" / "upstream-data"
ITEMS = [
    {"tag": tag, "prompt": f"{number} kites", "include": [{"class": "kite", "count": number}]}
    for number, tag in enumerate(["counting", "counting", "color_attr", "color_attr"], 1)
]


def yes(system: str, prompt: str, images: list[Image.Image]) -> str:
    return '{"correct": 1, "reason": "seen"}'


@pytest.fixture
def images(tmp_path: Path) -> list[list[Path]]:
    paths = [tmp_path / f"{number}.png" for number in range(len(ITEMS))]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return [[path] for path in paths]


def evaluated(images: list, items: list = ITEMS, **options: object) -> dict:
    return evaluate_images("geneval_pp", images, items, **{"judge": yes, "progress": False, **options})


def test_an_exact_copy_of_the_official_file_is_the_official_text(
    images: list[list[Path]], judge_texts: None, tmp_path: Path
) -> None:
    pinned = pinned_path(JUDGE_TEXTS["geneval_pp"], "")
    (tmp_path / "copy.py").write_bytes(pinned.read_bytes().replace(b"\n", b"\r\n"))
    for options in ({}, {"judge_text": tmp_path / "copy.py"}):
        assert not [text for text in evaluated(images, **options)["deviations"] if "text" in text]


@pytest.mark.usefixtures("judge_texts")
class TestWithJudgeTexts:
    def test_results_describe_themselves(self, images: list[list[Path]], tmp_path: Path) -> None:
        results = evaluated([*images[:3], []], seed=3)
        assert results["benchmark"] == "geneval_pp" and results["protocol"] == "official" and results["seed"] == 3
        assert results["items_sha256"] == items_sha256(ITEMS) and "echo4o-hf" in results["software"]
        (judge,) = results["judges"]
        assert judge["name"] == "yes" and (judge["calls"], judge["from_store"], judge["failures"]) == (3, 0, 0)
        first, *_, last = results["items"]
        assert first["id"] == 0 and first["group"] == "counting" and first["item"] == ITEMS[0]
        assert first["checklist"] == "This image should contain:\n- 1 kite present in the image."
        (image,) = first["images"]
        assert image["path"] == str(images[0][0]) and len(image["sha256"]) == 64
        assert image["verdict"] == {"score": 1.0, "reason": "seen", "parts": {}, "unscored": None}
        assert image["judgements"] == [{"judge": "yes", "repeat": 0, "reply": yes("", "", []), **image["verdict"]}]
        nothing = {"score": None, "reason": "", "parts": {}, "unscored": "no image"}
        assert last["images"] == [{"path": None, "sha256": None, "verdict": nothing, "judgements": []}]
        write_results(results, tmp_path / "new" / "results.json")
        assert read_results(tmp_path / "new" / "results.json") == results
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]

    def test_the_store_makes_judging_again_free(self, images: list[list[Path]], tmp_path: Path) -> None:
        calls = []

        def counted(system: str, prompt: str, images: list[Image.Image]) -> str:
            calls.append(prompt)
            return Reply(yes(system, prompt, images), input_tokens=10, output_tokens=2)

        store = tmp_path / "store.sqlite"
        first = evaluated(images, judge=counted, store=store, repeats=2)
        again = evaluated(images, judge=counted, store=store, repeats=2)
        assert len(calls) == 8
        usage = [
            [results["judges"][0][name] for name in ("calls", "from_store", "input_tokens", "output_tokens")]
            for results in (first, again)
        ]
        assert first["judges"][0]["prices"] is None and first["judges"][0]["cost"] is None
        assert usage == [[8, 0, 80, 16], [0, 8, 0, 0]]
        assert again["scores"] == first["scores"] and again["items"] == first["items"]
        noted = sqlite3.connect(store).execute("SELECT verdict FROM replies").fetchall()
        assert [json.loads(row[0])["score"] for row in noted] == [1.0] * 8
        moved = [[path.rename(path.with_name(f"moved-{path.name}"))] for (path,) in images]
        evaluated(moved, judge=counted, store=store)  # by content, not by name
        assert len(calls) == 8
        evaluated(moved, judge=counted, store=store, items=[{**ITEMS[0], "prompt": "another"}, *ITEMS[1:]])
        assert len(calls) == 9

    def test_what_it_cost(self, images: list[list[Path]], tmp_path: Path) -> None:
        """Of this run, and with the replies from the store; one in vain counts, one for two pictures counts once."""

        def paid(system: str, prompt: str, images: list[Image.Image]) -> str:
            if "4 kites" in prompt:
                raise JudgeFailed("empty", input_tokens=1000, output_tokens=1000)
            return Reply(yes(system, prompt, images), input_tokens=1000, output_tokens=10)

        paid.prices = (2, 10)
        store = tmp_path / "store.sqlite"
        evaluated([images[0], [], [], []], judge=paid, store=store)
        pictures = [images[0], [*images[1], *images[1]], [], images[3]]
        (judge,) = evaluated(pictures, judge=paid, store=store)["judges"]
        assert (judge["calls"], judge["from_store"], judge["failures"]) == (2, 2, 1)
        assert (judge["input_tokens"], judge["output_tokens"], judge["prices"]) == (2000, 1010, [2.0, 10.0])
        assert judge["cost"] == pytest.approx((2000 * 2 + 1010 * 10) / 1e6)
        assert judge["total_cost"] == pytest.approx((3000 * 2 + 1020 * 10) / 1e6)
        (judge,) = evaluated([images[0], [], [], []], judge=paid, store=store)["judges"]
        assert (judge["cost"], judge["total_cost"]) == (0, pytest.approx(0.0021))

    def test_a_cost_that_is_not_known_is_none(self, images: list[list[Path]]) -> None:
        def silent(system: str, prompt: str, images: list[Image.Image]) -> str:
            known = None if "2 kites" in prompt else 5
            return Reply(yes(system, prompt, images), input_tokens=known, output_tokens=5)

        silent.prices = [1, 1]
        (judge,) = evaluated(images, judge=silent)["judges"]
        assert [judge[name] for name in ("input_tokens", "output_tokens", "cost", "total_cost")] == [
            None,
            20,
            None,
            None,
        ]
        silent.prices = [1]
        with pytest.raises(ValueError, match="prices are two numbers"):
            evaluated(images, judge=silent)

    def test_what_agreement_needs_is_there_before_anybody_is_asked(
        self, images: list[list[Path]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(system: str, prompt: str, images: list[Image.Image]) -> str:
            raise AssertionError("asked")

        monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
        for options in ({"judge": [never, yes]}, {"judge": never, "repeats": 2}):
            with pytest.raises(ValueError, match=r"scikit-learn.*pip install 'echo4o-hf\[judges\]'"):
                evaluated(images, **options)

    def test_a_stop_keeps_what_arrived(self, images: list[list[Path]], tmp_path: Path) -> None:
        calls, quota = [], 2

        def short_of_quota(system: str, prompt: str, images: list[Image.Image]) -> str:
            calls.append(prompt)
            if len(calls) > quota:
                raise JudgeStopped("the quota is used up")
            return yes(system, prompt, images)

        options = {"judge": short_of_quota, "store": tmp_path / "store.sqlite", "concurrency": 1}
        with pytest.raises(JudgeStopped, match="quota"):
            evaluated(images, **options)
        quota = 9
        results = evaluated(images, **options)
        assert results["judges"][0]["from_store"] == 2 and results["scores"]["num_unscored"] == 0

    def test_failures_and_refusals_are_unscored(self, images: list[list[Path]]) -> None:
        def troubled(system: str, prompt: str, images: list[Image.Image]) -> str:
            if "1 kites" in prompt:
                raise JudgeFailed("no answer after 6 retries")
            if "2 kites" in prompt:
                return "I'm sorry, I can't help with that."
            if "3 kites" in prompt:
                return Reply('{"correct": 1, "rea', truncated=True)
            return '{"correct": "1"}'

        results = evaluated(images, judge=troubled)
        reasons = [item["images"][0]["verdict"]["unscored"] for item in results["items"]]
        assert reasons[0] == "no answer after 6 retries" and "refused" in reasons[1]
        assert "limit of its length" in reasons[2] and reasons[3] is None
        assert results["judges"][0]["failures"] == 1
        assert results["scores"]["num_unscored"] == 3 and results["scores"]["accuracy"] == 1.0
        assert results["scores"]["geneval_pp"] is None  # the tag `counting` has no score at all

    def test_a_tie_of_judges_is_unscored(self, images: list[list[Path]]) -> None:
        def no(system: str, prompt: str, images: list[Image.Image]) -> str:
            return '{"correct": 0}'

        results = evaluated(images, judge=[yes, no])
        assert results["scores"]["num_unscored"] == 4 and results["agreement"]["pairs"][0]["percent_agreement"] == 0
        assert [one["accuracy"] for one in results["per_judge"].values()] == [1.0, 0.0]

    def test_several_images_of_some_items_with_repeats(self, images: list[list[Path]]) -> None:
        results = evaluated([[*images[0], *images[1]], [], [None], images[3]], repeats=2)
        assert results["scores"]["num_images"] == 5 and results["judges"][0]["calls"] == 6
        assert results["self_agreement"]["yes"]["pairs"][0]["num_left_out"] == 2

    def test_deviations(self, images: list[list[Path]]) -> None:
        found = evaluated([*images[:3], [*images[0], *images[3]]], repeats=2)["deviations"]
        assert found == [
            "these 4 items are not the benchmark's own",
            "judged by yes; published scores are by openai:gpt-4.1",
            "each judge was asked 2 times",
            "up to 2 pictures of an item",
        ]

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({}, []),
            ({"temperature": 0, "max_tokens": 200}, []),
            ({"temperature": 1.0, "extra_body": {"seed": 3}}, ["temperature=1.0, seed=3"]),
            ({"temperature": None}, ["temperature=its default"]),
            ({"base_url": "http://127.0.0.1:9/v1"}, ["base_url=http://127.0.0.1:9/v1"]),
        ],
    )
    def test_what_sets_apart_the_official_protocol(
        self, options: dict, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not UPSTREAM.is_dir():
            pytest.skip("needs the benchmark's own items")
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        items = load_items("geneval_pp", UPSTREAM / "Geneval++.jsonl")
        results = evaluated([[] for _ in items], items, judge=OpenAIJudge("gpt-4.1", api_key="none", **options))
        end = "; published scores are by OpenAI's at temperature 0"
        assert results["deviations"] == [f"the judge was asked with {one}{end}" for one in told]
        assert results["scores"]["num_unscored"] == 280

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"images": []}, "got the pictures of 0 items for 4 items"),
            ({"items": []}, "got the pictures of 4 items for 0 items"),
            ({"items": [{**ITEMS[0], "tag": "cats"}, *ITEMS[1:]]}, "item 0: tag must be one of.*'cats'"),
            ({"judge": ["shapes", "shapes"]}, "with different names"),
        ],
    )
    def test_mistakes(self, options: dict, message: str, images: list[list[Path]]) -> None:
        with pytest.raises(ValueError, match=message):
            evaluated(**{"images": images, **options})


def _rows(store: Path) -> int:
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT count(*) FROM replies").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


# --- without the official text ---


def test_a_function_is_asked_without_the_official_text_but_not_a_model(
    images: list[list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    results = evaluated(images)
    assert "ECHO4O_BENCHMARK_SOURCE" in caplog.text and "no system text" in caplog.text
    assert "the official judge text was not to be had; the judge saw the item alone" in results["deviations"]
    caplog.clear()
    evaluated(images, judge=ScriptedJudge('{"correct": 1}'))  # which does not read it
    assert "no system text" not in caplog.text
    with pytest.raises(OSError, match="protocol='strict'"):
        evaluated(images, judge=OpenAIJudge("gpt-4.1", api_key="none"))
    with pytest.raises(OSError, match=r"missing\.py"):
        evaluated(images, judge_text="missing.py")


def test_a_copy_of_the_official_file(images: list[list[Path]], tmp_path: Path) -> None:
    (tmp_path / "official.py").write_text('SYSTEM_PROMPT = "Look closely."\n')
    seen = []

    def judge(system: str, prompt: str, images: list[Image.Image]) -> str:
        seen.append(system)
        return yes(system, prompt, images)

    results = evaluated(images, judge=judge, judge_text=tmp_path / "official.py")
    assert seen == ["Look closely."] * 4 and results["texts_sha256"] != evaluated(images)["texts_sha256"]
    assert "the judge's text is not the one of the official script" in results["deviations"]


def test_killed_and_resumed(images: list[list[Path]], tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from echo4o_hf.benchmarks.evaluation import evaluate_images

def yes(system, prompt, images):
    time.sleep(1)
    return '{{"correct": 1, "reason": "seen"}}'

evaluate_images("geneval_pp", {[[str(path)] for (path,) in images]!r}, {ITEMS!r}, judge=yes, progress=False,
                store={str(tmp_path / "store.sqlite")!r}, concurrency=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    store = tmp_path / "store.sqlite"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and _rows(store) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    arrived = _rows(store)
    assert 2 <= arrived < 4
    asked = []

    def resumed(system: str, prompt: str, images: list[Image.Image]) -> str:
        asked.append(prompt)
        return yes(system, prompt, images)

    resumed.name = "yes"
    results = evaluated(images, judge=resumed, store=store)
    assert len(asked) == 4 - arrived == results["judges"][0]["calls"]
    assert results["scores"] == evaluated(images)["scores"]


def test_strict_asks_endpoints_for_json_of_the_schema() -> None:
    options = {"api_key": "none", "base_url": "http://127.0.0.1:9"}
    (strict,) = load_judges("openai:m", "geneval_pp", "strict", options)
    (official,) = load_judges("openai:m", "geneval_pp", "official", options)
    assert strict.parameters["response_format"]["json_schema"]["name"] == "geneval_pp_strict"
    assert "response_format" not in official.parameters
    with pytest.raises(ValueError, match="shapes takes other options than colour"):
        load_judges("shapes", "geneval_pp", options={"colour": 1})


def test_hashes_of_the_pinned_items() -> None:
    if not UPSTREAM.is_dir():
        pytest.skip("needs the benchmarks' own items")
    for name, file in (("geneval_pp", "Geneval++.jsonl"), ("imagine_bench", "Imagine.jsonl")):
        assert items_sha256(load_items(name, UPSTREAM / file)) == ITEMS_SHA256[name]
