"""From pictures to results: every picture judged, each verdict kept with its reason, the scores of all.

What the results hold is written in `echo4o_hf.benchmarks.summary`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from echo4o_hf.benchmarks import geneval_pp, imagine_bench
from echo4o_hf.benchmarks.items import ITEMS_SHA256 as ITEMS_SHA256
from echo4o_hf.benchmarks.items import JudgeText, load_items, official_text
from echo4o_hf.benchmarks.results import read_results as read_results
from echo4o_hf.benchmarks.results import write_results as write_results
from echo4o_hf.benchmarks.statistics import check_agreement
from echo4o_hf.benchmarks.summary import Answers, Item, Picture, Question, as_dict, results_of
from echo4o_hf.benchmarks.verdict import Protocol, Verdict, check_protocol
from echo4o_hf.judges.ask import Outcome, ask
from echo4o_hf.judges.judge import Judge, judge_name, judge_parameters, judge_prices
from echo4o_hf.judges.load import load_judge
from echo4o_hf.judges.store import VerdictStore

BENCHMARKS: dict[str, ModuleType] = {module.NAME: module for module in (geneval_pp, imagine_bench)}

# What a function is asked where the official text is not to be had: the item and nothing else.
_BARE = JudgeText("", ("Instruction:\n", "instruction", "\n\nNote:\n", "note", ""))

logger = logging.getLogger(__name__)

Judges: TypeAlias = str | Judge | Sequence[str | Judge]
Source: TypeAlias = bytes | str | os.PathLike[str] | None


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
        judge_text: A copy of the official Python file with the judge's text; the pinned one when None. Another text is
            among `deviations`. Where none is to be had, a function of the caller's own is asked without it, with a
            warning and among `deviations`.

    Returns:
        The results that `summary` describes. `scores` are the majority's where several judges or repeats judged a
        picture.

    Raises:
        JudgeStopped: no request can succeed; what arrived is in `store`.
        OSError: the pinned items or the judge's text cannot be had, or the store cannot be written.
        ValueError: an argument is not one of the above, with its value; or scikit-learn is missing for an agreement.
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
    if len(judges) > 1 or repeats > 1:
        check_agreement()
    text = _judge_text(module, judges, judge_text) if protocol == "official" else None
    question = Question(
        benchmark=module,
        protocol=protocol,
        items=items,
        pictures=[_picture(place, source) for place, sources in enumerate(images) for source in sources or [None]],
        texts=[module.request(item, protocol, text) for item in items],
        wording="none" if text is _BARE else "pinned" if text is None or text.pinned else "other",
        repeats=repeats,
    )
    with ExitStack() as stack:
        if store is not None and not isinstance(store, VerdictStore):
            store = stack.enter_context(VerdictStore(Path(store)))
        answers = [_ask(one, question, store, concurrency, progress) for one in judges]
    return results_of(question, answers, seed)


def _picture(place: int, source: Source) -> Picture:
    if source is None:
        return Picture(place, problem="no image")
    if isinstance(source, bytes):
        return Picture(place, source, sha256=hashlib.sha256(source).hexdigest())
    path = Path(source)
    if not path.is_file():
        return Picture(place, path=str(path), problem="no image: there is no such file")
    try:
        with path.open("rb") as file:
            return Picture(place, path, str(path), hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return Picture(place, path=str(path), problem=f"no image: {error.strerror}")


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


def _ask(judge: Judge, question: Question, store: VerdictStore | None, concurrency: int, progress: bool) -> Answers:
    requests = question.requests()
    replies = ask(judge, requests.values(), store=store, concurrency=concurrency, progress=progress)
    outcomes = dict(zip(requests, replies, strict=True))
    verdicts: list[list[Verdict]] = [[] for _ in question.pictures]
    keyed: dict[str, dict[str, Any]] = {}
    for (place, _), outcome in outcomes.items():
        verdict = _verdict(outcome, question.items[question.pictures[place].place], question)
        verdicts[place].append(verdict)
        if outcome.reply is not None and outcome.key is not None:
            keyed[outcome.key] = as_dict(verdict)
    if store is not None:
        store.put_verdicts(keyed)
    return Answers(judge_name(judge), judge_parameters(judge), judge_prices(judge), outcomes, verdicts)


def _verdict(outcome: Outcome, item: Item, question: Question) -> Verdict:
    if outcome.reply is None:
        return Verdict(None, unscored=outcome.failure)
    verdict: Verdict = question.benchmark.parse(outcome.reply, item, question.protocol)
    if verdict.unscored and outcome.truncated:
        why = f"{verdict.unscored} (the reply reached the limit of its length)"
        return Verdict(None, verdict.reason, verdict.parts, why)
    return verdict
