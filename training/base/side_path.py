"""LoRAs beside the layers of a frozen U-Net, another one for every sample of a batch.

One mechanism for grouped LoRA training (the LoRAs are parameters), for the end-to-end stage (they
come from the predictor) and for painting (they come from files).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from difflora_core.lora import Lora

#: layer name -> (down [r, in] or [B, r, in], up [B, out, r]): adds up_b @ down_b to sample b
Factors = Mapping[str, tuple[Tensor, Tensor]]
UNET = "unet."


class SidePath:
    """Forward hooks on the Linears of a U-Net that add up_b @ down_b @ x to sample b's output."""

    def __init__(self, unet: nn.Module) -> None:
        self.factors: Factors = {}
        for path, module in unet.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self._add, UNET + path))

    @contextmanager
    def using(self, factors: Factors) -> Iterator[None]:
        """Inside, the U-Net runs with these LoRAs; their batch must be the U-Net's batch."""
        before, self.factors = self.factors, factors
        try:
            yield
        finally:
            self.factors = before

    def _add(
        self, name: str, module: nn.Module, args: tuple[Tensor], output: Tensor
    ) -> Tensor | None:
        pair = self.factors.get(name)
        if pair is None:
            return None
        down, up = (factor.to(output.dtype) for factor in pair)
        x = args[0].to(output.dtype)
        flat = x if x.dim() == 3 else x[:, None]
        added = flat @ down.mT @ up.mT
        return output + (added if x.dim() == 3 else added[:, 0])


def stack_loras(loras: Sequence[Lora], device: torch.device) -> Factors:
    """One LoRA per sample -> batched factors; all must have the same layers and ranks.

    Raises ValueError when they do not: group unlike LoRAs before painting.
    """
    names = list(loras[0].layers)
    if any(list(lora.layers) != names for lora in loras):
        raise ValueError("these LoRAs change different layers, so they cannot share a batch")
    factors = {}
    for name in names:
        layers = [lora.layers[name] for lora in loras]
        down = torch.stack([layer.down.float() for layer in layers])
        up = torch.stack([layer.up.float() * layer.scale for layer in layers])
        factors[name] = (down.to(device), up.to(device))
    return factors


def repeat_factors(factors: Factors, times: int) -> Factors:
    """Factors for a batch that holds the samples `times` times one after another ([x, x, ...])."""
    return {
        name: (down.repeat(times, 1, 1) if down.dim() == 3 else down, up.repeat(times, 1, 1))
        for name, (down, up) in factors.items()
    }


def spread_factors(factors: Factors, times: int) -> Factors:
    """Factors for a batch that holds each sample `times` times in a row ([x, x, y, y, ...])."""
    return {
        name: (
            down.repeat_interleave(times, 0) if down.dim() == 3 else down,
            up.repeat_interleave(times, 0),
        )
        for name, (down, up) in factors.items()
    }
