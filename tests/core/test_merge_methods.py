"""What every merging method must be, and what each of them is by its paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from difflora_core.errors import BadLoraFile
from difflora_core.lora import Lora, LoraLayer
from difflora_core.merging import (
    METHODS,
    MergeSettings,
    RankRule,
    merge,
    resize,
)
from tests.core.merge_samples import (
    FOREIGN,
    NAMES,
    dense,
    dense_sum,
    distance,
    inputs_of,
    random_lora,
    refactored,
)

#: methods whose exact result has full rank
DENSE = {"ties", "dare", "della"}
#: merges of X with X that are not X: see their docstrings
NOT_IDEMPOTENT = {"iso_c", "sum", "concat", "svd"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_certificate_is_the_true_error(method: str, dtype: torch.dtype) -> None:
    loras = [random_lora(i) for i in range(2)]
    settings = MergeSettings(method, density=0.6, seed=3)
    everything = RankRule(rank=999) if method in DENSE else RankRule()
    full = merge(inputs_of(loras), settings_with(settings, everything, torch.float64))
    rule = RankRule() if method == "concat" else RankRule(rank=3)
    limited = merge(inputs_of(loras), settings_with(settings, rule, dtype))
    if method == "iso_c":
        full = merge(inputs_of(loras), settings_with(settings, rule, torch.float64))
    for name, certificate in limited.certificates.items():
        exact = dense(full.lora.layers[name])
        if method == "svd":
            exact = dense_sum(loras, [1.0, 1.0], name)
        true = distance(dense(limited.lora.layers[name]), exact)
        assert certificate.error == pytest.approx(true, rel=1e-3, abs=2e-6)
        assert certificate.rank == limited.lora.layers[name].rank
        assert certificate.norm == pytest.approx(float(exact.norm()), rel=1e-5)


def settings_with(settings: MergeSettings, rule: RankRule, dtype: torch.dtype) -> MergeSettings:
    return MergeSettings(
        settings.method, rule, density=settings.density, seed=settings.seed, dtype=dtype
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_the_result_does_not_depend_on_how_inputs_are_factored(method: str, seed: int) -> None:
    loras = [random_lora(20 + 2 * seed + i) for i in range(2)]
    others = [refactored(lora, 7 + i) for i, lora in enumerate(loras)]
    settings = MergeSettings(method, density=0.7, seed=1, rule=rule_for(method))
    a, b = merge(inputs_of(loras), settings), merge(inputs_of(others), settings)
    for name in NAMES:
        assert distance(dense(b.lora.layers[name]), dense(a.lora.layers[name])) < 2e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_a_lora_lacks_counts_as_zeros(method: str) -> None:
    one, other = random_lora(3), random_lora(4)
    name, rule = NAMES[1], RankRule() if method == "concat" else RankRule(rank=999)
    layer = other.layers[name]
    none = LoraLayer(name, torch.zeros_like(layer.down), torch.zeros_like(layer.up), layer.scale)
    zeros = Lora(dict(other.layers) | {name: none}, naming=FOREIGN)
    lacking = Lora({k: v for k, v in other.layers.items() if k != name}, naming=FOREIGN)
    settings = MergeSettings(method, density=0.6, seed=1, rule=rule)
    a = merge(inputs_of([one, lacking], [1.0, 0.5]), settings)
    b = merge(inputs_of([one, zeros], [1.0, 0.5]), settings)
    assert distance(dense(a.lora.layers[name]), dense(b.lora.layers[name])) < 1e-4


def rule_for(method: str) -> RankRule:
    return RankRule() if method == "concat" else RankRule(rank=4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in NOT_IDEMPOTENT])
def test_merging_a_lora_with_itself_gives_it_back(method: str) -> None:
    lora = random_lora(5)
    merged = merge(inputs_of([lora, lora]), MergeSettings(method))
    for layer in merged.lora:
        assert distance(dense(layer), dense(lora.layers[layer.name])) < 1e-5
        assert layer.rank <= 2 * lora.layers[layer.name].rank


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("slerp", "dare", "della")])
def test_the_order_of_inputs_does_not_matter(method: str) -> None:
    loras, weights = [random_lora(30 + i) for i in range(3)], [0.5, 1.0, 0.8]
    settings = MergeSettings(method, density=0.6, rule=rule_for(method))
    a = merge(inputs_of(loras, weights), settings)
    b = merge(inputs_of(loras[::-1], weights[::-1]), settings)
    for name in NAMES:
        assert distance(dense(b.lora.layers[name]), dense(a.lora.layers[name])) < 1e-4


def test_slerp_keeps_the_norm_between_two_directions() -> None:
    a, b = random_lora(1), random_lora(2)
    both = merge(inputs_of([a, b], [0.25, 0.75]), MergeSettings("slerp"))
    name = NAMES[2]
    x, y, z = (dense(lora.layers[name]) for lora in (a, b, both.lora))
    angle = math.acos(float((x * y).sum() / (x.norm() * y.norm())))
    expected = (math.sin(0.25 * angle) * x + math.sin(0.75 * angle) * y) / math.sin(angle)
    assert distance(z, expected) < 1e-5
    swapped = merge(inputs_of([b, a], [0.75, 0.25]), MergeSettings("slerp"))
    assert distance(dense(swapped.lora.layers[name]), z) < 1e-5


def ties_by_hand(deltas: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """TIES entry by entry, in plain Python."""
    trimmed = []
    for delta in deltas:
        kept = max(1, round(density * delta.numel()))
        limit = delta.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append([float(v) if abs(v) >= limit else 0.0 for v in delta.flatten()])
    out = []
    for values in zip(*trimmed, strict=True):
        sign = math.copysign(1, sum(w * v for w, v in zip(weights, values, strict=True)))
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if w * v * sign > 0]
        mass = sum(abs(w) for w, _ in agreeing)
        out.append(sum(w * v for w, v in agreeing) / mass if mass else 0.0)
    return torch.tensor(out).view(deltas.shape[1:]) * sum(map(abs, weights))


def test_ties_agrees_with_the_algorithm_by_hand() -> None:
    loras = [random_lora(50 + i) for i in range(3)]
    merged = merge(
        inputs_of(loras, [1, 2, 1]), MergeSettings("ties", RankRule(rank=99), density=0.4)
    )
    deltas = torch.stack([dense(lora.layers[NAMES[0]]) for lora in loras])
    expected = ties_by_hand(deltas.float(), [0.25, 0.5, 0.25], 0.4).double()
    assert distance(dense(merged.lora.layers[NAMES[0]]), expected) < 1e-5


def test_dare_is_seeded_and_right_on_average() -> None:
    loras = [random_lora(60 + i) for i in range(2)]
    full = RankRule(rank=99)

    def merged(seed: int) -> Tensor:
        settings = MergeSettings("dare", full, density=0.5, seed=seed)
        return dense(merge(inputs_of(loras), settings).lora.layers[NAMES[2]])

    assert torch.equal(merged(1), merged(1)) and not torch.equal(merged(1), merged(2))
    mean = torch.stack([merged(seed) for seed in range(200)]).mean(0)
    assert distance(mean, dense_sum(loras, [0.5, 0.5], NAMES[2])) < 0.12


def test_tsv_adds_orthogonal_loras_and_counts_equal_ones_once() -> None:
    q = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))[0]
    name = NAMES[0]
    layers = [LoraLayer(name, q[:, :4].T.contiguous(), q[:, :4].contiguous(), 2.0)]
    layers.append(LoraLayer(name, q[:, 4:].T.contiguous(), q[:, 4:].contiguous(), 3.0))
    loras = [Lora({name: layer}, naming=FOREIGN) for layer in layers]
    merged = merge(inputs_of(loras), MergeSettings("tsv"))
    expected = dense(layers[0]) + dense(layers[1])
    assert distance(dense(merged.lora.layers[name]), expected) < 1e-5


def test_iso_c_flattens_what_the_rank_keeps() -> None:
    loras = [random_lora(70 + i) for i in range(2)]
    merged = merge(inputs_of(loras), MergeSettings("iso_c", RankRule(rank=3)))
    for layer in merged.lora:
        mean = dense_sum(loras, [0.5, 0.5], layer.name)
        u, sigma, vt = torch.linalg.svd(mean, full_matrices=False)
        k = min(3, sum(lora.layers[layer.name].rank for lora in loras))
        expected = u[:, :k] @ vt[:k] * sigma[:k].mean()
        assert distance(dense(layer), expected) < 1e-4


@pytest.mark.parametrize("method", [m for m in METHODS if m != "slerp"])
def test_layers_of_one_lora_only_and_of_zeros(method: str) -> None:
    a, b = random_lora(1), random_lora(2)
    part = {name: layer for name, layer in b.layers.items() if name != NAMES[1]}
    zero = LoraLayer(NAMES[0], torch.zeros(2, 17), torch.zeros(24, 2))
    some = Lora(part | {NAMES[0]: zero}, naming=FOREIGN)
    merged = merge(inputs_of([a, some]), MergeSettings(method, density=0.9))
    assert list(merged.lora.layers) == NAMES
    assert all(bool(torch.isfinite(layer.up).all()) for layer in merged.lora)
    if METHODS[method].shares:
        share = 0.5 if METHODS[method].ratios else 1.0
        for name in NAMES[:2]:
            expected = share * dense(a.layers[name])
            assert distance(dense(merged.lora.layers[name]), expected) < 1e-5
    assert any("in one LoRA only" in warning for warning in merged.report["warnings"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 2])
def test_layers_that_no_input_changes_stay_as_they_are(method: str, rank: int | None) -> None:
    loras = [random_lora(1), random_lora(2)]
    first = loras[0].layers[NAMES[0]]
    zero = replace(first, up=torch.zeros_like(first.up))
    loras = [Lora(lora.layers | {zero.name: zero}, naming=FOREIGN) for lora in loras]
    rule = RankRule(rank=None if method == "concat" else rank)
    merged = merge(inputs_of(loras), MergeSettings(method, rule))
    deltas = {layer.name: dense(layer) for layer in merged.lora}
    assert list(deltas) == NAMES and all(bool(delta.isfinite().all()) for delta in deltas.values())
    assert [name for name, delta in deltas.items() if not delta.any()] == [NAMES[0]]


@pytest.mark.parametrize("size", [1e13, 1e30, 1e38])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 2])
def test_results_too_big_for_their_precision_are_refused(
    method: str, size: float, rank: int | None
) -> None:
    loras = [random_lora(1), random_lora(2)]
    loras = [
        Lora({n: replace(x, up=x.up * size) for n, x in lora.layers.items()}, naming=FOREIGN)
        for lora in loras
    ]
    rule = RankRule(rank=None if method == "concat" else rank)
    settings = MergeSettings(method, rule, dtype=torch.float16)
    with pytest.raises(BadLoraFile, match=r"is not finite in float16|too big to be merged"):
        merge(inputs_of(loras), settings)


@pytest.mark.parametrize("rank", [None, 2])
def test_factor_average_states_its_distance_to_the_average(rank: int | None) -> None:
    loras, weights = [random_lora(i) for i in range(3)], [1.0, 2.0, -0.5]
    merged = merge(inputs_of(loras, weights), MergeSettings("factor_average", RankRule(rank=rank)))
    shares = [w / sum(weights) for w in weights]
    averages = {name: dense_sum(loras, shares, name) for name in NAMES}
    lost = sum(float((dense(x) - averages[x.name]).square().sum()) for x in merged.lora)
    energy = sum(float(average.square().sum()) for average in averages.values())
    stated = merged.report["error_to_average"]
    assert stated == pytest.approx(math.sqrt(lost / energy), rel=1e-5)
    assert any(f"by {stated:.1%} of" in warning for warning in merged.warnings)
    same = merge(inputs_of([loras[0], loras[0]]), MergeSettings("factor_average"))
    assert same.report["error_to_average"] < 1e-5
    assert "error_to_average" not in merge(inputs_of(loras), MergeSettings("average")).report


@pytest.mark.parametrize("zero", ["down", "up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_layer_of_zeros_stays_zero_at_any_rank(zero: str, dtype: torch.dtype) -> None:
    """As trainers leave a module that nothing has moved: one factor is random, the other zero."""
    name, factors = NAMES[0], {"down": torch.randn(4, 320), "up": torch.randn(320, 4)}
    factors[zero].zero_()
    lora = Lora({name: LoraLayer(name, **factors)}, naming=FOREIGN)
    merged = resize(lora, RankRule(2), dtype)
    assert not merged.lora.layers[name].delta().any()
    assert merged.lora.layers[name].down.isfinite().all()
