"""The miniature behind the app, and an adapter for it."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from echo4o_hf.app.studio import Studio
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.pipeline.source import Source

MODEL = "echo4o-miniature"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapter `strong`, of random weights."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("adapters")
    pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.model.add_adapter(LoraConfig(r=4, target_modules=["o_proj_moe_gen"]), "strong")
    generator = torch.Generator().manual_seed(0)
    for name, weight in pipe.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    pipe.save_lora_weights(folder / "strong", "strong")
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, adapters: Path) -> Studio:
    return Studio(Source(MODEL), tmp_path_factory.mktemp("pictures"), {"strong": str(adapters / "strong")})


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a red circle."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    path = tmp_path_factory.mktemp("references") / "circle.png"
    image.save(path)
    return path
