"""The miniature: the shapes world, its judge, and the tiny checkpoints trained on it."""
