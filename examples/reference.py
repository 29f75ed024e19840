"""A picture from references: `python examples/reference.py` writes reference.png."""

import torch
from PIL import Image, ImageDraw

from echo4o_hf import Echo4oPipeline

MODEL = "echo4o-miniature"  # the real one is "Yejy53/Echo-4o", on a GPU with dtype=torch.bfloat16
PROMPT = "put the shape of the first picture and the shape of the second together"

circle = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(circle).ellipse((18, 18, 46, 46), fill="red")
square = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(square).rectangle((18, 18, 46, 46), fill="blue")

pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
images = pipe(PROMPT, image=[circle, square], generator=torch.Generator().manual_seed(0)).images
images[0].save("reference.png")
print("reference.png")
