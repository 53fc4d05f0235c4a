"""Merging against dense float64 arithmetic: sums, ranks, weights, headers, bad settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from difflora_core.errors import BadConfig, LayoutMismatch
from difflora_core.lora import Lora, LoraLayer, Naming
from difflora_core.merging import (
    MergeInput,
    MergeSettings,
    RankRule,
    merge,
    merge_header,
    resize,
    truncate_dense,
)
from difflora_core.merging.truncation import truncate_wide
from tests.core.merge_samples import (
    FOREIGN,
    NAMES,
    best_error,
    dense,
    dense_sum,
    distance,
    inputs_of,
    random_lora,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_average_and_sum_equal_the_dense_result(seed: int, dtype: torch.dtype) -> None:
    loras = [random_lora(10 * seed + i, dtype) for i in range(2 + seed % 3)]
    weights = [0.7, -0.4, 1.3, 0.2][: len(loras)]
    shares = [w / sum(weights) for w in weights]
    for method, expected in (("average", shares), ("sum", weights), ("concat", weights)):
        merged = merge(inputs_of(loras, weights), MergeSettings(method))
        for layer in merged.lora:
            assert distance(dense(layer), dense_sum(loras, expected, layer.name)) < 1e-5
            assert layer.rank <= min(dense(layer).shape)
        assert all(c.energy > 1 - 1e-6 and c.error < 1e-5 for c in merged.certificates.values())


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_truncation_is_as_good_as_the_dense_optimum(rank: int, decay: float) -> None:
    loras = [random_lora(i, decay=decay) for i in range(4)]
    merged = merge(inputs_of(loras), MergeSettings("sum", RankRule(rank=rank)))
    for layer in merged.lora:
        exact = dense_sum(loras, [1.0] * 4, layer.name)
        error = distance(dense(layer), exact)
        assert layer.rank <= rank
        assert error == pytest.approx(best_error(exact, rank), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("rule", [RankRule(energy=0.9), RankRule(error=0.2), RankRule(error=0.0)])
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_energy_and_error_are_kept_with_the_smallest_rank(method: str, rule: RankRule) -> None:
    loras = [random_lora(80 + i, decay=1.0) for i in range(3)]
    merged = merge(inputs_of(loras), MergeSettings(method, rule, density=0.8))
    allowed = rule.error if rule.error is not None else math.sqrt(1 - (rule.energy or 0))
    for name, certificate in merged.certificates.items():
        assert certificate.error <= allowed + 1e-6
        sigma = torch.tensor(certificate.singular_values, dtype=torch.float64)
        if certificate.rank > 1 and len(sigma) >= certificate.rank:
            fewer = certificate.norm**2 - sigma[: certificate.rank - 1].square().sum()
            assert math.sqrt(max(float(fewer), 0)) / certificate.norm > allowed - 1e-6, name


def test_a_size_is_spent_where_it_lowers_the_error_most() -> None:
    loras = [random_lora(90 + i, decay=2.0) for i in range(3)]
    megabytes = 0.01
    merged = merge(inputs_of(loras), MergeSettings("sum", RankRule(megabytes=megabytes)))
    used = sum(layer.up.numel() + layer.down.numel() for layer in merged.lora) * 4
    assert 0.5 * megabytes * 1e6 < used <= megabytes * 1e6
    ours = merged.report["error"]
    uniform = max((r for r in range(1, 24) if uniform_size(loras, r) <= megabytes * 1e6), default=1)
    equal = merge(inputs_of(loras), MergeSettings("sum", RankRule(rank=uniform)))
    assert ours <= equal.report["error"] + 1e-9
    with pytest.raises(BadConfig, match="rank 1 in every layer takes"):
        merge(inputs_of(loras), MergeSettings("sum", RankRule(megabytes=1e-4)))


def test_a_size_counts_biases_and_norms() -> None:
    loras = [random_lora(90 + i, decay=2.0) for i in range(3)]
    offsets = {f"{NAMES[0]}.bias": torch.ones(1000)}
    loras[0] = Lora(loras[0].layers, offsets=offsets, naming=FOREIGN)
    merged = merge(inputs_of(loras), MergeSettings("sum", RankRule(megabytes=0.012))).lora
    factors = sum(layer.up.numel() + layer.down.numel() for layer in merged) * 4
    assert 0.004 < factors / 1e6 <= 0.008


def uniform_size(loras: Sequence[Lora], rank: int) -> int:
    merged = merge(inputs_of(loras), MergeSettings("sum", RankRule(rank=rank)))
    return sum(layer.up.numel() + layer.down.numel() for layer in merged.lora) * 4


def test_block_weights_and_weightings() -> None:
    a, b = random_lora(1), random_lora(2)
    block = "lora_unet_double_blocks_1"
    merged = merge(
        [MergeInput(a, "a", 1.0, {block: 0.0}), MergeInput(b, "b", 1.0)], MergeSettings("sum")
    )
    assert distance(dense(merged.lora.layers[NAMES[1]]), dense(b.layers[NAMES[1]])) < 1e-5
    expected = dense_sum([a, b], [1, 1], NAMES[0])
    assert distance(dense(merged.lora.layers[NAMES[0]]), expected) < 1e-5
    equal = merge(inputs_of([a, b]), MergeSettings("sum", weighting="equal_energy"))
    for name in NAMES:
        x, y = dense(a.layers[name]), dense(b.layers[name])
        mean = (x.norm() + y.norm()) / 2
        expected = x * mean / x.norm() + y * mean / y.norm()
        assert distance(dense(equal.lora.layers[name]), expected) < 1e-5
    doubled = merge(inputs_of([a, b]), MergeSettings("average", total=2.0))
    assert (
        distance(dense(doubled.lora.layers[NAMES[0]]), dense_sum([a, b], [1, 1], NAMES[0])) < 1e-5
    )


def test_norm_matched_weights_use_one_factor_per_lora() -> None:
    a, b = random_lora(1), random_lora(2).scaled(10.0)
    merged = merge(inputs_of([a, b]), MergeSettings("sum", weighting="norm_matched"))
    totals = [math.sqrt(sum(n * n for n in lora.norms().values())) for lora in (a, b)]
    mean = sum(totals) / 2
    expected = dense_sum([a, b], [mean / totals[0], mean / totals[1]], NAMES[3])
    assert distance(dense(merged.lora.layers[NAMES[3]]), expected) < 1e-5


@pytest.mark.parametrize("size", [(300, 200, 150), (120, 400, 90)])
def test_wide_sums_are_truncated_as_well_as_narrow_ones(size: tuple[int, int, int]) -> None:
    rows, columns, ranks = size
    generator = torch.Generator().manual_seed(0)
    for decay in (0.0, 2.0):
        factor = torch.randn(rows, ranks, generator=generator) * torch.logspace(0, -decay, ranks)
        other = torch.randn(ranks, columns, generator=generator)
        exact = factor.double() @ other.double()
        down, up, certificate = truncate_dense(exact.float(), RankRule(rank=8))
        error = distance(up.double() @ down.double(), exact)
        assert error == pytest.approx(best_error(exact, 8), rel=1e-5)
        assert certificate.error == pytest.approx(error, rel=1e-4)
        down, up, certificate = truncate_wide(factor, other, RankRule(rank=8))
        assert distance(up.double() @ down.double(), exact) == pytest.approx(error, rel=1e-5)
        assert certificate.norm == pytest.approx(float(exact.norm()), rel=1e-5)


def test_resizing_up_and_down() -> None:
    lora = random_lora(3)
    same = resize(lora, RankRule(rank=64))
    assert same.report["error"] < 1e-6
    assert all(layer.rank <= lora.layers[layer.name].rank for layer in same.lora)
    smaller = resize(lora, RankRule(rank=1))
    for layer in smaller.lora:
        exact = dense(lora.layers[layer.name])
        assert distance(dense(layer), exact) == pytest.approx(best_error(exact, 1), abs=1e-6)


def test_inputs_are_not_changed_and_results_do_not_share_memory() -> None:
    lora = random_lora(4)
    before = {layer.name: (layer.up.clone(), layer.down.clone()) for layer in lora}
    merged = merge(inputs_of([lora]), MergeSettings("sum"))
    for layer in merged.lora:
        layer.up.zero_()
        layer.down.zero_()
    for layer in lora:
        assert torch.equal(layer.up, before[layer.name][0])
        assert torch.equal(layer.down, before[layer.name][1])


def test_offsets_are_summed_with_the_weights() -> None:
    a, b = random_lora(1), random_lora(2)
    bias = f"{NAMES[0]}.bias"
    a = Lora(a.layers, offsets={bias: torch.ones(4)}, naming=FOREIGN)
    b = Lora(b.layers, offsets={bias: torch.full((4,), 3.0)}, naming=FOREIGN)
    merged = merge(inputs_of([a, b], [1.0, 3.0]), MergeSettings("average"))
    assert torch.allclose(merged.lora.offsets[bias], torch.full((4,), 2.5))


def test_loras_without_layers_still_have_offsets() -> None:
    bias = f"{NAMES[0]}.bias"
    loras = [Lora({}, offsets={bias: torch.full((3,), i + 1.0)}, naming=FOREIGN) for i in range(2)]
    merged = merge(inputs_of(loras), MergeSettings("svd"))
    assert not merged.lora.layers and torch.equal(merged.lora.offsets[bias], torch.full((3,), 3.0))


def test_the_header_tells_where_the_result_comes_from() -> None:
    facts = [{"modelspec.trigger_phrase": "sks person", "sshs_model_hash": "abc"}, {}]
    loras = [Lora(random_lora(i).layers, fact, naming=FOREIGN) for i, fact in enumerate(facts)]
    inputs = inputs_of(loras, [3.0, 1.0])
    header = merge_header(inputs, merge(inputs), "both")
    assert header["modelspec.title"] == "both"
    assert header["modelspec.trigger_phrase"] == "sks person"
    assert header["modelspec.merged_from"] == "lora 0, lora 1"
    certificates = json.loads(header["difflora.certificates"])
    assert list(certificates) == NAMES
    assert certificates[NAMES[0]].keys() == {"rank", "energy", "error", "norm"}
    assert (
        '"weight": 0.75' in header["difflora.merge"] and '"hash": "abc"' in header["difflora.merge"]
    )


CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: merge([]), BadConfig, "Nothing to merge"),
    (lambda: RankRule(rank=0), BadConfig, "rank of 0"),
    (lambda: RankRule(rank=3, energy=0.5), BadConfig, "at the same time"),
    (lambda: RankRule(energy=1.5), BadConfig, "energy 1.5"),
    (lambda: one("unknown"), BadConfig, "no method named 'unknown'"),
    (lambda: one("slerp"), BadConfig, "slerp takes 2 LoRAs, not 1"),
    (lambda: one("concat", rule=RankRule(rank=2)), BadConfig, "takes no limit"),
    (lambda: one("ties", density=0.0), BadConfig, "density of 0"),
    (lambda: one("sum", weighting="magic"), BadConfig, "no weighting named"),
    (lambda: merge(inputs_of([random_lora(1), random_lora(2)], [1, -1])), BadConfig, "add up to 0"),
    (lambda: merge(inputs_of([random_lora(1)], [-1])), BadConfig, "-1 add up to less than 0"),
    (lambda: one("iso_c", rule=RankRule(megabytes=1)), BadConfig, "so a size cannot be spread"),
    (lambda: merge(inputs_of([random_lora(1)], [math.nan])), BadConfig, "weight of nan"),
    (lambda: merge([MergeInput(random_lora(1), "a", 1, {"unet.x": 1})]), BadConfig, "no block"),
    (lambda: other_naming(), LayoutMismatch, "lora 0 and lora 1 do not fit together"),
    (lambda: other_shape(), LayoutMismatch, "has the shape"),
]


def one(method: str, **settings: object) -> object:
    return merge(inputs_of([random_lora(1)]), MergeSettings(method, **settings))  # type: ignore[arg-type]


def other_naming() -> object:
    other = Lora(random_lora(2).layers, naming=Naming("Flux, diffusers names", "peft"))
    return merge(inputs_of([random_lora(1), other]))


def other_shape() -> object:
    layer = LoraLayer(NAMES[0], torch.zeros(2, 5), torch.zeros(24, 2))
    return merge(inputs_of([random_lora(1), Lora({NAMES[0]: layer}, naming=FOREIGN)]))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_impossible_settings_get_one_sentence(case: int) -> None:
    run, kind, words = CASES[case]
    with pytest.raises(kind, match=words):
        run()
