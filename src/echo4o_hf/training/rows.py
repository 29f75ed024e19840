"""Datasets as rows to train on: one set of columns, undecoded images, ids that differ over a whole mixture.

A row holds `id`, `instruction`, `input_images` (a list, maybe empty), and either `output_image`, to be drawn, or
`answer`. Images are {"bytes": ..., "path": ...}, one of which may be None.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
from datasets.fingerprint import Hasher

from ..data.builder import NAME as ECHO_4O_IMAGE

if TYPE_CHECKING:
    from .arguments import Echo4oTrainingArguments

IMAGE = datasets.Image(decode=False)
TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {"id": TEXT, "instruction": TEXT, "input_images": datasets.List(IMAGE), "output_image": IMAGE, "answer": TEXT}
)
# Of each column of ours: the option that names a dataset's column for it, and the usual name in other datasets.
_SOURCES = {
    "id": ("id_column", "id"),
    "instruction": ("caption_column", "caption"),
    "input_images": ("references_column", "references"),
    "output_image": ("image_column", "image"),
    "answer": ("answer_column", "answer"),
}

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Source:
    """One dataset, with the names of its columns.

    Attributes:
        dataset: What `load_dataset` takes: a name, or a folder.
        dataset_config: Its configuration.
        data_dir: The folder with its files, where it needs one.
        dataset_split: Which rows.
        id_column: Of names, by default `id`, or what tells rows apart: the number, or a hash of it in streaming.
        caption_column: Of texts, by default `instruction` or `caption`.
        references_column: Of lists of images, or of one image each, by default `input_images` or `references`.
        image_column: Of images to draw, by default `output_image` or `image`.
        answer_column: Of answers, by default `answer`.
        weight: Share in a mixture, relative to the other weights.
    """

    dataset: str
    dataset_config: str | None = None
    data_dir: str | None = None
    dataset_split: str = "train"
    id_column: str | None = None
    caption_column: str | None = None
    references_column: str | None = None
    image_column: str | None = None
    answer_column: str | None = None
    weight: float | None = None

    @property
    def label(self) -> str:
        """What its rows are called in a mixture."""
        return "/".join(filter(None, [Path(self.dataset).name, self.dataset_config]))


def load_rows(arguments: Echo4oTrainingArguments) -> Rows:
    """Load the dataset, or the mixture, that the arguments name.

    A mixture without weights shows every row once per epoch. With weights, each dataset has its share of the rows: an
    epoch lasts until every row was shown, and rows of the others are shown again as often as that takes. Read from
    disk, shares are exact, and a row shown again has "#2" after its id; in streaming they are chances
    (`interleave_datasets`), and a row shown again in the same epoch is the same sample. In a mixture ids begin with
    the dataset's name.

    Raises:
        ValueError: a column that is not there, weights for some datasets only, an id that several rows share.
    """
    sources = _sources(arguments)
    labels = _labels(sources)
    parts = [
        _load(source, label, arguments.streaming, arguments.on_error)
        for source, label in zip(sources, labels, strict=True)
    ]
    weights = [source.weight for source in sources if source.weight is not None]
    if len(parts) == 1:
        return parts[0]
    if not arguments.streaming:
        return _mix(parts, weights)
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(
        parts,
        probabilities=shares or None,
        seed=arguments.seed,
        stopping_strategy="all_exhausted" if shares else "all_exhausted_without_replacement",
    )


def _sources(arguments: Echo4oTrainingArguments) -> list[Source]:
    """The datasets that the arguments name."""
    if arguments.mixture is None:
        names = [field.name for field in fields(Source) if field.name != "weight"]
        return [Source(**{name: getattr(arguments, name) for name in names})]
    sources = [Source(**entry) for entry in arguments.mixture]
    weights = [source.weight for source in sources]
    if None in weights and any(weights):
        raise ValueError(f"give a weight to every dataset of the mixture, or to none: got {weights}")
    return sources


def _labels(sources: Sequence[Source]) -> list[str]:
    """Beginnings of ids: none for a dataset alone, a different one for each of a mixture."""
    if len(sources) == 1:
        return [""]
    count = Counter(source.label for source in sources)
    return [
        f"{source.label}{f'[{place}]' if count[source.label] > 1 else ''}:" for place, source in enumerate(sources)
    ]


def _load(source: Source, label: str, streaming: bool, on_error: str) -> Rows:
    options = {"decode": False, "on_error": on_error} if source.dataset == ECHO_4O_IMAGE else {}
    rows = datasets.load_dataset(
        source.dataset,
        source.dataset_config,
        data_dir=source.data_dir,
        split=source.dataset_split,
        streaming=streaming,
        **options,
    )
    if rows.features is None:
        raise ValueError(f"{source.dataset}: its columns are not known before it is read: load it without streaming")
    names = _columns(source, rows.column_names)
    return _streamed(rows, names, label) if streaming else _eager(rows, names, label, source.dataset)


def _columns(source: Source, there: Sequence[str]) -> dict[str, str]:
    """Our columns -> the dataset's, for those it has."""
    asked = {ours: getattr(source, option) for ours, (option, _) in _SOURCES.items()}
    for ours, column in asked.items():
        if column is not None and column not in there:
            raise ValueError(f"{source.dataset}: {_SOURCES[ours][0]}={column!r}, but the columns are {list(there)}")
    taken = [column for column in asked.values() if column is not None]
    if len(set(taken)) < len(taken):
        raise ValueError(f"{source.dataset}: one column is named for two things: {asked}")
    free = [column for column in there if column not in taken]
    names = {}
    for ours, (_, usual) in _SOURCES.items():
        column = asked[ours] or next((name for name in (ours, usual) if name in free), None)
        if column is not None:
            names[ours] = column
    for needed in (("instruction",), ("output_image", "answer")):
        if not names.keys() & set(needed):
            options = " or ".join(_SOURCES[ours][0] for ours in needed)
            raise ValueError(f"{source.dataset}: give {options}, the columns are {list(there)}")
    return names


def _eager(rows: datasets.Dataset, names: dict[str, str], label: str, dataset: str) -> datasets.Dataset:
    """Our columns, without rewriting the images on disk."""
    rows = rows.select_columns(list(names.values()))
    rows = rows.rename_columns({theirs: ours for ours, theirs in names.items() if ours != theirs})
    if isinstance(rows.features.get("input_images"), datasets.Image):
        rows = _undecoded(rows)
        rows = rows.map(_as_lists, batched=True, batch_size=16, desc="Writing single references as lists")
    for column, feature in FEATURES.items():
        if column not in rows.column_names and column != "id":
            empty: Any = [] if column == "input_images" else None
            rows = rows.add_column(column, [empty] * len(rows), feature=feature)
    ids = list(map(str, rows["id"] if "id" in names else range(len(rows))))
    again = [id for id, count in Counter(ids).items() if count > 1]
    if again:
        raise ValueError(f"{dataset}: {len(again)} ids are those of several rows, like {again[0]!r}: give id_column")
    rows = _with_texts(rows, "id", [label + id for id in ids])
    for column in ("instruction", "answer"):
        if rows.features[column] != TEXT:
            rows = _with_texts(rows, column, list(rows[column]))
    return _undecoded(rows.select_columns(list(FEATURES)))


def _with_texts(rows: datasets.Dataset, column: str, values: list[str | None]) -> datasets.Dataset:
    """The rows with this column instead of the one they had."""
    wrong = next((value for value in values if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise ValueError(f"column {column} must hold texts, got {wrong!r}")
    kept = rows.remove_columns(column) if column in rows.column_names else rows
    return kept.add_column(column, values, feature=TEXT)


def _as_lists(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"input_images": [[] if image is None else [image] for image in batch["input_images"]]}


def _undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The same table, with image columns that are not decoded.

    `Dataset.cast` would write all of it again; it is left to columns that hold paths, bytes or other structures.
    """
    features = datasets.Features(rows.features)
    for column, feature in rows.features.items():
        inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
        if isinstance(inner, datasets.Image):
            features[column] = IMAGE if inner is feature else type(feature)(IMAGE)
        elif column in FEATURES and FEATURES[column] != TEXT:
            rows = rows.cast_column(column, FEATURES[column])
            features[column] = FEATURES[column]
    info = rows.info.copy()
    info.features = features
    fingerprint = Hasher.hash((rows._fingerprint, "undecoded"))
    return datasets.Dataset(rows.data, info=info, split=rows.split, fingerprint=fingerprint)


def _streamed(rows: datasets.IterableDataset, names: dict[str, str], label: str) -> datasets.IterableDataset:
    """Our columns, made as rows are read."""
    rows = rows.decode(False).select_columns(list(names.values()))
    make = partial(_row, names=names, label=label)
    return rows.map(make, features=FEATURES, remove_columns=[name for name in names.values() if name not in FEATURES])


def _row(row: dict[str, Any], names: dict[str, str], label: str) -> dict[str, Any]:
    """One row with our columns."""
    made: dict[str, Any] = {ours: row[names[ours]] if ours in names else None for ours in FEATURES}
    references = made["input_images"] if made["input_images"] is not None else []
    made["input_images"] = list(map(_image, references if isinstance(references, list) else [references]))
    made["output_image"] = _image(made["output_image"])
    if made["id"] is None:
        made["id"] = _content_hash(made)
    made["id"] = f"{label}{made['id']}"
    return made


def _image(value: Any) -> dict[str, Any] | None:
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return {"bytes": None, "path": value} if isinstance(value, str) else value


def _content_hash(row: dict[str, Any]) -> str:
    """A name that does not depend on which process reads the row."""
    digest = hashlib.blake2b(digest_size=8)
    for image in (*row["input_images"], row["output_image"]):
        digest.update(b"\0" if image is None else image["bytes"] or image["path"].encode())
    for text in (row["instruction"], row["answer"]):
        digest.update(f"\0{text}".encode())
    return digest.hexdigest()


def _mix(parts: Sequence[datasets.Dataset], weights: Sequence[float]) -> datasets.Dataset:
    """All rows of all parts; those of the parts with weights repeated until the shares are right."""
    if not weights:
        return datasets.concatenate_datasets(list(parts))
    total = max(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    pieces = []
    for part, weight in zip(parts, weights, strict=True):
        passes, rest = divmod(round(total * weight), len(part))
        for number in range(1, passes + 1):
            pieces.append(_again(part, number))
        if rest:
            pieces.append(_again(part, passes + 1).select([place * len(part) // rest for place in range(rest)]))
    return datasets.concatenate_datasets(pieces)


def _again(part: datasets.Dataset, number: int) -> datasets.Dataset:
    return part if number == 1 else _with_texts(part, "id", [f"{id}#{number}" for id in part["id"]])
