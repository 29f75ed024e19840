"""The card of a finished run."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import TrainerState

import echo4o_hf
from echo4o_hf.benchmarks.evaluation import evaluate_images, write_results
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.card import write_card

ROOT = Path(__file__).parents[2]
ITEM = {"tag": "counting", "prompt": "two red circles", "include": [{"class": "circle", "color": "red", "count": 2}]}


def state(steps: int = 40) -> TrainerState:
    log = [{"step": step, "loss": 1 / step, "flow_loss": 1 / step} for step in range(10, steps + 1, 10)]
    return TrainerState(global_step=steps, max_steps=steps, log_history=log)


def arguments(folder: Path, **settings) -> Echo4oTrainingArguments:
    return Echo4oTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        **{"model": "Yejy53/Echo-4o", "dataset": "echo-4o-image", "max_steps": 40, **settings},
    )


def validated(folder: Path, step: int, judge: str) -> None:
    """What validation leaves: a grid, and results of a judge that finds nothing right, or everything."""
    (folder / "validation" / f"step-{step}").mkdir(parents=True)
    grid = folder / "validation" / f"step-{step}.png"
    Image.new("RGB", (264, 280), "white").save(grid)
    results = evaluate_images("geneval_pp", [[grid]], [ITEM], judge=judge, progress=False)
    write_results(results, folder / "validation" / f"step-{step}" / "results.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my_adapter"
    for step, correct in ((0, 0), (40, 1)):
        replies = tmp_path / f"{correct}.jsonl"
        replies.write_text(
            json.dumps({"prompt": "two red circles", "reply": json.dumps({"correct": correct, "reason": "counted"})})
        )
        validated(folder, step, f"scripted:{replies}")
    return folder


def test_a_card_says_where_it_comes_from_and_how_it_was_made(run: Path) -> None:
    settings = {"mixture": [{"dataset": "echo-4o-image", "weight": 2}, {"dataset": "me/cats"}], "dataset": None}
    write_card(arguments(run, validation_prompts=['a "tomato"'], validation_steps=20, **settings), state())
    card = ModelCard.load(run / "README.md", ignore_metadata_errors=False)
    card.validate_fields = None
    assert card.data.base_model == "Yejy53/Echo-4o" and card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["Yejy53/Echo-4o-Image", "me/cats"]
    assert card.data.library_name == "peft" and "lora" in card.data.tags and card.data.license == "apache-2.0"
    assert "a LoRA adapter, 40 steps" in card.text
    assert "| lora rank | 64 |" in card.text and "| learning rate | 2e-05 |" in card.text
    assert "pipe.load_lora_weights(" in card.text and r'pipe("a \"tomato\"")' in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    for file in re.findall(r"!\[.*?\]\((.+?)\)", card.text):
        Image.open(run / file).verify()
    assert re.findall(r"!\[.*?\]\((.+?)\)", card.text) == ["card/loss.png", "card/step-0.png", "card/step-40.png"]


def test_scores_before_and_after_are_a_table_and_the_last_are_metadata(run: Path) -> None:
    write_card(arguments(run), state())
    card = ModelCard.load(run / "README.md")
    overall, tag = card.data.eval_results
    assert card.data.model_name == "my_adapter"
    assert (overall.metric_type, overall.metric_value) == ("geneval_pp", 1.0)
    assert overall.metric_name == "GenEval++'s protocol, other items overall"
    assert tag.metric_name.endswith("counting")
    assert re.search(r"\*\*step 0\*\* \| 0\.000 \| 0\.000", card.text)
    assert re.search(r"\*\*step 40\*\* \| 1\.000 \| 1\.000", card.text)
    assert "step 40 − step 0 | +1.000" in card.text


def test_nothing_of_the_users_home_and_no_key_is_in_a_card(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "my_base"
    base.mkdir()
    secrets = {"hub_token": "hf_secret", "data_dir": str(tmp_path / "data"), "latent_cache": str(tmp_path / "cache")}
    secrets |= {"run_name": "secret-run", "dataset": str(tmp_path / "my_data"), "model": str(base), "method": "full"}
    (tmp_path / "my_data").mkdir()
    write_card(arguments(run, **secrets), state())
    text = (run / "README.md").read_text(encoding="utf-8")
    assert "`my_base` fine-tuned on `my_data`" in text and "all weights" in text
    for secret in (str(tmp_path), str(Path.home()) + "/", "hf_secret", "secret-run", "lora"):
        assert secret not in text.replace("explor", "")
    card = ModelCard(text)
    assert card.data.base_model is None and card.data.datasets is None and card.data.library_name == "diffusers"


def test_a_run_without_validation_and_log_has_a_card_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"method": "generation", "model": "bagel-miniature", "dataset": "echo4o-miniature"}
    write_card(arguments(folder, hub_model_id="me/tuned", **settings), TrainerState(global_step=3))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "GPT-4o" not in text and "# tuned" in text and "`bagel-miniature` fine-tuned on `echo4o-miniature`" in text
    assert 'from_pretrained("me/tuned", dtype=torch.float32)\n' in text and "![" not in text
    assert not any(line.startswith("## Before") for line in text.splitlines())


def test_the_card_ends_as_the_repositorys() -> None:
    packaged = Path(echo4o_hf.__file__).parent / "training" / "model_card.md"
    assert (ROOT / "model_card" / "README.md").read_bytes() == packaged.read_bytes()
    assert "\n## Limits\n" in packaged.read_text(encoding="utf-8")


def test_a_score_that_nobody_gave_is_in_no_metadata(tmp_path: Path) -> None:
    judge = tmp_path / "silent.jsonl"
    judge.write_text(json.dumps({"prompt": "two red circles", "reply": "I cannot tell."}))
    validated(tmp_path / "run", 40, f"scripted:{judge}")
    card = ModelCard(write_card(arguments(tmp_path / "run"), state()).read_text(encoding="utf-8"))
    assert card.data.eval_results is None
    assert "1 of 1 |" in card.text


def test_headings_come_once_and_in_order(run: Path) -> None:
    text = write_card(arguments(run), state()).read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Use", "## Training", "## Before and after", "## Limits", "## Licence and sources"]
    assert "\n\n\n" not in text and all(f"\n\n{heading}\n\n" in text for heading in headings)
