"""The space in which LoRAs are predicted: which layers, at which rank, in which gauge.

B A = (B R)(R^-1 A): one LoRA has endless factorisations, so raw factors can neither be averaged nor
predicted. A space fixes the gauge:

* `frozen_down`: A is one shared row-orthonormal matrix per layer, only B is predicted. Unique;
  means and interpolations of B are means and interpolations of delta W, and with scale s
  ||dW1 - dW2||_F = s ||B1 - B2||_F.
* `shared_init`: A and B are predicted, all LoRAs start from the same A.
* `free`: A and B are predicted, every LoRA starts from its own random A.
* `svd`: A and B are predicted in the canonical form B = U sqrt(S), A = sqrt(S) V^T.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .config import to_dict
from .errors import BadConfig, LayoutMismatch
from .gauges import canonical_factors, product_energy, seeded_rows
from .lora import Lora, LoraLayer

LAYOUTS = Path(__file__).parent / "layouts"
ATTENTION_PROJECTION = re.compile(r".*\.attn[12]\.to_(q|k|v|out\.0)")

Gauge = Literal["frozen_down", "shared_init", "free", "svd"]


@dataclass(frozen=True)
class LayerSpec:
    """One linear layer of the base model."""

    name: str
    """Canonical name: component and diffusers module path."""
    in_features: int
    out_features: int


class Projection(NamedTuple):
    """A LoRA expressed in a space."""

    vector: Tensor
    """[D] float32"""
    lost: float
    """Share of the energy ||dW||_F^2 (summed over layers) that the space cannot express, 0..1."""


@dataclass(frozen=True)
class LoraSpace:
    """Ordered layers, rank, scale and gauge; converts between `Lora` and flat vectors [D]."""

    base: str
    layers: tuple[LayerSpec, ...]
    rank: int = 4
    alpha: float = 4.0
    gauge: Gauge = "frozen_down"
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = min((min(s.in_features, s.out_features) for s in self.layers), default=0)
        if not 1 <= self.rank <= smallest:
            raise ValueError(f"rank must be 1 to {smallest} for these layers, found {self.rank}")
        if len({s.name for s in self.layers}) != len(self.layers):
            raise ValueError("a layer name occurs twice")

    @classmethod
    def for_base(cls, base: str, rank: int = 4, gauge: Gauge = "frozen_down") -> LoraSpace:
        """All attention projections of the U-Net of `base` (mini, sd15, sdxl), alpha = rank."""
        return cls(base, attention_layers(base), rank=rank, alpha=float(rank), gauge=gauge)

    @classmethod
    def for_mini(cls, rank: int = 4, gauge: Gauge = "frozen_down") -> LoraSpace:
        return cls.for_base("mini", rank, gauge)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def predicts_down(self) -> bool:
        return self.gauge != "frozen_down"

    @cached_property
    def id(self) -> str:
        """16 hex digits; equal for equal base, names, shapes, rank, alpha, gauge and seed."""
        canonical = json.dumps(to_dict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of predicted values of each layer; ups first, then downs, both row-major."""
        return tuple(self.rank * (s.out_features + self._down_width(s)) for s in self.layers)

    @cached_property
    def size(self) -> int:
        """D, the number of predicted values."""
        return sum(self.counts)

    def _down_width(self, spec: LayerSpec) -> int:
        return spec.in_features if self.predicts_down else 0

    @cached_property
    @torch.inference_mode(False)  # what is kept must also serve in training, whoever asked first
    def _downs(self) -> dict[str, Tensor]:
        return {
            s.name: seeded_rows(self.rank, s.in_features, self.seed, s.name) for s in self.layers
        }

    def downs(self) -> dict[str, Tensor]:
        """The shared A of every layer: row-orthonormal [r, in], float32, equal on any machine."""
        return dict(self._downs)

    def initial_downs(self, person: int) -> dict[str, Tensor]:
        """The A [r, in] from which a LoRA of `person` is trained; own per person in gauge free."""
        if self.gauge != "free":
            return self.downs()
        tag = f"person {person} "
        return {
            s.name: seeded_rows(self.rank, s.in_features, self.seed, tag + s.name)
            for s in self.layers
        }

    def pack(self, lora: Lora) -> Tensor:
        """The vector [D] float32 of `lora`; see `project` for what cannot be expressed."""
        return self.project(lora).vector

    def project(self, lora: Lora) -> Projection:
        """Express `lora` in this space.

        Exact for LoRAs of this space. Otherwise gauge frozen_down takes the nearest B = dW A^T / s,
        the other gauges the nearest rank-r factors. Errors: LayoutMismatch for missing layers.
        """
        self._check_layers(lora)
        parts: list[Tensor] = []
        kept = 0.0
        for spec in self.layers:
            down, up = self._express(spec, lora.layers[spec.name])
            parts += [up.flatten(), down.flatten()] if self.predicts_down else [up.flatten()]
            kept += self.scale**2 * product_energy(up, down)
        total = sum(_energy(layer) for layer in lora.layers.values())
        lost = max(0.0, 1.0 - kept / total) if total > 0 else 0.0
        return Projection(torch.cat(parts).float(), lost)

    def unpack(self, vector: Tensor) -> Lora:
        """The LoRA of one vector [D]: float32, scale alpha / r, on the vector's device."""
        factors = self.unpack_factors(vector.detach().float()[None])
        return Lora(
            {
                name: LoraLayer(name, down[0].contiguous(), up[0].contiguous(), self.scale)
                for name, (down, up) in factors.items()
            },
            {},
        )

    def strengthened(self, vectors: Tensor, strength: float) -> Tensor:
        """Vectors [B, D] whose differences are `strength` times as large: B alone is multiplied."""
        if not self.predicts_down:
            return vectors * strength
        result = vectors.clone()
        for spec, part in zip(self.layers, result.split(self.counts, dim=-1), strict=True):
            part[..., : self.rank * spec.out_features] *= strength
        return result

    def unpack_ups(self, vectors: Tensor) -> dict[str, Tensor]:
        """vectors [B, D] -> B matrices name -> [B, out, r]: views, differentiable."""
        return {name: up for name, (_, up) in self._split(vectors).items()}

    def unpack_factors(self, vectors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """vectors [B, D] -> name -> (A [B, r, in], B [B, out, r]); the frozen A is expanded."""
        split = self._split(vectors)
        if self.predicts_down:
            return split
        shared = self._downs_like(vectors)
        rows = len(vectors)
        return {name: (shared[name].expand(rows, -1, -1), up) for name, (_, up) in split.items()}

    @torch.inference_mode(False)
    def _downs_like(self, like: Tensor) -> dict[str, Tensor]:
        """The shared A on the device of `like`: copied there once, not at every training step."""
        key = (like.device, like.dtype)
        if key not in self._moved:
            self._moved[key] = {name: down.to(like) for name, down in self._downs.items()}
        return self._moved[key]

    @cached_property
    def _moved(self) -> dict[tuple[torch.device, torch.dtype], dict[str, Tensor]]:
        return {}

    def _split(self, vectors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        self.check_vectors(vectors)
        r, result = self.rank, {}
        for spec, part in zip(self.layers, vectors.split(self.counts, dim=-1), strict=True):
            up, down = part.split([r * spec.out_features, r * self._down_width(spec)], dim=-1)
            result[spec.name] = (
                rearrange(down, "b (r i) -> b r i", r=r),
                rearrange(up, "b (o r) -> b o r", r=r),
            )
        return result

    def check_vectors(self, vectors: Tensor) -> None:
        """Errors: LayoutMismatch unless the last axis is D long."""
        if vectors.shape[-1] != self.size:
            raise LayoutMismatch(
                f"LoRA space {self.id} ({self.base}) holds vectors of {self.size} values, "
                f"found {vectors.shape[-1]}.",
                hint="Use weights and vectors that were made for the same LoRA space.",
            )

    def check_same(self, other: LoraSpace, what: str) -> None:
        """Errors: LayoutMismatch naming what differs between this space and that of `what`."""
        if other.id == self.id:
            return
        mine, theirs = to_dict(self), to_dict(other)
        differing = [key for key in mine if mine[key] != theirs[key]]
        shown = ", ".join(
            key if key == "layers" else f"{key} {theirs[key]} instead of {mine[key]}"
            for key in differing
        )
        raise LayoutMismatch(
            f"{what} belongs to another LoRA space: {shown}.",
            hint=f"Choose one made for base {self.base}, LoRA space {self.id}.",
        )

    def _check_layers(self, lora: Lora) -> None:
        missing = [s.name for s in self.layers if s.name not in lora.layers]
        if missing:
            raise LayoutMismatch(
                f"The LoRA lacks {len(missing)} of the {len(self.layers)} layers of the "
                f"{self.base} LoRA space: {', '.join(missing[:3])}.",
                hint=f"Use a LoRA trained on the attention layers of {self.base}.",
            )
        for spec in self.layers:
            layer = lora.layers[spec.name]
            shape = (layer.up.shape[0], layer.down.shape[1], *layer.down.shape[2:])
            if shape != (spec.out_features, spec.in_features):
                raise LayoutMismatch(
                    f"Layer {spec.name} changes a weight of shape {shape}; {self.base} expects "
                    f"{(spec.out_features, spec.in_features)}.",
                    hint=f"The LoRA was made for another base model than {self.base}.",
                )

    def _express(self, spec: LayerSpec, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) of this gauge, with the layer's own scale moved into B."""
        down, up = _matrices(layer)
        up = up * (layer.scale / self.scale)
        if self.gauge == "frozen_down":
            shared = self._downs[spec.name].to(down)
            same = down.shape == shared.shape and torch.equal(down, shared)
            return shared, up if same else up @ (down @ shared.mT)
        if self.gauge == "svd" or layer.rank != self.rank:
            return canonical_factors(down, up, self.rank, self.seed, spec.name)
        return down, up


def attention_layers(base: str) -> tuple[LayerSpec, ...]:
    """The attention projections of the U-Net of `base`, in module order. Errors: BadConfig."""
    path = LAYOUTS / f"{base}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in LAYOUTS.glob("*.json")))
        raise BadConfig(f"No layout is known for base model {base!r}.", hint=f"Known: {known}.")
    modules = json.loads(path.read_text())["components"]["unet"]
    return tuple(
        LayerSpec(f"unet.{name}", in_features=shape[1], out_features=shape[0])
        for name, *_, shape in modules
        if ATTENTION_PROJECTION.fullmatch(name)
    )


def _matrices(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """(down [r, in...], up [out, r]) in float32, conv kernels flattened."""
    return layer.down.float().flatten(1), layer.up.float().flatten(1)


def _energy(layer: LoraLayer) -> float:
    down, up = _matrices(layer)
    return layer.scale**2 * product_energy(up, down)
