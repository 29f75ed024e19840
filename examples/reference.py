"""A picture from references: `python examples/reference.py` writes reference.png."""

import torch

from echo4o_hf import Echo4oPipeline
from echo4o_hf.miniature.world import Scene, SceneObject, render

MODEL = "echo4o-miniature"  # the real one is "Yejy53/Echo-4o", on a GPU with dtype=torch.bfloat16
PROMPT = "put the circle of the first picture and the star of the second picture together"

circle = render(Scene((SceneObject("circle", "red", row=0, col=0, size="large"),)))
star = render(Scene((SceneObject("star", "blue", row=2, col=2, size="large"),)))

pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
images = pipe(PROMPT, image=[circle, star], generator=torch.Generator().manual_seed(0)).images
images[0].save("reference.png")
print("reference.png")
