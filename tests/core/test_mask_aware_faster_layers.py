"""Layers that save time and memory give what the plain ones give, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflora_core.mask_aware.folding import folded_layers
from difflora_core.mask_aware.upsampling import DoublingConv
from difflora_core.recogniser import IResNet, IResNetConfig

SHAPE = IResNetConfig(stem=8, stem_stride=1, widths=(8, 16, 16), layers=(1, 2, 1), embedding=12)


def trained(seed: int) -> IResNet:
    """A network whose norms have seen something."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = IResNet(SHAPE)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        for tensor in (norm.weight.data, norm.running_var):
            assert tensor is not None
            tensor.uniform_(0.5, 2.0, generator=generator)
        for tensor in (norm.bias.data, norm.running_mean):
            assert tensor is not None
            tensor.normal_(generator=generator)
    return network.eval().requires_grad_(False)


def with_gradient(run: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_(True)
    y = run(leaf)
    return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_folded_network_gives_what_the_network_gives(seed: int) -> None:
    network, crops = trained(seed), torch.rand(2, 3, 112, 112)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = nn.Sequential(*folded_layers(network))
    assert not any("BatchNorm" in type(module).__name__ for module in folded.modules())
    pairs = zip(with_gradient(folded, crops), with_gradient(network, crops), strict=True)
    assert all(close(ours, plain) for ours, plain in pairs)
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 5, 8)], ids=str)
def test_a_doubling_convolution_is_one_of_the_doubled_map(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours = DoublingConv(4, 3).requires_grad_(False)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.interpolate(x, scale_factor=2), ours.weight, padding=1)

    x = torch.randn(shape)
    pairs = zip(with_gradient(ours, x), with_gradient(Plain(), x), strict=True)
    assert all(close(a, b) for a, b in pairs)
