"""How statistics and overlaps are shown: aligned columns of text, and one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def align(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Lines of columns as wide as their widest cell: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(widths[n]) if n < left else cell.rjust(widths[n]) for n, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_page(template: str, path: str | Path, **values: Any) -> None:
    """Render a template of this folder, everything in it escaped, into the HTML file `path`."""
    environment = Environment(
        loader=PackageLoader("echo4o_hf.data", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["share"] = lambda value: f"{value:.2%}"
    page = environment.get_template(template).render(**values)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
