"""results.json: what is not one is refused, with the place."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from echo4o_hf.benchmarks.results import read_results, write_results

VERDICT = {"score": 1.0, "reason": "a\ud800b \u2028 </script>", "parts": {}, "unscored": None}
RESULTS: dict[str, Any] = {
    "schema_version": 1,
    "benchmark": "geneval_pp",
    "protocol": "official",
    "created": "2026-01-01T00:00:00+00:00",
    "seed": 0,
    "software": {},
    "items_sha256": "0" * 64,
    "texts_sha256": None,
    "repeats": 1,
    "deviations": [],
    "judges": [
        {
            "name": "yes",
            "parameters": {},
            "calls": 1,
            "from_store": 0,
            "failures": 0,
            "input_tokens": None,
            "output_tokens": None,
            "prices": [2.0, 8.0],
            "cost": 0.5,
            "total_cost": None,
        }
    ],
    "scores": {"geneval_pp": 1.0},
    "per_judge": {},
    "agreement": None,
    "self_agreement": None,
    "items": [
        {
            "id": 0,
            "group": "counting",
            "prompt": "a kite",
            "item": {},
            "checklist": None,
            "images": [
                {
                    "path": "/tmp/\udcff.png",
                    "sha256": None,
                    "verdict": VERDICT,
                    "judgements": [{"judge": "yes", "repeat": 0, "reply": "…", **VERDICT}],
                }
            ],
        }
    ],
}


def test_there_and_back_with_hostile_texts(tmp_path: Path) -> None:
    write_results(RESULTS, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_more_keys_are_left_alone(tmp_path: Path) -> None:
    write_results({**RESULTS, "model": "x"}, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json")["model"] == "x"


IMAGE = ("items", 0, "images", 0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("benchmark",), None, "benchmark is missing"),
        (("judges", 0, "calls"), "1", r"judges\[0\]: calls: expected int; got '1'"),
        (("judges", 0, "calls"), True, "expected int; got True"),
        (("judges", 0, "cost"), "0.5", "cost: expected int or float or null; got '0.5'"),
        (("items",), {}, "items: expected a list; got dict"),
        (("items", 0), [], r"items\[0\]: expected an object; got list"),
        ((*IMAGE, "verdict", "score"), "1", "score: expected int or float or null; got '1'"),
        ((*IMAGE, "verdict", "score"), False, "score: expected int or float or null; got False"),
        ((*IMAGE, "verdict", "unscored"), "refused", "exactly one of score and unscored must be null"),
        ((*IMAGE, "judgements", 0, "reply"), 1, "reply: expected str or null; got 1"),
        (("schema_version",), 2, "schema_version is 2, this version of echo4o-hf reads 1"),
    ],
)
def test_what_is_no_result(place: tuple, value: object, message: str, tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    *parents, last = place
    inner: Any = results
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=message) as error:
        read_results(tmp_path / "results.json")
    assert "results.json" in str(error.value)
    if last != "schema_version":
        with pytest.raises(ValueError, match=message):
            write_results(results, tmp_path / "new.json")
        assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema_version": NaN}', "[]", "\ufeff{}"])
def test_what_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="results.json"):
        read_results(tmp_path / "results.json")


def test_numbers_that_json_has_not_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results({**RESULTS, "scores": {"geneval_pp": float("nan")}}, tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "missing.json")
