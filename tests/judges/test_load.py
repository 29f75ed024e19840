from __future__ import annotations

import subprocess
import sys

import pytest

from echo4o_hf.judges.load import load_judge


def judge(system, prompt, images):
    return "yes"


def test_a_callable_is_the_judge():
    assert load_judge(judge) is judge
    with pytest.raises(ValueError, match="max_tokens"):
        load_judge(judge, max_tokens=3)


@pytest.mark.parametrize("spec", ["gpt-4.1", "openai:", "openai", "shapes:x", "anthropic:x", "", None, 3])
def test_an_unknown_judge_is_refused_with_the_list(spec):
    with pytest.raises(ValueError, match="openai:MODEL.*hf:MODEL.*transformers:MODEL.*scripted:FILE.*shapes"):
        load_judge(spec)


@pytest.mark.parametrize("spec", ["openai:m", "hf:m"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"max_tokens": 10.5},
        {"response_format": "json"},
        {"max_retries": -1},
        {"max_retries": True},
        {"timeout": 0},
        {"timeout": "abc"},
        {"base_url": "localhost:8000"},
        {"base_url": 5},
        {"prices": [2]},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(spec, options):
    ((name, value),) = options.items()
    key = {"api_key" if spec == "openai:m" else "token": "k"}
    with pytest.raises(ValueError, match=name) as error:
        load_judge(spec, **key, **options)
    assert repr(value) in str(error.value)


def test_a_key_that_is_no_text_is_not_shown():
    for spec, name in (("openai:m", "api_key"), ("hf:m", "token")):
        with pytest.raises(ValueError, match="key must be a text; got int"):
            load_judge(spec, **{name: 12345})
    with pytest.raises(ValueError, match="extra_body must be an object; got 3"):
        load_judge("openai:m", api_key="k", extra_body=3)


@pytest.mark.parametrize(
    ("spec", "module", "advice"),
    [
        ("openai:m", "openai", r"pip install 'echo4o-hf\[judges\]'"),
        ("hf:m", "httpx2", r"pip install 'echo4o-hf\[judges\]'"),
        ("transformers:m", "transformers", "install what is missing"),
    ],
)
def test_a_package_that_is_not_installed_is_named(spec, module, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("openai_judge", "hf_judge", "transformers_judge"):
        monkeypatch.delitem(sys.modules, f"echo4o_hf.judges.{name}", raising=False)
    with pytest.raises(ValueError, match=f"{spec} cannot be used: .*{module}.*{advice}"):
        load_judge(spec)


def test_the_judge_that_is_not_used_is_not_imported():
    code = "import sys, echo4o_hf.judges.load, echo4o_hf.judges.ask; print(*{'torch', 'openai'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
