"""GenEval++ and Imagine-Bench as metrics of `evaluate`, and their registration by name.

```python
metric = evaluate.load("geneval_pp")
metric.compute(predictions=["0.png", "1.png"], references=items, judge="openai:gpt-4.1")
```
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import evaluate
import numpy as np
from datasets import Features, Image, List, Value
from PIL.Image import Image as PILImage

from echo4o_hf.benchmarks import geneval_pp, imagine_bench
from echo4o_hf.benchmarks.evaluation import Judges, evaluate_images
from echo4o_hf.benchmarks.images import to_bytes
from echo4o_hf.judges.store import VerdictStore

NAMES = (geneval_pp.NAME, imagine_bench.NAME)

Picture: TypeAlias = str | os.PathLike[str] | bytes | PILImage | np.ndarray | Mapping[str, Any] | None

_CITATION = """\
@misc{ye2025echo4o,
  title={Echo-4o: Harnessing the Power of GPT-4o Synthetic Images for Improved Image Generation},
  author={Junyan Ye and others},
  year={2025},
  eprint={2508.09987},
  archivePrefix={arXiv}
}"""
_INPUTS = """
Args:
    predictions: the picture or the list of pictures of each item: paths, PIL images, arrays (height, width, channels),
        dicts of `datasets.Image`. None, or a path where no file is, is an item without a picture: unscored.
    references: the items, as dicts in the schema of the benchmark's file; one that is given again gets more pictures.
    judge: "openai:MODEL", "hf:MODEL", "transformers:MODEL", "shapes", any callable (system, prompt, images) -> str, or
        a list of these, each judging every picture: the scores are then those of the majority.
    protocol: "official" (the published wording) or "strict" (a verdict for each clause).
    repeats: how often each judge is asked about each picture.
    store: file that keeps every reply as it arrives; what it holds is not asked again.
    concurrency: requests at the same time.
    seed: of the intervals' resampling.
    progress: show a bar.
    judge_text: a copy of the official Python file that holds the judge's text, for a machine without network.

Returns:
    A dict of the score under the metric's name, its parts, `num_items`, `num_unscored` and `confidence_interval`; with
    several judges also `per_judge` and `agreement`, with several repeats `self_agreement`. Each verdict with its
    reason is in the metric's attribute `results`, for `echo4o_hf.benchmarks.evaluation.write_results`. The score is
    named after the metric for other items and judges too: `results["deviations"]` says what sets it apart from
    published ones, and is empty where nothing does.
"""


class _JudgedImages(evaluate.Metric):
    """A metric that encodes its inputs itself: a feature of `datasets` takes one form of picture, and no items."""

    name: ClassVar[str]
    data: Any
    results: dict[str, Any] | None = None
    """What `evaluate_images` returned in the last `compute`."""

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add the picture or the pictures of one item.

        Raises:
            ValueError: a prediction is no picture, or the reference no item.
        """
        example = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in example.items()})

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add the pictures of several items.

        Raises:
            ValueError: a prediction is no picture, a reference no item, or there are not as many of both.
        """
        for name, values in (("predictions", predictions), ("references", references)):
            if values is None or isinstance(values, (str, bytes, Mapping)):
                raise ValueError(f"{name} must be a list with one entry for each item; got {type(values).__name__}")
        encoded = [_encode(prediction, f"predictions[{place}]") for place, prediction in enumerate(predictions)]
        items = [_dump(reference, f"references[{place}]") for place, reference in enumerate(references)]
        if len(encoded) != len(items):
            raise ValueError(f"got {len(encoded)} predictions for {len(items)} references")
        super().add_batch(predictions=encoded, references=items, **kwargs)

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        judge: Judges | None = None,
        protocol: str = "official",
        repeats: int = 1,
        store: str | os.PathLike[str] | VerdictStore | None = None,
        concurrency: int = 16,
        seed: int = 0,
        progress: bool = True,
        judge_text: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any] | None:
        """Judge what was added, or what is given.

        Raises:
            JudgeStopped: no request can succeed; what arrived is in `store`.
            ValueError: the inputs are not as described below.
        """
        if judge is None:
            raise ValueError('say who judges, such as judge="openai:gpt-4.1" or judge=my_function')
        options = {
            "judge": judge,
            "protocol": protocol,
            "repeats": repeats,
            "store": store,
            "concurrency": concurrency,
            "seed": seed,
            "progress": progress,
            "judge_text": judge_text,
        }
        try:
            return super().compute(predictions=predictions, references=references, **options)
        finally:
            self._clear()

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        pictures_of: dict[str, list[bytes | Path | None]] = {}
        for pictures, reference in zip(predictions, references, strict=True):
            pictures_of.setdefault(reference, []).extend(_decode(picture) for picture in pictures)
        items = [json.loads(reference) for reference in pictures_of]
        self.results = evaluate_images(self.name, list(pictures_of.values()), items, **options)
        more = ("per_judge", "agreement", "self_agreement")
        several = len(self.results["judges"]) > 1
        shown = {name: self.results[name] for name in more if several and self.results[name] is not None}
        if self.results["self_agreement"] is not None:
            shown["self_agreement"] = self.results["self_agreement"]
        return {**self.results["scores"], **shown}

    def _clear(self) -> None:
        """Remove what `evaluate` leaves behind, locked, where `_compute` raises."""
        if self.data is None:
            return
        self.data = None
        self.buf_writer = None
        for lock, path in zip(self.filelocks or [], self.file_paths or [], strict=True):
            Path(path).unlink(missing_ok=True)
            lock.release()

    def _details(self, description: str) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=description,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features({"predictions": List(Image(decode=False)), "references": Value("string")}),
            reference_urls=["https://arxiv.org/abs/2508.09987", "https://github.com/yejy53/Echo-4o"],
        )


class GenEvalPP(_JudgedImages):
    """GenEval++: is every object there, in number, color, place and size?"""

    name = geneval_pp.NAME

    def _info(self) -> evaluate.MetricInfo:
        return self._details(
            "GenEval++ (280 items, 7 tags): a judge holds each picture against the checklist of its prompt. The score "
            "is the mean of the tags' accuracies."
        )


class ImagineBench(_JudgedImages):
    """Imagine-Bench: is the fantasy there, and is the thing still itself?"""

    name = imagine_bench.NAME

    def _info(self) -> evaluate.MetricInfo:
        return self._details(
            "Imagine-Bench (270 items, 4 groups): a judge gives 0 to 10 for fantasy fulfillment, identity "
            "preservation and aesthetic quality. The score is the mean of the groups weighted 3:2:2:2."
        )


def _encode(prediction: Any, where: str) -> list[dict[str, Any] | None]:
    """The pictures of one item as `datasets.Image` stores them: paths as they are, pixels as PNG; None is missing."""
    several = isinstance(prediction, Sequence) and not isinstance(prediction, (str, bytes))
    several |= isinstance(prediction, np.ndarray) and prediction.ndim == 4
    pictures: Iterable[Picture] = prediction if several else [prediction]
    encoded: list[dict[str, Any] | None] = []
    for picture in pictures:
        if isinstance(picture, Mapping) and picture.get("bytes") is None and "path" in picture:
            picture = picture["path"]
        if isinstance(picture, (str, os.PathLike)) and _is_utf8(os.fspath(picture)):
            encoded.append({"path": os.fspath(picture), "bytes": None})
        elif picture is None:
            encoded.append(None)
        else:
            try:
                encoded.append({"path": None, "bytes": to_bytes(picture)})
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return encoded


def _is_utf8(path: str) -> bool:
    """Whether Arrow can hold the path; files of other names are read at once."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode(stored: Mapping[str, Any] | None) -> bytes | Path | None:
    if stored is None:
        return None
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"])


def _dump(reference: Any, where: str) -> str:
    if not isinstance(reference, Mapping):
        raise ValueError(f"{where} must be an item of the benchmark, a dict; got {type(reference).__name__}")
    try:
        return json.dumps(_without_none(reference), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from error


def _without_none(value: Any) -> Any:
    """`datasets` fills the keys that an item lacks, but another one has, with None."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(entry) for entry in value]
    return value


def script(name: str) -> str:
    """The metric script that `evaluate` imports: in its modules cache, and in a Space.

    Raises:
        ValueError: no metric of ours has this name.
    """
    if name not in NAMES:
        raise ValueError(f"no metric is called {name!r}; there are {', '.join(NAMES)}")
    return (files("echo4o_hf.benchmarks.scripts") / f"{name}.py").read_text(encoding="utf-8")


def install_metrics(modules_cache: str | os.PathLike[str] | None = None) -> list[Path]:
    """Let `evaluate.load("geneval_pp")` and `evaluate.load("imagine_bench")` work without `import echo4o_hf`.

    Args:
        modules_cache: default: the one `evaluate` uses (HF_MODULES_CACHE, or `modules` under HF_HOME).

    Returns:
        The files written.
    """
    cache = Path(modules_cache or evaluate.config.HF_MODULES_CACHE)
    written = []
    for name in NAMES:
        text = script(name)
        # evaluate takes a folder named by 64 characters for a version of the script, the newest first
        version = hashlib.sha256(text.encode()).hexdigest()
        path = cache / "evaluate_modules" / "metrics" / f"evaluate-metric--{name}" / version / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.parents[:5]:  # all are packages, the cache too
            (folder / "__init__.py").touch()
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        written.append(path)
    return written
