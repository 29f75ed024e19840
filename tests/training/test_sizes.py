"""Sizes in training: the official constants, the limits of a model, buckets, and the rule that shrinks."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import echo4o_hf.miniature
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.training.sizes import bucket_grids, count_tokens, fit_grids, nearest_bucket, training_sizes

CHECKPOINTS = Path(echo4o_hf.miniature.__file__).parent / "checkpoints"
MAX_PIXELS, QUESTION_MAX_PIXELS = 1806336, 2007040


@pytest.fixture(scope="module")
def miniature():
    return BagelProcessor.from_pretrained(CHECKPOINTS / "shared" / "processor")


@pytest.fixture(scope="module")
def official(miniature):
    return BagelProcessor(BagelImageProcessor(), miniature.tokenizer)


def rule(largest, smallest, stride, max_pixels=MAX_PIXELS):
    return {"max": largest, "min": smallest, "stride": stride, "max_pixels": max_pixels}


def test_the_official_sizes(official):
    sizes = training_sizes(official, BagelConfig())
    assert sizes.target == sizes.reference == rule(1024, 512, 16)
    assert sizes.vision == rule(518, 224, 14)
    assert sizes.question == rule(980, 378, 14, QUESTION_MAX_PIXELS)


def test_smaller_sizes(official):
    sizes = training_sizes(official, BagelConfig(), image_size=512)
    assert sizes.target == sizes.reference == rule(512, 256, 16)
    sizes = training_sizes(official, BagelConfig(), image_size=768, reference_size=256, vision_size=140)
    assert (sizes.target, sizes.reference) == (rule(768, 384, 16), rule(256, 128, 16))
    assert (sizes.vision, sizes.question) == (rule(140, 56, 14), rule(140, 56, 14, QUESTION_MAX_PIXELS))


def test_a_small_model_limits_the_sizes(miniature, official):
    config = BagelConfig.from_pretrained(CHECKPOINTS / "echo4o-miniature" / "model")
    sizes = training_sizes(miniature, config)
    assert sizes.target == sizes.reference == rule(64, 32, 16)
    assert (sizes.vision["max"], sizes.question["max"]) == (64, 64)
    # the model's tables count, whatever its processor allows
    assert training_sizes(official, BagelConfig(max_latent_size=32)).target == rule(512, 256, 16)


@pytest.mark.parametrize(
    ("name", "size", "limits"),
    [
        ("image_size", 1000, "multiple of 16 from 16 to 1024"),
        ("image_size", 1040, "1040"),
        ("reference_size", 0, "from 16"),
        ("vision_size", 512, "multiple of 14 from 14 to 980"),
    ],
)
def test_sizes_that_the_model_does_not_take(official, name, size, limits):
    with pytest.raises(ValueError, match=rf"{name}={size} .*{limits}|{limits}"):
        training_sizes(official, BagelConfig(), **{name: size})


@pytest.mark.parametrize(("side", "limit"), [(64, 64), (48, 64), (16, 64), (32, 128)])
def test_buckets(side, limit):
    grids = bucket_grids(side, limit)
    assert (side, side) in grids and {(columns, rows) for rows, columns in grids} == set(grids)
    assert len(set(grids)) == len(grids)
    for rows, columns in grids:
        assert max(rows, columns) <= limit
        assert Fraction(1, 2) <= Fraction(rows, columns) <= 2
        if max(rows, columns) < limit:
            assert abs(rows * columns - side**2) <= max(rows, columns) / 2
        else:
            assert rows * columns <= side**2 + limit / 2
    shapes = {rows / columns for rows, columns in grids}
    assert min(shapes) < 0.6 and max(shapes) > 1.7


def test_the_nearest_bucket():
    grids = bucket_grids(48, 64)
    assert nearest_bucket(grids, 500, 500) == (48, 48)
    assert nearest_bucket(grids, 1000, 1001) == (48, 48)
    assert nearest_bucket(grids, 3000, 100) == (64, 32)
    assert nearest_bucket(grids, 100, 3000) == (32, 64)
    rows, columns = nearest_bucket(grids, 1200, 900)
    assert (rows, columns) == nearest_bucket(grids, 900, 1200)[::-1]
    assert min(grids, key=lambda grid: abs(grid[0] / grid[1] - 4 / 3)) == (rows, columns)


sides = st.integers(1, 40)
several_grids = st.lists(st.tuples(sides, sides), max_size=6)


def shrunk(grids, factor):
    return [tuple(max(1, int(side * factor + Fraction(1, 2))) for side in grid) for grid in grids]


def have_one_factor(grids, fitted):
    """Whether one factor rounds all sides of `grids` to those of `fitted`."""
    sides = [pair for one, other in zip(grids, fitted, strict=True) for pair in zip(one, other, strict=True)]
    lowest = [Fraction(2 * after - 1, 2 * before) for before, after in sides if after > 1]
    highest = [Fraction(2 * after + 1, 2 * before) for before, after in sides]
    return max(lowest, default=0) < min(highest, default=1)


@settings(max_examples=60, deadline=None)
@example([(31, 32)], [], 0.96875)  # (31, 31), by factors between 0.98387 and 0.98438 only
@given(several_grids, st.lists(st.tuples(sides, sides), max_size=1), st.floats(0, 1))
def test_what_is_shrunk_fits_and_is_the_largest(references, targets, share):
    total = count_tokens([*references, *targets])
    budget = int(share * total)
    fitted = fit_grids(references, targets, budget)
    if budget < len(references) + len(targets):
        assert fitted is None
        return
    assert count_tokens(fitted) <= budget
    factors = [Fraction(step, 400) for step in range(1, 401)]
    quarter = shrunk(references, Fraction(1, 4))
    if count_tokens([*quarter, *targets]) <= budget:
        assert fitted[len(references) :] == targets
        assert have_one_factor(references, fitted[: len(references)])
        rivals = [[*shrunk(references, factor), *targets] for factor in factors if factor >= Fraction(1, 4)]
    else:
        assert have_one_factor([*quarter, *targets], fitted)
        rivals = [shrunk([*quarter, *targets], factor) for factor in factors]
    counts = [count_tokens(rival) for rival in rivals]
    assert count_tokens(fitted) >= max((count for count in counts if count <= budget), default=0)


def test_the_rule_in_numbers():
    references, target = [(64, 64), (37, 37)] * 4, [(64, 64)]
    assert fit_grids(references, target, 26000) == references + target
    assert fit_grids(references, target, 10000) == [(33, 33), (19, 19)] * 4 + target
    assert fit_grids(references, target, 4200) == [(14, 14), (8, 8)] * 4 + [(56, 56)]
    assert fit_grids([], target, 1000) == [(31, 31)]
    assert fit_grids([(8, 4)], [], 9) == [(4, 2)]
    assert fit_grids([], [], 0) == [] and fit_grids([], [], -1) is None
