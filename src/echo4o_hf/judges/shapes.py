"""The rule-based judge of the shapes world as a judge: no model, no network, the same verdict every time."""

from __future__ import annotations

import json
import re

from PIL import Image

from echo4o_hf.judges.judge import JudgeFailed
from echo4o_hf.miniature.items import Item
from echo4o_hf.miniature.judge import verdict
from echo4o_hf.miniature.wording import parse_caption

_INSTRUCTION = re.compile(r"\s*Instruction:\s*(.+?)\s*(?:\n\s*\n|\Z)", re.DOTALL)


class ShapesJudge:
    """Replies `{"correct": 1 or 0, "reason": …}` to GenEval++'s official request about one picture of shapes.

    The instruction is read from the prompt's first block, `Instruction:` and a line.
    """

    name = "shapes"
    reads_system = False

    def __call__(self, system: str, prompt: str, images: list[Image.Image]) -> str:
        """Check the picture against the instruction.

        Raises:
            JudgeFailed: the instruction is not in the words of the shapes world, or there is not one picture.
        """
        if len(images) != 1:
            raise JudgeFailed(f"the judge of the shapes world looks at one picture, got {len(images)}")
        match = _INSTRUCTION.match(prompt)
        if match is None:
            raise JudgeFailed(f"the prompt does not begin with an instruction: {prompt[:80]!r}")
        clauses = parse_caption(match[1])
        if clauses is None:
            raise JudgeFailed(f"the judge of the shapes world does not understand {match[1]!r}")
        judged = verdict(Item("", match[1], tuple(clauses)), images[0])
        return json.dumps({"correct": int(judged.correct), "reason": judged.reason})
