import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from echo4o_hf.miniature import training
from echo4o_hf.miniature.examples import QUESTION, Example, Examples, draw_examples
from echo4o_hf.miniature.items import is_held_out
from echo4o_hf.miniature.wording import parse_caption
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.processing_bagel import BagelProcessor


@pytest.fixture(scope="module")
def processor():
    return BagelProcessor.from_pretrained(training.SHARED / "processor")


@pytest.fixture(scope="module")
def examples(processor):
    vae = AutoencoderKL.from_pretrained(training.SHARED / "vae", torch_dtype=torch.float32)
    return training.make_examples(12, 0, False, vae, processor, training.miniature_config(processor))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training, "BATCH_SIZE", 3)
    monkeypatch.setattr(training, "NOISE_DRAWS", 2)
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(training, "TASK_CYCLE", ("describe", "text", "references"))


def make_model(processor):
    torch.manual_seed(0)
    config = training.miniature_config(processor)
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = ["full_attention"]
    return BagelForConditionalGeneration(config)


def run(processor, examples, steps=6, **kwargs):
    model = make_model(processor)
    losses = training.train(model, examples, steps=steps, learning_rate=1e-3, **kwargs)
    return model, losses


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(processor, examples, tmp_path):
    straight, expected = run(processor, examples)

    class Stopped(Exception):
        pass

    def stop(step):
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run(processor, examples, checkpoint=tmp_path / "state.safetensors", on_step=stop)
    resumed, losses = run(processor, examples, checkpoint=tmp_path / "state.safetensors")
    np.testing.assert_array_equal(losses, expected)
    assert np.isnan(losses[0]) and np.isfinite(losses[1:3]).all()  # a step that describes, steps that draw
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_stops_the_run(processor, examples):
    model = make_model(processor)
    model.llm2vae.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        training.train(model, examples, steps=3, learning_rate=1e-3)


def test_clean_captions_are_never_the_benchmark_and_noisy_ones_are_wrong_or_vague():
    clean = draw_examples("describe", 200, seed=5)
    noisy = draw_examples("describe", 200, seed=5, noisy=True)
    assert not any(is_held_out(example.text) for example in [*clean, *noisy])
    assert all(parse_caption(example.text) for example in clean)
    assert sum(parse_caption(example.text) is None for example in noisy) > 50
    again = draw_examples("describe", 200, seed=5)
    assert [example.text for example in again] == [example.text for example in clean]


def test_samples_of_each_task(processor, examples):
    rng = np.random.default_rng(0)
    text = examples.batch("text", 20, 4, rng)
    assert {tuple(s.role for s in sample[-4:]) for sample in text} == {("target",) * 4}
    assert {len(sample) for sample in text} <= {4, 5}  # without or with the text
    seen = {segment.role for sample in examples.batch("references", 20, 1, rng) for segment in sample}
    assert seen == {"latents", "vision", "text", "target"}
    (described,) = examples.batch("describe", 1, 1, rng)
    vision, question, answer = described
    assert (vision.role, vision.grid) == ("vision", (4, 4))
    assert processor.tokenizer.decode(question.input_ids[1:-1]) == QUESTION
    assert answer.labels[:-1] == answer.input_ids[1:] and answer.labels[-1] == -100


def test_dropped_images_keep_their_rope_position(processor, examples):
    example = examples.tasks["references"][0]

    class AlwaysDrop:
        def random(self):
            return 0.0

    dropped = list(Examples({}, processor, (4, 4))._conditions(example, AlwaysDrop()))
    assert [segment.rope_advance for segment in dropped] == [1] * (2 * len(example.references))
    assert isinstance(example, Example) and not any(segment.input_ids for segment in dropped)
