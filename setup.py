"""Packaging of echo4o-hf; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent


def version() -> str:
    """Reads `__version__` from the package without importing it."""
    source = (here / "src/echo4o_hf/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


setup(
    name="echo4o-hf",
    version=version(),
    description="Echo-4o (Bagel) with transformers and diffusers",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "echo4o_hf": ["py.typed"],
        "echo4o_hf.benchmarks": ["templates/*.jinja"],
        "echo4o_hf.data": ["*.jinja", "*.md"],
        "echo4o_hf.miniature": ["**/*.json", "**/*.jsonl", "**/*.md", "**/*.safetensors", "**/*.txt"],
        "echo4o_hf.report": ["*.jinja"],
        "echo4o_hf.training": ["*.jinja", "*.md"],
    },
    entry_points={"console_scripts": ["echo4o = echo4o_hf.cli:main"]},
    # transformers 5.23 and diffusers 0.42 need Python 3.11
    python_requires=">=3.11",
    # Each lower bound is the version the tests run with (constraints.txt).
    install_requires=[
        "accelerate>=1.15",
        "datasets>=5.2",
        "diffusers>=0.42.1",
        "evaluate>=0.4.6",
        "filelock>=4.2",
        "huggingface_hub>=2.4",
        "jinja2>=3.1.6",
        "markupsafe>=3.0",
        "numpy>=2.4",
        "pillow>=12.3",
        "pyarrow>=26.0",
        "safetensors>=0.8",
        "scipy>=1.17",
        "tokenizers>=0.23.3",
        "torch>=2.13",
        "tqdm>=4.70",
        "transformers>=5.23",
    ],
    extras_require={
        # echo4o app
        "app": [
            "gradio>=6.31",
        ],
        # echo4o data overlap, and export webdataset
        "data": [
            "datasketch>=2.0",
            "webdataset>=1.0.2",
        ],
        # judges behind an endpoint, and the agreement of several
        "judges": [
            "httpx2>=2.16.2",
            "openai>=3.54",
            "scikit-learn>=1.9.1",
        ],
        # the 4-bit and 8-bit base under an adapter, and optimizers of 8 bits
        "qlora": [
            "bitsandbytes>=0.50.2",
        ],
        "train": [
            "peft>=0.21.2",
            "pyyaml>=6.0.3",
            "tensorboard>=2.21",
            "torchdata>=0.11",
        ],
        "test": [
            "bitsandbytes>=0.50.2",
            "datasketch>=2.0",
            "fastapi>=0.165",
            "gradio>=6.31",
            "httpx2>=2.16.2",
            "hypothesis>=6.170",
            "mypy>=2.4",
            "openai>=3.54",
            "peft>=0.21.2",
            "playwright>=1.65",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "pyyaml>=6.0.3",
            "ruff>=0.17.6",
            "scikit-image>=0.26",
            "scikit-learn>=1.9.1",
            "tensorboard>=2.21",
            "torchdata>=0.11",
            "uvicorn>=0.54",
            "webdataset>=1.0.2",
        ],
    },
)
