"""The `transformers` command, with the processor of tiny_vlm.py known to it."""

import tiny_vlm  # noqa: F401
from transformers.cli.transformers import main

main()
