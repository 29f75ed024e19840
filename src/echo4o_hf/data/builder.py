"""`load_dataset("echo-4o-image", "surreal_fantasy")`: Echo-4o-Image as it lies on the Hub, or as our Parquet files.

Eager: records keep the order of the metadata. Each archive is decompressed once to a plain tar in
`<cache of datasets>/echo4o_archives`, with an index of its pictures, so that they are read by seeking in any order and
nothing is held in memory. That costs as much disk as the archives, next to the Arrow files with the same pictures;
the folder can be deleted at any time.

Streaming: the archives with output pictures are shards, each read once from beginning to end, never stored; rows come
in their order. Reference pictures lie in other archives than the pictures made from them and are needed in any order:
those archives, and any that cannot be told from them, go through the eager way (on the Hub: they are downloaded).
A missing picture is known when all archives were read; what they hold is then remembered, and the next time a missing
picture is reported before the first row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.fingerprint import Hasher
from datasets.load import DatasetModule
from huggingface_hub import is_offline_mode

from .archives import digest, read_in_order, unpack, write_json
from .config import FEATURES as FEATURES
from .config import REPO_ID as REPO_ID
from .config import REVISION as REVISION
from .config import Echo4oImageConfig, features
from .layout import SUBSETS as SUBSETS
from .layout import Files, Picture, Pictures, container_folders, find_subsets, folders_of, wanted
from .pictures import picture_problem
from .records import Record, read_records
from .rows import Outputs, Reader, Row, example, locate
from .source import Folder, Repository, open_source

NAME = "echo-4o-image"
ROWS_PER_SHARD = 1000
SHOWN = 10  # problems in an error's message
# A change of these makes cached files stale.
MODULES = {"archives", "builder", "config", "layout", "pictures", "records", "rows", "source"}

logger = datasets.utils.logging.get_logger("datasets.echo_4o_image")


class Located(NamedTuple):
    """A shard: rows whose pictures can be read in any order."""

    rows: tuple[Row, ...]


class Streamed(NamedTuple):
    """A shard: an archive, and the rows whose outputs are in it or, where that is not `known`, may be."""

    archive: str
    rows: tuple[Row, ...]
    folders: frozenset[str]
    others: tuple[str, ...] = ()


class Table(NamedTuple):
    """A shard: a Parquet file."""

    path: str


Source = Folder | Repository
Shard = Located | Streamed | Table


class Echo4oImage(datasets.GeneratorBasedBuilder):
    """The three subsets of Echo-4o-Image."""

    BUILDER_CONFIG_CLASS = Echo4oImageConfig
    BUILDER_CONFIGS = [Echo4oImageConfig(name=name) for name in (*SUBSETS, "all")]
    DEFAULT_WRITER_BATCH_SIZE = 16  # rows in memory: of five pictures each, some megabytes

    def _info(self) -> datasets.DatasetInfo:
        self.config.check()
        return datasets.DatasetInfo(
            description="Instructions, references and images made by GPT-4o, in three subsets.",
            features=features(self.config.decode),
            homepage=f"https://huggingface.co/datasets/{REPO_ID}",
            license="MIT",
        )

    def _create_builder_config(
        self,
        config_name: str | None = None,
        custom_features: datasets.Features | None = None,
        config_id: str | None = None,
        **options: Any,
    ) -> tuple[Echo4oImageConfig, str]:
        """Say which files are meant before the cache is asked for them."""
        repo_id, revision = self.repo_id or REPO_ID, options.get("revision") or REVISION
        self._source = open_source(options.get("data_dir"), repo_id, revision, self.token)
        self._own_features = custom_features
        options |= {"repo_id": repo_id, "state": self._source.state()}
        return super()._create_builder_config(config_name, custom_features, config_id, **options)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        names = SUBSETS if self.config.name == "all" else (self.config.name,)
        source = self._source
        if isinstance(source, Repository) and (is_offline_mode() or not dl_manager.is_streaming):
            source = source.download(names)
        found = find_subsets(source.files(), source.name)
        problems = [f"{source.name}: no folder for the subset {name}" for name in names if name not in found]
        plan = self._plan_streaming if dl_manager.is_streaming else self._plan
        shards = [
            shard
            for name in names
            if name in found
            for shard in ([Table(path) for path in found[name].tables] or plan(source, name, found[name], problems))
        ]
        self._conclude(problems)
        splits = ["train", "validation"] if self.config.validation_fraction else ["train"]
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards, "source": source, "split": split})
            for split in splits
        ]

    def _records(self, source: Source, subset: str, files: Files, problems: list[str]) -> list[Record]:
        with ExitStack() as stack:
            lines = ((path, stack.enter_context(open(source.local(path), "rb"))) for path in files.metadata)
            records, wrong = read_records(subset, lines)
        problems.extend(wrong)
        if not records:
            problems.append(f"{source.name}: no record of the subset {subset} in {len(files.metadata)} *.jsonl files")
        return records

    def _plan(self, source: Source, subset: str, files: Files, problems: list[str]) -> list[Shard]:
        """Shards of an eager load: all pictures are located."""
        records = self._records(source, subset, files, problems)
        pictures = self._pictures(source, files.pictures, files.archives, problems)
        rows = locate(records, pictures, files.folders(), problems)
        logger.info(f"{subset}: {len(rows)} rows, {len(pictures)} images")
        return list(_located(rows))

    def _plan_streaming(self, source: Source, subset: str, files: Files, problems: list[str]) -> list[Shard]:
        """Shards of a streaming load: outputs are read as they come."""
        records = self._records(source, subset, files, problems)
        folders = files.folders()
        streamed = output_archives(files.archives, records, folders)
        indexed = [path for path in files.archives if path not in streamed]
        pictures = self._pictures(source, files.pictures, indexed, problems)
        names = {path: self._names_in(source, path) for path in streamed}
        known = all(members is not None for members in names.values())
        if known:
            pictures.add_names(names)
        rows = locate(records, pictures, folders, problems, pending=not known)
        at_hand = [row for row in rows if row.output and row.output.container not in names]
        shards: list[Shard] = list(_located(at_hand))
        for path in streamed:
            inside = tuple(row for row in rows if (row.output.container == path if row.output else not known))
            shards.append(Streamed(path, inside, folders, () if known else tuple(streamed)))
        return shards

    def _pictures(self, source: Source, extracted: list[str], archives: list[str], problems: list[str]) -> Pictures:
        """The pictures that can be read in any order."""
        pictures = Pictures()
        for path in extracted:
            pictures.add(folders_of(path), Picture(path, path))
        for path in archives:
            archive = unpack(source.local(path), path, self._archives, source.identity(path))
            problems.extend(archive.problems)
            for member in archive.members:
                picture = Picture(archive.tar, member.name, member.offset, member.size)
                pictures.add(container_folders(path) | folders_of(member.name), picture)
        return pictures

    @property
    def _archives(self) -> Path:
        return Path(self._cache_dir_root, "echo4o_archives")

    def _names_file(self, source: Source, archive: str) -> Path:
        return self._archives / f"{digest(source.identity(archive))}.names.json"

    def _names_in(self, source: Source, archive: str) -> list[str] | None:
        """The pictures in an archive, if it has been read to its end before."""
        file = self._names_file(source, archive)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def _prepare_split(self, split_generator: datasets.SplitGenerator, **options: Any) -> None:
        """Generate the rows, then say what was wrong with all of them, whichever process found it."""
        with TemporaryDirectory() as self._found_by_processes:
            super()._prepare_split(split_generator, **options)
            files = sorted(Path(self._found_by_processes).iterdir())
            problems = [line for file in files for line in json.loads(file.read_text(encoding="utf-8"))]
        del self._found_by_processes
        self._conclude(problems)

    def _generate_examples(
        self, shards: list[Shard], source: Source, split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        eager = "_found_by_processes" in self.__dict__
        for shard in shards:
            problems: list[str] = []
            for label, row in self._rows(shard, source, split, problems):
                wrong = self._wrong(row, decode=eager or self.config.on_error == "skip")
                if not wrong:
                    yield row["id"], row
                    continue
                problems.append(f"{label}: {wrong}")
                if not eager:
                    self._conclude(problems)
                    problems.clear()
            if eager and problems:
                write_json(Path(self._found_by_processes, f"{digest(problems[0])}.json"), problems)
            else:
                self._conclude(problems)

    def _rows(
        self, shard: Shard, source: Source, split: str, problems: list[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(shard, Table):
            rows = read_table(source, shard.path, problems)
            yield from ((f"{shard.path} ({row['id']})", row) for row in rows if self._split_of(row["id"]) == split)
        elif isinstance(shard, Streamed):
            yield from self._stream(shard, source, split, problems)
        else:
            with Reader(source) as reader:
                for row in shard.rows:
                    if self._split_of(row.record.id) == split:
                        yield str(row.record), example(row, reader)

    def _stream(
        self, shard: Streamed, source: Source, split: str, problems: list[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        outputs = Outputs(shard.archive, shard.rows, shard.folders)
        new = self._names_in(source, shard.archive) is None
        names = []
        with Reader(source) as reader, source.open(shard.archive) as file:
            for name, data in read_in_order(file, shard.archive, problems):
                names.append(name)
                for row in outputs.match(name, problems):
                    if self._split_of(row.record.id) == split:
                        yield str(row.record), example(row, reader, name, data)
        logger.info(f"{shard.archive}: {len(names)} images, {len(names) - outputs.matched} of them without a record")
        if new:
            self._archives.mkdir(parents=True, exist_ok=True)
            write_json(self._names_file(source, shard.archive), names)
            problems.extend(self._missing(shard, source))

    def _missing(self, shard: Streamed, source: Source) -> list[str]:
        """Rows whose output is in no archive, once all have been read."""
        names = {path: self._names_in(source, path) for path in shard.others}
        if not names or None in names.values():
            return []
        pictures = Pictures()
        pictures.add_names(names)
        problems: list[str] = []
        locate([row.record._replace(inputs=()) for row in shard.rows], pictures, shard.folders, problems)
        return problems

    def _split_of(self, identifier: str) -> str:
        share = int(hashlib.sha256(identifier.encode()).hexdigest()[:8], 16) / 2**32
        return "validation" if share < self.config.validation_fraction else "train"

    def _wrong(self, row: dict[str, Any], decode: bool) -> str:
        """The first thing that is wrong with the pictures of a row."""
        for image in (*row["input_images"], row["output_image"]):
            problem = picture_problem(image["bytes"], self.config.max_pixels, decode)
            if problem:
                return f"{image['path']} {problem}"
        return ""

    def _conclude(self, problems: list[str]) -> None:
        """Fail, or say what is left out."""
        if not problems:
            return
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {self._source.name}"
        if self.config.on_error == "skip":
            logger.warning(f"{count}, left out:\n" + "\n".join(problems))
            return
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError(
            f"{count}:\n"
            + "\n".join([*problems[:SHOWN], *more])
            + "\nRepair them, or read the rest with on_error='skip'."
        )

    def _as_dataset(self, split: Any = datasets.Split.TRAIN, in_memory: bool = False) -> datasets.Dataset:
        """The cached files are shared; the columns are as asked for."""
        if self._own_features is None:
            self.info.features = features(self.config.decode)
        return super()._as_dataset(split, in_memory)

    def _get_dataset_fingerprint(self, split: Any) -> str:
        return Hasher.hash((super()._get_dataset_fingerprint(split), self.config.decode))


def output_archives(archives: list[str], records: list[Record], known: frozenset[str]) -> list[str]:
    """The archives that hold outputs and no references, as far as folders tell."""
    inputs = {name for record in records for path in record.inputs for name in wanted(path, known).folders}
    outputs = {name for record in records for name in wanted(record.output, known).folders}
    if not inputs:
        return archives
    own = [(path, container_folders(path)) for path in archives]
    return [path for path, folders in own if folders & (outputs - inputs) and not folders & (inputs - outputs)]


def _located(rows: list[Row]) -> Iterator[Located]:
    for start in range(0, len(rows), ROWS_PER_SHARD):
        yield Located(tuple(rows[start : start + ROWS_PER_SHARD]))


def read_table(source: Source, path: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one of our Parquet files."""
    try:
        with source.open_anywhere(path) as file:
            table = pq.ParquetFile(file)
            missing = [name for name in FEATURES if name not in table.schema_arrow.names]
            if missing:
                raise pa.ArrowInvalid(f"no column {', '.join(missing)}")
            size, columns = Echo4oImage.DEFAULT_WRITER_BATCH_SIZE, list(FEATURES)
            for group in range(table.num_row_groups):  # one by one, or all of the file would stay in memory to its end
                for batch in table.iter_batches(size, row_groups=[group], columns=columns):
                    yield from batch.to_pylist()
    except pa.ArrowException as error:
        problems.append(f"{path}: not one of our Parquet files ({error})")


def dataset_module(revision: str | None, data_files: object) -> DatasetModule:
    """What `datasets.load.dataset_module_factory` gives for the name of this dataset."""
    if data_files is not None:
        raise ValueError("data_files is not used: give the folder that holds the subsets as data_dir")
    code = sorted(Path(__file__).parent.glob("*.py"))
    version = hashlib.sha256(b"".join(file.read_bytes() for file in code if file.stem in MODULES)).hexdigest()
    return DatasetModule(__name__, version, {"dataset_name": NAME, "revision": revision})
