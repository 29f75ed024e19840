"""Pictures from a prompt: `python examples/generate.py` writes generate-0.png ... generate-3.png."""

import torch

from echo4o_hf import Echo4oPipeline

MODEL = "echo4o-miniature"  # draws flat shapes; the real one is "Yejy53/Echo-4o", on a GPU with dtype=torch.bfloat16
PROMPT = "two red circles and a blue star"

pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
images = pipe(PROMPT, num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)).images
for index, image in enumerate(images):
    image.save(f"generate-{index}.png")
    print(f"generate-{index}.png")
