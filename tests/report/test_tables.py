import dataclasses
from pathlib import Path
from typing import Any

import pytest
from report_results import PUBLISHED

from echo4o_hf.report.runs import Comparison, Run
from echo4o_hf.report.tables import latex_text, markdown_text, write_tables

FOUND = {
    "difference": -0.25,
    "confidence_interval": [-0.5, 0.05],
    "test": "McNemar exact",
    "p_value": 0.0001,
    "smallest_detectable_difference": None,
    "per_group": {},
    "num_items": 2,
    "num_left_out": 1,
    "same_judges": False,
}
AGREEMENT = {"pairs": [{"judges": ["a", "b"], "num_images": 2, "percent_agreement": 50.0, "kappa": 0.25}]}


def lines(run: Run, other: Run, form: Any, tmp_path: Path) -> list[str]:
    run = dataclasses.replace(run, name="a_b|c", results={**run.results, "deviations": ["50 % & more"]})
    other = dataclasses.replace(other, results={**other.results, "agreement": AGREEMENT})
    comparisons = [Comparison(run, other, FOUND)]
    write_tables([run, other], tmp_path / "out", form, published=PUBLISHED, comparisons=comparisons)
    return (tmp_path / "out").read_text(encoding="utf-8").splitlines()


def test_markdown(run: Run, other: Run, tmp_path: Path) -> None:
    text = lines(run, other, "markdown", tmp_path)
    assert text[:8] == [
        "## GenEval++",
        "",
        r"| model | counting | color\_attr | overall (95 % interval) | unscored |",
        "|---|---:|---:|---:|---:|",
        r"| **a\_b\|c** | 0.500 | – | 0.500 (0.250 to 0.750) | 1 of 3 |",
        "| **theirs** | 0.500 | – | 0.750 (0.250 to 0.750) | 1 of 3 |",
        "| GPT-4o | 0.675 | 0.900 | 0.739 | |",
        "| Echo-4o | 0.575 | – | 0.200 | |",
    ]
    assert r"- Not as published (a\_b\|c): 50 % \& more" in text
    minus = "\N{MINUS SIGN}"
    assert (
        rf"| theirs {minus} a\_b\|c | {minus}0.250 ({minus}0.500 to +0.050) | \< 0.001 "
        "| McNemar exact, different judges | – | 2 |"
    ) in text
    assert "| a, b | 2 | 50.0 % | 0.250 |" in text


def test_latex(run: Run, other: Run, tmp_path: Path) -> None:
    text = lines(run, other, "latex", tmp_path)
    assert text[0] == r"% \usepackage{booktabs}"
    start = text.index(r"\toprule")
    assert text[start : start + 9] == [
        r"\toprule",
        r"model & counting & color attr & overall \\",
        r"\midrule",
        r"a\_b\textbar{}c & 0.500 & -- & 0.500 {\scriptsize[0.250, 0.750]} \\",
        r"theirs & 0.500 & -- & 0.750 {\scriptsize[0.250, 0.750]} \\",
        r"\midrule",
        r"GPT-4o & 0.675 & 0.900 & 0.739 \\",
        r"Echo-4o & 0.575 & -- & 0.200 \\",
        r"\bottomrule",
    ]
    assert r"% not as published (a\_b\textbar{}c): 50 \% \& more" in text
    assert (
        r"theirs $-$ a\_b\textbar{}c & $-$0.250 {\scriptsize[$-$0.500, +0.050]} & \textless{} 0.001"
        r" & McNemar exact, different judges & -- & 2 \\"
    ) in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2


@pytest.mark.parametrize(
    ("text", "markdown", "latex"),
    [
        ("a|b\n# c", r"a\|b \# c", r"a\textbar{}b \# c"),
        ("<b>&amp;*_`[x](y)", r"\<b\>\&amp;\*\_\`\[x\](y)", r"\textless{}b\textgreater{}\&amp;*\_`[x](y)"),
        ("\\end{x} ~^ 5 % $\u202e", r"\\end{x} \~^ 5 % \$\[U+202E\]", None),
        ("\\ ~^{}%$", None, r"\textbackslash{} \textasciitilde{}\textasciicircum{}\{\}\%\$"),
    ],
)
def test_hostile_strings_stay_text(text: str, markdown: str | None, latex: str | None) -> None:
    assert markdown is None or markdown_text(text) == markdown
    assert latex is None or latex_text(text) == latex
