"""The LoRA object against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difflora_core.errors import BadLoraFile
from difflora_core.lora import Lora, LoraLayer


def _linear(scale: float = 0.5, dtype: torch.dtype = torch.float32) -> LoraLayer:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 6, generator=generator), torch.randn(8, 3, generator=generator)
    return LoraLayer("unet.a.to_q", down.to(dtype), up.to(dtype), scale)


def _conv() -> LoraLayer:
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(3, 4, 3, 3, generator=generator)
    return LoraLayer("unet.conv", down, torch.randn(8, 3, 1, 1, generator=generator), 0.7)


def test_linear_delta_is_scaled_product() -> None:
    layer = _linear()
    expected = torch.zeros(8, 6)
    for o in range(8):
        for i in range(6):
            expected[o, i] = 0.5 * sum(layer.up[o, r] * layer.down[r, i] for r in range(3))
    torch.testing.assert_close(layer.delta(), expected)


def test_conv_delta_equals_two_convolutions() -> None:
    layer, x = _conv(), torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(2))
    one = nn.functional.conv2d(x, layer.delta(), padding=1)
    inner = nn.functional.conv2d(x, layer.down, padding=1)
    two = layer.scale * nn.functional.conv2d(inner, layer.up)
    assert layer.weight_shape == (8, 4, 3, 3)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("layer", [_linear(), _conv(), _linear(-2.0)])
def test_norm_is_that_of_the_delta(layer: LoraLayer) -> None:
    assert layer.norm() == pytest.approx(float(layer.delta().norm()), rel=1e-5)


def test_delta_of_half_precision_is_computed_in_float32() -> None:
    layer = _linear(dtype=torch.float16)
    assert layer.delta().dtype == torch.float32
    expected = 0.5 * layer.up.float() @ layer.down.float()
    torch.testing.assert_close(layer.delta(), expected)


def test_lora_scales_moves_and_reports() -> None:
    lora = Lora({layer.name: layer for layer in (_linear(), _conv())}, {"modelspec.title": "x"})
    assert [layer.name for layer in lora] == ["unet.a.to_q", "unet.conv"]
    assert len(lora) == 2
    assert lora.ranks == {"unet.a.to_q": 3, "unet.conv": 3}
    half = lora.scaled(0.5)
    for before, after in zip(lora, half, strict=True):
        torch.testing.assert_close(after.delta(), 0.5 * before.delta())
    assert half.metadata == lora.metadata
    moved = lora.to(torch.bfloat16)
    assert {layer.up.dtype for layer in moved} == {torch.bfloat16}
    assert lora.norms()["unet.conv"] == pytest.approx(float(_conv().delta().norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("down", "up"), [((3, 6), (8, 4)), ((3, 6), (8, 3, 1, 1)), ((3, 4, 3, 3), (8, 3, 3, 3))]
)
def test_factors_that_do_not_fit_are_refused(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    with pytest.raises(BadLoraFile, match=r"unet\.x do not fit"):
        LoraLayer("unet.x", torch.zeros(down), torch.zeros(up))
