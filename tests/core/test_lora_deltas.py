"""45 numeric cases: tensors that LyCORIS and PEFT save, and what their forward pass adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflora_core.base_kinds import bias_difference, difference
from difflora_core.errors import BadLoraFile
from difflora_core.lora_families import ON_WEIGHTS, family_of, parse_among
from difflora_core.lora_groups import group_parts
from difflora_core.lora_offsets import read_offsets
from difflora_core.lora_plans import layer_scale, plan_layer
from difflora_core.lora_scales import ConfiguredScales
from difflora_core.tensor_file import TensorsInMemory
from tests.core.lora_layouts import packed

CASES = packed("lora_deltas")["cases"]
TOLERANCE = 1e-6


def tensor(value: dict) -> Tensor:
    return torch.tensor(value["data"]).reshape(value["shape"])


def tensors(case: dict) -> dict[str, Tensor]:
    return {suffix: tensor(value) for suffix, value in case["tensors"].items()}


def families(case: dict) -> set[str]:
    keys = {f"m.{suffix}" for suffix in case["tensors"]}
    roles = {part.role for key in keys if (part := parse_among(key, keys))}
    return family_of(roles) | ({"dora_scale", "magnitude"} & roles)


def assert_close(found: Tensor, case: dict) -> None:
    """PEFT's numbers come from merged weights, so they are as exact as those."""
    expected, weight = tensor(case["delta"]), tensor(case["base_weight"])
    size = max(float(expected.norm()), float(weight.norm()) if "peft" in case["source"] else 0)
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= TOLERANCE * size


def test_there_are_45() -> None:
    assert len(CASES) == 45


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_difference_on_a_base_weight(case: dict) -> None:
    found = difference(tensors(case), tensor(case["base_weight"]), case.get("config"))
    assert found.dtype == torch.float32
    assert_close(found, case)


PLAIN = [case for case in CASES if not families(case) & {*ON_WEIGHTS, "dora_scale", "magnitude"}]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case["id"])
def test_the_factors_of_a_plain_kind(case: dict) -> None:
    source = TensorsInMemory({f"layer.{suffix}": t for suffix, t in tensors(case).items()})
    groups, _ = group_parts(source, [], {})
    shape = tuple(case["delta"]["shape"])
    scales = ConfiguredScales({}, case.get("config"))
    plan = plan_layer("layer", groups["layer"], shape, source, scales, [])
    assert plan
    layer = plan.read(source)
    assert layer.outline == plan.outline
    assert_close(layer.delta(), case)
    if "delta_bias" in case:
        scale = layer_scale("layer", groups["layer"], source, scales)
        (bias,) = read_offsets("layer", groups["layer"], scale, None, source).values()
        torch.testing.assert_close(bias, tensor(case["delta_bias"]), atol=1e-6, rtol=1e-6)


def test_ia3_of_peft_changes_the_bias_of_the_outputs_that_it_scales() -> None:
    by_id = {case["id"]: case for case in CASES}
    factor = tensors(by_id["peft_ia3_linear"])["ia3_l"]
    bias = torch.linspace(-1, 1, factor.numel())
    found = bias_difference({"ia3_l": factor}, bias)
    assert found is not None
    torch.testing.assert_close(found, bias * (factor.flatten() - 1))
    other = tensors(by_id["peft_ia3_feedforward_linear"])
    assert bias_difference(other, bias) is None


@pytest.mark.parametrize("shape", [(8,), (8, 1), (1, 8), (8, 1, 1, 1), (1, 8, 1, 1)])
def test_the_axis_of_a_square_layer_is_told_by_the_position_of_the_ones(
    shape: tuple[int, ...],
) -> None:
    """Only dora_scale can be per column; PEFT writes [1, out, 1, 1] for convolutions."""
    weight = torch.randn(8, 8, 3, 3) if len(shape) == 4 else torch.randn(8, 8)
    tensors = {"lora_up.weight": torch.randn(8, 2), "lora_down.weight": torch.randn(2, 8)}
    if weight.ndim == 4:
        tensors["lora_down.weight"] = torch.randn(2, 8, 3, 3)
    lengths = 1 + torch.rand(shape)
    for name, by_input in (("dora_scale", shape[:2] == (1, 8)), ("lora_magnitude_vector", False)):
        changed = weight + difference({**tensors, name: lengths}, weight)
        rows = changed.transpose(0, 1) if by_input else changed
        torch.testing.assert_close(rows.flatten(1).norm(dim=1), lengths.flatten())


def test_the_series_of_peft_is_near_the_rotation() -> None:
    packed_skew = {"oft_R.weight": torch.randn(3, 1) * 0.002}
    weight = torch.randn(8, 6)
    exact = difference(packed_skew, weight, {"use_cayley_neumann": False})
    series = difference(packed_skew, weight, {"use_cayley_neumann": True})
    # PEFT's two formulas turn in opposite directions
    assert float((exact + series).norm()) < 0.05 * float(exact.norm())


@pytest.mark.parametrize(
    "bad",
    [
        {"lora_up.weight": torch.ones(8, 3), "lora_down.weight": torch.ones(3, 5)},
        {"oft_blocks": torch.ones(3, 2, 2)},
        {"ia3_l": torch.ones(7, 1)},
        {"hada_w1_a": torch.ones(8, 2)},
        {"dora_scale": torch.ones(5, 1)},
        {"something": torch.ones(1)},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_tensors_that_do_not_fit_the_weight_are_refused(bad: dict[str, Tensor]) -> None:
    with pytest.raises(BadLoraFile):
        difference(bad, torch.ones(8, 6))
