from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from difflora_core.errors import BadConfig, LayoutMismatch
from difflora_core.gauges import canonical_factors
from difflora_core.lora import Lora, LoraLayer
from difflora_core.lora_space import LAYOUTS, LayerSpec, LoraSpace

LAYERS = (LayerSpec("unet.a.attn1.to_q", 12, 20), LayerSpec("unet.a.attn2.to_k", 16, 10))
RECORDED = [
    -0.1156349,
    -0.0013396,
    0.0803379,
    0.0892008,
    0.1035999,
    -0.1657236,
    0.0265891,
    0.1344812,
    0.0101459,
    0.0020526,
    -0.0593408,
    0.0156696,
]
GAUGES = ("frozen_down", "shared_init", "free", "svd")


def space(gauge="frozen_down", **changes) -> LoraSpace:
    return LoraSpace("toy", LAYERS, rank=3, alpha=6.0, gauge=gauge, **changes)


def random_lora(seed: int, rank: int = 3, scale: float = 1.5) -> Lora:
    g = torch.Generator().manual_seed(seed)
    layers = {
        s.name: LoraLayer(
            s.name,
            torch.randn(rank, s.in_features, generator=g),
            torch.randn(s.out_features, rank, generator=g),
            scale,
        )
        for s in LAYERS
    }
    return Lora(layers, {})


def assert_same_deltas(first: Lora, second: Lora, tolerance: float = 1e-5) -> None:
    for name, layer in first.layers.items():
        torch.testing.assert_close(
            layer.delta(), second.layers[name].delta(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("gauge", GAUGES)
def test_unpack_then_pack_gives_the_vector_back(gauge):
    s = space(gauge)
    lora = random_lora(0)
    vector = s.pack(lora)
    assert vector.shape == (s.size,)
    torch.testing.assert_close(s.pack(s.unpack(vector)), vector, rtol=1e-4, atol=1e-5)


def test_frozen_vectors_survive_bit_for_bit():
    s = space()
    vector = torch.randn(s.size)
    assert torch.equal(s.pack(s.unpack(vector)), vector)


@pytest.mark.parametrize("gauge", ("shared_init", "free", "svd"))
def test_factor_gauges_keep_delta(gauge):
    lora = random_lora(1)
    projection = space(gauge).project(lora)
    assert_same_deltas(space(gauge).unpack(projection.vector), lora, 1e-4)
    assert projection.lost < 1e-6


def test_average_of_frozen_vectors_is_the_average_of_deltas():
    s = space()
    vectors = torch.randn(5, s.size)
    mean = s.unpack(vectors.mean(0))
    loras = [s.unpack(v) for v in vectors]
    for name, layer in mean.layers.items():
        expected = torch.stack([x.layers[name].delta().double() for x in loras]).mean(0)
        torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-6, atol=1e-6)


def test_frozen_projection_is_the_nearest_and_reports_the_lost_energy():
    s, lora = space(), random_lora(2)
    vector, lost = s.project(lora)
    nearest = s.unpack(vector)
    kept = error = total = 0.0
    for spec in LAYERS:
        dense, a = lora.layers[spec.name].delta(), s.downs()[spec.name]
        torch.testing.assert_close(
            nearest.layers[spec.name].delta(), dense @ a.mT @ a, rtol=1e-4, atol=1e-5
        )
        total += float(dense.square().sum())
        kept += float(nearest.layers[spec.name].delta().square().sum())
        error += float((dense - nearest.layers[spec.name].delta()).square().sum())
    assert lost == pytest.approx(1 - kept / total, abs=1e-5)
    assert lost == pytest.approx(error / total, abs=1e-5)


def test_layers_outside_the_space_count_as_lost():
    lora = space().unpack(torch.ones(space().size))
    extra = LoraLayer("text_encoder.x", torch.eye(2), torch.eye(2), 1.0)
    more = Lora({**lora.layers, extra.name: extra}, {})
    total = sum(float(x.delta().square().sum()) for x in more)
    assert space().project(more).lost == pytest.approx(2.0 / total, rel=1e-4)


def test_distance_of_vectors_is_the_distance_of_deltas():
    s = space()
    a, b = torch.randn(2, s.size)
    squared = sum(
        float((x.delta() - y.delta()).square().sum())
        for x, y in zip(s.unpack(a), s.unpack(b), strict=True)
    )
    assert s.scale * float((a - b).norm()) == pytest.approx(squared**0.5, rel=1e-5)


def test_downs_are_orthonormal_and_repeatable():
    first, second = space().downs(), space().downs()
    for name, a in first.items():
        torch.testing.assert_close(a @ a.mT, torch.eye(3), rtol=0, atol=1e-6)
        assert torch.equal(a, second[name])
    assert not torch.equal(first[LAYERS[0].name], space(seed=1).downs()[LAYERS[0].name])


def test_downs_are_these_numbers_on_any_machine():
    """A of the shipped mini space: recorded once, so that files and machines stay compatible."""
    a = LoraSpace.for_mini().downs()["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    recorded = torch.tensor(RECORDED)
    torch.testing.assert_close(a[:, :3].flatten(), recorded, rtol=0, atol=1e-6)


def test_free_gauge_starts_from_a_down_of_its_own():
    s = space("free")
    name = LAYERS[0].name
    assert not torch.equal(s.initial_downs(1)[name], s.initial_downs(2)[name])
    assert torch.equal(s.initial_downs(1)[name], s.initial_downs(1)[name])
    shared = space("shared_init")
    assert torch.equal(shared.initial_downs(1)[name], shared.initial_downs(2)[name])


def test_svd_gauge_does_not_depend_on_the_factorisation():
    g = torch.Generator().manual_seed(3)
    turn = torch.randn(3, 3, generator=g)
    lora = random_lora(3)
    turned = Lora(
        {
            n: LoraLayer(n, torch.linalg.inv(turn) @ x.down, x.up @ turn, x.scale)
            for n, x in lora.layers.items()
        },
        {},
    )
    s = space("svd")
    torch.testing.assert_close(s.pack(lora), s.pack(turned), rtol=1e-3, atol=1e-4)


def test_canonical_factors_are_balanced_and_ordered():
    layer = random_lora(4).layers[LAYERS[0].name]
    down, up = canonical_factors(layer.down, layer.up, rank=5)
    torch.testing.assert_close(up @ down, layer.up @ layer.down, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(up.mT @ up, down @ down.mT, rtol=1e-4, atol=1e-4)
    energy = up.square().sum(0)
    assert bool((energy[:-1] >= energy[1:] - 1e-5).all()) and float(energy[3:].sum()) < 1e-8


def test_batched_unpacking_equals_single():
    for gauge in GAUGES:
        s = space(gauge)
        vectors = torch.randn(4, s.size, requires_grad=True)
        factors = s.unpack_factors(vectors)
        ups = s.unpack_ups(vectors)
        for i in range(4):
            for name, layer in s.unpack(vectors[i]).layers.items():
                down, up = factors[name]
                assert torch.equal(layer.up, up[i]) and torch.equal(layer.down, down[i])
                assert torch.equal(ups[name][i], layer.up)
        sum(up.square().sum() for up in ups.values()).backward()
        assert vectors.grad is not None


def test_shared_factors_serve_in_training_after_a_use_without_gradients():
    s = space()
    with torch.inference_mode():
        s.unpack(torch.zeros(s.size))
    vectors = torch.randn(1, s.size, requires_grad=True)
    sum((up @ down).square().sum() for down, up in s.unpack_factors(vectors).values()).backward()
    assert vectors.grad is not None and bool(vectors.grad.any())


def test_id_changes_with_everything_that_matters():
    base = space()
    others = [
        space("svd"),
        space(seed=1),
        dataclasses.replace(base, alpha=3.0),
        dataclasses.replace(base, rank=2),
        dataclasses.replace(base, base="other"),
        dataclasses.replace(base, layers=LAYERS[::-1]),
    ]
    assert space().id == base.id
    assert len({base.id, *(o.id for o in others)}) == 7
    for other in others:
        with pytest.raises(LayoutMismatch, match="another LoRA space"):
            base.check_same(other, "The predictor")


def test_wrong_loras_and_vectors_are_told_apart():
    s = space()
    lora = random_lora(5)
    with pytest.raises(LayoutMismatch, match=r"lacks 1 of the 2 layers .*attn2"):
        s.pack(Lora({LAYERS[0].name: lora.layers[LAYERS[0].name]}, {}))
    odd = LoraLayer(LAYERS[0].name, torch.randn(3, 7), torch.randn(20, 3), 1.0)
    with pytest.raises(LayoutMismatch, match=r"\(20, 7\); toy expects \(20, 12\)"):
        s.pack(Lora({**lora.layers, odd.name: odd}, {}))
    with pytest.raises(LayoutMismatch, match=f"{s.size} values, found 5"):
        s.unpack(torch.zeros(5))
    with pytest.raises(BadConfig, match="No layout is known"):
        LoraSpace.for_base("sdx")


@pytest.mark.parametrize(("base", "count", "size"), [("mini", 56, 22_528), ("sd15", 128, 399_360)])
def test_spaces_of_known_bases(base, count, size):
    s = LoraSpace.for_base(base)
    assert (len(s.layers), s.size, s.scale) == (count, size, 1.0)


def test_sdxl_space_names_layers_of_the_sdxl_unet():
    frozen, both = LoraSpace.for_base("sdxl"), LoraSpace.for_base("sdxl", gauge="free")
    assert (len(frozen.layers), frozen.size, both.size) == (560, 2_662_400, 5_806_080)
    modules = json.loads((LAYOUTS / "sdxl.json").read_text())["components"]["unet"]
    shapes = {f"unet.{name}": tuple(shape) for name, *_, shape in modules}
    assert all(shapes[s.name] == (s.out_features, s.in_features) for s in frozen.layers)
