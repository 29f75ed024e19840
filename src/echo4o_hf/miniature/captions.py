"""What is asked for in the shapes world: items of every tag, scenes that satisfy them, clean and noisy captions.

The tags are GenEval++'s; unlike there, every group of objects has a color, which a small model learns much faster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from echo4o_hf.miniature.items import TAGS, Item, is_held_out
from echo4o_hf.miniature.wording import COUNT_WORDS, OPPOSITE, REGIONS, SIZES, Clause, caption_for
from echo4o_hf.miniature.world import COLORS, GRID, SHAPES, Scene, SceneObject

ITEMS_PER_TAG = 20
ITEMS_SEED = 140
# scraped captions mostly name things and their colors, and seldom count, place or compare them
CAPTION_NOISE = {"class_name": 0.1, "color": 0.1, "count": 0.6, "region": 0.6, "size": 0.6}
_REGION_CELLS = {
    "left": lambda row, col: col < GRID // 2,
    "right": lambda row, col: col >= GRID // 2,
    "above": lambda row, col: row < GRID // 2,
    "below": lambda row, col: row >= GRID // 2,
}


def draw_item(tag: str, rng: np.random.Generator) -> Item:
    """Draw any item of a tag, held out or not.

    Raises:
        ValueError: `tag` is unknown.
    """
    if tag not in TAGS:
        raise ValueError(f"tag must be one of {', '.join(TAGS)}; got {tag!r}")
    groups = {"color_attr": int(rng.integers(2, 4)), "counting": 1, "multi_object_count_attr": 3}.get(tag, 2)
    counts = _counts(tag, groups, rng)
    shapes = rng.choice(SHAPES, groups, replace=False)
    colors = rng.choice(COLORS, groups, replace=False)
    clauses = [Clause(str(s), n, str(c)) for s, n, c in zip(shapes, counts, colors, strict=True)]
    if tag in ("color_spatial_attr", "spatial_count_attr", "size_spatial_attr"):
        region = str(rng.choice(REGIONS))
        clauses = [replace(clauses[0], region=region), replace(clauses[1], region=OPPOSITE[region])]
    if tag == "size_spatial_attr":
        sizes = rng.permutation(SIZES)
        clauses = [replace(clause, size=str(size)) for clause, size in zip(clauses, sizes, strict=True)]
    exclude = ((clauses[0].class_name, clauses[0].count + 1),) if tag == "counting" else ()
    return Item(tag, caption_for(clauses, rng), tuple(clauses), exclude)


def sample_item(rng: np.random.Generator, tag: str | None = None) -> Item:
    """Draw an item for training, of any tag unless one is named, never asking for what a benchmark item asks."""
    while is_held_out(item := draw_item(tag or str(rng.choice(TAGS)), rng)):
        pass
    return item


def scene_for(item: Item, rng: np.random.Generator) -> Scene:
    """A random scene that shows exactly what the item asks for.

    Raises:
        ValueError: a class or color is not of this world, or the objects do not fit on the grid.
    """
    free = {(row, col) for row in range(GRID) for col in range(GRID)}
    objects: list[SceneObject] = []
    for clause in sorted(item.include, key=lambda clause: clause.size != "larger"):  # the large need blocks
        size = "large" if clause.size == "larger" else "normal"
        color = clause.color or str(rng.choice(COLORS))
        for _ in range(clause.count):
            places = _free_places(free, clause.region, size)
            if not places:
                raise ValueError(f"{clause} does not fit on a grid of {GRID}x{GRID} cells with {objects}")
            row, col = places[int(rng.integers(len(places)))]
            objects.append(SceneObject(clause.class_name, color, row, col, size))
            free -= objects[-1].cells
    return Scene(tuple(objects))


def corrupt(item: Item, rng: np.random.Generator, noise: Mapping[str, float] = CAPTION_NOISE) -> str:
    """A noisy caption, as scraped data has: each attribute is wrong or unsaid, half and half, with its probability."""
    while True:
        clauses, omit = [], []
        for clause in item.include:
            wrong: dict[str, Any] = {}
            unsaid = set()
            for name, others in _alternatives(clause).items():
                if rng.random() < noise[name]:
                    if rng.random() < 0.5:
                        unsaid.add(name)
                    else:
                        wrong[name] = others[int(rng.integers(len(others)))]
            clauses.append(replace(clause, **wrong))
            omit.append(frozenset(unsaid))
        caption = caption_for(clauses, rng, omit)
        if not is_held_out(caption):
            return caption


def draw_benchmark(seed: int = ITEMS_SEED) -> list[Item]:
    """Draw the items of Shapes-140: per tag 20 different specs, counting from two upwards."""
    rng = np.random.default_rng(seed)
    items: list[Item] = []
    for tag in TAGS:
        chosen: dict[frozenset[Clause], Item] = {}
        while len(chosen) < ITEMS_PER_TAG:
            item = draw_item(tag, rng)
            if tag != "counting" or item.include[0].count > 1:
                chosen.setdefault(item.spec, replace(item, prompt=item.prompt[0].lower() + item.prompt[1:]))
        items += chosen.values()
    return items


def _counts(tag: str, groups: int, rng: np.random.Generator) -> list[int]:
    if tag == "counting":
        return [int(rng.integers(1, len(COUNT_WORDS) + 1))]
    if "count" not in tag:
        return [1] * groups
    while True:  # a count tag asks for several of something
        counts = [int(n) for n in rng.integers(1, 4, groups)]
        if max(counts) > 1:
            return counts


def _free_places(free: set[tuple[int, int]], region: str | None, size: str) -> list[tuple[int, int]]:
    """Cells, or upper left cells of blocks on the quarters, that are free and inside the region."""
    step = 2 if size == "large" else 1
    places = []
    for row in range(0, GRID, step):
        for col in range(0, GRID, step):
            inside = region is None or _REGION_CELLS[region](row, col)
            if inside and all((row + i, col + j) in free for i in range(step) for j in range(step)):
                places.append((row, col))
    return places


def _alternatives(clause: Clause) -> dict[str, list[str | int]]:
    """For each attribute that the clause states, the wrong values."""
    choices: dict[str, list[str | int]] = {
        "class_name": [shape for shape in SHAPES if shape != clause.class_name],
        "count": [n for n in range(1, len(COUNT_WORDS) + 1) if n != clause.count],
    }
    if clause.color:
        choices["color"] = [color for color in COLORS if color != clause.color]
    if clause.region:
        choices["region"] = [OPPOSITE[clause.region]]
    if clause.size:
        choices["size"] = [size for size in SIZES if size != clause.size]
    return choices


def main() -> None:
    """Print the lines of `items.jsonl`."""
    for item in draw_benchmark():
        print(json.dumps(item.to_dict()))  # noqa: T201


if __name__ == "__main__":
    main()
