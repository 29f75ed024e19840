"""A question about a picture: `python examples/understand.py` prints the answer (the miniature's is mostly wrong)."""

import torch

from echo4o_hf import BagelForConditionalGeneration, BagelProcessor
from echo4o_hf.miniature.world import Scene, SceneObject, render

MODEL = "echo4o-miniature"  # the real one is "Yejy53/Echo-4o", on a GPU with dtype=torch.bfloat16
QUESTION = "Describe the picture."

objects = (SceneObject("circle", "red", row=1, col=0), SceneObject("star", "blue", row=1, col=3))
picture = render(Scene(objects))

processor = BagelProcessor.from_pretrained(MODEL)
model = BagelForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
inputs = processor(text=QUESTION, images=[picture], return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
answer = ids[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
