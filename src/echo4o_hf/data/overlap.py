"""Which training instructions also occur among the prompts of a benchmark, and a copy of the data without them.

Texts are compared as tokens: Unicode NFKC, case folded, runs of letters and digits (so punctuation, underscores and
whitespace only separate), without an opening such as "a photo of" that says nothing of the content.

* exact: the same tokens in the same order.
* near: not exact, and the Jaccard similarity of the two sets of token n-grams is at least the threshold. Candidates
  come from datasketch's MinHashLSH, the similarity is then computed exactly.

A text of fewer tokens than an n-gram is one n-gram. Short prompts are hard to be near: with n-grams of three, changing
one token in the middle of nine leaves 4 of 10; smaller n-grams find more. Languages written without spaces have no
tokens to compare but whole phrases: there, only the exact comparison means something.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from echo4o_hf.data.display import align, write_page
from echo4o_hf.data.instructions import read_instructions

KEYS = ("prompt", "instruction")  # of a benchmark's records: GenEval and GenEval++, Imagine-Bench
PAIRS_SHOWN = 200  # per subset and benchmark in the HTML page; the report holds all

_NUM_PERM = 128
_MISSED = 1e-3  # largest chance that a pair exactly at the threshold is no candidate
_TOKEN = re.compile(r"[^\W_]+")
_OPENING = re.compile(r"^(?:(?:an?|the) )?(?:photo|photograph|picture|image) of (?=.)")


class Match(NamedTuple):
    """A benchmark's item, counted from 0 in its file, and how similar an instruction is to its prompt."""

    benchmark: str
    item: int
    exact: bool
    similarity: float

    @property
    def rank(self) -> tuple[bool, float, int]:
        """The best match has the lowest: exact before near, then by similarity, then by order in the file."""
        return not self.exact, -self.similarity, self.item


def normalise(text: str) -> str:
    """The tokens that are compared, joined by single spaces; empty where there are none."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    return _OPENING.sub("", " ".join(tokens))


def ngrams(text: str, n: int) -> set[str]:
    """The n-grams of a normalised text; the text itself where it is shorter; none of an empty one."""
    tokens = text.split()
    return {" ".join(tokens[i : i + n]) for i in range(max(len(tokens) - n, 0) + 1)} if tokens else set()


def jaccard(first: set[str], second: set[str]) -> float:
    """Size of the intersection over that of the union, of sets that are not both empty."""
    return len(first & second) / len(first | second)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file of JSON lines with "prompt" (GenEval, GenEval++) or "instruction" (Imagine-Bench).

    Raises:
        ValueError: names the file and the line that is no such record, or a file without any.
        OSError: the file cannot be read.
    """
    prompts = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                prompts.append(_read_prompt(line, f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _read_prompt(line: bytes, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{where} is not JSON: {error}; a benchmark is a file of JSON lines") from error
    keys = [key for key in KEYS if key in record] if isinstance(record, dict) else []
    if len(keys) != 1:
        raise ValueError(f'{where} must be an object with either "prompt" or "instruction", got {record!r:.80}')
    prompt = record[keys[0]]
    if not isinstance(prompt, str) or not normalise(prompt):
        raise ValueError(f'{where}: "{keys[0]}" must be a text with words, got {prompt!r:.80}')
    return prompt


class Prompts:
    """The prompts of all benchmarks, to be found by an instruction; datasketch does not keep the n-grams."""

    def __init__(self, benchmarks: Mapping[str, Sequence[str]], threshold: float = 0.7, ngram: int = 3) -> None:
        if not benchmarks:
            raise ValueError("benchmarks must name at least one file of prompts")
        if not 0.1 <= threshold <= 1:
            raise ValueError(f"threshold must be a similarity from 0.1 to 1, got {threshold}")
        if ngram < 1:
            raise ValueError(f"ngram must be at least 1, got {ngram}")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ImportError("overlap needs datasketch: pip install 'echo4o-hf[data]'") from error
        self.benchmarks = benchmarks
        self.threshold = threshold
        self.ngram = ngram
        self._exact: dict[str, list[tuple[str, int]]] = {}
        self._grams: dict[tuple[str, int], set[str]] = {}
        self._empty = MinHash(num_perm=_NUM_PERM)
        self._lsh = MinHashLSH(num_perm=_NUM_PERM, params=_bands(threshold))
        for name, prompts in benchmarks.items():
            for item, prompt in enumerate(prompts):
                text = normalise(prompt)
                self._exact.setdefault(text, []).append((name, item))
                grams = self._grams[name, item] = ngrams(text, ngram)
                self._lsh.insert((name, item), self._minhash(grams))

    def matches(self, instruction: str) -> Iterator[Match]:
        """All prompts that are exactly the instruction or near it."""
        text = normalise(instruction)
        if not text:
            return
        exact = self._exact.get(text, [])
        for name, item in exact:
            yield Match(name, item, True, 1.0)
        grams = ngrams(text, self.ngram)
        for key in self._lsh.query(self._minhash(grams)):
            if key not in exact and (similarity := jaccard(grams, self._grams[key])) >= self.threshold:
                yield Match(key[0], key[1], False, similarity)

    def _minhash(self, grams: set[str]) -> Any:
        minhash = self._empty.copy()
        minhash.update_batch(gram.encode() for gram in grams)
        return minhash


def _bands(threshold: float) -> tuple[int, int]:
    """Number of bands and rows in each: the fewest candidates among those that miss (almost) nothing.

    A pair of similarity s is a candidate with the chance 1 - (1 - s ** rows) ** bands. datasketch's own choice weighs
    missed pairs against useless candidates and puts that curve's middle at the threshold.
    """
    rows = max(rows for rows in range(1, _NUM_PERM // 2) if (1 - threshold**rows) ** (_NUM_PERM // rows) <= _MISSED)
    return _NUM_PERM // rows, rows


def overlap(
    data_dir: str | Path | None,
    benchmarks: Mapping[str, str | Path],
    *,
    subsets: Sequence[str] | None = None,
    revision: str | None = None,
    on_error: str = "raise",
    threshold: float = 0.7,
    ngram: int = 3,
) -> dict[str, Any]:
    """Compare every instruction of the data with every prompt of the benchmarks; pictures are not read.

    Args:
        data_dir: as of `load_dataset("echo-4o-image", data_dir=...)`; None: the Hub.
        benchmarks: a name to show -> a file for `read_prompts`.
        subsets: which; by default all.
        revision: of the Hub's repository.
        on_error: "raise" or "skip", as of `load_dataset`.
        threshold: the Jaccard similarity from which two texts are near, 0.1 to 1.
        ngram: tokens in an n-gram; 1 compares words whatever their order.

    Returns:
        Nothing but JSON: "threshold", "ngram"; "subsets": name -> rows; "benchmarks": name -> "file" and
        number of "prompts"; "counts": per benchmark and subset (and "all") the rows, those with an exact and those
        with only a near prompt, their share, and how many prompts were met exactly or only nearly; "pairs": each of
        these rows with the prompt of each benchmark that is most similar to it.

    Raises:
        ValueError: of an argument, of `read_prompts` or of `read_instructions`.
        OSError: a benchmark's file cannot be read.
        ImportError: datasketch is missing.
    """
    prompts = Prompts({name: read_prompts(path) for name, path in benchmarks.items()}, threshold, ngram)
    return {
        "threshold": threshold,
        "ngram": ngram,
        "benchmarks": {
            name: {"file": Path(path).name, "prompts": len(prompts.benchmarks[name])}
            for name, path in benchmarks.items()
        },
        **compare(read_instructions(data_dir, subsets, revision, on_error), prompts),
    }


def compare(rows: Iterable[Mapping[str, Any]], prompts: Prompts) -> dict[str, Any]:
    """The "subsets", "counts" and "pairs" of `overlap`, from rows with "id", "subset" and "instruction"."""
    number_of_rows: Counter[str] = Counter()
    met: dict[tuple[str, str], dict[int, bool]] = {}  # (subset, benchmark) -> prompt -> whether exactly
    pairs: list[dict[str, Any]] = []
    for row in rows:
        number_of_rows[row["subset"]] += 1
        best: dict[str, Match] = {}
        for match in prompts.matches(row["instruction"]):
            seen = met.setdefault((row["subset"], match.benchmark), {})
            seen[match.item] = match.exact or seen.get(match.item, False)
            best[match.benchmark] = min(match, best.get(match.benchmark, match), key=lambda match: match.rank)
        for name in sorted(best):
            pairs.append(_pair(row, best[name], prompts.benchmarks[name]))
    if not number_of_rows:
        raise ValueError("the data has no rows")
    subsets = dict(number_of_rows)
    return {"subsets": subsets, "counts": _counts(subsets, pairs, met, prompts.benchmarks), "pairs": pairs}


def _pair(row: Mapping[str, Any], match: Match, prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "subset": row["subset"],
        "instruction": row["instruction"],
        "benchmark": match.benchmark,
        "prompt": prompts[match.item],
        "item": match.item,
        "exact": match.exact,
        "similarity": round(match.similarity, 4),
    }


def _counts(
    subsets: Mapping[str, int],
    pairs: Iterable[Mapping[str, Any]],
    met: Mapping[tuple[str, str], Mapping[int, bool]],
    benchmarks: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """One entry per benchmark and subset, and per benchmark one for all subsets where there are several."""
    found = Counter((pair["benchmark"], pair["subset"], pair["exact"]) for pair in pairs)
    counts = []
    for name, prompts in benchmarks.items():
        for label in [*subsets, *(["all"] if len(subsets) > 1 else [])]:
            within = list(subsets) if label == "all" else [label]
            rows = sum(subsets[subset] for subset in within)
            exact, near = (sum(found[name, subset, kind] for subset in within) for kind in (True, False))
            touched = {item for subset in within for item in met.get((subset, name), {})}
            exactly = {item for subset in within for item, kind in met.get((subset, name), {}).items() if kind}
            counts.append(
                {
                    "benchmark": name,
                    "subset": label,
                    "rows": rows,
                    "exact": exact,
                    "near": near,
                    "share": (exact + near) / rows,
                    "prompts": len(prompts),
                    "prompts_exact": len(exactly),
                    "prompts_near": len(touched - exactly),
                }
            )
    return counts


def table(report: Mapping[str, Any]) -> str:
    """The counts of a report of `overlap` as text, one line per benchmark and subset."""
    header = ["benchmark", "subset", "rows", "exact", "near", "share", "prompts", "met exactly", "met nearly"]
    names = ("rows", "exact", "near", "share", "prompts", "prompts_exact", "prompts_near")
    rows = [
        [
            entry["benchmark"],
            entry["subset"],
            *(f"{entry[name]:.2%}" if name == "share" else f"{entry[name]:,}" for name in names),
        ]
        for entry in report["counts"]
    ]
    return align(header, rows, left=2)


def write_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a report of `overlap` as JSON."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def write_html(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a report of `overlap` as one self-contained page: the counts, and the pairs to look at."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for pair in sorted(report["pairs"], key=lambda pair: (not pair["exact"], -pair["similarity"])):
        groups.setdefault((pair["benchmark"], pair["subset"]), []).append(pair)
    order = {(entry["benchmark"], entry["subset"]): n for n, entry in enumerate(report["counts"])}
    groups = dict(sorted(groups.items(), key=lambda group: order[group[0]]))
    write_page("overlap.html.jinja", path, report=report, groups=groups, shown=PAIRS_SHOWN)


def drop(
    report: Mapping[str, Any],
    output: str | Path,
    data_dir: str | Path | None = None,
    *,
    revision: str | None = None,
    on_error: str = "raise",
) -> dict[str, int]:
    """Write the subsets that a report of `overlap` compared, without the rows of its pairs, in our Parquet layout.

    Args:
        report: of the same data; choose its threshold for what shall go.
        output: folder, as of `build`.
        data_dir: as of `overlap`.
        revision: as of `overlap`.
        on_error: as of `overlap`.

    Returns:
        Number of rows of each subset in `output`.

    Raises:
        ValueError: of `build`, or the data has other rows than those of the report (fewer are fine with "skip", which
            also leaves out rows with bad pictures).
    """
    from echo4o_hf.data.build import build

    exclude = frozenset(pair["id"] for pair in report["pairs"])
    written = build(
        output,
        data_dir,
        subsets=list(report["subsets"]),
        revision=revision,
        on_error=on_error,
        exclude=exclude,
        overlap=report,
    )
    dropped = Counter(subset for subset, _ in {(pair["subset"], pair["id"]) for pair in report["pairs"]})
    for subset, rows in report["subsets"].items():
        left = rows - dropped[subset]
        if written[subset] > left or (on_error == "raise" and written[subset] < left):
            raise ValueError(
                f"{str(output)!r} has {written[subset]} rows of {subset} where the report leaves "
                f"{left}: it is of other data; compare these and build again into a new folder"
            )
    return written
