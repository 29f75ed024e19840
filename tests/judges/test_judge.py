from __future__ import annotations

import pytest

from echo4o_hf.judges.judge import BatchJudge, Reply, judge_name, judge_parameters, judge_prices


def strict(system, prompt, images):
    return "no"


class Named:
    name = "mine"

    def __init__(self, parameters):
        self.parameters = parameters

    def __call__(self, system, prompt, images):
        return "yes"


def test_a_reply_is_a_str_that_knows_its_cost():
    reply = Reply("yes", input_tokens=3, output_tokens=1, latency=0.5, truncated=True)
    assert reply == "yes" and isinstance(reply, str)
    assert (reply.input_tokens, reply.output_tokens, reply.latency, reply.truncated) == (3, 1, 0.5, True)
    assert (Reply("").input_tokens, Reply("").latency, Reply("").truncated) == (None, None, False)


def test_any_callable_has_a_name():
    assert judge_name(strict) == "strict" and judge_parameters(strict) == {}
    assert judge_name(Named({})) == "mine"
    strict_copy = Named({"a": (1, 2)})
    assert judge_parameters(strict_copy) == {"a": [1, 2]}


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_judge_without_a_name_is_refused(name):
    judge = Named({})
    judge.name = name
    with pytest.raises(ValueError, match="Named"):
        judge_name(judge)


@pytest.mark.parametrize("parameters", [{"a": float("nan")}, {"a": object()}, [1]])
def test_parameters_that_are_not_json_are_refused(parameters):
    with pytest.raises(ValueError, match="parameters of mine"):
        judge_parameters(Named(parameters))


def test_prices_are_two_numbers():
    judge = Named({})
    assert judge_prices(judge) is None
    judge.prices = [2, 8.5]
    assert judge_prices(judge) == (2.0, 8.5)


@pytest.mark.parametrize("prices", [2, [2], [2, 8, 1], "28", ["2", "8"], [2, -1], [2, float("nan")], [True, 1], {}])
def test_other_prices_are_refused(prices):
    judge = Named({})
    judge.prices = prices
    with pytest.raises(ValueError, match="prices are two numbers"):
        judge_prices(judge)


def test_batch_judges_are_recognised():
    judge = Named({})
    assert not isinstance(judge, BatchJudge)
    judge.batch, judge.batch_size = list, 4
    assert isinstance(judge, BatchJudge)
