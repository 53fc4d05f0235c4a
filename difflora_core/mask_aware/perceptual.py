"""LPIPS on VGG-16 (Zhang et al., 2018) from the user's own weights; never a download.

Features of the VAE's decoder (`masked_distance` in losses.py) are the first choice for bodies, as
in LPL (Berrada et al., 2025): they are there already and know what a latent can express. This is
the distance of the original project, for comparison.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadWeightsFile
from ..tensor_file import is_finite
from ..weights_file import read_safetensors
from .losses import direction_difference

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of VGG-16's convolutions in torchvision; each stage begins at half the resolution."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, for pictures in 0..1"""
HINT = (
    "Expected vgg16 of torchvision or timm, and for calibrated channels the weights of the lpips "
    "package, saved as safetensors."
)


class Lpips(nn.Module):
    """VGG-16's five stages and, per stage, what each channel counts."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """weights: `features.N.weight`, `features.N.bias` for N in STAGES, and `lin.K` [C] for
        each of the five stages or for none, where all channels count 1. Errors: KeyError for what
        is missing, ValueError for what does not fit."""
        super().__init__()
        calibrated = any(f"lin.{k}" in weights for k in range(len(STAGES)))
        width = 3
        for k, stage in enumerate(STAGES):
            for number in stage:
                inputs, width = width, weights[f"features.{number}.bias"].numel()
                for name, shape in {"weight": (width, inputs, 3, 3), "bias": (width,)}.items():
                    tensor = _checked(weights, f"features.{number}.{name}", shape)
                    self.register_buffer(f"{name}_{number}", tensor)
            lin = _checked(weights, f"lin.{k}", (width,)) if calibrated else torch.ones(width)
            self.register_buffer(f"lin_{k}", lin)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Pictures [B, 3, H, W] in 0..1 -> the last map of each stage, [B, C, h, w]."""
        x = (pictures.float() - self.get_buffer("mean")) / self.get_buffer("deviation")
        for k, stage in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if k else x
            for number in stage:
                weight, bias = (self.get_buffer(f"{n}_{number}") for n in ("weight", "bias"))
                x = F.conv2d(x, weight, bias, padding=1).relu()
            yield x

    def forward(self, ours: Tensor, theirs: Tensor) -> list[Tensor]:
        """Distances [B, h, w] of two pictures [B, 3, H, W] per stage, for `mean_inside`.

        LPIPS itself is the sum of their means, five times what `mean_inside` gives.
        """
        stages = zip(self.features(ours), self.features(theirs), strict=True)
        return [
            (self.get_buffer(f"lin_{k}")[:, None, None] * direction_difference(*maps).square()).sum(
                1
            )
            for k, maps in enumerate(stages)
        ]


def open_lpips(*paths: str | Path) -> Lpips:
    """From VGG-16's weights and the lpips package's, in one .safetensors file or in two.

    Known are the names of torchvision, timm and lpips. Errors: BadWeightsFile.
    """
    weights: dict[str, Tensor] = {}
    with torch.inference_mode(False):
        for path in paths:
            tensors, _ = read_safetensors(path)
            weights |= {_canonical(name): tensor.float() for name, tensor in tensors.items()}
        weights |= {k: v.flatten() for k, v in weights.items() if k.startswith("lin.")}
        names = " with ".join(Path(path).name for path in paths)
        try:
            return Lpips(weights).eval()
        except KeyError as error:
            raise BadWeightsFile(f"{names} lacks VGG-16's {error}.", hint=HINT) from error
        except ValueError as error:
            raise BadWeightsFile(f"{names} is no LPIPS on VGG-16: {error}.", hint=HINT) from error


def _checked(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """One of the tensors. Errors: KeyError, ValueError."""
    tensor = weights[name]
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, expected {list(shape)}")
    if not is_finite(tensor):
        raise ValueError(f"{name} holds numbers that are not finite")
    return tensor


def _canonical(name: str) -> str:
    """`net.slice2.5.weight` of lpips -> `features.5.weight`, `lin0.model.1.weight` -> `lin.0`."""
    name = re.sub(r"^(?:net\.)?slice\d\.", "features.", name)
    return re.sub(r"^lin(\d)\.model\.1\.weight$", r"lin.\1", name)
