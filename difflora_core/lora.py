"""A LoRA as ordered layers of low-rank factors (Hu et al. 2021, arXiv 2106.09685, section 4.1).

Letters: `r` rank, `in`/`out` features or channels of the layer, `kh kw` kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

from .errors import BadLoraFile


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One layer: delta W = scale * up @ down.

    Linear: down [r, in], up [out, r]. Convolution: down [r, in, kh, kw], up [out, r, 1, 1].
    `name` is the diffusers module path with its component, such as
    `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q`.
    Raises BadLoraFile when the two factors do not fit each other.
    """

    name: str
    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        linear = len(down) == 2 and len(up) == 2
        conv = len(down) == 4 and len(up) == 4 and up[2:] == (1, 1)
        if not (linear or conv) or down[0] != up[1]:
            raise BadLoraFile(
                f"The factors of {self.name} do not fit: down {list(down)}, up {list(up)}.",
                hint="Expected down [rank, in] and up [out, rank].",
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The alpha of a file: scale = alpha / rank."""
        return self.scale * self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer changes: [out, in] or [out, in, kh, kw]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """The weight difference in float32, of `weight_shape`."""
        return (
            (self.up.float().flatten(1) @ self.down.float().flatten(1))
            .mul_(self.scale)
            .view(self.weight_shape)
        )

    def norm(self) -> float:
        """Frobenius norm of the difference, without building it: |U D|^2 = <U^T U, D D^T>."""
        up = rearrange(self.up.double(), "o r ... -> o (r ...)")
        down = rearrange(self.down.double(), "r ... -> r (...)")
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0)
        return abs(self.scale) * float(squared.sqrt())


@dataclass(frozen=True, eq=False)
class Lora:
    """Layers in order, by canonical name, and the header fields of the file they came from."""

    layers: Mapping[str, LoraLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LoraLayer]:
        return iter(self.layers.values())

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every layer, by name."""
        return {layer.name: layer.rank for layer in self}

    def scaled(self, weight: float) -> Lora:
        """The same LoRA at another strength: every difference times `weight`."""
        return self._each(lambda layer: replace(layer, scale=layer.scale * weight))

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Lora:
        """Factors as `dtype` on `device`; None leaves either as it is."""
        return self._each(
            lambda layer: replace(
                layer,
                down=layer.down.to(device=device, dtype=dtype),
                up=layer.up.to(device=device, dtype=dtype),
            )
        )

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every layer's difference, by name."""
        return {layer.name: layer.norm() for layer in self}

    def _each(self, change: Callable[[LoraLayer], LoraLayer]) -> Lora:
        return replace(self, layers={layer.name: change(layer) for layer in self})
