"""One row of each subset: `python examples/load_dataset.py` writes load_dataset.png.

The rows are those of a small dataset of flat shapes, written first in the layout of Echo-4o-Image. With `--hub` they
are streamed from Echo-4o-Image itself; the archives of the references are then downloaded in full, once.
"""

import argparse
import tempfile
import textwrap

from datasets import load_dataset
from PIL import Image, ImageDraw, ImageOps

import echo4o_hf  # noqa: F401  makes "echo-4o-image" a name that load_dataset knows
from echo4o_hf.miniature.dataset import write_dataset

SUBSETS = ("surreal_fantasy", "multi_reference", "instruction_following")
SIDE, GAP, TEXT = 192, 8, 32  # pixels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--hub", action="store_true", help="read Echo-4o-Image from the Hub")
arguments = parser.parse_args()

rows = []
with tempfile.TemporaryDirectory() as folder:
    if not arguments.hub:
        write_dataset(folder, samples_per_subset=4)
    for subset in SUBSETS:
        data_dir = None if arguments.hub else folder
        dataset = load_dataset("echo-4o-image", subset, data_dir=data_dir, split="train", streaming=True)
        rows.append(next(iter(dataset)))

columns = max(len(row["input_images"]) for row in rows) + 1
grid = Image.new("RGB", (columns * (SIDE + GAP) + GAP, len(rows) * (TEXT + SIDE + GAP) + GAP), "white")
draw = ImageDraw.Draw(grid)
for index, row in enumerate(rows):
    top = GAP + index * (TEXT + SIDE + GAP)
    draw.text((GAP, top), f"{row['id']}\n{textwrap.shorten(row['instruction'], 90)}", fill="black")
    for column, image in enumerate([*row["input_images"], row["output_image"]]):
        picture = ImageOps.contain(image.convert("RGB"), (SIDE, SIDE))
        grid.paste(picture, (GAP + column * (SIDE + GAP), top + TEXT))
grid.save("load_dataset.png")
print("load_dataset.png")
