"""A question about a picture: `python examples/understand.py` prints the answer."""

import torch
from PIL import Image, ImageDraw

from echo4o_hf import BagelForConditionalGeneration, BagelProcessor

MODEL = "echo4o-miniature"  # the real one is "Yejy53/Echo-4o", on a GPU with dtype=torch.bfloat16
QUESTION = "what is in the picture?"

picture = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(picture).ellipse((18, 18, 46, 46), fill="red")

processor = BagelProcessor.from_pretrained(MODEL)
model = BagelForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
inputs = processor(text=QUESTION, images=[picture], return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
answer = ids[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
