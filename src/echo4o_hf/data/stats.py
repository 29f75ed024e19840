"""What the data holds, per subset and category: rows, picture sizes, lengths of instructions, number of references."""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from echo4o_hf.data.display import align, write_page

THUMBNAIL = 256  # pixels: the output images of the sample are scaled down to this
REFERENCE_THUMBNAIL = 112
BINS = 20  # of a histogram, at most
BARS_SHOWN = 10  # of counts by name in the HTML page
HEADER = ("subset", "category", "rows", "references", "words", "characters", "MB", "sizes (width x height)")

_CHART = {"width": 400, "height": 190, "left": 52, "right": 10, "top": 10, "bottom": 24}  # SVG units
_BAR = 24  # SVG units from one horizontal bar to the next


def read_rows(
    data_dir: str | Path | None, subsets: Sequence[str] | None, revision: str | None, on_error: str
) -> Iterator[dict[str, Any]]:
    """Rows of the subsets as they are read, pictures encoded, with a progress bar."""
    from datasets.utils import tqdm

    from echo4o_hf.data.builder import SUBSETS, Echo4oImage

    place = {"revision": revision} if data_dir is None else {"data_dir": str(data_dir)}
    for name in SUBSETS if subsets is None else subsets:
        # The class, as the name could mean a folder of this name in the working directory.
        builder = Echo4oImage(config_name=name, on_error=on_error, decode=False, **place)
        yield from tqdm(builder.as_streaming_dataset(split="train"), desc=name, unit=" rows")


def stats(
    data_dir: str | Path | None = None,
    *,
    subsets: Sequence[str] | None = None,
    revision: str | None = None,
    on_error: str = "raise",
    sample: int = 12,
    seed: int = 0,
) -> dict[str, Any]:
    """Read the data once and count.

    Args:
        data_dir: as of `load_dataset("echo-4o-image", data_dir=...)`; None: the Hub.
        subsets: which; by default all.
        revision: of the Hub's repository.
        on_error: "raise" or "skip", as of `load_dataset`.
        sample: number of rows per subset to keep as thumbnails.
        seed: of the sample, which depends on nothing else but the ids.

    Returns:
        Nothing but JSON: "all", a group; "subsets": name -> a group with "categories": name -> group; "samples":
        subset -> rows with thumbnails as data URLs. A group has "rows"; "characters" and "words" of the instructions
        ("min", "median", "mean", "max", "histogram": a list of [from, to (exclusive), rows]); "references": number of
        input images -> rows; "output_images" and "input_images": "number", "bytes" ("total", "min", "mean", "max"),
        "sizes" ("1024x1536", width first, -> pictures) and "formats" (-> pictures).

    Raises:
        ValueError: of `load_dataset`, or a picture whose header cannot be read.
    """
    if sample < 0:
        raise ValueError(f"sample must not be negative, got {sample}")
    return measure(read_rows(data_dir, subsets, revision, on_error), sample, seed)


def measure(rows: Iterable[Mapping[str, Any]], sample: int = 12, seed: int = 0) -> dict[str, Any]:
    """What `stats` returns, from rows with pictures as {"bytes", ...}."""
    everything = _Group()
    subsets: dict[str, _Group] = {}
    categories: dict[str, dict[str, _Group]] = {}
    samples: dict[str, _Sample] = {}
    for row in rows:
        subset, category = row["subset"], row["category"]
        group = subsets.setdefault(subset, _Group())
        part = categories.setdefault(subset, {}).setdefault(category, _Group())
        output, *inputs = [
            _describe(image["bytes"], row["id"]) for image in (row["output_image"], *row["input_images"])
        ]
        for counted in (everything, group, part):
            counted.add(row["instruction"], output, inputs)
        samples.setdefault(subset, _Sample(sample, seed)).offer(row)
    if not everything.rows:
        raise ValueError("the data has no rows")
    return {
        "all": everything.as_dict(),
        "subsets": {
            name: {
                **group.as_dict(),
                "categories": {name: part.as_dict() for name, part in sorted(categories[name].items())},
            }
            for name, group in subsets.items()
        },
        "samples": {name: kept.rows() for name, kept in samples.items()},
    }


def table(stats: Mapping[str, Any]) -> str:
    """The result of `stats` as text, one line per category, subset, and all."""
    return align(HEADER, [_line(*group) for group in _groups(stats)], left=2)


def write_html(stats: Mapping[str, Any], path: str | Path) -> None:
    """Write the result of `stats` as one self-contained page: the table, and per subset histograms and the sample."""
    lines = [_line(*group) for group in _groups(stats)]
    charts = {name: _charts(group) for name, group in stats["subsets"].items()}
    write_page("stats.html.jinja", path, stats=stats, header=HEADER, lines=lines, charts=charts)


def _describe(data: bytes, where: str) -> tuple[str, str, int]:
    """Size as "widthxheight", format, and number of bytes of an encoded picture, from its header."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.width}x{image.height}", str(image.format), len(data)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture of {where} cannot be read: {error}") from error


class _Pictures:
    """Counts over pictures."""

    def __init__(self) -> None:
        self.bytes = {"total": 0, "min": 0, "max": 0}
        self.sizes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()

    def add(self, size: str, image_format: str, number_of_bytes: int) -> None:
        first = not self.sizes
        self.sizes[size] += 1
        self.formats[image_format] += 1
        self.bytes["total"] += number_of_bytes
        self.bytes["min"] = number_of_bytes if first else min(self.bytes["min"], number_of_bytes)
        self.bytes["max"] = max(self.bytes["max"], number_of_bytes)

    def as_dict(self) -> dict[str, Any]:
        number = self.sizes.total()
        return {
            "number": number,
            "bytes": {**self.bytes, "mean": round(self.bytes["total"] / number, 1) if number else 0},
            "sizes": dict(self.sizes.most_common()),
            "formats": dict(self.formats.most_common()),
        }


class _Group:
    """Counts over rows: numbers of different values, never the values themselves, so that memory stays flat."""

    def __init__(self) -> None:
        self.rows = 0
        self.characters: Counter[int] = Counter()
        self.words: Counter[int] = Counter()
        self.references: Counter[int] = Counter()
        self.output_images = _Pictures()
        self.input_images = _Pictures()

    def add(self, instruction: str, output: tuple[str, str, int], inputs: Sequence[tuple[str, str, int]]) -> None:
        self.rows += 1
        self.characters[len(instruction)] += 1
        self.words[len(instruction.split())] += 1
        self.references[len(inputs)] += 1
        self.output_images.add(*output)
        for picture in inputs:
            self.input_images.add(*picture)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "characters": summarize(self.characters),
            "words": summarize(self.words),
            "references": {str(number): rows for number, rows in sorted(self.references.items())},
            "output_images": self.output_images.as_dict(),
            "input_images": self.input_images.as_dict(),
        }


def summarize(counts: Counter[int]) -> dict[str, Any]:
    """Minimum, median, mean, maximum and histogram of numbers, each counted how often it occurs."""
    values = sorted(counts)
    total = counts.total()
    ends = list(accumulate(counts[value] for value in values))  # position after the last of each value, when sorted
    middle = [values[bisect_right(ends, position)] for position in ((total - 1) // 2, total // 2)]
    return {
        "min": values[0],
        "median": sum(middle) / 2,
        "mean": round(sum(value * count for value, count in counts.items()) / total, 2),
        "max": values[-1],
        "histogram": _histogram(counts, values[0], values[-1]),
    }


def _histogram(counts: Counter[int], low: int, high: int) -> list[list[int]]:
    """[from, to (exclusive), count] of bins of 1, 2 or 5 times a power of ten, at multiples of their width."""
    widths = (unit * 10**power for power in range(20) for unit in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < BINS)
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value // width] += count
    return [[n * width, (n + 1) * width, bins[n]] for n in range(low // width, high // width + 1)]


class _Sample:
    """The rows with the smallest hashes: a fair sample that does not depend on the order of reading."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.kept: list[tuple[int, str, dict[str, Any]]] = []  # a heap with the largest hash, negative, on top

    def offer(self, row: Mapping[str, Any]) -> None:
        rank = -int.from_bytes(hashlib.sha256(f"{self.seed}/{row['id']}".encode()).digest())
        if len(self.kept) < self.size:
            heapq.heappush(self.kept, (rank, row["id"], _card(row)))
        elif self.kept and rank > self.kept[0][0]:
            heapq.heapreplace(self.kept, (rank, row["id"], _card(row)))

    def rows(self) -> list[dict[str, Any]]:
        return [card for _, _, card in sorted(self.kept, key=lambda entry: -entry[0])]


def _card(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with thumbnails in place of the pictures."""
    return {
        **{name: row[name] for name in ("id", "category", "instruction")},
        "output_image": _thumbnail(row["output_image"]["bytes"], THUMBNAIL, row["id"]),
        "input_images": [_thumbnail(image["bytes"], REFERENCE_THUMBNAIL, row["id"]) for image in row["input_images"]],
    }


def _thumbnail(data: bytes, size: int, where: str) -> str:
    """A picture, scaled down where it is larger than `size`, as a JPEG data URL."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (size, size))  # a JPEG is decoded at no more than the size needed
            picture = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture of {where} does not decode: {error}") from error
    picture.thumbnail((size, size))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode('ascii')}"


def _groups(stats: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Subset, category and group of each line of the table; "all" stands for all of them."""
    for subset, group in stats["subsets"].items():
        for category, part in group["categories"].items():
            yield subset, category, part
        yield subset, "all", group
    if len(stats["subsets"]) > 1:
        yield "all", "all", stats["all"]


def _line(subset: str, category: str, group: Mapping[str, Any]) -> list[str]:
    numbers = [int(number) for number in group["references"]]
    sizes = [f"{size} {count / group['rows']:.0%}" for size, count in group["output_images"]["sizes"].items()]
    return [
        subset,
        category,
        f"{group['rows']:,}",
        f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}",
        *(f"{part['min']} / {part['median']:g} / {part['max']}" for part in (group["words"], group["characters"])),
        f"{(group['output_images']['bytes']['total'] + group['input_images']['bytes']['total']) / 1e6:,.1f}",
        ", ".join(sizes[:3]) + (f", {len(sizes) - 3} more" if len(sizes) > 3 else ""),
    ]


def _charts(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the template draws for a subset: histograms, and bars for counts by name."""
    output, references = group["output_images"], group["input_images"]
    charts = [
        _histogram_chart("Words in an instruction", group["words"]["histogram"]),
        _histogram_chart("Characters in an instruction", group["characters"]["histogram"]),
        _bar_chart("Rows by category", {name: part["rows"] for name, part in group["categories"].items()}),
        _bar_chart("Rows by number of references", group["references"]),
        _bar_chart("Sizes of output images, width x height", output["sizes"]),
        _bar_chart("Formats of output images", output["formats"]),
    ]
    if references["number"]:
        charts.append(_bar_chart("Sizes of references, width x height", references["sizes"]))
        charts.append(_bar_chart("Formats of references", references["formats"]))
    return charts


def _histogram_chart(title: str, histogram: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Columns in SVG units, with the edges of the bins below and the largest count at the left."""
    width = _CHART["width"] - _CHART["left"] - _CHART["right"]
    height = _CHART["height"] - _CHART["top"] - _CHART["bottom"]
    step, top = width / len(histogram), max(count for _, _, count in histogram)
    columns = [
        {
            "x": round(_CHART["left"] + n * step + 1, 1),
            "y": round(_CHART["top"] + height * (1 - count / top), 1),
            "width": round(max(step - 2, 1), 1),
            "height": round(height * count / top, 1),
            "title": f"{low:,}: {count:,}" if high == low + 1 else f"{low:,} to {high - 1:,}: {count:,}",
        }
        for n, (low, high, count) in enumerate(histogram)
    ]
    edges = [low for low, _, _ in histogram] + [histogram[-1][1]]
    every = -(-len(edges) // 7)
    ticks = [
        {"at": round(_CHART["left"] + n * step, 1), "label": f"{edge:,}"}
        for n, edge in list(enumerate(edges))[::every]
    ]
    return {"kind": "histogram", "title": title, "columns": columns, "ticks": ticks, "top_count": f"{top:,}", **_CHART}


def _bar_chart(title: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """Horizontal bars in SVG units; the most frequent names one by one, the others in one bar."""
    named = list(counts.items())
    if len(named) > BARS_SHOWN:
        named.sort(key=lambda entry: -entry[1])
        others = sum(count for _, count in named[BARS_SHOWN - 1 :])
        named = [*named[: BARS_SHOWN - 1], (f"{len(counts) - BARS_SHOWN + 1} others", others)]
    top = max(count for _, count in named)
    bars = [
        {"label": name, "count": f"{count:,}", "y": n * _BAR, "width": round(max(200 * count / top, 1), 1)}
        for n, (name, count) in enumerate(named)
    ]
    return {"kind": "bars", "title": title, "bars": bars, "width": 400, "height": len(bars) * _BAR, "bar": _BAR}
