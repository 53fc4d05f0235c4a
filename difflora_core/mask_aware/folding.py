"""Frozen networks without batch norms: where statistics stand still, they are mere factors.

One after a convolution is a part of the convolution. One before it is not, because of the padding;
as a multiplication it keeps nothing of its input for the backward pass, which a norm does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..recogniser import IResNet, ResidualBlock


class Affine(nn.Module):
    """A batch norm in evaluation mode: [N, C, h, w] times a scale, plus a shift per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        scale, shift = affine(mean, variance, norm.weight, norm.bias, norm.eps)
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", shift.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def affine(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a batch norm whose statistics [C] stand still."""
    scale = weight / (variance + eps).sqrt()
    return scale, bias - mean * scale


def folded_layers(network: IResNet) -> list[nn.Module]:
    """The layers of a trained IResNet in a row, each block one of them; convolutions are copies.

    They give what the network in evaluation mode gives, up to rounding, in less time and memory.
    """
    network.eval()
    stem = (fuse_conv_bn_eval(network.conv1, network.bn1), network.prelu)
    blocks = [_FoldedBlock(block) for block in network.blocks if isinstance(block, ResidualBlock)]
    embedding = fuse_linear_bn_eval(network.fc, network.features)
    return [*stem, *blocks, Affine(network.bn2), nn.Flatten(), embedding]


class _FoldedBlock(nn.Module):
    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        first = fuse_conv_bn_eval(block.conv1, block.bn2)
        second = fuse_conv_bn_eval(block.conv2, block.bn3)
        self.body = nn.Sequential(Affine(block.bn1), first, block.prelu, second)
        self.downsample = block.downsample
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = block.downsample
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            self.downsample = fuse_conv_bn_eval(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.downsample(x)
