"""Intervals, paired tests and agreement for scores that are grouped (tags, types) and clustered by prompt.

A table is a mapping of group to item scores; an item's score is the mean over its images, so that several images of
one prompt count as one observation. All intervals are of 95 %; all random numbers are seeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from echo4o_hf.benchmarks.verdict import Verdict

Table = Mapping[str, Sequence[float]]
Interval = list[float]  # low, high

RESAMPLES = 2000
_Z = 1.959963984540054  # standard normal, two-sided 95 %
_Z_POWER = 0.8416212335729143  # standard normal, power of 80 %


def by_group(rows: Sequence[tuple[str, Sequence[float | None]]]) -> dict[str, list[float]]:
    """Group to item scores, from (group, the scores of the item's images) per item; unscored images are left out.

    A group whose items all are unscored stays, empty.
    """
    table: dict[str, list[float]] = {}
    for group, scores in rows:
        known = [score for score in scores if score is not None]
        table.setdefault(group, []).extend([sum(known) / len(known)] if known else [])
    return table


def counts(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, int]:
    """How many items and images there are, and how many of them have no score."""
    return {
        "num_items": len(verdicts),
        "num_unscored": sum(all(one.score is None for one in images) for images in verdicts),
        "num_images": sum(map(len, verdicts)),
        "num_unscored_images": sum(one.score is None for images in verdicts for one in images),
    }


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def weighted_mean(table: Table, weights: Mapping[str, float]) -> float | None:
    """The groups' means, weighted; None when a group of the table is empty, for the rest would be another figure."""
    if not table or not all(table.values()):
        return None
    total = sum(weights[group] for group in table)
    return math.fsum(weights[group] * math.fsum(values) / len(values) for group, values in table.items()) / total


def wilson(successes: float, total: float) -> Interval:
    """Wilson's score interval of a proportion; whole numbers, or effective ones of a weighted sample.

    Raises:
        ValueError: the total is not above 0, or the successes are not within it.
    """
    if not (total > 0 and 0 <= successes <= total):
        raise ValueError(f"successes must be 0 to total, and total above 0; got {successes} of {total}")
    rate, square = successes / total, _Z**2 / total
    middle = (rate + square / 2) / (1 + square)
    half = math.sqrt(rate * (1 - rate) * square + square**2 / 4) / (1 + square)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def proportion_interval(table: Table, weights: Mapping[str, float], seed: int = 0) -> Interval | None:
    """The interval of a weighted mean of proportions; None when a group is empty.

    Wilson's when every item is right or wrong, with the effective sample size of the weights (all items, when the
    groups are equally large and weighted). With items between right and wrong (several images) the bootstrap.
    """
    rate = weighted_mean(table, weights)
    if rate is None:
        return None
    values = [value for scores in table.values() for value in scores]
    if not set(values) <= {0.0, 1.0} and (interval := clustered_bootstrap(table, weights, seed)) is not None:
        return interval
    total = sum(weights[group] for group in table)
    size = 1 / sum((weights[group] / total) ** 2 / len(scores) for group, scores in table.items())
    return wilson(min(rate, 1.0) * size, size)


def clustered_bootstrap(
    table: Table, weights: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """The percentile interval of a weighted mean, items resampled within their group.

    Returns:
        None when a group has fewer than two items: its spread is unknown.
    """
    if not table or any(len(values) < 2 for values in table.values()):
        return None
    low, high = np.percentile(_resampled(table, weights, seed, resamples), [2.5, 97.5])
    return [float(low), float(high)]


def _resampled(table: Table, weights: Mapping[str, float], seed: int, resamples: int) -> np.ndarray:
    """(resamples,) weighted means of tables drawn with replacement."""
    generator = np.random.default_rng(seed)
    total = sum(weights[group] for group in table)
    means = np.zeros(resamples)
    for group, values in table.items():
        drawn = generator.choice(np.asarray(values, dtype=np.float64), (resamples, len(values)))
        means += weights[group] / total * drawn.mean(1)
    return means


def majority(verdicts: Sequence[Verdict], levels: Sequence[int] = (0, 1)) -> Verdict:
    """One verdict of many judges' (or repeats') on one image.

    Args:
        verdicts: At least one; the unscored have no voice.
        levels: Of a score. Two are voted on, a tie being unscored; with more, scores and parts are averaged.

    Raises:
        ValueError: there are no verdicts.
    """
    if not verdicts:
        raise ValueError("no verdicts to combine")
    if len(verdicts) == 1:
        return verdicts[0]
    scored = [one for one in verdicts if one.score is not None]
    reasons = "\n".join(dict.fromkeys(one.reason or one.unscored or "" for one in verdicts))
    if not scored:
        return Verdict(None, reasons, unscored="; ".join(dict.fromkeys(one.unscored or "" for one in verdicts)))
    if len(levels) > 2:
        parts = {name: math.fsum(one.parts[name] for one in scored) / len(scored) for name in scored[0].parts}
        return Verdict(math.fsum(one.score or 0 for one in scored) / len(scored), reasons, parts)
    right = sum(one.score == levels[1] for one in scored)
    if 2 * right == len(scored):
        return Verdict(None, reasons, unscored=f"a tie: {right} of {len(scored)} verdicts say right")
    winner = float(levels[2 * right > len(scored)])
    ours = [one for one in scored if one.score == winner]
    return Verdict(winner, "\n".join(dict.fromkeys(one.reason for one in ours)), ours[0].parts)


def check_agreement() -> None:
    """Before judges are paid: whether `agreement` will be able to work.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        import sklearn.metrics  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"several judges or repeats need scikit-learn ({error}): pip install 'echo4o-hf[judges]'"
        ) from error


def agreement(
    verdicts_by_judge: Mapping[str, Sequence[Verdict]], groups: Sequence[str], levels: Sequence[int] = (0, 1)
) -> dict[str, Any]:
    """How far judges agree on the same images.

    Args:
        verdicts_by_judge: Of each judge one verdict per image, in the same order.
        groups: The group (tag, type) of each image.
        levels: Of a score; scores count as the nearest one.

    Returns:
        `levels`, and in `pairs` for every two judges: `judges`, `num_images` (both scored), `num_left_out`,
        `percent_agreement` (0..100, the same level), `kappa` (Cohen's; quadratic weights with more than two levels;
        None where it is undefined, both always saying the same), `mean_absolute_difference`, and `confusion` by group
        and for "all": rows are the first judge's levels, columns the second's.

    Raises:
        ValueError: there are not two judges, or their verdicts are not as many as the groups.
    """
    if len(verdicts_by_judge) < 2:
        raise ValueError(f"agreement needs two judges or more; got {', '.join(verdicts_by_judge) or 'none'}")
    for judge, verdicts in verdicts_by_judge.items():
        if len(verdicts) != len(groups):
            raise ValueError(f"{judge} has {len(verdicts)} verdicts for {len(groups)} images")
    pairs = [
        {"judges": [first, second], **_pair(verdicts_by_judge[first], verdicts_by_judge[second], groups, levels)}
        for first, second in combinations(verdicts_by_judge, 2)
    ]
    return {"levels": list(levels), "pairs": pairs}


def _pair(
    first: Sequence[Verdict], second: Sequence[Verdict], groups: Sequence[str], levels: Sequence[int]
) -> dict[str, Any]:
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    def nearest(score: float) -> int:
        return min(levels, key=lambda level: (abs(level - score), level))

    both = [
        (group, one.score, other.score)
        for group, one, other in zip(groups, first, second, strict=True)
        if one.score is not None and other.score is not None
    ]
    rated = [(group, nearest(one), nearest(other)) for group, one, other in both]
    found: dict[str, Any] = {
        "num_images": len(both),
        "num_left_out": len(groups) - len(both),
        "percent_agreement": 100 * sum(one == other for _, one, other in rated) / len(rated) if rated else None,
        "kappa": None,
        "mean_absolute_difference": mean([abs(one - other) for _, one, other in both]),
        "confusion": {},
    }
    if len({level for _, *pair in rated for level in pair}) > 1:
        _, ones, others = zip(*rated, strict=True)
        weights = "quadratic" if len(levels) > 2 else None
        found["kappa"] = float(cohen_kappa_score(ones, others, labels=list(levels), weights=weights))
    for name in ["all", *dict.fromkeys(groups)] if rated else []:
        chosen = [(one, other) for group, one, other in rated if name in ("all", group)]
        if chosen:
            ones, others = zip(*chosen, strict=True)
            found["confusion"][name] = confusion_matrix(ones, others, labels=list(levels)).tolist()
    return found


def compare(results_a: Mapping[str, Any], results_b: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """A paired test of two results of one benchmark on the same items.

    Args:
        results_a: As `evaluate_images` returns them.
        results_b: Likewise; differences are b minus a.
        seed: Of the bootstrap.

    Returns:
        `difference` of the overall scores on the items that both have a score for (None when a group has none), its
        `confidence_interval` and `p_value`, `test` ("McNemar exact" when all items are right or wrong, else "paired
        bootstrap"), `smallest_detectable_difference` (found in 80 of 100 such comparisons at the 5 % level; None
        when it cannot be told), `per_group` differences, `num_items`, `num_left_out`, `same_judges` (who were told the
        same), and with McNemar
        `discordant`: how many only a, only b got right.

    Raises:
        ValueError: benchmark, protocol or items differ, or the benchmark is none of ours.
    """
    for key in ("benchmark", "protocol", "items_sha256"):
        if results_a[key] != results_b[key]:
            raise ValueError(
                f"only results with the same {key} compare; got {results_a[key]!r} and {results_b[key]!r}"
            )
    from echo4o_hf.benchmarks import geneval_pp, imagine_bench

    known = {one.NAME: one.GROUP_WEIGHTS for one in (geneval_pp, imagine_bench)}
    if results_a["benchmark"] not in known:
        raise ValueError(f"the groups' weights are known of {', '.join(known)}; got {results_a['benchmark']!r}")
    weights = known[results_a["benchmark"]]
    scores_a, scores_b = _item_scores(results_a), _item_scores(results_b)
    both: dict[str, list[tuple[float, float]]] = {group: [] for group, _ in scores_a.values()}
    for name, (group, score) in scores_a.items():
        other = scores_b[name][1]
        if score is not None and other is not None:
            both[group].append((score, other))
    table = {group: [b - a for a, b in pairs] for group, pairs in both.items()}
    pairs = [pair for pairs in both.values() for pair in pairs]
    binary = {score for pair in pairs for score in pair} <= {0.0, 1.0}
    return {
        "difference": weighted_mean(table, weights),
        "confidence_interval": clustered_bootstrap(table, weights, seed),
        **(_mcnemar(table) if binary else _bootstrap_test(table, weights, seed)),
        "per_group": {group: mean(values) for group, values in table.items()},
        "num_items": len(pairs),
        "num_left_out": len(scores_a) - len(pairs),
        "same_judges": _judges(results_a) == _judges(results_b),
    }


def _judges(results: Mapping[str, Any]) -> list[Any]:
    """Who judged, and what they were told."""
    return [results["texts_sha256"], *((judge["name"], judge["parameters"]) for judge in results["judges"])]


def _item_scores(results: Mapping[str, Any]) -> dict[str, tuple[str, float | None]]:
    """Item id to group and mean score of its images."""
    found = {}
    for item in results["items"]:
        scores = [image["verdict"]["score"] for image in item["images"]]
        found[str(item["id"])] = (item["group"], mean([score for score in scores if score is not None]))
    return found


def _mcnemar(table: Table) -> dict[str, Any]:
    from scipy.stats import binomtest

    values = [value for scores in table.values() for value in scores]
    only_a, only_b = values.count(-1.0), values.count(1.0)
    discordant = only_a + only_b
    return {
        "test": "McNemar exact",
        "p_value": float(binomtest(only_b, discordant).pvalue) if discordant else 1.0,
        "discordant": {"only_a": only_a, "only_b": only_b},
        "smallest_detectable_difference": _detectable(discordant / len(values), len(values)) if discordant else None,
    }


def _detectable(share: float, total: int) -> float | None:
    """The difference d that McNemar's test finds with 80 % power when `share` of the pairs disagree (Connor 1987).

    Solves d * sqrt(total) = z * sqrt(share) + z_power * sqrt(share - d**2), a quadratic in d; None where no d does,
    with three pairs or fewer.
    """
    a, b = math.sqrt(total), _Z * math.sqrt(share)
    # (a d - b)^2 = z_power^2 (share - d^2)
    second, first, last = a**2 + _Z_POWER**2, -2 * a * b, b**2 - _Z_POWER**2 * share
    discriminant = first**2 - 4 * second * last
    return None if discriminant < 0 else min((-first + math.sqrt(discriminant)) / (2 * second), share)


def _bootstrap_test(table: Table, weights: Mapping[str, float], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"test": "paired bootstrap", "p_value": None, "smallest_detectable_difference": None}
    if any(len(values) < 2 for values in table.values()):
        return found
    drawn = _resampled(table, weights, seed, RESAMPLES)
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    found["p_value"] = min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))
    total = sum(weights[group] for group in table)
    variance = sum(
        (weights[group] / total) ** 2 * float(np.var(values, ddof=1)) / len(values) for group, values in table.items()
    )
    found["smallest_detectable_difference"] = (_Z + _Z_POWER) * math.sqrt(variance)
    return found
