"""From pictures to results: every picture judged, each verdict kept with its reason, the scores of all.

The results are one JSON object that describes itself:
    {"schema_version": 1, "benchmark": "geneval_pp", "protocol": "official", "created": "2026-…", "seed": 0,
     "software": {"echo4o-hf": "0.1.0", …}, "items_sha256": "…", "repeats": 1, "deviations": ["judged by …"],
     "judges": [{"name", "parameters", "calls", "from_store", "input_tokens", "output_tokens", "failures"}],
     "scores": {…}, "per_judge": {name: {…}}, "agreement": {…} | null, "self_agreement": {name: {…}} | null,
     "items": [{"id", "group", "prompt", "item", "checklist",
                "images": [{"path", "sha256", "verdict": {"score", "reason", "parts", "unscored"},
                            "judgements": [{"judge", "repeat", "reply", "score", "reason", "parts", "unscored"}]}]}]}
`calls` and tokens are this run's; what came from the store cost nothing. `deviations` says what sets the scores apart
from published ones, and is empty where nothing does. An item without a picture has one image, unscored.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from echo4o_hf.benchmarks import geneval_pp, imagine_bench
from echo4o_hf.benchmarks.items import JudgeText, items_sha256, load_items, official_text
from echo4o_hf.benchmarks.results import SCHEMA_VERSION
from echo4o_hf.benchmarks.results import read_results as read_results
from echo4o_hf.benchmarks.results import write_results as write_results
from echo4o_hf.benchmarks.statistics import agreement, majority
from echo4o_hf.benchmarks.verdict import Protocol, Verdict, check_protocol
from echo4o_hf.judges.ask import Outcome, Request, ask
from echo4o_hf.judges.judge import Judge, judge_name, judge_parameters
from echo4o_hf.judges.load import load_judge
from echo4o_hf.judges.store import VerdictStore

BENCHMARKS: dict[str, ModuleType] = {module.NAME: module for module in (geneval_pp, imagine_bench)}
ITEMS_SHA256 = {  # `items_sha256` of the pinned items
    "geneval_pp": "53cd0eee49975442f44779d1e2db036b00cead7be4af3e1b1af1894607645338",
    "imagine_bench": "9ae7cfd0de83f85e800cc9a9eedd347365b3f7bc7dabedb42d6af77aa181b98f",
}
SOFTWARE = ("echo4o-hf", "huggingface_hub", "pillow")

# What a function is asked where the official text is not to be had: the item and nothing else.
_BARE = JudgeText("", ("Instruction:\n", "instruction", "\n\nNote:\n", "note", ""))

logger = logging.getLogger(__name__)

Judges: TypeAlias = str | Judge | Sequence[str | Judge]
Item: TypeAlias = Mapping[str, Any]
Source: TypeAlias = bytes | str | os.PathLike[str] | None


@dataclass(frozen=True)
class _Picture:
    """One picture of the item at `place`, or why there is none."""

    place: int
    source: bytes | Path | None = None
    path: str | None = None
    sha256: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class _Question:
    """What every judge is asked about the pictures."""

    benchmark: ModuleType
    protocol: Protocol
    items: Sequence[Item]
    pictures: Sequence[_Picture]
    texts: Sequence[tuple[str, str]]  # of each item: system text, prompt
    bare: bool  # whether the texts are not the official ones, for those are not to be had
    repeats: int

    def requests(self) -> dict[tuple[int, int], Request]:
        """By the place of the picture and the repeat; pictures that are missing are not asked about."""
        return {
            (place, repeat): Request(*self.texts[picture.place], [picture.source], repeat)
            for place, picture in enumerate(self.pictures)
            if picture.source is not None
            for repeat in range(self.repeats)
        }

    def majority(self, verdicts: Sequence[Verdict]) -> Verdict:
        """One verdict out of several on one picture."""
        return majority(verdicts, self.benchmark.LEVELS)

    def agreement(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
        """How far verdicts on all pictures agree, by who gave them."""
        groups = [self.benchmark.group(self.items[picture.place]) for picture in self.pictures]
        return agreement(verdicts, groups, self.benchmark.LEVELS)

    def summarize(self, verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
        """The scores of one verdict for each picture."""
        of_item: list[list[Verdict]] = [[] for _ in self.items]
        for picture, verdict in zip(self.pictures, verdicts, strict=True):
            of_item[picture.place].append(verdict)
        scores: dict[str, Any] = self.benchmark.summarize(
            list(zip(self.items, of_item, strict=True)), self.protocol, seed
        )
        return scores


@dataclass(frozen=True)
class _Answers:
    """What one judge said; outcomes by the place of the picture and the repeat."""

    name: str
    parameters: dict[str, Any]
    outcomes: Mapping[tuple[int, int], Outcome]
    verdicts: Sequence[Sequence[Verdict]]  # of each picture one for each repeat

    def usage(self) -> dict[str, Any]:
        """What the results say of the judge."""
        made = [outcome for outcome in self.outcomes.values() if not outcome.from_store]
        tokens = {
            name: [value for outcome in made if (value := getattr(outcome, name)) is not None]
            for name in ("input_tokens", "output_tokens")
        }
        return {
            "name": self.name,
            "parameters": self.parameters,
            "calls": len(made),
            "from_store": len(self.outcomes) - len(made),
            **{name: sum(values) if values or not made else None for name, values in tokens.items()},
            "failures": sum(outcome.failure is not None for outcome in self.outcomes.values()),
        }


def evaluate_images(
    benchmark: str,
    images: Sequence[Sequence[Source]],
    items: Sequence[Item] | None = None,
    *,
    judge: Judges,
    protocol: Protocol = "official",
    repeats: int = 1,
    store: str | os.PathLike[str] | VerdictStore | None = None,
    concurrency: int = 16,
    seed: int = 0,
    progress: bool = True,
    judge_text: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Judge the pictures of every item.

    Args:
        benchmark: "geneval_pp" or "imagine_bench".
        images: Of each item its pictures, encoded or as paths, which are read when their turn comes. No picture, None,
            or a path where no file is, is unscored and never 0.
        items: The pinned ones when None.
        judge: One, by name or any callable, or several, each judging every picture.
        protocol: "official" or "strict".
        repeats: How often each judge is asked about each picture.
        store: A file, or a store; what it holds is not asked again.
        concurrency: Requests at the same time.
        seed: Of the resampling for the intervals.
        progress: Show a bar for each judge.
        judge_text: A copy of the official Python file with the judge's text; the pinned one when None. Where that is
            not to be had, a function of the caller's own is asked without it, with a warning and among `deviations`.

    Returns:
        The results described above. `scores` are the majority's where several judges or repeats judged a picture.

    Raises:
        JudgeStopped: no request can succeed; what arrived is in `store`.
        OSError: the pinned items or the judge's text cannot be had, or the store cannot be written.
        ValueError: an argument is not one of the above, with its value.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}; got {benchmark!r}")
    check_protocol(protocol)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    module = BENCHMARKS[benchmark]
    items = load_items(benchmark) if items is None else list(items)
    for place, item in enumerate(items):
        module.validate_item(item, f"item {place}")
    ids = [item.get("id", place) for place, item in enumerate(items)]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two items have the id {next(one for one in ids if ids.count(one) > 1)}")
    if len(images) != len(items) or not items:
        raise ValueError(f"got the pictures of {len(images)} items for {len(items)} items")
    judges = load_judges(judge, benchmark, protocol)
    text = _judge_text(module, judges, judge_text) if protocol == "official" else None
    question = _Question(
        benchmark=module,
        protocol=protocol,
        items=items,
        pictures=[_picture(place, source) for place, sources in enumerate(images) for source in sources or [None]],
        texts=[module.request(item, protocol, text) for item in items],
        bare=text is _BARE,
        repeats=repeats,
    )
    with ExitStack() as stack:
        if store is not None and not isinstance(store, VerdictStore):
            store = stack.enter_context(VerdictStore(Path(store)))
        answers = [_ask(one, question, store, concurrency, progress) for one in judges]
    return _results(question, answers, seed)


def _picture(place: int, source: Source) -> _Picture:
    if source is None:
        return _Picture(place, problem="no image")
    if isinstance(source, bytes):
        return _Picture(place, source, sha256=hashlib.sha256(source).hexdigest())
    path = Path(source)
    if not path.is_file():
        return _Picture(place, path=str(path), problem="no image: there is no such file")
    try:
        with path.open("rb") as file:
            return _Picture(place, path, str(path), hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return _Picture(place, path=str(path), problem=f"no image: {error.strerror}")


def load_judges(
    judges: Judges, benchmark: str, protocol: Protocol = "official", options: Mapping[str, Any] | None = None
) -> list[Judge]:
    """The judges as `evaluate_images` asks them.

    In the strict protocol, endpoints are told to answer in JSON of the benchmark's schema.

    Args:
        judges: One, by name or any callable, or several.
        benchmark: For its schema.
        protocol: Likewise.
        options: Keyword arguments for every judge that is given by name.

    Raises:
        JudgeStopped: a judge cannot work, such as without a key.
        ValueError: a name or an option is unknown, or two judges are called the same.
    """
    specs: Sequence[str | Judge] = [judges] if isinstance(judges, str) or callable(judges) else judges
    loaded = []
    for spec in specs:
        chosen = dict(options or {}) if isinstance(spec, str) else {}
        if protocol == "strict" and isinstance(spec, str) and spec.startswith(("openai:", "hf:")):
            schema = {"name": f"{benchmark}_strict", "schema": BENCHMARKS[benchmark].REPLY_SCHEMA, "strict": True}
            chosen = {"response_format": {"type": "json_schema", "json_schema": schema}, **chosen}
        try:
            loaded.append(load_judge(spec, **chosen))
        except TypeError as error:
            raise ValueError(f"{spec} takes other options than {', '.join(chosen) or 'none'}: {error}") from error
    names = [judge_name(one) for one in loaded]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"judge must be one judge, or several with different names; got {names}")
    return loaded


def _judge_text(module: ModuleType, judges: Sequence[Judge], path: str | os.PathLike[str] | None) -> JudgeText:
    """The official text, or the bare item for judges that can do without it.

    A judge says by `reads_system` whether it can; a function says nothing, and may.
    """
    try:
        return official_text(module.NAME, path)
    except OSError as error:
        reads = [getattr(judge, "reads_system", None) for judge in judges]
        if path is not None or True in reads:
            raise
        if None in reads:
            logger.warning("%s Until then the judge gets no system text, only the item.", error)
        return _BARE


def _ask(judge: Judge, question: _Question, store: VerdictStore | None, concurrency: int, progress: bool) -> _Answers:
    requests = question.requests()
    replies = ask(judge, requests.values(), store=store, concurrency=concurrency, progress=progress)
    outcomes = dict(zip(requests, replies, strict=True))
    verdicts: list[list[Verdict]] = [[] for _ in question.pictures]
    keyed: dict[str, dict[str, Any]] = {}
    for (place, _), outcome in outcomes.items():
        verdict = _verdict(outcome, question.items[question.pictures[place].place], question)
        verdicts[place].append(verdict)
        if outcome.reply is not None and outcome.key is not None:
            keyed[outcome.key] = _as_dict(verdict)
    if store is not None:
        store.put_verdicts(keyed)
    return _Answers(judge_name(judge), judge_parameters(judge), outcomes, verdicts)


def _verdict(outcome: Outcome, item: Item, question: _Question) -> Verdict:
    if outcome.reply is None:
        return Verdict(None, unscored=outcome.failure)
    verdict: Verdict = question.benchmark.parse(outcome.reply, item, question.protocol)
    if verdict.unscored and outcome.truncated:
        why = f"{verdict.unscored} (the reply reached the limit of its length)"
        return Verdict(None, verdict.reason, verdict.parts, why)
    return verdict


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    return {
        "score": verdict.score,
        "reason": verdict.reason,
        "parts": dict(verdict.parts),
        "unscored": verdict.unscored,
    }


def _results(question: _Question, answers: Sequence[_Answers], seed: int) -> dict[str, Any]:
    """One verdict of each judge on each picture out of the repeats, and one of all judges out of those."""
    missing = [Verdict(None, unscored=picture.problem) if picture.problem else None for picture in question.pictures]
    of_judge = {
        one.name: [none or question.majority(verdicts) for none, verdicts in zip(missing, one.verdicts, strict=True)]
        for one in answers
    }
    final = [
        none or question.majority(verdicts)
        for none, verdicts in zip(missing, zip(*of_judge.values(), strict=True), strict=True)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": question.benchmark.NAME,
        "protocol": question.protocol,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "software": {name: version(name) for name in SOFTWARE},
        "items_sha256": items_sha256(question.items),
        "repeats": question.repeats,
        "deviations": _deviations(question, answers),
        "judges": [one.usage() for one in answers],
        "scores": question.summarize(final, seed),
        "per_judge": {name: question.summarize(verdicts, seed) for name, verdicts in of_judge.items()},
        "agreement": question.agreement(of_judge) if len(of_judge) > 1 else None,
        "self_agreement": (
            {one.name: _self_agreement(question, one) for one in answers} if question.repeats > 1 else None
        ),
        "items": _items(question, answers, final),
    }


def _self_agreement(question: _Question, answers: _Answers) -> dict[str, Any]:
    """How far the repeats of one judge agree with each other."""
    missing = [Verdict(None, unscored="no image")] * question.repeats
    rows = [verdicts or missing for verdicts in answers.verdicts]
    return question.agreement({f"repeat {k}": [row[k] for row in rows] for k in range(question.repeats)})


def _items(question: _Question, answers: Sequence[_Answers], final: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The results' `items`."""
    geneval = question.benchmark is geneval_pp
    items: list[dict[str, Any]] = [
        {
            "id": item.get("id", place),
            "group": question.benchmark.group(item),
            "prompt": item["prompt" if geneval else "instruction"],
            "item": dict(item),
            "checklist": geneval_pp.checklist(item) if geneval else None,
            "images": [],
        }
        for place, item in enumerate(question.items)
    ]
    for place, (picture, verdict) in enumerate(zip(question.pictures, final, strict=True)):
        judgements = [
            {"judge": one.name, "repeat": repeat, "reply": one.outcomes[place, repeat].reply, **_as_dict(given)}
            for one in answers
            for repeat, given in enumerate(one.verdicts[place])
        ]
        items[picture.place]["images"].append(
            {
                "path": picture.path,
                "sha256": picture.sha256,
                "verdict": _as_dict(verdict),
                "judgements": judgements,
            }
        )
    return items


def _deviations(question: _Question, answers: Sequence[_Answers]) -> list[str]:
    """What sets the scores apart from published ones."""
    module = question.benchmark
    judges = [one.name for one in answers]
    published = str(module.JUDGE_DEFAULTS["model"])
    most = max(Counter(picture.place for picture in question.pictures).values())
    found = {
        f"the protocol is {question.protocol}": question.protocol != "official",
        "the official judge text was not to be had; the judge saw the item alone": question.bare,
        f"these {len(question.items)} items are not the benchmark's own": (
            items_sha256(question.items) != ITEMS_SHA256[module.NAME]
        ),
        f"judged by {', '.join(judges)}; published scores are by {published}": judges != [f"openai:{published}"],
        f"each judge was asked {question.repeats} times": question.repeats > 1,
        f"up to {most} pictures of an item": most > 1,
    }
    return [text for text, holds in found.items() if holds]
