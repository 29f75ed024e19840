"""A Space for a metric: the script that `evaluate.load` finds on the Hub, a small app, a card."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from jinja2 import Environment, PackageLoader, StrictUndefined

from echo4o_hf.benchmarks import geneval_pp, imagine_bench
from echo4o_hf.benchmarks.metrics import GenEvalPP, ImagineBench, script

GRADIO = "6.31.0"  # the version the app was tried with

_METRICS = {
    geneval_pp.NAME: (GenEvalPP, "GenEval++", geneval_pp.PUBLISHED_JUDGE),
    imagine_bench.NAME: (ImagineBench, "Imagine-Bench", imagine_bench.PUBLISHED_JUDGE),
}
# Of our own, for the benchmarks' items are not ours to publish.
_EXAMPLES: dict[str, dict[str, Any]] = {
    geneval_pp.NAME: {
        "tag": "color_count_attr",
        "prompt": "a photo of two blue teapots and one yellow ladder",
        "include": [
            {"class": "teapot", "count": 2, "color": "blue"},
            {"class": "ladder", "count": 1, "color": "yellow"},
        ],
    },
    imagine_bench.NAME: {
        "id": 1,
        "instruction": "A photo of a teapot knitted from thick wool.",
        "note": "The wool is the fantasy; spout, handle and lid keep it a teapot.",
        "type": "MATERIAL",
    },
}


def write_space(name: str, output: str | os.PathLike[str], push_to_hub: str | None = None) -> list[Path]:
    """Write the Space of a metric, and upload it where asked to.

    `evaluate.load` looks for a script that is named like its folder or repository: it is written under the metric's
    name and, where they differ, under theirs.

    Args:
        name: "geneval_pp" or "imagine_bench".
        output: folder to write; other files in it stay as they are.
        push_to_hub: repository to upload to, such as "me/geneval_pp"; made where it does not exist.

    Returns:
        The files written.

    Raises:
        OSError: the folder cannot be written, or the Hub not reached.
        ValueError: no metric of ours has this name.
    """
    text = script(name)
    folder = Path(output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    repository = push_to_hub or folder.name
    contents = {
        f"{name}.py": text,
        f"{repository.rsplit('/', 1)[-1]}.py": text,
        "app.py": _render("app.py.jinja", name, repository),
        "README.md": _render("README.md.jinja", name, repository),
        "requirements.txt": f"echo4o-hf[judges]>={version('echo4o-hf')}\n",
    }
    uploaded = list(contents)
    contents[f"{folder.name}.py"] = text
    written = []
    for file, content in contents.items():
        temporary = folder / f"{file}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, folder / file)
        written.append(folder / file)
    if push_to_hub:
        api = HfApi()
        api.create_repo(push_to_hub, repo_type="space", space_sdk="gradio", exist_ok=True)
        api.upload_folder(
            repo_id=push_to_hub,
            repo_type="space",
            folder_path=folder,
            allow_patterns=uploaded,
            commit_message=f"Metric {name} of echo4o-hf {version('echo4o-hf')}",
        )
    return written


def _render(template: str, name: str, repository: str) -> str:
    metric_class, title, judge = _METRICS[name]
    info = metric_class().info
    environment = Environment(
        loader=PackageLoader("echo4o_hf.benchmarks"), undefined=StrictUndefined, keep_trailing_newline=True
    )  # no HTML is made here, so nothing is escaped
    return environment.get_template(template).render(
        name=name,
        class_name=metric_class.__name__,
        title=title,
        description=info.description,
        inputs=info.inputs_description,
        citation=info.citation,
        repository=repository,
        item=json.dumps(_EXAMPLES[name], indent=2),
        item_python=_EXAMPLES[name],
        judge=judge.removeprefix("openai:"),
        gradio=GRADIO,
    )
