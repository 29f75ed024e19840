"""Scores as the `model-index` metadata of a model card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from echo4o_hf.report.runs import Published, Run, Section, sections, visible


def write_model_index(runs: Sequence[Run], output: Path, published: Published | None = None) -> None:
    """Write YAML that goes between the `---` lines of the card, for one model on one or several benchmarks.

    Args:
        runs: Of the model.
        output: The file.
        published: Rows of the literature by the questions that they answer: other items are called so.

    Raises:
        ValueError: the runs are of more than one model, an overall score is missing, or they do not fit their schema.
        OSError: the file cannot be written.
    """
    data = model_index(runs, published)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    temporary.write_text(data.to_yaml() + "\n", encoding="utf-8")
    os.replace(temporary, output)


def model_index(runs: Sequence[Run], published: Published | None = None) -> ModelCardData:
    """What `write_model_index` writes, as metadata that a card takes; see there."""
    names = list(dict.fromkeys(run.name for run in runs))
    if len(names) != 1:
        raise ValueError(f"a model card is about one model, got {', '.join(names)}; give all files one name")
    parts = sections(runs, published)
    return ModelCardData(
        model_name=visible(names[0]), eval_results=[result for section in parts for result in _results(section)]
    )


def _results(section: Section) -> list[EvalResult]:
    """The overall score and those of the groups."""
    (row,), (run,) = section.rows, section.runs
    if row.overall.value is None:
        raise ValueError(f"{row.name} has no overall score on {section.title}: a whole group is unscored")
    scores = {"overall": row.overall, **row.groups}
    results = run.results
    told = {
        "judges": [judge["name"] for judge in results["judges"]],
        "protocol": results["protocol"],
        "items_sha256": results["items_sha256"],
        "num_items": row.num_items,
        "num_unscored": row.num_unscored,
        "deviations": results["deviations"],
    }
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=results["benchmark"],
            dataset_name=section.title,
            metric_type=section.metric,
            metric_name=f"{section.title} {visible(name)}",
            metric_value=round(score.value, 6),
            metric_args={
                **(told if name == "overall" else {}),
                **({"confidence_interval": [round(end, 6) for end in score.interval]} if score.interval else {}),
            },
        )
        for name, score in scores.items()
        if score.value is not None
    ]
