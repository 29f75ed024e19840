"""The pipeline: from prompts and references to images."""
