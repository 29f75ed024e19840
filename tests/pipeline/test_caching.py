"""Step caching changes nothing while it is off, and only the velocities that it forecasts while it is on."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_taylorseer_cache
from diffusers.models.cache_utils import CacheMixin
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter

from echo4o_hf.model.packing import Segment, collate
from echo4o_hf.pipeline.caching import StepCache

STEPS = 12  # with guidance at the first ten
EXACT = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent"}
EVERY_SECOND = TaylorSeerCacheConfig(2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)  # 0, 2, 4 ...


def config(interval=2, before=1, after=None, order=1, **changes):
    return TaylorSeerCacheConfig(interval, before, after, order, **{"taylor_factors_dtype": torch.float32, **changes})


def seed(number):
    return torch.Generator().manual_seed(number)


def picture(width=32, height=32):
    return Image.effect_noise((width, height), 80).convert("RGB")


@pytest.fixture
def evaluations(pipe):
    """Rows of each evaluation of the model, prompts left out."""
    rows = []
    pipe.model.llm2vae.register_forward_pre_hook(lambda _, hidden: rows.append(len(hidden[0])))
    return rows


# ------------------------------------------------------------------------------------------------------ one velocity


class Toy(nn.Module, CacheMixin):
    """A model whose output is that of its `proj_out`, as diffusers' lite mode expects."""

    def __init__(self):
        super().__init__()
        self.proj_out = nn.Identity()

    def forward(self, velocity):
        return self.proj_out(velocity)


@pytest.mark.parametrize(
    "settings", [(2, 1, None, 1), (3, 2, None, 2), (4, 1, 9, 0), (1, 1, None, 1), (5, 3, 10, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forecasts_are_those_of_diffusers_hook(settings, dtype):
    velocities = torch.randn(12, 1, 5, 3, generator=seed(0))
    hooked, cache = Toy(), StepCache(config(*settings, taylor_factors_dtype=dtype))
    apply_taylorseer_cache(hooked, config(*settings, taylor_factors_dtype=dtype, use_lite_mode=True))
    for velocity in velocities:
        with hooked.cache_context("conditional"):
            expected = hooked(velocity)
        assert torch.equal(cache([("conditional", 0)], lambda velocity=velocity: velocity), expected)


def test_a_straight_line_is_continued_exactly():
    cache, calls = StepCache(config(interval=4, before=2)), []

    def at(step):
        calls.append(step)
        return torch.full((1, 2, 2), 3.0 - 0.5 * step)

    forecasts = [cache([("conditional", 0)], lambda step=step: at(step)) for step in range(12)]
    assert calls == [0, 1, 3, 7, 11]
    assert [forecast.unique().item() for forecast in forecasts] == [3.0 - 0.5 * step for step in range(12)]


def test_rows_keep_their_own_state_while_others_come_and_go():
    """Each row is a line of its own; a mixed state would be seen at once."""
    slopes = {("conditional", 0): 1.0, ("conditional", 1): -2.0, ("without_text", 0): 8.0, ("without_text", 1): 32.0}
    both = list(slopes)
    rows_of_step = [both] * 5 + [[*both[:2], both[3]]] * 3 + [both[:2]] * 4
    cache, evaluated = StepCache(config(interval=3, before=2)), []
    for step, rows in enumerate(rows_of_step):

        def evaluate(step=step, rows=rows):
            evaluated.append(step)
            return torch.stack([torch.full((1, 1), slopes[row] * step) for row in rows])

        assert cache(rows, evaluate).flatten().tolist() == [slopes[row] * step for row in rows]
    assert evaluated == [0, 1, 3, 6, 9]  # no update more because rows left


def test_a_row_that_begins_late_has_its_image_evaluated_and_no_other():
    cache, rows = StepCache(config(interval=10, before=1)), [("conditional", 0), ("conditional", 1)]
    for _ in range(3):
        cache(rows, lambda: torch.zeros(2, 1, 1))
    velocity = cache([*rows, ("without_text", 1)], lambda: torch.ones(3, 1, 1))
    assert velocity.flatten().tolist() == [0, 1, 1]


# ------------------------------------------------------------------------------------------------------ the pipeline


def test_off_by_default_and_after_disabling(pipe, evaluations):
    exact = pipe("a cat", generator=seed(0), **EXACT).images
    assert evaluations == [2] * 10 + [1] * 2
    pipe.enable_cache(EVERY_SECOND)
    cached = pipe("a cat", generator=seed(0), **EXACT).images
    assert evaluations[STEPS:] == [2] * 5 + [1]
    assert not torch.equal(cached, exact)
    pipe.disable_cache()
    assert torch.equal(pipe("a cat", generator=seed(0), **EXACT).images, exact)


@pytest.mark.parametrize("changes", [{"interval": 1}, {"before": STEPS}, {"after": 0}], ids=str)
def test_exact_bit_for_bit_where_all_updates_are_evaluated(pipe, evaluations, changes):
    settings = {"image": [[picture()], [picture()]], "generator": [seed(0), seed(1)], **EXACT}
    exact = pipe(["a cat", "red hats"], **settings).images
    pipe.enable_cache(config(**changes, taylor_factors_dtype=torch.bfloat16))
    settings["generator"] = [seed(0), seed(1)]
    assert torch.equal(pipe(["a cat", "red hats"], **settings).images, exact)
    assert len(evaluations) == 2 * STEPS


def test_a_batch_equals_single_calls(pipe, evaluations):
    """One image with three branches to the end, two with two branches until guidance ends, of several sizes."""
    pipe.enable_cache(config(interval=2, before=2))
    prompts = [[picture(64, 48), "red cat"], "a cat", "two blue hats"]
    settings = {"num_inference_steps": STEPS, "output_type": "latent"}
    batch = pipe(prompts, generator=[seed(n) for n in range(3)], **settings).images
    assert evaluations == [7] * 6 + [5]  # updates 0, 1, 3, 5, 7, 9 and 11
    for row, prompt in enumerate(prompts):
        single = pipe([prompt], generator=seed(row), **settings).images[0]
        torch.testing.assert_close(batch[row, : len(single)], single, atol=1e-4, rtol=0)
        assert not batch[row, len(single) :].any()


def test_forecasts_are_near_the_exact_pictures_and_nearer_with_more_evaluations(pipe):
    settings = {**EXACT, "num_inference_steps": 24}
    exact = pipe("a cat", generator=seed(0), **settings).images
    errors = []
    for interval in (2, 4, 8):
        pipe.enable_cache(config(interval=interval))
        errors.append((pipe("a cat", generator=seed(0), **settings).images - exact).abs().mean().item())
    assert 0 < errors[0] < errors[1] < errors[2] < exact.abs().mean()


def test_each_call_begins_anew_whatever_happened_before(pipe):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 3
        return {}

    pipe.enable_cache(EVERY_SECOND)
    first = pipe("a cat", generator=seed(0), **EXACT).images
    pipe("red hats", generator=seed(1), callback_on_step_end=stop, **EXACT)
    with pytest.raises(ValueError, match="NaN"):
        pipe("a cat", latents=torch.full((1, 4, 16), torch.nan), **EXACT)
    assert torch.equal(pipe("a cat", generator=seed(0), **EXACT).images, first)


def test_nothing_is_kept_after_a_call(pipe):
    pipe.enable_cache(EVERY_SECOND)
    before = set(vars(pipe)), set(vars(pipe.model)), set(vars(pipe.model.language_model.model.layers[0]))
    pipe("a cat", generator=seed(0), **EXACT)
    after = set(vars(pipe)), set(vars(pipe.model)), set(vars(pipe.model.language_model.model.layers[0]))
    assert after == before


def test_prompts_texts_and_training_are_not_forecast(pipe):
    """The model is used for other things between the updates; neither they nor the picture notice."""
    text = Segment("text", [5, 6, 7], labels=[6, 7, -100])
    target = Segment("target", [28, 29], latents=torch.randn(4, 16, generator=seed(3)), grid=(2, 2))
    batch = collate([[text, target]])
    noise = {"noise": torch.randn(1, 4, 16, generator=seed(4)), "timestep": torch.full((1, 4), 0.5)}
    contexts = pipe.encode_contexts([["a cat"]])
    seen = []

    def others(*_):
        loss = pipe.model(**batch, **noise).loss
        again = pipe.encode_contexts([["a cat"]]).conditional
        ids = pipe.model.generate_from(again, 5, do_sample=False)
        seen.append((loss.item(), again.cache.layers[-1].keys, ids.tolist()))
        return {}

    others()
    pipe.enable_cache(EVERY_SECOND)
    alone = pipe("a cat", generator=seed(0), **EXACT).images
    assert torch.equal(pipe("a cat", generator=seed(0), callback_on_step_end=others, **EXACT).images, alone)
    assert len(seen) == 1 + STEPS
    for loss, keys, ids in seen[1:]:
        assert loss == seen[0][0] and torch.equal(keys, contexts.conditional.cache.layers[-1].keys)
        assert ids == seen[0][2]


def test_plans_are_those_of_the_exact_run(pipe):
    exact = pipe("a cat", thinking=True, max_think_tokens=6, generator=seed(0), **EXACT)
    pipe.enable_cache(EVERY_SECOND)
    cached = pipe("a cat", thinking=True, max_think_tokens=6, generator=seed(0), **EXACT)
    assert cached.texts == exact.texts and not torch.equal(cached.images, exact.images)


def test_compiled_layers(pipe):
    pipe.enable_cache(EVERY_SECOND)
    expected = pipe("a cat", generator=seed(0), **EXACT).images
    torch._dynamo.reset()
    graphs = CompileCounter()
    pipe.compile(backend=graphs)
    torch.testing.assert_close(pipe("a cat", generator=seed(0), **EXACT).images, expected, atol=1e-5, rtol=0)
    assert graphs.frame_count == 2  # as without the cache: with guidance, and without


def test_a_config_that_changes_later_does_not_count(pipe):
    mine = config()
    pipe.enable_cache(mine)
    expected = pipe("a cat", generator=seed(0), **EXACT).images
    mine.cache_interval = 0
    assert torch.equal(pipe("a cat", generator=seed(0), **EXACT).images, expected)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (FirstBlockCacheConfig(), "TaylorSeerCacheConfig, not FirstBlockCacheConfig"),
        (MagCacheConfig(calibrate=True), "TaylorSeerCacheConfig, not MagCacheConfig"),
        (None, "TaylorSeerCacheConfig, not NoneType"),
        (config(interval=0), "cache_interval=0 must be a whole number and at least 1"),
        (config(interval=2.5), "cache_interval=2.5 must"),
        (config(order=-1), "max_order=-1 must be a whole number and at least 0"),
        (config(order=None), "max_order=None must"),
        (config(before=-1), "disable_cache_before_step=-1 must"),
        (config(after=-1), "disable_cache_after_step=-1 must"),
        (config(taylor_factors_dtype=torch.int8), "taylor_factors_dtype=torch.int8 must be a floating-point dtype"),
        (config(cache_identifiers=["layers.*"]), "cache_identifiers must be None"),
        (config(skip_predict_identifiers=["layers.*"]), "skip_predict_identifiers must be None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_and_changes_nothing(pipe, evaluations, bad, message):
    pipe.enable_cache(EVERY_SECOND)
    with pytest.raises(ValueError, match=message):
        pipe.enable_cache(bad)
    pipe("a cat", **EXACT)
    assert len(evaluations) == STEPS // 2
