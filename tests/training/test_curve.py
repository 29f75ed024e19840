"""The chart of losses and scores."""

import numpy as np
from PIL import ImageColor

from echo4o_hf.training.curve import COLORS, SCALE, curve_picture


def rows_of(picture, color: str) -> np.ndarray:
    """The mean height of a line in each column where it is, in pixels."""
    pixels = np.asarray(picture).astype(int)
    match = np.abs(pixels - ImageColor.getrgb(color)).sum(-1) < 60
    match[-25 * SCALE :] = False  # the names
    return np.array([np.flatnonzero(column).mean() for column in match.T if column.any()])


def test_lines_follow_their_values():
    steps = list(range(0, 101, 10))
    falling = {"name": "loss", "steps": steps, "values": [1 - step / 100 for step in steps]}
    flat = {"name": "flow_loss", "steps": steps, "values": [0.3] * 11}
    picture = curve_picture([falling, flat], "loss")
    assert picture.size == (640 * SCALE, 270 * SCALE)
    down = rows_of(picture, COLORS[0])
    assert np.polyfit(range(len(down)), down, 1)[0] > 0.1  # pixels count downwards
    assert np.ptp(rows_of(picture, COLORS[1])[5:-5]) <= 2 * SCALE


def test_one_point_is_drawn():
    assert rows_of(curve_picture([{"name": "a", "steps": [5], "values": [0.5]}], "score"), COLORS[0]).size
