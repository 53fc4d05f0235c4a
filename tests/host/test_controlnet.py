"""An exported ControlNet in stock ComfyUI: loads, acts, and no hint image changes anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host, PromptFailed
from diffusers import ControlNetModel
from guided_runs import latents
from prompts import kept, node, unguided
from safetensors.torch import load_file
from torch import Tensor

from training.base.models import open_unet
from training.config import Config
from training.controlnet.control import NoHint, new_control
from training.controlnet.export import export, open_control
from training.run_config import RunConfig

NAME = "random-seed0"
SIDE = 8
SD15_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768,
    "num_heads": 8, "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "adm_in_channels": None,
    "dtype": torch.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A ControlNet of SD 1.5's size with random weights, as files."""

    config: Config
    single: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    config = Config(run=RunConfig(root=str(tmp_path_factory.mktemp("run")), device="cpu"))
    with torch.device("meta"):
        control: Any = ControlNetModel(cross_attention_dim=768)
    control.controlnet_cond_embedding = NoHint()
    control = filled(control.to_empty(device="cpu"))
    folder = export(config, NAME, control, {})
    return Exported(config, folder / f"{NAME}_comfyui.safetensors")


@pytest.fixture(scope="module")
def loaded(host: Host, exported: Exported) -> Iterator[Any]:
    """What core's "Load ControlNet Model" makes of the single file."""
    folder = host.base / "models" / "controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / exported.single.name
    link.symlink_to(exported.single)
    loader = host.nodes.NODE_CLASS_MAPPINGS["ControlNetLoader"]()
    yield loader.load_controlnet(link.name)[0]
    link.unlink()


def filled(module: Any) -> Any:
    """Random weights that keep activations finite through a deep network."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return module


def inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, SIDE, SIDE), torch.tensor([7.0]), torch.randn(batch, 77, 768)


def hint(value: float) -> Tensor:
    """An image [1, H, W, 3]; above 1 noise."""
    shape = (1, 8 * SIDE, 8 * SIDE, 3)
    return torch.rand(shape) if value > 1 else torch.full(shape, value)


@torch.inference_mode()
def test_every_weight_arrives_in_comfyui(loaded: Any, exported: Exported) -> None:
    stored = load_file(exported.single)
    inside = loaded.control_model.state_dict()
    assert {f"control_model.{key}" for key in inside} == set(stored)
    assert all(torch.equal(inside[key[14:]].half(), value) for key, value in stored.items())
    assert not stored["control_model.input_hint_block.14.weight"].any()
    assert not stored["control_model.input_hint_block.14.bias"].any()


@torch.inference_mode()
def test_comfyui_computes_what_diffusers_computes(loaded: Any, exported: Exported) -> None:
    x, t, context = inputs()
    control = open_control(exported.config, NAME)
    down, middle = control(x, t, context, controlnet_cond=x, return_dict=False)
    model = loaded.control_model
    out = model.float()(x=x, hint=torch.rand(1, 3, 64, 64), timesteps=t, context=context)
    assert len(out["output"]) == len(down) == 12
    for ours, theirs in zip((*down, middle), (*out["output"], out["middle"][0]), strict=True):
        assert ours.abs().max() > 0
        assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


@torch.inference_mode()
def test_hints_change_nothing_and_the_control_does(host: Host, loaded: Any) -> None:
    import comfy.sample

    model, (latent, _, context) = sd15(), inputs()
    plain = [[context, {}]]
    apply = host.nodes.NODE_CLASS_MAPPINGS["ControlNetApplyAdvanced"]().apply_controlnet

    def sampled(conditions: tuple[Any, Any]) -> Tensor:
        noise = comfy.sample.prepare_noise(latent, 3)
        positive, negative = conditions
        return comfy.sample.sample(
            model, noise, 1, 2.0, "euler", "normal", positive, negative, torch.zeros_like(latent)
        )

    without = sampled((plain, plain))
    painted = [
        sampled(apply(plain, plain, loaded, hint(v), 1.0, 0.0, 1.0)) for v in (0.0, 1.0, 2.0)
    ]
    assert torch.isfinite(painted[0]).all()
    assert torch.equal(painted[0], painted[1]) and torch.equal(painted[0], painted[2])
    assert (painted[0] - without).abs().max() > 1e-3


def sd15() -> Any:
    """Stable Diffusion 1.5 with random weights as ComfyUI's own model."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(dict(SD15_UNET))
    config.unet_config |= {"num_heads": 8, "num_head_channels": -1}
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    filled(model.diffusion_model)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


@pytest.fixture
def mini_control(host: Host, tmp_path: Path) -> Iterator[tuple[Config, str]]:
    """A ControlNet of the mini model with random weights, and its name in models/controlnet."""
    config = Config(run=RunConfig(root=str(tmp_path), device="cpu"))
    control = filled(new_control(open_unet(config)))
    folder = host.base / "models" / "controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mini_comfyui.safetensors"
    file.symlink_to(export(config, "mini", control, {}) / file.name)
    yield config, file.name
    file.unlink()


def loaded_by_us(host: Host, name: str) -> Any:
    prompt = {"control": node("DiffLoRA_LoadMiniControlNet", control_net=name)}
    return host.run(kept(prompt, control=["control", 0]))["control"]


@torch.inference_mode()
def test_our_node_loads_the_mini_models(host: Host, mini_control: tuple[Config, str]) -> None:
    """Core's loader takes the file, but with another number of heads."""
    config, name = mini_control
    control = open_control(config, "mini")
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(2, *s, generator=generator) for s in ((4, 16, 16), (77, 128)))
    t = torch.tensor([7.0, 801.0])
    down, middle = control(x, t, context, controlnet_cond=x, return_dict=False)
    out = loaded_by_us(host, name).control_model(
        x=x, hint=torch.rand(2, 3, 128, 128), timesteps=t, context=context
    )
    for ours, theirs in zip((*down, middle), (*out["output"], out["middle"][0]), strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


def test_our_node_loads_where_vram_is_dynamic(
    host: Host, mini_control: tuple[Config, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NVIDIA by default: there ComfyUI's layers have no weights until they are loaded."""
    memory = pytest.importorskip("comfy.memory_management", reason="older than dynamic VRAM")
    usual = loaded_by_us(host, mini_control[1]).control_model.state_dict()
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    host.forget_outputs()
    state = loaded_by_us(host, mini_control[1]).control_model.state_dict()
    assert state.keys() == usual.keys()
    assert all(torch.equal(state[key], usual[key]) for key in usual)


def test_the_mini_models_acts_in_a_sampler(host: Host, mini_control: tuple[Config, str]) -> None:
    def painted(strength: float) -> Tensor:
        prompt = unguided()
        prompt["control"] = node("DiffLoRA_LoadMiniControlNet", control_net=mini_control[1])
        prompt["photo"] = node("TestPhoto", faces="one")
        prompt["apply"] = node(
            "ControlNetApplyAdvanced", positive=["yes", 0], negative=["no", 0],
            control_net=["control", 0], image=["photo", 0], strength=strength,
            start_percent=0.0, end_percent=1.0,
        )  # fmt: skip
        prompt["sample"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
        return latents(host.run(prompt))

    without = latents(host.run(unguided()))
    assert torch.equal(painted(0.0), without)
    assert not torch.equal(painted(1.0), without)


def test_other_controls_are_refused(host: Host, loaded: Any, exported: Exported) -> None:
    with pytest.raises(PromptFailed, match="is no ControlNet of the mini model"):
        loaded_by_us(host, exported.single.name)
