"""Judges by name: `openai:gpt-4.1`, `hf:…`, `transformers:…`, `scripted:…`, `shapes`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo4o_hf.judges.judge import Judge

FORMS = (
    "openai:MODEL (any OpenAI-compatible endpoint)",
    "hf:MODEL (Hugging Face Inference Providers)",
    "transformers:MODEL (on this machine)",
    "scripted:FILE.jsonl (fixed answers)",
    "shapes (rule-based, for pictures of the shapes world)",
)

_EXTRA = ("httpx2", "openai")  # packages that only judges behind an endpoint need


def load_judge(spec: str | Judge, **options: Any) -> Judge:
    """The judge that `spec` names; a callable is returned as it is.

    Args:
        spec: One of `FORMS`, or a callable.
        options: Keyword arguments of the judge's class.

    Raises:
        ValueError: an unknown form, options for a callable, or a package that is not installed.
        JudgeStopped: the judge cannot work, such as without a key.
    """
    if not isinstance(spec, str):
        if not callable(spec):
            raise ValueError(f"a judge must be a callable or one of: {', '.join(FORMS)}; got {spec!r}")
        if options:
            raise ValueError(f"a callable judge takes no options, got {', '.join(options)}")
        return spec
    try:
        return _load(spec, options)
    except ImportError as error:
        advice = "pip install 'echo4o-hf[judges]'" if error.name in _EXTRA else "install what is missing"
        raise ValueError(f"{spec} cannot be used: {error}; {advice}") from error


def _load(spec: str, options: Mapping[str, Any]) -> Judge:
    kind, _, model = spec.partition(":")
    if spec == "shapes":
        from echo4o_hf.judges.shapes import ShapesJudge

        return ShapesJudge(**options)
    if model and kind == "openai":
        from echo4o_hf.judges.openai_judge import OpenAIJudge

        return OpenAIJudge(model, **options)
    if model and kind == "hf":
        from echo4o_hf.judges.hf_judge import HFJudge

        return HFJudge(model, **options)
    if model and kind == "transformers":
        from echo4o_hf.judges.transformers_judge import TransformersJudge

        return TransformersJudge(model, **options)
    if model and kind == "scripted":
        from echo4o_hf.judges.scripted import ScriptedJudge

        return ScriptedJudge.from_file(model, **options)
    raise ValueError(f"no judge is called {spec!r}; there are: {', '.join(FORMS)}")
