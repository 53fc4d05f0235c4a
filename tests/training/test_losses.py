from __future__ import annotations

import pytest
import torch

from difflora_core.lora_space import LayerSpec, LoraSpace
from training.predictor.losses import (
    delta_loss,
    delta_terms,
    relative_delta_error,
    weight_preserved_loss,
)

LAYERS = (LayerSpec("unet.a.attn1.to_q", 12, 20), LayerSpec("unet.a.attn2.to_k", 16, 10))


def test_weight_preserved_loss_by_hand():
    target = torch.tensor([[1.0, 3.0]])  # relative magnitudes 0.5 and 1.5
    small, large = target + torch.tensor([1.0, 0.0]), target + torch.tensor([0.0, 1.0])
    assert float(weight_preserved_loss(small, target)) == pytest.approx(1.5 / 2)
    assert float(weight_preserved_loss(large, target)) == pytest.approx(2.5 / 2)
    assert float(weight_preserved_loss(large, target, emphasis=0)) == pytest.approx(0.5)


@pytest.mark.parametrize("gauge", ["frozen_down", "free"])
def test_delta_terms_equal_dense_matrices(gauge):
    space = LoraSpace("toy", LAYERS, rank=3, alpha=6.0, gauge=gauge)
    a, b = torch.randn(2, 4, space.size, generator=torch.Generator().manual_seed(0))
    terms = delta_terms(space, a, b)
    for i in range(4):
        pairs = zip(space.unpack(a[i]), space.unpack(b[i]), strict=True)
        for j, (x, y) in enumerate(pairs):
            dx, dy = x.delta().flatten().double(), y.delta().flatten().double()
            cosine = torch.nn.functional.cosine_similarity(dx, dy, dim=0)
            assert float(terms.squared[i, j]) == pytest.approx(
                float((dx - dy).norm() ** 2), rel=1e-4
            )
            assert float(terms.cosine[i, j]) == pytest.approx(float(cosine), abs=1e-5)
            ratio = float((dx.norm() / dy.norm()).log())
            assert float(terms.log_ratio[i, j]) == pytest.approx(ratio, abs=1e-5)


@pytest.mark.parametrize("gauge", ["frozen_down", "free"])
def test_delta_terms_are_exact_in_a_training_of_half_precision(gauge):
    space = LoraSpace("toy", LAYERS, rank=3, alpha=6.0, gauge=gauge)
    a = torch.randn(4, space.size, generator=torch.Generator().manual_seed(0))
    exact = delta_terms(space, 1.02 * a, a)
    with torch.autocast("cpu", torch.bfloat16):
        within = delta_terms(space, 1.02 * a, a)
    for name, tensor in exact._asdict().items():
        assert torch.equal(getattr(within, name), tensor)


def test_delta_losses_of_equal_scaled_and_zero_loras():
    space = LoraSpace("toy", LAYERS, rank=3, alpha=3.0)
    a = torch.randn(2, space.size, requires_grad=True)
    assert float(delta_loss(space, a, a)) == pytest.approx(0, abs=1e-6)
    doubled = float(delta_loss(space, 2 * a, a, norm=1.0))
    assert doubled == pytest.approx(0.6931**2, abs=1e-3)
    assert float(relative_delta_error(space, torch.zeros_like(a), a)) == pytest.approx(1)
    delta_loss(space, 0 * a, a.detach()).backward()
    assert bool(a.grad.isfinite().all())
