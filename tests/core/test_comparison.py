"""Comparing LoRAs against dense float64 arithmetic, and the pictures of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflora_core.errors import BadLoraFile
from difflora_core.lora import Lora, LoraLayer
from difflora_core.merging import (
    MergeInput,
    MergeSettings,
    RankRule,
    block_of,
    compare,
    heat_map,
    merge,
    spectrum_picture,
)
from tests.core.merge_samples import FOREIGN, NAMES, dense, distance, random_lora, refactored


def everything(lora: Lora) -> Tensor:
    return torch.cat([dense(layer).flatten() for layer in lora])


def projection(matrix: Tensor) -> Tensor:
    """Projector on the column space."""
    u, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    u = u[:, sigma > 1e-9 * sigma[0]]
    return u @ u.T


def test_loras_without_layers_are_refused() -> None:
    offsets = {"unet.conv_in.bias": torch.ones(32)}
    loras = [Lora({}, offsets=offsets), Lora({}, offsets=offsets)]
    with pytest.raises(BadLoraFile, match="biases and norms only"):
        compare(loras, ["a", "b"])


def test_figures_equal_the_dense_ones() -> None:
    loras = [random_lora(i) for i in range(3)]
    result = compare(loras, ["a", "b", "c"])
    for i, a in enumerate(loras):
        for j, b in enumerate(loras):
            x, y = everything(a), everything(b)
            assert abs(result.total_cosine[i, j] - x @ y / (x.norm() * y.norm())) < 1e-6
            one, other = dense(a.layers[NAMES[2]]), dense(b.layers[NAMES[2]])
            inside = projection(one) @ other @ projection(one.T)
            share = inside.square().sum() / other.square().sum()
            assert abs(result.interference[2, i, j] - share) < 1e-6
            ranks = min(a.layers[NAMES[2]].rank, b.layers[NAMES[2]].rank)
            pairs = ((one, other), (one.T, other.T))
            angles = [(projection(p) * projection(q)).sum() / ranks for p, q in pairs]
            assert abs(result.overlap[2, i, j] - sum(angles) / 2) < 1e-6
    assert result.blocks == tuple(block_of(name) for name in NAMES)
    assert torch.allclose(result.norms[0, 1], dense(loras[1].layers[NAMES[0]]).norm())


def test_figures_do_not_depend_on_the_factors() -> None:
    a, b = random_lora(1), random_lora(2)
    one = compare([a, b], ["a", "b"])
    other = compare([refactored(a, 3), refactored(b, 4)], ["a", "b"])
    for name in ("cosine", "overlap", "interference", "norms"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5)


def test_a_lora_is_like_itself_and_nothing_like_zero() -> None:
    lora = random_lora(1)
    zero = {
        n: LoraLayer(n, layer.down, torch.zeros_like(layer.up)) for n, layer in lora.layers.items()
    }
    result = compare([lora, lora.scaled(-2.0), Lora(zero, naming=FOREIGN)], ["x", "-2x", "0"])
    assert abs(result.total_cosine[0, 1] + 1) < 1e-6 and abs(result.total_overlap[0, 1] - 1) < 1e-6
    assert bool(result.total_cosine[0, 2].isnan())
    report = result.report()
    assert report["cosine"][0][2] is None and report["norms"][2] == 0.0


def test_pictures_have_a_row_per_block() -> None:
    loras = [random_lora(i) for i in range(3)]
    map_ = heat_map(compare(loras, ["a", "b", "c"]))
    inputs = [MergeInput(lora, str(i)) for i, lora in enumerate(loras)]
    for rule in (RankRule(rank=2), RankRule()):
        picture = spectrum_picture(merge(inputs, MergeSettings("sum", rule)))
        assert picture.width > 300 and picture.height > 18 * len(NAMES)
    assert map_.height > 26 * len(NAMES) and len(map_.getcolors(1 << 20) or []) > 10


def test_comparing_two_equal_merges_shows_it() -> None:
    inputs = [MergeInput(random_lora(i), str(i)) for i in range(2)]
    merged = [merge(inputs, MergeSettings(m)).lora for m in ("average", "knots")]
    assert distance(everything(merged[1]), everything(merged[0])) > 0.01
    assert compare(merged, ["average", "knots"]).total_cosine[0, 1] > 0.5
