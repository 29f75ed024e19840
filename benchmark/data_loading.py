"""Pictures per second through datasets, their ratio to bare reading and decoding, and memory up to 20 000 rows.

    python benchmark/data_loading.py --repeats 20

The pictures are crops of scikit-image's photographs, 1024x1024 pixels, as JPEG, in archives laid out as on the Hub.
Speed is measured in turns in one process. Its seconds are the CPU's, all threads together: it is that of one core, and
other programs hardly count. Memory is what a fresh process adds at its peak for each number of rows, pages of mapped
files left out, with small pictures of noise. Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL
import pyarrow
import skimage
from datasets import load_dataset
from PIL import Image

from echo4o_hf.data.build import build

SUBSET = "surreal_fantasy"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "rocket")


@dataclass(frozen=True)
class Size:
    """What is measured."""

    pictures: int
    pixels: int  # along one side
    rows: tuple[int, ...]  # of the datasets whose memory is measured
    small: int  # pixels along one side of their pictures


FULL = Size(pictures=100, pixels=1024, rows=(1_000, 20_000), small=64)
TINY = Size(pictures=4, pixels=64, rows=(20, 40), small=16)


def photographs(number: int, pixels: int) -> Iterator[bytes]:
    """JPEG files, each another square of a photograph with a little noise, as a camera's would have."""
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    for index in range(number):
        source = sources[index % len(sources)]
        side = int(min(source.size) * rng.uniform(0.6, 1.0))
        left, top = (int(rng.integers(length - side + 1)) for length in source.size)
        square = source.crop((left, top, left + side, top + side)).resize((pixels, pixels), Image.Resampling.LANCZOS)
        noisy = np.asarray(square) + rng.normal(0, 3, (pixels, pixels, 1))
        yield encode(noisy.clip(0, 255).astype(np.uint8))


def noise(number: int, pixels: int) -> Iterator[bytes]:
    """JPEG files of noise."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        yield encode(rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8))


def encode(pixels: np.ndarray) -> bytes:
    """The JPEG file of (height, width, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def write_hub_layout(folder: Path, pictures: Iterable[bytes]) -> tuple[Path, list[bytes]]:
    """One subset as on the Hub; its archive, and the pictures."""
    kept = list(pictures)
    archive = folder / "Surrel-Fantasy-Image/images/0-5000.tar.gz"
    archive.parent.mkdir(parents=True)
    metadata = archive.parents[1] / "conflict.jsonl"
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar, metadata.open("w") as lines:
        for index, data in enumerate(kept):
            member = tarfile.TarInfo(f"images/{index:05d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            record = {
                "task_type": "t2i",
                "instruction": f"A photograph with the number {index}, of a thing that cannot be as it is shown here.",
                "output_image": f"/Echo-4o-Image/Surrel-Fantasy-Image/images/{index:05d}.jpg",
                "type": "T1",
            }
            lines.write(json.dumps(record) + "\n")
    return archive, kept


def decode(pictures: Iterable[bytes]) -> None:
    """Nothing but PIL."""
    for data in pictures:
        Image.open(io.BytesIO(data)).load()


def members(archive: Path) -> Iterator[bytes]:
    """The files of an archive, by tarfile, from its beginning to its end."""
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            yield file.read()


def iterate(dataset: Iterable[dict[str, Image.Image]]) -> None:
    """Decode every row's picture."""
    for row in dataset:
        row["output_image"].load()


def stream_hub(folder: Path) -> Iterable[dict[str, Image.Image]]:
    """The rows out of the archives."""
    return load_dataset("echo-4o-image", SUBSET, data_dir=str(folder), split="train", streaming=True)


def stream_parquet(built: Path) -> datasets.IterableDataset:
    """The rows out of the Parquet files."""
    return load_dataset(str(built), SUBSET, split="train", streaming=True)


def load_parquet(built: Path) -> Iterable[dict[str, Image.Image]]:
    """The rows out of datasets' cache of the Parquet files."""
    return load_dataset(str(built), SUBSET, split="train")


def load_hub(folder: Path) -> Iterable[dict[str, Image.Image]]:
    """The rows out of datasets' cache of the archives."""
    return load_dataset("echo-4o-image", SUBSET, data_dir=str(folder), split="train")


def in_turns(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each task, one after the other in each repetition; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repeats + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if repetition:
                seconds[name].append(time.process_time() - start)
    return seconds


def measure_speed(folder: Path, size: Size, repeats: int) -> None:
    """Print the table of speeds."""
    archive, pictures = write_hub_layout(folder / "hub", photographs(size.pictures, size.pixels))
    builds = (folder / f"built-{index}" for index in range(repeats + 2))
    built = next(builds)
    build(built, folder / "hub", subsets=[SUBSET])
    cached, parquet, archives = load_parquet(built), stream_parquet(built), stream_hub(folder / "hub")

    tasks: dict[str, Callable[[], object]] = {
        "PIL": lambda: decode(pictures),
        "tarfile + PIL": lambda: decode(members(archive)),
        "built Parquet, loaded": lambda: iterate(cached),
        "built Parquet, streamed": lambda: iterate(parquet),
        "built Parquet, resharded, streamed": lambda: iterate(parquet.reshard()),
        "tar.gz, streamed": lambda: iterate(archives),
        "build": lambda: build(next(builds), folder / "hub", subsets=[SUBSET]),
    }
    bare = dict.fromkeys(tasks, "tarfile + PIL") | dict.fromkeys(list(tasks)[2:5], "PIL")
    seconds = in_turns(tasks, repeats)

    megabytes = sum(map(len, pictures)) / 1e6
    print(f"{size.pictures} pictures of {size.pixels}x{size.pixels}, {megabytes:.3g} MB, {repeats} repetitions\n")
    print(
        "| | pictures per CPU second, best | median | MB, median | bare | ratio of bare's speed, median | quartiles |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, times in seconds.items():
        best, median = min(times), statistics.median(times)
        ratios = [of_bare / own for of_bare, own in zip(seconds[bare[name]], times, strict=True)]  # in the same turn
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        figures = " | ".join(f"{x:.3g}" for x in (size.pictures / best, size.pictures / median, megabytes / median))
        print(f"| {name} | {figures} | {bare[name]} | {middle:.3g} | {low:.3g} to {high:.3g} |")


MEMORY: dict[str, Callable[[Path, Path], object]] = {
    "tar.gz, streamed": lambda hub, built: iterate(stream_hub(hub)),
    "tar.gz, loaded": lambda hub, built: iterate(load_hub(hub)),
    "build": lambda hub, built: build(built, hub, subsets=[SUBSET]),
    "built Parquet, streamed": lambda hub, built: iterate(stream_parquet(built)),
    "built Parquet, resharded, streamed": lambda hub, built: iterate(stream_parquet(built).reshard()),
    "built Parquet, loaded": lambda hub, built: iterate(load_parquet(built)),
}


def growth(name: str, folder: Path) -> float:
    """Megabytes of its own that this process has more at the peak of one task, looked up every few milliseconds."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    before = peak = own_memory()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    MEMORY[name](folder / "hub", folder / "built")
    ended.set()
    watcher.join()
    return (max(peak, own_memory()) - before) / 1e6


def own_memory() -> int:
    """Bytes of this process that are in memory and no file's pages, which the system may drop at any time."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()


def measure_memory(folder: Path, size: Size) -> None:
    """Print the table of memory."""
    context = multiprocessing.get_context("forkserver")  # a fresh process for each figure, with the imports made
    context.set_forkserver_preload(["__main__", "torch", "echo4o_hf.data.build"])
    figures: dict[str, list[float]] = {name: [] for name in MEMORY}
    megabytes = []
    for rows in size.rows:
        below = folder / f"{rows} rows"
        _, pictures = write_hub_layout(below / "hub", noise(rows, size.small))
        megabytes.append(sum(map(len, pictures)) / 1e6)
        for name in MEMORY:
            with ProcessPoolExecutor(1, context) as process:
                figures[name].append(process.submit(growth, name, below).result())
    columns = (f"{rows:,} rows ({mb:.3g} MB)" for rows, mb in zip(size.rows, megabytes, strict=True))
    print(f"\n| MB more | {' | '.join(columns)} |")
    print("|---" * (len(size.rows) + 1) + "|")
    for name, grown in figures.items():
        print(f"| {name} | {' | '.join(f'{x:.3g}' for x in grown)} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sections", nargs="+", choices=("speed", "memory"), default=["speed", "memory"])
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the script runs")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} must be at least 1")
    if sys.platform != "linux":
        parser.error("this counts memory as Linux does")

    size = TINY if arguments.tiny else FULL
    print(f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}, Pillow {PIL.__version__}")
    cache = datasets.config.HF_DATASETS_CACHE
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as name:
            datasets.config.HF_DATASETS_CACHE = Path(name) / "cache"
            if "speed" in arguments.sections:
                measure_speed(Path(name), size, arguments.repeats)
            if "memory" in arguments.sections:
                measure_memory(Path(name), size)
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
        datasets.enable_progress_bars()


if __name__ == "__main__":
    main()
