"""Decoders against diffusers' own, and on weights that inference mode has made useless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from difflora_core.errors import BadWeightsFile
from difflora_core.mask_aware.decoders import (
    Decoder,
    FastDecoder,
    ModuleDecoder,
    Part,
    frozen_clone,
)
from difflora_core.weights_file import write_safetensors


def tiny_autoencoder(channels: int) -> Any:
    torch.manual_seed(0)
    width = (8, 8, 8, 8)
    return AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=width, decoder_block_out_channels=width
    ).eval()


def small_vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
    ).eval()  # fmt: skip


def comfy_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names of the decoder as TAESD and ComfyUI write them: numbers one higher."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("decoder.layers."):
            number, _, rest = name.removeprefix("decoder.layers.").partition(".")
            renamed[f"{int(number) + 1}.{rest}"] = tensor
    return renamed


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("names", ["diffusers", "taesd", "both parts"])
def test_fast_decoder_is_diffusers_tiny(channels: int, names: str, tmp_path: Path) -> None:
    theirs = tiny_autoencoder(channels)
    state = theirs.state_dict()
    if names != "diffusers":
        state = comfy_names(state)
    if names == "both parts":
        state = {f"taesd_decoder.{k}": v for k, v in state.items()}
        state |= {"taesd_encoder.0.weight": torch.zeros(8, 3, 3, 3)}
    write_safetensors(tmp_path / "fast.safetensors", {k: v.clone() for k, v in state.items()}, {})
    ours = FastDecoder.open(tmp_path / "fast.safetensors")
    latents = 3 * torch.randn(2, channels, 5, 7)
    with torch.no_grad():
        wanted = theirs.decode(latents).sample / 2 + 0.5
    assert (ours(latents) - wanted).abs().max() < 1e-5
    assert ours.upscale == 8 and isinstance(ours, Decoder)


@pytest.mark.parametrize(
    "part", [Part(8, 11, 7, 12), Part(0, 3, 0, 16), Part(17, 18, 4, 5), Part(0, 18, 0, 16)]
)
def test_a_part_decodes_as_in_the_whole_picture(part: Part) -> None:
    """The part, a pixel around it for sampling, and the gradient of what is seen there."""
    torch.manual_seed(0)
    decoder = FastDecoder(width=8).requires_grad_(False)
    latents = torch.randn(2, 4, 18, 16)
    seen = torch.zeros(2, 3, 144, 128)
    rows = slice(max(8 * part.top - 1, 0), 8 * part.bottom + 1)
    seen[..., rows, max(8 * part.left - 1, 0) : 8 * part.right + 1] = 1

    def look(part: Part | None) -> tuple[Tensor, Tensor]:
        leaf = latents.clone().requires_grad_(True)
        picture = decoder(leaf, part) * seen
        return picture.detach(), torch.autograd.grad(picture.square().sum(), leaf)[0]

    for ours, wanted in zip(look(part), look(None), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_a_small_part_takes_less_work() -> None:
    shapes = []
    decoder = FastDecoder(width=8)
    decoder.layers[-1].register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[2:]))
    decoder(torch.randn(1, 4, 18, 16), Part(8, 11, 7, 12))
    assert [tuple(shape) for shape in shapes] == [(24 + 2 * 6, 40 + 2 * 6)]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_safetensors(path, {"conv.weight": torch.zeros(3)}, {})
    with pytest.raises(BadWeightsFile, match=r"other\.safetensors .*TAESD"):
        FastDecoder.open(path)


def test_whole_vae_decodes_as_it_does_itself() -> None:
    vae = small_vae()
    latents = torch.randn(2, 4, 6, 6)
    decoder = ModuleDecoder(vae, lambda z: z / 0.5, upscale=2)
    with torch.no_grad():
        wanted = vae.decode(latents / 0.5).sample / 2 + 0.5
    # not bit for bit: some kernels depend on where in memory weights lie
    torch.testing.assert_close(decoder(latents), wanted)
    assert isinstance(decoder, Decoder)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_inference_mode_take_gradients_as_clones(stored: torch.dtype) -> None:
    with torch.inference_mode():
        vae = small_vae().to(stored)
    # fp32 weights fail in the backward pass, others in the first convolution
    with pytest.raises(RuntimeError):
        leaf = torch.randn(1, 4, 4, 4, requires_grad=True)
        vae.decode(leaf).sample.sum().backward()
    with torch.inference_mode():
        decoder = ModuleDecoder(vae, lambda z: z)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.randn(1, 4, 4, 4, requires_grad=True)
            (gradient,) = torch.autograd.grad(decoder(leaf).sum(), leaf)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert all(p.is_inference() and p.dtype == stored for p in vae.parameters())


def test_gradient_of_a_clone_is_the_modules() -> None:
    vae, leaf = small_vae(), torch.randn(1, 4, 4, 4, requires_grad=True)
    (wanted,) = torch.autograd.grad(vae.decode(leaf).sample.square().sum(), leaf)
    frozen = frozen_clone(vae, "decode")
    (found,) = torch.autograd.grad(frozen(leaf).sample.square().sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert frozen.bytes == 4 * sum(p.numel() for p in vae.parameters())


def test_clones_are_private() -> None:
    module = nn.Linear(2, 2)
    frozen = frozen_clone(module)
    before = frozen(torch.ones(1, 2))
    with torch.no_grad():
        module.weight.mul_(0)
    assert torch.equal(frozen(torch.ones(1, 2)), before)
    assert not before.requires_grad


def test_the_encoder_is_not_copied() -> None:
    vae = small_vae()
    decoder = ModuleDecoder(vae, lambda latents: latents, upscale=2)
    used = [vae.decoder, vae.post_quant_conv]
    count = sum(parameter.numel() for part in used for parameter in part.parameters())
    assert decoder.bytes == 4 * count
