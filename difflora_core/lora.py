"""A LoRA as ordered layers of low-rank factors (Hu et al. 2021, arXiv 2106.09685, section 4.1).

Letters: `r` rank, `in`/`out` features or channels of the layer, `kh kw` kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

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

    @property
    def outline(self) -> LayerOutline:
        return LayerOutline(self.rank, self.weight_shape, self.up.dtype, self.scale)

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


@dataclass(frozen=True, slots=True)
class LayerOutline:
    """What is known of a layer without its weights."""

    rank: int
    weight_shape: tuple[int, ...]
    """[out, in] or [out, in, kh, kw]"""
    dtype: torch.dtype
    """of the factors"""
    scale: float = 1.0

    @property
    def alpha(self) -> float:
        return self.scale * self.rank


class LazyLayers(Mapping[str, LoraLayer]):
    """Layers that are made when they are asked for, each time anew, and not kept.

    `make` gives the layer of a name, and what it gives has to agree with the `outline`.
    """

    def __init__(
        self, outline: Mapping[str, LayerOutline], make: Callable[[str], LoraLayer]
    ) -> None:
        self.outline = outline
        self._make = make

    def __getitem__(self, name: str) -> LoraLayer:
        if name not in self.outline:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)

    def __contains__(self, name: object) -> bool:
        return name in self.outline


@dataclass(frozen=True)
class Naming:
    """How a LoRA of a model without a module table spells its layers.

    The layer names of such a LoRA are those of its file; two of them name the same things only when
    their labels are equal.
    """

    label: str
    """the model and whose names: `Flux, kohya names`"""
    suffix: str
    """spelling of the factors: kohya, diffusers, peft or xlabs"""


@dataclass(frozen=True, eq=False)
class Lora:
    """Layers in order, by canonical name, and the header fields of the file they came from.

    `layers` may be `LazyLayers`: then nothing is held in memory, and `outline` tells ranks and
    shapes without reading. `offsets` are differences of parameters that are no matrices (biases,
    weights of norms), by parameter name such as `unet.conv_norm_out.weight`; they are added as they
    are. `naming` is None for the base models with a module table.
    """

    layers: Mapping[str, LoraLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    naming: Naming | None = None

    def __iter__(self) -> Iterator[LoraLayer]:
        return (self.layers[name] for name in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def outline(self) -> Mapping[str, LayerOutline]:
        """Rank, shape, dtype and scale of every layer, by name; reads no weights."""
        if isinstance(self.layers, LazyLayers):
            return self.layers.outline
        return {name: layer.outline for name, layer in self.layers.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every layer, by name."""
        return {name: outline.rank for name, outline in self.outline.items()}

    def scaled(self, weight: float) -> Lora:
        """The same LoRA at another strength: every difference times `weight`."""
        return self._each(
            lambda layer: replace(layer, scale=layer.scale * weight),
            lambda outline: replace(outline, scale=outline.scale * weight),
            {name: offset * weight for name, offset in self.offsets.items()},
        )

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Lora:
        """Factors as `dtype` on `device`; None leaves either as it is."""

        def move(layer: LoraLayer) -> LoraLayer:
            down = layer.down.to(device=device, dtype=dtype)
            return replace(layer, down=down, up=layer.up.to(device=device, dtype=dtype))

        def moved(outline: LayerOutline) -> LayerOutline:
            return replace(outline, dtype=dtype or outline.dtype)

        offsets = {n: offset.to(device=device, dtype=dtype) for n, offset in self.offsets.items()}
        return self._each(move, moved, offsets)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every layer's difference, by name."""
        return {layer.name: layer.norm() for layer in self}

    def _each(
        self,
        change: Callable[[LoraLayer], LoraLayer],
        change_outline: Callable[[LayerOutline], LayerOutline],
        offsets: Mapping[str, Tensor],
    ) -> Lora:
        layers = self.layers
        if isinstance(layers, LazyLayers):
            outline = {name: change_outline(one) for name, one in layers.outline.items()}
            changed: Mapping[str, LoraLayer] = LazyLayers(
                outline, lambda name: change(layers[name])
            )
        else:
            changed = {name: change(layer) for name, layer in layers.items()}
        return replace(self, layers=changed, offsets=offsets)
