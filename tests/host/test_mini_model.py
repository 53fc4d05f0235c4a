"""Load Mini Model: same numbers as diffusers and transformers, and stock nodes accept it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from mini_files import build_text_encoder, build_unet, build_vae
from torch import Tensor

from difflora_core.mini_world import TEXT_ENCODER, UNET, VAE, open_part

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def loader(host: Host) -> Any:
    return host.module("nodes.mini_model")


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max().clamp(min=1.0)
    assert ((ours - theirs).abs().max() / scale).item() < TOLERANCE


@torch.inference_mode()
def test_unet_agrees_with_diffusers(loader: Any, random_world: Path) -> None:
    tensors, config = open_part(UNET, random_world)
    theirs = build_unet(config)
    theirs.load_state_dict(tensors)
    ours = loader.load_model(random_world).model.diffusion_model
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([7.0, 801.0]), torch.randn(2, 77, 128)
    assert_close(ours(x, t, context=context), theirs(x, t, context).sample)


def test_the_model_loads_where_vram_is_dynamic(
    loader: Any, random_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NVIDIA by default: there ComfyUI's layers have no weights until they are loaded."""
    memory = pytest.importorskip("comfy.memory_management", reason="older than dynamic VRAM")
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    found = states(loader, random_world)
    monkeypatch.undo()
    for dynamic, usual in zip(found, states(loader, random_world), strict=True):
        assert dynamic.keys() == usual.keys()
        assert all(torch.equal(dynamic[key], usual[key]) for key in usual)


def states(loader: Any, folder: Path) -> list[dict[str, Tensor]]:
    modules = (
        loader.load_model(folder).model.diffusion_model,
        loader.load_clip(folder).cond_stage_model,
        loader.load_vae(folder).first_stage_model,
    )
    return [module.state_dict() for module in modules]


@torch.inference_mode()
def test_clip_agrees_with_transformers(loader: Any, random_world: Path) -> None:
    tensors, config = open_part(TEXT_ENCODER, random_world)
    theirs = build_text_encoder(config)
    theirs.load_state_dict(tensors)
    clip = loader.load_clip(random_world)
    tokens = clip.tokenize("a photo of sks person smiling, in the woods")
    ours = clip.encode_from_tokens(tokens)
    ids = torch.tensor([[token for token, _weight in tokens["l"][0]]])
    assert ids.shape == (1, 77)
    assert ids[0, 0] == 49406 and ids[0, -1] == 49407
    assert_close(ours, theirs(ids).last_hidden_state)


@torch.inference_mode()
def test_vae_agrees_with_diffusers(loader: Any, random_world: Path) -> None:
    tensors, config = open_part(VAE, random_world)
    theirs = build_vae(config)
    theirs.load_state_dict(tensors)
    vae = loader.load_vae(random_world)
    pixels, latent = torch.rand(1, 128, 128, 3), torch.randn(1, 4, 16, 16)
    mean = theirs.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mean
    model = vae.first_stage_model
    moments = model.quant_conv(model.encoder(pixels.movedim(-1, 1) * 2 - 1))
    assert_close(moments[:, :4], mean)
    assert vae.encode(pixels).shape == mean.shape
    picture = theirs.decode(latent).sample.movedim(1, -1) / 2 + 0.5
    assert_close(vae.decode(latent.clone()), picture.clamp(0, 1))


def test_latent_scale_is_the_one_of_the_vae(loader: Any, random_world: Path) -> None:
    scale = open_part(VAE, random_world).config["scaling_factor"]
    latent_format = loader.load_model(random_world).model.latent_format
    assert_close(latent_format.process_in(torch.ones(1)), torch.full((1,), scale))


def test_real_checkpoints_are_detected_as_before(host: Host, loader: Any) -> None:
    import comfy.supported_models

    assert all(loader.MiniSD15 is not kind for kind in comfy.supported_models.models)
    assert not any("difflora" in kind.__module__ for kind in comfy.supported_models.models)


def test_every_prompt_makes_its_own_picture(host: Host, base_prompt: Any) -> None:
    one = host.run(base_prompt(seed=1))["picture"]
    two = host.run(base_prompt(seed=2))["picture"]
    assert one.shape == (1, 128, 128, 3)
    assert torch.isfinite(one).all()
    assert not torch.equal(one, two)
    host.forget_outputs()
    assert torch.equal(host.run(base_prompt(seed=1))["picture"], one)


def test_interruption_leaves_the_next_run_right(host: Host, base_prompt: Any) -> None:
    import comfy.model_management
    from comfy_host import Interrupted

    expected = host.run(base_prompt(seed=3))["picture"]
    host.forget_outputs()
    # ComfyUI reports the first step of a fast sampler always, later ones only now and then.
    host.on_progress = lambda _step: comfy.model_management.interrupt_current_processing()
    with pytest.raises(Interrupted):
        host.run(base_prompt(seed=3))
    host.on_progress = None
    assert torch.equal(host.run(base_prompt(seed=3))["picture"], expected)


def test_other_autoencoders_are_built_as_before(loader: Any, random_world: Path) -> None:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules import model

    vae = loader.load_vae(random_world)
    assert vae.first_stage_model.encoder.norm_out.num_groups == 8
    assert model.ops is comfy.ops.disable_weight_init
    assert model.Normalize(64).num_groups == 32
