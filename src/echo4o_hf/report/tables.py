"""Scores as Markdown or LaTeX tables, with intervals and published rows, for papers and model cards."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from echo4o_hf.report.runs import Comparison, Published, Run, sections, visible

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": r"\textendash{}",
    "\N{MINUS SIGN}": "$-$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char`\"}",  # \textquotedbl needs the encoding T1
    "`": r"\textasciigrave{}",  # else two are one quote
    **{bracket: f"{{{bracket}}}" for bracket in "[]*"},  # at the start of a row they are arguments of \\ before
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def write_tables(
    runs: Sequence[Run],
    output: Path,
    form: Literal["markdown", "latex"],
    *,
    published: Published | None = None,
    comparisons: Sequence[Comparison] = (),
) -> None:
    """Write a table of scores for each section, and one of the paired tests where there are several runs.

    Args:
        runs: As for the page.
        output: The file.
        form: LaTeX tables need the package booktabs.
        published: As for the page.
        comparisons: As for the page.

    Raises:
        ValueError: the runs do not fit together, or do not fit their schema.
        OSError: the file cannot be written.
    """
    text = tables_text(runs, form, published=published, comparisons=comparisons)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, output)


def tables_text(
    runs: Sequence[Run],
    form: Literal["markdown", "latex"],
    *,
    published: Published | None = None,
    comparisons: Sequence[Comparison] = (),
) -> str:
    """What `write_tables` writes."""
    environment = Environment(
        loader=PackageLoader("echo4o_hf.report", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = markdown_text if form == "markdown" else latex_text
    template = environment.get_template("tables.md.jinja" if form == "markdown" else "tables.tex.jinja")
    return template.render(sections=sections(runs, published, comparisons))


def markdown_text(text: object) -> str:
    """Text that Markdown, inside a table or not, shows as it is."""
    line = " ".join(visible(str(text)).split())
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", line)


def latex_text(text: object) -> str:
    """Text that LaTeX sets as it is."""
    line = " ".join(visible(str(text)).split())
    return "".join(_LATEX.get(character, character) for character in line).replace("--", "-{}-")
