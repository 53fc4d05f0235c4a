"""Likeness, prompt and picture measures on held-out people and prompts: see protocol."""
