"""Likeness, prompt and picture measures on people and prompts that no stage trains on."""
