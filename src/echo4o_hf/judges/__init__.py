"""A judge is a function: `judge(system, prompt, images) -> str`."""
