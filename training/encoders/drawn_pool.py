"""The pool that an encoder trains on: chunks of drawn people, each from a generator of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..drawing import generator_for
from ..example_pool import Examples, Pool
from ..run_config import RunConfig
from .config import EncodersConfig

Draw = Callable[[int, torch.Generator, torch.device], Examples]
"""Number of examples, generator and device to examples."""


def drawn_pool(draw: Draw, config: EncodersConfig, run: RunConfig) -> Pool:
    """A pool on the training device; the same seed draws the same chunks."""
    device = run.torch_device()
    return Pool(
        lambda k: draw(config.chunk, generator_for(run.seed, k), device), config.pool, config.reuse
    )
