import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from echo4o_hf.report.model_index import write_model_index
from echo4o_hf.report.runs import Run


def test_a_model_card_takes_it(run: Run, tmp_path: Path) -> None:
    name = "a: [model] \u202e'"
    imagine = {
        "imagine_bench": 7.5,
        "per_type": {"Hybridization": 7.5},
        "num_items": 3,
        "num_unscored": 0,
        "confidence_interval": None,
    }
    results = {**run.results, "benchmark": "imagine_bench", "scores": imagine}
    runs = [dataclasses.replace(run, name=name), Run(name, results, tmp_path)]
    write_model_index(runs, tmp_path / "index.yaml")
    card = ModelCard(f"---\n{(tmp_path / 'index.yaml').read_text(encoding='utf-8')}---\n")
    assert card.data.model_name == "a: [model] [U+202E]'"
    found = [
        (one.task_type, one.dataset_type, one.metric_type, one.metric_name, one.metric_value)
        for one in card.data.eval_results or []
    ]
    assert found == [
        ("text-to-image", "geneval_pp", "geneval_pp", "GenEval++ overall", 0.5),
        ("text-to-image", "geneval_pp", "geneval_pp", "GenEval++ counting", 0.5),
        ("text-to-image", "imagine_bench", "imagine_bench", "Imagine-Bench overall", 7.5),
        ("text-to-image", "imagine_bench", "imagine_bench", "Imagine-Bench Hybridization", 7.5),
    ]
    told = (card.data.eval_results or [])[0].metric_args
    assert told is not None
    assert told["judges"] == ["openai:gpt-4.1"] and told["confidence_interval"] == [0.25, 0.75]


def test_only_one_model_with_a_score(run: Run, other: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one model, got ours, theirs"):
        write_model_index([run, other], tmp_path / "index.yaml")
    scores = {**run.results["scores"], "geneval_pp": None}
    with pytest.raises(ValueError, match=r"ours has no overall score on GenEval\+\+"):
        write_model_index(
            [dataclasses.replace(run, results={**run.results, "scores": scores})], tmp_path / "index.yaml"
        )
    assert not (tmp_path / "index.yaml").exists()
