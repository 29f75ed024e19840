from __future__ import annotations

import json

import pytest

from echo4o_hf.judges.judge import JudgeFailed, JudgeStopped
from echo4o_hf.judges.load import load_judge
from echo4o_hf.judges.scripted import ScriptedJudge


def test_one_answer_for_all():
    judge = ScriptedJudge("yes")
    assert [judge("", prompt, []) for prompt in "ab"] == ["yes", "yes"]


def test_a_sequence_is_answered_in_order_and_ends():
    judge = ScriptedJudge(["one", JudgeFailed("broken"), "three"])
    assert judge("", "a", []) == "one"
    with pytest.raises(JudgeFailed, match="broken"):
        judge("", "a", [])
    assert judge("", "a", []) == "three"
    with pytest.raises(JudgeFailed, match="3 answers, this is request 4"):
        judge("", "a", [])


def test_a_mapping_goes_by_the_longest_key_in_the_prompt():
    judge = ScriptedJudge({"a dog": "dog", "a dog and a cat": "both", "quota": JudgeStopped("no credit")})
    assert judge("", "Instruction:\na dog and a cat\n", []) == "both"
    assert judge("", "Instruction:\na dog\n", []) == "dog"
    with pytest.raises(JudgeStopped, match="no credit"):
        judge("", "quota", [])
    with pytest.raises(JudgeFailed, match="a bird"):
        judge("", "a bird", [])


def test_a_function_sees_everything(picture):
    judge = ScriptedJudge(lambda system, prompt, images: f"{system} {prompt} {images[0].size}")
    assert judge("s", "p", [picture]) == "s p (12, 8)"


def test_another_script_is_another_judge():
    first, second = ScriptedJudge({"a": "1", "b": "2"}), ScriptedJudge({"b": "2", "a": "1"})
    assert first.parameters == second.parameters != ScriptedJudge({"a": "1", "b": "3"}).parameters
    assert ScriptedJudge("a", name="other").name == "other"


def test_a_script_from_a_file(tmp_path):
    path = tmp_path / "script.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "reply": p.upper()}) for p in ("ä", "b")), encoding="utf-8")
    judge = load_judge(f"scripted:{path}")
    assert judge("", "say ä", []) == "Ä"
    assert judge.name == "scripted:script.jsonl"


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', '{"prompt": "a", "reply": 1}', "7"])
def test_a_broken_script_names_the_line(tmp_path, line):
    path = tmp_path / "script.jsonl"
    path.write_text(f'{{"prompt": "a", "reply": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match="script.jsonl, line 2"):
        ScriptedJudge.from_file(path)


def test_only_a_function_may_read_the_system_text():
    assert [ScriptedJudge(answers).reads_system for answers in ("a", ["a"], {"p": "a"})] == [False] * 3
    assert ScriptedJudge(lambda *asked: "a").reads_system is None
