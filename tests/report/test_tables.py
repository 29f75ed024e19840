import dataclasses
import re
import shutil
import subprocess
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
        "| model | Color | Count | overall (95 % interval) | unscored |",
        "|---|---:|---:|---:|---:|",
        r"| **a\_b\|c** | – | 0.500 | 0.500 (0.250 to 0.750) | 1 of 3 |",
        "| **theirs** | – | 0.500 | 0.750 (0.250 to 0.750) | 1 of 3 |",
        "| GPT-4o | 0.900 | 0.675 | 0.739 | |",
        "| Echo-4o | – | 0.575 | 0.200 | |",
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
    assert text[0].startswith(r"% \usepackage{booktabs}")
    start = text.index(r"\toprule")
    assert text[start : start + 9] == [
        r"\toprule",
        r"model & Color & Count & overall & unscored \\",
        r"\midrule",
        r"a\_b\textbar{}c & \textendash{} & 0.500 & 0.500 {\scriptsize[0.250, 0.750]} & 1 of 3 \\",
        r"theirs & \textendash{} & 0.500 & 0.750 {\scriptsize[0.250, 0.750]} & 1 of 3 \\",
        r"\midrule",
        r"GPT-4o & 0.900 & 0.675 & 0.739 & \\",
        r"Echo-4o & \textendash{} & 0.575 & 0.200 & \\",
        r"\bottomrule",
    ]
    assert r"% not as published (a\_b\textbar{}c): 50 \% \& more" in text
    assert (
        r"theirs $-$ a\_b\textbar{}c & $-$0.250 {\scriptsize[$-$0.500, +0.050]} & \textless{} 0.001"
        r" & McNemar exact, different judges & \textendash{} & 2 \\"
    ) in text
    assert r"a, b & 2 & 50.0 \% & 0.250 \\" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3


@pytest.mark.parametrize(
    ("text", "markdown", "latex"),
    [
        ("a|b\n# c", r"a\|b \# c", r"a\textbar{}b \# c"),
        (
            "<b>&amp;*_`[x](y)",
            r"\<b\>\&amp;\*\_\`\[x\](y)",
            r"\textless{}b\textgreater{}\&amp;{*}\_\textasciigrave{}{[}x{]}(y)",
        ),
        ("\\end{x} ~^ 5 % $\u202e", r"\\end{x} \~^ 5 % \$\[U+202E\]", None),
        ("\\ ~^{}%$", None, r"\textbackslash{} \textasciitilde{}\textasciicircum{}\{\}\%\$"),
        ('"a"--b', None, r"{\char`\"}a{\char`\"}-{}-b"),
    ],
)
def test_hostile_strings_stay_text(text: str, markdown: str | None, latex: str | None) -> None:
    assert markdown is None or markdown_text(text) == markdown
    assert latex is None or latex_text(text) == latex


COMMANDS = {
    *("begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "scriptsize", "kappa", "char"),
    *("textbackslash", "textasciitilde", "textasciicircum", "textasciigrave", "textless", "textgreater", "textbar"),
    *("textendash", "\\", ",", '"', *"&%$#_{}"),
}


def check_latex(text: str) -> None:
    """Whether all is known and closed, and every row has as many cells as its table has columns."""
    columns, environments, depth, math = 0, [], 0, False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("%"):
            continue
        cells = 1
        for command, mark in re.findall(r"\\([a-zA-Z]+|.)|([^\\])", line):
            assert command == "" or command in COMMANDS, f"line {number}: {command}"
            assert mark not in ("%", "#", "^", "_", "~", "\t"), f"line {number}: {mark} is not escaped"
            depth += (mark == "{") - (mark == "}")
            math ^= mark == "$"
            cells += mark == "&"
            assert depth >= 0, f"line {number}: more braces close than open"
        assert depth == 0 and not math, f"line {number}: open at its end"
        for verb, name, spec in re.findall(r"\\(begin|end)\{(\w+)\}(?:\{([lr]+)\})?", line):
            environments.append(name) if verb == "begin" else environments.remove(name)
            columns = len(spec) if spec else columns
        if line.endswith(r"\\"):
            assert cells == columns, f"line {number}: {cells} cells of {columns}"
        assert not re.match(r"\s*[\[*]", line), f"line {number} begins with an argument of the \\\\ before"
    assert not environments


def test_latex_of_hostile_names_is_well_formed(run: Run, other: Run, tmp_path: Path) -> None:
    everything = "".join(map(chr, range(32, 127)))
    names = [f"{start}{everything}\u202e" for start in "[*%"]
    pair = {**AGREEMENT["pairs"][0], "judges": names[:2]}
    results = {**run.results, "deviations": [everything], "agreement": {"pairs": [pair]}}
    scores = {**run.results["scores"], "per_tag": {everything: 0.5}, "per_tag_confidence_interval": {}}
    runs = [
        dataclasses.replace(one, name=name, results=results) for one, name in zip((run, other), names, strict=False)
    ]
    runs.append(dataclasses.replace(run, name=names[2], results={**results, "scores": scores}))
    comparisons = [Comparison(runs[0], runs[1], FOUND)]
    write_tables(runs, tmp_path / "out.tex", "latex", published=PUBLISHED, comparisons=comparisons)
    text = (tmp_path / "out.tex").read_text(encoding="utf-8")
    check_latex(text)
    text = text.partition("\n")[2]  # without a comment
    for broken in (text.replace(r"\_", "_", 1), text.replace(" & ", " ", 1), text.replace("}", "", 1)):
        with pytest.raises(AssertionError):
            check_latex(broken)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(run: Run, other: Run, tmp_path: Path) -> None:
    tables = "\n".join(
        lines(run, dataclasses.replace(other, name="".join(map(chr, range(32, 127)))), "latex", tmp_path)
    )
    start = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
    (tmp_path / "page.tex").write_text(f"{start}{tables}\n\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
