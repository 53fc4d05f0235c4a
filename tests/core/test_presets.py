from __future__ import annotations

import json

import pytest
import torch

from difflora_core.lora import Lora
from difflora_core.lora_space import LAYOUTS, LoraSpace
from difflora_core.predictor import Predictor
from difflora_core.presets import count_parameters, preset
from difflora_core.weights_file import lora_to_kohya

MILLION = 1_000_000


def test_mini_presets_fit_their_budgets():
    """In half precision the default takes at most 5 MB, the paper's preset 3 MB."""
    space = LoraSpace.for_mini()
    assert (
        2.0 * MILLION
        <= count_parameters(preset("default", space, 512, 512))["all"]
        <= 2.5 * MILLION
    )
    assert count_parameters(preset("paper", space, 512, 512))["all"] <= 1.5 * MILLION


def test_paper_preset_at_sdxl_size():
    """560 layers at rank 4: 5.8 M numbers, "nearly 300" times fewer latents, DiT 16 x 1454."""
    space = LoraSpace.for_base("sdxl", gauge="free")
    counts = count_parameters(preset("paper", space, 512, 1280))
    assert counts["values"] == 5_806_080
    assert counts["values"] / counts["latent"] == pytest.approx(292, abs=1)
    assert 500 * MILLION < counts["dit"] < 620 * MILLION


def test_direct_path_and_tokens_can_be_left_out():
    config = preset("default", LoraSpace.for_mini(), 64, 64)
    full = count_parameters(config)["dit"]
    assert full > 56 * 16 * 256  # the linear path from the features alone


@pytest.mark.slow
def test_default_preset_predicts_for_sdxl_on_the_cpu():
    """One forward with random weights: every key that comes out names a layer of the SDXL U-Net."""
    space = LoraSpace.for_base("sdxl")
    with torch.device("meta"):
        predictor = Predictor(preset("default", space, 512, 1280))
    predictor.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in predictor.state_dict().values():
            tensor.fill_(0.01)
        on = torch.ones(1, dtype=torch.bool)
        condition = predictor.condition(torch.ones(1, 512), torch.ones(1, 1280), on, on)
        x0 = predictor.denoise(torch.ones(1, *predictor.latent_shape), torch.ones(1), condition)
        lora = space.unpack(predictor.decode(x0)[0])
    assert_keys_of_sdxl(lora)


def assert_keys_of_sdxl(lora: Lora) -> None:
    modules = json.loads((LAYOUTS / "sdxl.json").read_text())["components"]["unet"]
    names = {f"unet.{name}" for name, *_ in modules}
    flat = {"lora_unet_" + original.replace(".", "_") for _, original, *_ in modules}
    flat |= {"lora_unet_" + name.replace(".", "_") for name, *_ in modules}
    assert len(lora) == 560 and all(layer.name in names for layer in lora)
    kohya = {key.split(".")[0] for key in lora_to_kohya(lora)}
    assert len(kohya) == 560 and kohya <= flat
