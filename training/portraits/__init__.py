"""Drawn portraits: parametric people, rendered in batches, with ground truth and prompts."""

from __future__ import annotations

from .factors import FACTORS, identities
from .grammar import describe, parse_prompt
from .render import Portraits, render, renderer_digest
from .scene import Scene, is_held_out, sample_scenes, with_identity
from .vocabulary import ATTRIBUTES

__all__ = [
    "ATTRIBUTES",
    "FACTORS",
    "Portraits",
    "Scene",
    "describe",
    "identities",
    "is_held_out",
    "parse_prompt",
    "render",
    "renderer_digest",
    "sample_scenes",
    "with_identity",
]
