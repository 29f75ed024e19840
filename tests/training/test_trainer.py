"""The trainer in one process: losses, logs, options, errors, and what is left in the output folder."""

import importlib.util
import json
import math
import resource
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from echo4o_hf.model.context import Context
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import IGNORE, TARGET
from echo4o_hf.training.checkpoints import newest_checkpoint


def load(path):
    """A module of the tests."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = Path(__file__).parents[1]
process = load(TESTS / "training" / "training_process.py")


@pytest.fixture
def make_trainer(tmp_path):
    """Function (settings) -> trainer on tiny packs; everything goes to `tmp_path`."""

    def make(**settings):
        return process.make_trainer(**{"output_dir": str(tmp_path)} | settings)

    return make


def history(trainer, without=("tokens_per_second",)):
    """What was logged of each step."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class At(TrainerCallback):
    """Calls a function when a step, or each, begins or ends."""

    def __init__(self, step, function, event="on_step_begin"):
        self.step, self.function = step, function
        setattr(self, event, self._call)

    def _call(self, args, state, control, **kwargs):
        if self.step in (None, state.global_step):
            self.function()


# ------------------------------------------------------------------------------------------------------------- losses

GOLDEN = TESTS.parent / "../shared/reference/golden_a"


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")
@pytest.mark.parametrize("case", ["f1", "f2"])
def test_losses_and_gradients_of_the_official_code(make_trainer, case):
    numbers, facts = load_file(GOLDEN / "golden.safetensors"), json.loads((GOLDEN / "golden.json").read_text())
    model = BagelForConditionalGeneration.from_pretrained(GOLDEN, attn_implementation="sdpa").train()
    _, batch = load(TESTS / "model" / "test_modeling_parity.py").training_pack(model, numbers, facts, case)
    trainer, expected = make_trainer(), facts[case]
    loss, output = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected["loss"], abs=4e-5)
    labelled = output.text_loss[batch["shift_labels"] != IGNORE]
    torch.testing.assert_close(labelled, numbers[f"{case}.ce_per_token"], atol=1e-4, rtol=0)
    drawn = output.flow_loss[batch["roles"][:, -batch["latents"].shape[1] :] == TARGET]
    torch.testing.assert_close(drawn, numbers[f"{case}.mse_per_token"], atol=1e-4, rtol=0)
    trainer.log({"loss": loss.item()})
    (line,) = history(trainer)
    assert line["text_loss"] == pytest.approx(expected["ce"], abs=2e-5)
    assert line["flow_loss"] == pytest.approx(expected["mse"], abs=2e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(expected["grad_norms"])
    for name, gradient in gradients.items():
        if "vit_model" in name and name.endswith("k_proj.bias"):
            continue  # mathematically zero
        assert gradient.norm().item() == pytest.approx(expected["grad_norms"][name], rel=1e-4), name
        if f"{case}.grad.{name}" in numbers:
            torch.testing.assert_close(gradient, numbers[f"{case}.grad.{name}"], atol=2e-5, rtol=1e-4)


def pack(trainer, *rows):
    return trainer.data_collator([(0, [trainer.train_dataset.rows[row] for row in rows])])


def gradients_of_step(trainer, batches):
    trainer.model.zero_grad()
    counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = sum(trainer.training_step(trainer.model, batch, counts) for batch in batches)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "rows",
    [((0, 1, 2), (3,)), ((1,), (3, 4, 7)), ((3, 7), (11,)), ((0,), (1, 2))],  # rows 3, 7, 11 are answers
)
def test_unequal_packs_of_a_step_are_one_pack_of_all(make_trainer, rows):
    trainer = make_trainer(flow_weight=0.5, text_weight=2.0)
    trainer.optimizer = None
    loss, together = gradients_of_step(trainer, [pack(trainer, *rows[0], *rows[1])])
    sum_of_losses, apart = gradients_of_step(trainer, [pack(trainer, *part) for part in rows])
    torch.testing.assert_close(sum_of_losses, loss, atol=1e-5, rtol=0)
    assert together.keys() == apart.keys()
    for name in together:
        torch.testing.assert_close(apart[name], together[name], atol=1e-5, rtol=0)
    trainer.log({"loss": 0.0})
    line = history(trainer)[-1]
    parts = 0.5 * line.get("flow_loss", 0) + 2 * line.get("text_loss", 0)
    assert parts == pytest.approx(loss.item(), abs=1e-5)


def test_the_weights_of_the_losses(make_trainer):
    batch = make_trainer().data_collator  # the same rows in all trainers
    losses = []
    for flow, text in ((1.0, 0.0), (0.0, 1.0), (3.0, 0.25)):
        trainer = make_trainer(flow_weight=flow, text_weight=text)
        losses.append(trainer.compute_loss(trainer.model, pack(trainer, 0, 3)).item())
    assert batch is not None and losses[2] == pytest.approx(3 * losses[0] + 0.25 * losses[1], rel=1e-5)


def test_all_parts_take_part_in_every_pack(make_trainer):
    trainer = make_trainer()
    trainer.data_collator.always_all_parts = True
    for rows in ((1,), (3,)):  # a text to draw, a question
        _, gradients = gradients_of_step(trainer, [pack(trainer, *rows)])
        assert gradients.keys() == weights(trainer).keys()


def test_accumulation_is_the_same_as_one_step_of_all(make_trainer, tmp_path):
    """Two packs a step, against one process that sees both in one: the trainer's own loop."""
    trainer = make_trainer(gradient_accumulation_steps=2, max_steps=2, output_dir=str(tmp_path / "a"))
    trainer.train()
    seen = [line["loss"] for line in history(trainer)]
    again = make_trainer(output_dir=str(tmp_path / "b"))
    order = list(trainer._get_train_sampler())
    assert len(order) % 2 == 0
    batches = [again.data_collator([again.train_dataset[place]]) for place in order[:2]]
    loss, _ = gradients_of_step(again, batches)
    assert seen[0] == pytest.approx(loss.item(), abs=1e-5)


# --------------------------------------------------------------------------------------------------------------- logs


def test_logs_are_of_tokens(make_trainer):
    trainer = make_trainer(logging_steps=3, max_steps=6)
    trainer.train()
    lines = history(trainer, without=())
    assert [line["step"] for line in lines] == [3, 6]
    assert all({"loss", "flow_loss", "grad_norm", "learning_rate"} <= line.keys() for line in lines)
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert trainer.model.config.use_cache is False


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activation_checkpointing_changes_nothing(make_trainer, tmp_path, method):
    plain = make_trainer(method=method, output_dir=str(tmp_path / "a"), max_steps=4)
    less = make_trainer(method=method, output_dir=str(tmp_path / "b"), max_steps=4, activation_checkpointing=True)
    for trainer in (plain, less):
        trainer.train()
    layers = [module for module in less.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert len(layers) >= 4  # of both experts' stack and of the vision encoder
    for one, other in zip(history(plain), history(less), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    for name, weight in weights(less).items():
        torch.testing.assert_close(weight, weights(plain)[name], atol=1e-5, rtol=0)


def test_the_result_is_the_average(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.6, max_steps=5, save_steps=5)
    names = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    expected, taken = {}, []

    def average():
        step = len(taken)
        decay = 0 if step == 0 else min(0.6, (1 + step) / (10 + step))
        for name in names:
            own = trainer.model.get_parameter(name).detach()
            expected[name] = own.clone() if step == 0 else decay * expected[name] + (1 - decay) * own
        taken.append(step)

    trainer.add_callback(At(None, average, "on_step_end"))
    trainer.train()
    trainer.save_model()
    own = weights(trainer)
    result = load_file(tmp_path / "model.safetensors")
    kept = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    for name in names:
        torch.testing.assert_close(result[name], expected[name], atol=1e-6, rtol=0)
        assert torch.equal(kept[name], own[name])  # what training goes on from
    assert not same(own, expected)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_saved_can_be_loaded(make_trainer, tmp_path, method):
    trainer = make_trainer(method=method, max_steps=1)
    trainer.train()
    trainer.save_model()
    if method == "full":
        loaded = BagelForConditionalGeneration.from_pretrained(tmp_path)
    else:
        base = process.make_model(process.load_miniature()["model"].config)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = pack(trainer, 0, 3)
    with torch.no_grad():
        losses = [trainer.compute_loss(model.eval(), dict(batch)) for model in (loaded, trainer.model)]
    assert torch.equal(*losses)
    text = trainer.processing_class.text_segment("a red circle")
    written = [
        model.generate_from(model.prefill(Context.empty(1), [text]), 5, do_sample=False)
        for model in (loaded, trainer.model)
    ]
    assert torch.equal(*written)


def test_muon(make_trainer):
    trainer = make_trainer(muon=True, max_steps=3)
    trainer.train()
    muon, rest = trainer.optimizer.optimizer.parts
    assert isinstance(muon, torch.optim.Muon) and isinstance(rest, torch.optim.AdamW)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    matrices = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
    others = {names[parameter] for group in rest.param_groups for parameter in group["params"]}
    assert matrices | others == set(names.values()) and not matrices & others
    assert "language_model.model.layers.0.mlp_moe_gen.up_proj.weight" in matrices
    assert {"llm2vae.weight", "language_model.lm_head.weight", "connector.fc1.weight"} <= others
    assert all(parameter.requires_grad for parameter in names)
    assert math.isfinite(history(trainer)[-1]["loss"])


def test_samples_that_are_left_out_are_listed(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=20)
    trainer.data_collator.on_error = "skip"
    broken = trainer.train_dataset.rows[4]
    broken["output_image"]["bytes"] = broken["output_image"]["bytes"][:300]
    rows = [broken if row["id"] == broken["id"] else row for row in trainer.train_dataset.rows]
    trainer.train_dataset.rows = process.datasets.Dataset.from_list(rows, features=trainer.train_dataset.rows.features)
    trainer.train_dataset.left_out = [("r99", "too long")]
    trainer.train()
    found = {line["id"]: line["reason"] for line in map(json.loads, (tmp_path / "left_out.jsonl").open())}
    assert found.keys() == {"r4", "r99"} and "output_image" in found["r4"]
    resumed = make_trainer(max_steps=20)
    resumed.train(resume_from_checkpoint=True)  # nothing is left to do, and nothing is forgotten
    assert [json.loads(line)["id"] for line in (tmp_path / "left_out.jsonl").open()] == ["r4"]
    make_trainer(max_steps=1).train()
    assert not (tmp_path / "left_out.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_loss_that_is_not_finite_stops(make_trainer, tmp_path):
    trainer = make_trainer(save_steps=2)
    order = list(trainer._get_train_sampler())
    _, rows = trainer.train_dataset[order[3]]

    def poison():
        with torch.no_grad():
            trainer.model.language_model.model.norm_moe_gen.weight[0] = torch.nan
            trainer.model.language_model.model.norm.weight[0] = torch.nan

    trainer.add_callback(At(3, poison))
    with pytest.raises(ValueError) as error:
        trainer.train()
    for part in ("loss is nan in step 4", "checkpoint-2", "learning_rate=0.001", *(row["id"] for row in rows)):
        assert part in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    resumed = make_trainer(save_steps=2, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert math.isfinite(history(resumed)[-1]["loss"])


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(make_trainer, tmp_path):
    trainer = make_trainer(save_steps=1)
    trainer.add_callback(
        At(2, lambda: trainer.model.llm2vae.bias.register_hook(lambda gradient: gradient * torch.inf))
    )
    with pytest.raises(ValueError, match=r"norm of the gradient is (nan|inf) in step 3, of the samples r\d+"):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert same(weights(trainer), {name: saved[name] for name in weights(trainer)})


@pytest.fixture
def small_files():
    """Function that makes every file beyond so many bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])  # by safetensors and by torch
def test_a_full_disk_stops_and_leaves_the_last_checkpoint(make_trainer, tmp_path, small_files, part):
    trainer = make_trainer(save_steps=2, save_total_limit=1)
    trainer.add_callback(At(3, lambda: small_files((tmp_path / "checkpoint-2" / part).stat().st_size - 1)))
    message = "checkpoint-4 cannot be written, with .* MiB free there: .* The last good checkpoint is .*checkpoint-2"
    with pytest.raises(OSError, match=message):
        trainer.train()
    small_files(resource.RLIM_INFINITY)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    make_trainer(save_steps=2).train(resume_from_checkpoint=True)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_a_full_disk_at_the_end_leaves_the_model_that_was_there(make_trainer, tmp_path, small_files):
    trainer = make_trainer(max_steps=1)
    trainer.save_model()
    before = load_file(tmp_path / "model.safetensors")
    trainer.train()
    small_files(50_000)
    with pytest.raises(OSError, match=f"{tmp_path} cannot be written, with .* MiB free there: .*checkpoint-1"):
        trainer.save_model()
    small_files(resource.RLIM_INFINITY)
    assert same(load_file(tmp_path / "model.safetensors"), before)
    trainer.save_model()
    assert not same(load_file(tmp_path / "model.safetensors"), before)
