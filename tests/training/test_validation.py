"""Validation: pictures and scores while training, and a training that does not notice."""

import importlib.util
import io
import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from echo4o_hf.benchmarks.evaluation import read_results
from echo4o_hf.judges.judge import JudgeStopped
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.pipeline.samples import noise_seed
from echo4o_hf.training.grid import picture_grid
from echo4o_hf.training.validation import ValidationCallback, read_benchmark, undisturbed

spec = importlib.util.spec_from_file_location("training_process", Path(__file__).with_name("training_process.py"))
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)

PROMPTS = ["two red circles", "a blue star above a green ring"]
ITEMS = [
    {"tag": "counting", "prompt": "two red circles", "include": [{"class": "circle", "color": "red", "count": 2}]},
    {"tag": "color_attr", "prompt": "a blue star", "include": [{"class": "star", "color": "blue", "count": 1}]},
]


@pytest.fixture
def trained(tmp_path):
    """Function (settings) -> trainer after three steps, with validation unless `validation_steps` is None."""

    def train(folder="run", **settings):
        defaults = {"validation_prompts": PROMPTS, "validation_steps": 2, "validation_inference_steps": 3}
        if settings.get("validation_steps", 2) is None:
            defaults = {}
        settings = {"output_dir": str(tmp_path / folder), "max_steps": 3, "save_strategy": "no"} | defaults | settings
        trainer = process.make_trainer(rows=12, **settings)
        if trainer.args.validation_steps:
            trainer.add_callback(ValidationCallback(trainer))
        trainer.train()
        return trainer

    return train


@pytest.fixture
def benchmark(tmp_path) -> dict[str, str]:
    """Settings for two items and a judge that finds the first right and the second wrong."""
    items, replies = tmp_path / "items.jsonl", tmp_path / "replies.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    answers = zip(ITEMS, (1, 0), strict=True)
    lines = [{"prompt": item["prompt"], "reply": json.dumps({"correct": one, "reason": ""})} for item, one in answers]
    replies.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"validation_benchmark": str(items), "validation_judge": f"scripted:{replies}"}


def drawn(trainer, prompts=PROMPTS) -> list[Image.Image]:
    """What the pipeline draws with the model as it is."""
    model = trainer.model.eval()
    pipeline = Echo4oPipeline(
        model, trainer.encoder.vae, FlowMatchEulerDiscreteScheduler(shift=3.0), trainer.processing_class
    )
    generators = [torch.Generator().manual_seed(noise_seed(0, number, 0)) for number in range(len(prompts))]
    return pipeline(prompts, num_inference_steps=3, generator=generators).images


def same(image: Path | Image.Image, other: Image.Image) -> bool:
    image = Image.open(image) if isinstance(image, Path) else image
    return np.array_equal(np.asarray(image), np.asarray(other))


def folder_of(trainer) -> Path:
    return Path(trainer.args.output_dir, "validation")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_does_not_notice(trained, benchmark, method):
    settings = {"method": method, "ema_decay": 0.9}
    if method == "lora":
        settings |= {"lora_dropout": 0.3, "lora_rank": 4}  # which draws from the global generator
    without = trained("without", validation_steps=None, **settings)
    with_it = trained("with", validation_steps=1, **settings, **benchmark)
    assert len(list(folder_of(with_it).glob("*.png"))) == 4

    def logged(trainer):
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]

    assert logged(with_it) == logged(without) and len(logged(without)) == 3
    others = dict(without.model.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in with_it.model.named_parameters())
    averages = zip(with_it.average.shadow_params, without.average.shadow_params, strict=True)
    assert all(torch.equal(one, other) for one, other in averages)


def test_pictures_before_the_first_step_every_few_and_after_the_last(trained):
    trainer = trained(learning_rate=0.01)
    assert sorted(path.name for path in folder_of(trainer).iterdir()) == ["step-0.png", "step-2.png", "step-3.png"]
    assert same(folder_of(trainer) / "step-3.png", picture_grid(drawn(trainer), PROMPTS))
    assert not same(folder_of(trainer) / "step-0.png", Image.open(folder_of(trainer) / "step-3.png"))


def test_the_same_weights_draw_the_same(trained):
    trainer = trained(learning_rate=0.0)
    assert same(folder_of(trainer) / "step-0.png", Image.open(folder_of(trainer) / "step-3.png"))
    other = trained("other", learning_rate=0.0, validation_seed=1)
    assert not same(folder_of(trainer) / "step-0.png", Image.open(folder_of(other) / "step-0.png"))


def test_the_average_draws_where_there_is_one(trained):
    trainer = trained(learning_rate=0.01, ema_decay=0.999)
    last = folder_of(trainer) / "step-3.png"
    assert not same(last, picture_grid(drawn(trainer), PROMPTS))
    with trainer.averaged():
        assert same(last, picture_grid(drawn(trainer), PROMPTS))


def test_adapters_draw(trained):
    trainer = trained(method="lora", learning_rate=0.01)
    last = folder_of(trainer) / "step-3.png"
    assert same(last, picture_grid(drawn(trainer), PROMPTS))
    with trainer.model.disable_adapter():
        assert not same(last, picture_grid(drawn(trainer), PROMPTS))


def test_tensorboard_gets_pictures_and_scores(trained, benchmark):
    trainer = trained(report_to="tensorboard", **benchmark)
    events = EventAccumulator(str(next(Path(trainer.args.output_dir, "runs").iterdir())))
    events.Reload()
    pictures = events.Images("validation")
    assert [picture.step for picture in pictures] == [0, 2, 3]
    shown = Image.open(io.BytesIO(pictures[-1].encoded_image_string))
    assert same(folder_of(trainer) / "step-3.png", shown)
    assert [(score.step, score.value) for score in events.Scalars("eval/geneval_pp")] == [(0, 0.5), (2, 0.5), (3, 0.5)]


def test_a_benchmark_is_scored_and_its_results_stay(trained, benchmark):
    trainer = trained(validation_prompts=None, **benchmark)
    scores = [line for line in trainer.state.log_history if "eval_geneval_pp" in line]
    assert [(line["step"], line["eval_geneval_pp"], line["eval_num_unscored"]) for line in scores] == [
        (0, 0.5, 0),
        (2, 0.5, 0),
        (3, 0.5, 0),
    ]
    results = read_results(folder_of(trainer) / "step-3" / "results.json")
    assert [item["images"][0]["verdict"]["score"] for item in results["items"]] == [1.0, 0.0]
    prompts = [item["prompt"] for item in ITEMS]
    for item, image in zip(results["items"], drawn(trainer, prompts), strict=True):
        assert same(folder_of(trainer) / "step-3" / item["images"][0]["path"], image)
    assert not list(folder_of(trainer).glob("*.png"))


def test_a_step_is_logged_though_it_is_scored(trained, benchmark):
    trainer = trained(logging_steps=1, validation_steps=1, **benchmark)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3]


def test_its_time_is_not_the_trainings(trained):
    trainer = trained()
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ValidationCallback))
    start, before = time.monotonic(), trainer._last_log
    callback.validate(3)
    assert 0 < trainer._last_log - before <= time.monotonic() - start


def test_a_judge_that_cannot_go_on_costs_the_score_and_not_the_run(trained, benchmark, tmp_path, caplog):
    trainer = process.make_trainer(
        output_dir=str(tmp_path / "run"), max_steps=1, validation_steps=1, validation_inference_steps=2, **benchmark
    )
    callback = ValidationCallback(trainer)

    def out_of_reach(system, prompt, images):
        raise JudgeStopped("nobody answers")

    callback.judges = [out_of_reach]
    trainer.add_callback(callback)
    logging.getLogger("transformers").propagate = logging.getLogger("echo4o_hf").propagate = True
    trainer.train()
    assert "nobody answers" in caplog.text
    assert trainer.state.global_step == 1
    assert not any("eval_geneval_pp" in line for line in trainer.state.log_history)


def test_a_resumed_run_does_not_begin_with_pictures(trained, tmp_path):
    trained(save_strategy="steps", save_steps=2)
    for path in (tmp_path / "run" / "validation").iterdir():
        path.unlink()
    trainer = process.make_trainer(
        rows=12,
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        validation_prompts=PROMPTS,
        validation_steps=2,
        validation_inference_steps=3,
    )
    trainer.add_callback(ValidationCallback(trainer))
    trainer.train(str(tmp_path / "run" / "checkpoint-2"))
    assert [path.name for path in folder_of(trainer).iterdir()] == ["step-3.png"]


def test_modes_randomness_and_attention_are_as_before():
    model = process.make_model(process.load_miniature()["model"].config)
    model.set_attn_implementation("flex_attention")
    model.train()
    model.vit_model.eval()
    before, state = {name: module.training for name, module in model.named_modules()}, torch.get_rng_state()
    with undisturbed(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
        torch.rand(3)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "flex_attention"


def test_items_of_both_forms_are_known_by_their_numbers(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    benchmark, items = read_benchmark(str(path))
    assert benchmark == "geneval_pp"
    assert {number: prompt for number, (prompt, _) in items.items()} == {0: "two red circles", 1: "a blue star"}
    path.write_text(json.dumps({"id": 7, "instruction": "a square sun", "note": "square", "type": "SHAPE"}))
    benchmark, items = read_benchmark(str(path))
    assert benchmark == "imagine_bench" and items[7][0] == "a square sun"
    with pytest.raises(ValueError, match="'geneval' is neither a file nor one of geneval_pp, imagine_bench"):
        read_benchmark("geneval")
