"""LPIPS from files of the user's, against its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difflora_core.errors import BadWeightsFile
from difflora_core.mask_aware import mean_inside, open_lpips
from difflora_core.weights_file import write_safetensors

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SLICES = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
WIDTHS = (4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8)


def vgg(name: str = "features.{n}") -> dict[str, Tensor]:
    """A narrow VGG-16 by the names of torchvision and timm, or of the lpips package."""
    torch.manual_seed(0)
    weights, inputs = {}, 3
    for number, width in zip(CONVOLUTIONS, WIDTHS, strict=True):
        key = name.format(n=number, s=SLICES[number])
        weights[f"{key}.weight"] = torch.randn(width, inputs, 3, 3) / inputs
        weights[f"{key}.bias"] = torch.randn(width) / 10
        inputs = width
    return weights


def linear() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1) for k, w in enumerate((4, 6, 8, 8, 8))}


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    write_safetensors(path, tensors, {})
    return path


def definition(one: Tensor, other: Tensor, lin: dict[str, Tensor] | None) -> Tensor:
    """LPIPS in float64, as its paper and package have it, for pictures in 0..1."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1).double()
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1).double()
    x = torch.cat([one, other]).double() * 2 - 1
    x, total, stage = (x - shift) / scale, torch.zeros(len(one)).double(), 0
    weights = vgg()
    for number in range(30):
        if number in CONVOLUTIONS:
            weight, bias = (weights[f"features.{number}.{n}"].double() for n in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, padding=1)
        elif number in (4, 9, 16, 23):
            x = F.max_pool2d(x, 2, 2)
        else:
            x = F.relu(x)
        if number in (3, 8, 15, 22, 29):
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            squared = (unit[: len(one)] - unit[len(one) :]).square()
            if lin is not None:
                squared = squared * lin[f"lin{stage}.model.1.weight"].double()
            total, stage = total + squared.sum(1).mean((1, 2)), stage + 1
    return total


def pictures(seed: int) -> Tensor:
    return torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("names", ["features.{n}", "net.slice{s}.{n}", "slice{s}.{n}"])
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "plain"])
def test_is_its_definition(tmp_path: Path, names: str, calibrated: bool) -> None:
    files = [saved(tmp_path / "vgg.safetensors", vgg(names))]
    if calibrated:
        files.append(saved(tmp_path / "lin.safetensors", linear()))
    maps = open_lpips(*files)(pictures(0), pictures(1))
    found = torch.stack([level.mean((1, 2)) for level in maps]).sum(0)
    expected = definition(pictures(0), pictures(1), linear() if calibrated else None)
    assert found.tolist() == pytest.approx(
        expected.tolist(), rel=5e-4
    )  # near blank places ours is blunter
    inside = mean_inside(maps, torch.ones(2, 1, 48, 32))
    assert torch.allclose(5 * inside, found, rtol=1e-5)


def test_has_gradients_even_when_opened_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        lpips = open_lpips(saved(tmp_path / "vgg.safetensors", vgg()))
    ours = pictures(0).requires_grad_(True)
    mean_inside(lpips(ours, pictures(1)), torch.ones(2, 1, 48, 32)).sum().backward()
    assert ours.grad is not None and ours.grad.isfinite().all() and ours.grad.abs().max() > 0


def test_the_same_picture(tmp_path: Path) -> None:
    lpips = open_lpips(saved(tmp_path / "vgg.safetensors", vgg()))
    ours = pictures(0).requires_grad_(True)
    distance = mean_inside(lpips(ours, pictures(0)), torch.ones(2, 1, 48, 32))
    distance.sum().backward()
    assert distance.abs().max() == 0
    assert ours.grad is not None and ours.grad.abs().max() == 0


def test_another_network_is_refused(tmp_path: Path) -> None:
    weights = vgg()
    del weights["features.17.weight"]
    path = saved(tmp_path / "vgg19.safetensors", weights)
    with pytest.raises(BadWeightsFile, match=r"vgg19.safetensors lacks VGG-16's 'features.17.weig"):
        open_lpips(path)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (
            {"features.0.weight": torch.randn(4, 1, 3, 3)},
            r"features.0.weight .* expected \[4, 3, ",
        ),
        (
            {"features.7.weight": torch.randn(6, 4, 3, 3)},
            r"features.7.weight .* expected \[6, 6, ",
        ),
        ({"features.5.weight": torch.full((6, 4, 3, 3), torch.nan)}, "features.5.weight holds"),
        ({"features.2.bias": torch.tensor([1.0, 0, 0, torch.inf])}, "features.2.bias holds numb"),
        ({"lin1.model.1.weight": torch.ones(1, 192, 1, 1)}, r"lin.1 has the shape \[192\]"),
        ({"lin1.model.1.weight": torch.full((1, 6, 1, 1), torch.nan)}, "lin.1 holds numbers that"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], reason: str
) -> None:
    path = saved(tmp_path / "x.safetensors", {**vgg(), **linear(), **weights})
    with pytest.raises(BadWeightsFile, match=rf"x.safetensors is no LPIPS on VGG-16: {reason}"):
        open_lpips(path)


def test_channels_are_calibrated_in_all_stages_or_in_none(tmp_path: Path) -> None:
    first = {"lin0.model.1.weight": linear()["lin0.model.1.weight"]}
    paths = saved(tmp_path / "vgg.safetensors", vgg()), saved(tmp_path / "lin.safetensors", first)
    with pytest.raises(BadWeightsFile, match=r"vgg.* with lin.safetensors lacks VGG-16's 'lin.1'"):
        open_lpips(*paths)
