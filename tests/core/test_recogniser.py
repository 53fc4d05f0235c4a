"""Recognisers: built from their header, differentiable, refused with a sentence when unfit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from difflora_core.errors import BadWeightsFile
from difflora_core.face_crop import TEMPLATE
from difflora_core.likeness import Calibration
from difflora_core.recogniser import (
    ConvNeXtConfig,
    IResNetConfig,
    Recogniser,
    RecogniserConfig,
    build,
)
from difflora_core.weights_file import read_safetensors, write_safetensors

SMALL = (
    IResNetConfig(stem=4, widths=(4, 8, 8), layers=(1, 1, 1), embedding=16),
    ConvNeXtConfig(widths=(8, 8, 16), layers=(1, 1, 1), embedding=16),
)


def small(network: IResNetConfig | ConvNeXtConfig, **extra: object) -> Recogniser:
    torch.manual_seed(0)
    recogniser = Recogniser(RecogniserConfig(network, **extra)).eval()  # type: ignore[arg-type]
    recogniser.half().float()
    return recogniser


@pytest.mark.parametrize("network", SMALL, ids=["iresnet", "convnext"])
def test_saved_and_opened_it_is_the_same(tmp_path: Path, network: IResNetConfig) -> None:
    calibration = Calibration(0.4, 12.0, 0.7, 0.1, 0.0, 0.1)
    before = small(network, calibration=calibration, name="small")
    before.save(tmp_path / "r.safetensors")
    after = Recogniser.open(tmp_path / "r.safetensors")
    crops = torch.rand(2, 3, 112, 112)
    assert torch.equal(before(crops), after(crops))
    assert after.config == before.config
    assert not any(p.requires_grad for p in after.parameters())


@pytest.mark.parametrize("network", SMALL, ids=["iresnet", "convnext"])
def test_gradients_flow_to_the_picture(network: IResNetConfig) -> None:
    images = torch.rand(2, 3, 80, 96, requires_grad=True)
    landmarks = (torch.tensor(TEMPLATE) * 0.7).expand(2, 5, 2)
    embedding = small(network).embed(images, landmarks)
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2), atol=1e-5)
    embedding[:, 0].sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_default_sizes() -> None:
    for network in (IResNetConfig(), ConvNeXtConfig()):
        count = sum(p.numel() for p in build(network).parameters())
        assert 500_000 < count < 800_000


def test_a_file_without_config_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    with pytest.raises(BadWeightsFile, match=r"x\.safetensors is not a recogniser of ours"):
        Recogniser.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"space": {}}, "Unknown key recogniser.space"),
        ({"network": {"kind": "iresnet", "layers": [1]}}, "zip"),
        ({"network": {"kind": "iresnet", "stem_stride": 0}}, "by zero"),
    ],
)
def test_another_file_is_named(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)}, {"config": json.dumps(config)})
    with pytest.raises(BadWeightsFile, match=rf"x\.safetensors is not a recogniser.*{reason}"):
        Recogniser.open(path)


def test_weights_that_do_not_fit_their_config(tmp_path: Path) -> None:
    small(SMALL[0]).save(tmp_path / "r.safetensors")
    tensors, metadata = read_safetensors(tmp_path / "r.safetensors")
    tensors.pop("fc.weight")
    write_safetensors(tmp_path / "r.safetensors", tensors, metadata, overwrite=True)
    with pytest.raises(BadWeightsFile, match="does not fit the config in its header"):
        Recogniser.open(tmp_path / "r.safetensors")


def test_percent_needs_a_calibration() -> None:
    with pytest.raises(BadWeightsFile, match="no calibration"):
        small(SMALL[0]).percent(0.5)
