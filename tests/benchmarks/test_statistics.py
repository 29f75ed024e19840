"""The statistics against computations written another way, and their intervals against simulation."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from echo4o_hf.benchmarks.statistics import (
    _detectable,
    agreement,
    by_group,
    clustered_bootstrap,
    compare,
    counts,
    majority,
    mean,
    proportion_interval,
    weighted_mean,
    wilson,
)
from echo4o_hf.benchmarks.verdict import Verdict

EQUAL = {"a": 1.0, "b": 1.0, "c": 1.0}
CUT = Verdict(None, unscored="cut")


def test_an_item_is_the_mean_of_its_scored_images() -> None:
    rows = [("a", [1.0, 0.0, None]), ("b", [None]), ("a", [1.0]), ("b", [])]
    assert by_group(rows) == {"a": [0.5, 1.0], "b": []}
    verdicts = [[Verdict(1.0), Verdict(0.0), CUT], [CUT], [Verdict(1.0)], []]
    assert counts(verdicts) == {"num_items": 4, "num_unscored": 2, "num_images": 5, "num_unscored_images": 2}


def test_means() -> None:
    assert mean([]) is None
    assert mean([0.1] * 10) == 0.1
    assert weighted_mean({"a": [1.0], "b": [0.0, 0.0, 0.0]}, {"a": 3.0, "b": 1.0}) == 0.75
    assert weighted_mean({"a": [1.0], "b": []}, EQUAL) is None
    assert weighted_mean({}, EQUAL) is None


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (0, 40), (40, 40), (20, 40), (205, 280)])
def test_wilson_is_scipys(successes: int, total: int) -> None:
    expected = binomtest(successes, total).proportion_ci(method="wilson")
    assert wilson(successes, total) == pytest.approx([expected.low, expected.high], abs=1e-9)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_of_nothing(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {total}"):
        wilson(successes, total)


def test_wilson_covers_the_truth() -> None:
    for rate in (0.05, 0.3, 0.732):
        chances = [math.comb(280, k) * rate**k * (1 - rate) ** (280 - k) for k in range(281)]
        covered = sum(p for k, p in enumerate(chances) if wilson(k, 280)[0] <= rate <= wilson(k, 280)[1])
        assert 0.93 < covered < 0.97


def test_the_effective_size_of_unequal_tags() -> None:
    balanced = {"a": [1.0] * 30 + [0.0] * 10, "b": [1.0] * 10 + [0.0] * 30}
    assert proportion_interval(balanced, EQUAL) == wilson(40, 80)
    # Two tags weigh the same: 1 / (0.25 / 10 + 0.25 / 90) observations.
    size = 36.0
    assert proportion_interval({"a": [1.0] * 10, "b": [0.0] * 90}, EQUAL) == pytest.approx(wilson(size / 2, size))
    assert proportion_interval({"a": [1.0], "b": []}, EQUAL) is None


def test_several_images_per_item_are_no_proportion() -> None:
    table = {"a": [0.25, 0.5, 0.75, 0.5] * 10}
    interval = proportion_interval(table, EQUAL, seed=3)
    assert interval == clustered_bootstrap(table, EQUAL, seed=3)
    assert interval is not None
    assert interval[1] - interval[0] < wilson(20, 40)[1] - wilson(20, 40)[0]
    assert proportion_interval({"a": [0.5]}, EQUAL) == wilson(0.5, 1)  # one item: its spread is unknown


def test_the_bootstrap_is_seeded_and_needs_two_items_per_group() -> None:
    table = {"a": [1.0, 4.0, 6.0], "b": [2.0, 9.0]}
    assert clustered_bootstrap(table, EQUAL, seed=1) == clustered_bootstrap(table, EQUAL, seed=1)
    assert clustered_bootstrap(table, EQUAL, seed=1, resamples=50) != clustered_bootstrap(table, EQUAL, 2, 50)
    assert clustered_bootstrap({"a": [1.0, 2.0], "b": [3.0]}, EQUAL) is None
    assert clustered_bootstrap({}, EQUAL) is None


def test_the_bootstrap_covers_the_truth() -> None:
    # Scores of 0..10 with known means, grouped as Imagine-Bench is.
    weights = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 2.0}
    levels = np.arange(11)
    chances = {
        name: (weight := np.exp(-((levels - 4 - 2 * k) ** 2) / 8)) / weight.sum() for k, name in enumerate("abcd")
    }
    truth = sum(weights[name] * float(levels @ chances[name]) for name in weights) / 9
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        table = {
            name: generator.choice(levels, 90 if name == "a" else 60, p=chances[name]).tolist() for name in weights
        }
        low, high = clustered_bootstrap(table, weights, seed, resamples=400) or (0, 0)
        covered += low <= truth <= high
    assert 0.91 < covered / 300 < 0.98


def test_images_of_one_prompt_are_not_independent() -> None:
    # 20 prompts of 4 images that always agree: the interval of 20 observations, not of 80.
    table = by_group([("a", [float(item % 2)] * 4) for item in range(20)])
    assert proportion_interval(table, EQUAL) == wilson(10, 20)


# --- comparing two results ---


def results(scores: dict[str, list[list[float | None]]], **changes: Any) -> dict[str, Any]:
    items = [
        {"id": f"{group}{place}", "group": group, "images": [{"verdict": {"score": score}} for score in images]}
        for group, rows in scores.items()
        for place, images in enumerate(rows)
    ]
    judges = [{"name": "judge", "parameters": {}, "calls": len(items)}]
    made = {"benchmark": "geneval_pp", "protocol": "official", "items_sha256": "0", "texts_sha256": "1"}
    return {**made, "judges": judges, "items": items, **changes}


def test_mcnemar_is_the_sign_test_of_the_discordant_items() -> None:
    a = results({"counting": [[1.0]] * 10 + [[0.0]] * 10, "color_attr": [[1.0]] * 20})
    b = results({"counting": [[1.0]] * 8 + [[0.0]] * 2 + [[1.0]] * 9 + [[0.0]], "color_attr": [[1.0]] * 20})
    found = compare(a, b)
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11  # 2 only a, 9 only b
    assert (found["test"], found["discordant"]) == ("McNemar exact", {"only_a": 2, "only_b": 9})
    assert found["p_value"] == pytest.approx(2 * tail)
    assert found["difference"] == pytest.approx(7 / 20 / 2)
    assert found["per_group"] == {"counting": pytest.approx(0.35), "color_attr": 0.0}
    low, high = found["confidence_interval"]
    assert low < found["difference"] < high
    assert (found["num_items"], found["num_left_out"], found["same_judges"]) == (40, 0, True)


def test_items_without_a_score_are_left_out_of_a_comparison() -> None:
    found = compare(
        results({"counting": [[1.0], [None], [1.0], [0.0]]}),
        results({"counting": [[1.0], [1.0], [None], [0.0]]}, judges=[{"name": "other", "parameters": {}}]),
    )
    assert (found["num_items"], found["num_left_out"], found["same_judges"]) == (2, 2, False)
    assert (found["difference"], found["p_value"], found["smallest_detectable_difference"]) == (0.0, 1.0, None)
    few = compare(results({"counting": [[0.0]]}), results({"counting": [[1.0]]}))
    assert (few["difference"], few["p_value"], few["smallest_detectable_difference"]) == (1.0, 1.0, None)
    nothing = compare(results({"counting": [[None]]}), results({"counting": [[1.0]]}))
    assert (nothing["difference"], nothing["confidence_interval"], nothing["num_items"]) == (None, None, 0)


def test_the_paired_bootstrap() -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(2, 8, 90)
    a = results({"Multi-Object": [[score] for score in base]}, benchmark="imagine_bench")
    same = results({"Multi-Object": [[x] for x in base + generator.normal(0, 1, 90)]}, benchmark="imagine_bench")
    better = results({"Multi-Object": [[x] for x in base + generator.normal(0.5, 1, 90)]}, benchmark="imagine_bench")
    assert compare(a, same)["p_value"] > 0.05
    found = compare(a, better)
    assert (found["test"], found["p_value"] < 0.01) == ("paired bootstrap", True)
    low, high = found["confidence_interval"]
    assert 0 < low < found["difference"] < high
    assert found["smallest_detectable_difference"] == pytest.approx(2.8 / math.sqrt(90), rel=0.2)
    assert compare(a, better) == found
    backwards = compare(better, a)
    assert backwards["difference"] == pytest.approx(-found["difference"])
    one = compare(results({"counting": [[0.5]]}), results({"counting": [[1.0]]}))
    assert (one["difference"], one["p_value"], one["smallest_detectable_difference"]) == (0.5, None, None)


def test_the_smallest_detectable_difference_is_found_in_80_of_100() -> None:
    share, total = 0.2, 280
    difference = _detectable(share, total)
    assert difference == pytest.approx(0.075, abs=0.001)  # "about 7.5 points" with 280 items
    generator = np.random.default_rng(0)
    only_a, only_b, _ = generator.multinomial(
        total, [(share - difference) / 2, (share + difference) / 2, 1 - share], 400
    ).T
    found = [binomtest(b, a + b).pvalue < 0.05 for a, b in zip(only_a.tolist(), only_b.tolist(), strict=True)]
    assert 0.7 < np.mean(found) < 0.88  # the exact test is a little conservative


def test_judges_are_the_same_if_they_were_told_the_same() -> None:
    one = results({"counting": [[1.0]]})
    assert compare(one, one)["same_judges"]
    assert not compare(one, {**one, "texts_sha256": "2"})["same_judges"]


def test_a_benchmark_that_is_not_known() -> None:
    other = results({"counting": [[1.0]]}, benchmark="shapes_140")
    with pytest.raises(ValueError, match="known of geneval_pp, imagine_bench; got 'shapes_140'"):
        compare(other, other)


@pytest.mark.parametrize("key", ["benchmark", "protocol", "items_sha256"])
def test_only_the_same_items_compare(key: str) -> None:
    with pytest.raises(ValueError, match=f"same {key} compare; got .* and 'x'"):
        compare(results({}), results({}, **{key: "x"}))


# --- several judges ---


def verdicts(scores: str) -> list[Verdict]:
    return [CUT if score == "-" else Verdict(float(score)) for score in scores]


def test_agreement_of_two_judges() -> None:
    found = agreement({"x": verdicts("11110000-1"), "y": verdicts("111000011-")}, ["a"] * 5 + ["b"] * 5)
    (pair,) = found["pairs"]
    assert (pair["judges"], pair["num_images"], pair["num_left_out"]) == (["x", "y"], 8, 2)
    assert pair["percent_agreement"] == 75.0
    # Both say right half of the time: chance agreement is a half.
    assert pair["kappa"] == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    assert pair["confusion"] == {"all": [[3, 1], [1, 3]], "a": [[1, 0], [1, 3]], "b": [[2, 1], [0, 0]]}


def test_agreement_on_a_scale_is_weighted() -> None:
    ones, others = [1.0, 4.5, 8.0, 10.0, 3.0], [2.0, 4.0, 8.0, 9.0, 7.0]
    found = agreement(
        {"x": [Verdict(score) for score in ones], "y": [Verdict(score) for score in others]}, ["t"] * 5, range(11)
    )
    (pair,) = found["pairs"]
    rounded = [1, 4, 8, 10, 3]
    expected = 1 - sum((a - b) ** 2 for a, b in zip(rounded, others, strict=True)) * 5 / sum(
        (a - b) ** 2 for a in rounded for b in others
    )
    assert pair["kappa"] == pytest.approx(expected)
    assert pair["percent_agreement"] == 40.0
    assert pair["mean_absolute_difference"] == pytest.approx((1 + 0.5 + 0 + 1 + 4) / 5)


def test_agreement_that_is_undefined() -> None:
    (pair,) = agreement({"x": verdicts("111"), "y": verdicts("111")}, ["a"] * 3)["pairs"]
    assert (pair["kappa"], pair["percent_agreement"]) == (None, 100.0)
    (pair,) = agreement({"x": verdicts("1-"), "y": verdicts("-1")}, ["a"] * 2)["pairs"]
    assert (pair["kappa"], pair["percent_agreement"], pair["confusion"]) == (None, None, {})


def test_agreement_of_three_judges_is_of_three_pairs() -> None:
    found = agreement({name: verdicts("10") for name in "xyz"}, ["a", "b"])
    assert [pair["judges"] for pair in found["pairs"]] == [["x", "y"], ["x", "z"], ["y", "z"]]
    with pytest.raises(ValueError, match="two judges or more; got x"):
        agreement({"x": verdicts("1")}, ["a"])
    with pytest.raises(ValueError, match="y has 2 verdicts for 1 images"):
        agreement({"x": verdicts("1"), "y": verdicts("11")}, ["a"])


def test_majority() -> None:
    yes, no = Verdict(1.0, "fine", {"1 count": True}), Verdict(0.0, "two cats", {"1 count": False})
    assert majority([yes]) is yes
    assert majority([yes, no, yes]) == yes
    assert majority([no, CUT, CUT]) == no
    tie = majority([yes, no])
    assert (tie.score, tie.unscored) == (None, "a tie: 1 of 2 verdicts say right")
    assert tie.reason == "fine\ntwo cats"
    assert majority([CUT, Verdict(None, unscored="refused")]).unscored == "cut; refused"
    with pytest.raises(ValueError, match="no verdicts"):
        majority([])


def test_scores_on_a_scale_are_averaged() -> None:
    found = majority([Verdict(8.0, "a", {"x": 8.0}), Verdict(5.0, "b", {"x": 6.0}), CUT], range(11))
    assert (found.score, found.parts, found.reason) == (6.5, {"x": 7.0}, "a\nb\ncut")
