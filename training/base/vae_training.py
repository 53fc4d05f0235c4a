"""Trains the picture autoencoder on freshly drawn portraits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difflora_core.errors import BadConfig

from .. import trained_for
from ..artifacts import save_artifact
from ..budget import train
from ..config import Config
from ..drawing import generator_for
from ..example_pool import Examples, Pool, as_bytes
from ..portraits import render, sample_scenes
from ..run_folder import RunFolder
from .config import VaeConfig
from .critic import Critic, balance, critic_loss, painter_loss
from .models import Vae, build_vae, check_start, open_vae, start_residuals_at_zero, vae_config
from .pool import decode_latents, encode_images

_WHOLE_EVERY = 4
#: steps of the critic before the decoder listens to it
_CRITIC_ALONE = 300
#: share of crops that may lie anywhere rather than around a face
_ANYWHERE = 0.25


def train_vae(config: Config, folder: RunFolder) -> None:
    """Train, measure on held-out people, and write the artifact `vae`."""
    settings, device = config.base.vae, config.run.torch_device()
    if settings.start == "artifact":
        check_start(config, "vae", vae_config(settings))
    part = folder.part("vae")
    trained_for.begin(part, decisive(config))
    torch.manual_seed(config.run.seed)
    vae = build_vae(vae_config(settings)).to(device, memory_format=torch.channels_last)
    if settings.start == "artifact":
        vae.load_state_dict(open_vae(config).state_dict())
    else:
        start_residuals_at_zero(vae)
    if settings.part == "decoder":
        _check_start(settings)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    # made only where it is used: its first weights take from the random numbers of the rest
    critic = Critic().to(device) if settings.critic_weight else None
    pool = Pool(lambda k: _draw(config, k), settings.pool, settings.reuse)

    def step(i: int) -> dict[str, Tensor]:
        whole = not settings.crop or i % _WHOLE_EVERY == 0
        batch = pool.draw(max(settings.batch // 4, 1) if whole else settings.batch)
        batch = batch if whole else crop_batch(batch, settings.crop)
        target = (batch["images"] * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        painted = vae.decode(posterior.sample()).sample.float()
        losses = vae_losses(painted - target, posterior, batch["faces"], settings)
        if critic is not None:
            weight = settings.critic_weight * (i >= _CRITIC_ALONE)
            losses |= critic_losses(critic, target, painted, losses["loss"], vae, weight)
        return losses

    trainer = train(
        {"vae": vae} if critic is None else {"vae": vae, "critic": critic},
        settings.optim,
        config.run,
        part,
        step,
        batch=settings.batch,
        minutes=settings.minutes,
        pool=pool,
    )
    vae.load_state_dict(trainer.averaged("vae"))
    vae.eval()
    if settings.part == "decoder":
        scale = open_vae(config).config.scaling_factor
    else:
        scale = latent_scale(vae, settings.measured, device)
    built_from = vae_config(settings) | {"scaling_factor": scale}
    vae.register_to_config(scaling_factor=built_from["scaling_factor"])
    save_artifact(
        config, "vae", vae.state_dict(), built_from, measure_vae(vae, settings.measured, device)
    )


def decisive(config: Config) -> dict[str, Any]:
    """What the training depends on, see `trained_for`."""
    again = config.base.vae.start == "artifact"
    values = trained_for.settings(config, "base.vae") | trained_for.drawings()
    return values | (trained_for.start(config, "vae") if again else {})


def _check_start(settings: VaeConfig) -> None:
    if settings.start == "fresh":
        raise BadConfig(
            "base.vae.part is decoder, but the encoder beside it would be new.",
            hint="Set base.vae.start=artifact to keep a trained one.",
        )


def _draw(config: Config, chunk: int) -> Examples:
    """The k-th chunk of pictures, with 1 inside their face boxes."""
    generator = generator_for(config.run.seed, chunk)
    device, count = config.run.torch_device(), config.base.vae.chunk
    drawn = render(sample_scenes(count, generator, people="mixed", device=device))
    return {"images": as_bytes(drawn.images), "faces": as_bytes(drawn.face_pixels())}


def crop_batch(batch: Examples, side: int) -> Examples:
    """Square crops, three quarters of them with a face in the middle (as far as it goes)."""
    images, faces = batch["images"], batch["faces"]
    offsets = torch.arange(side, device=images.device)
    rows = (_starts(faces.amax(2), side)[:, None] + offsets)[:, :, None]
    columns = (_starts(faces.amax(1), side)[:, None] + offsets)[:, None, :]
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return {
        "images": images.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2),
        "faces": faces[which, rows, columns],
    }


def _starts(inside: Tensor, side: int) -> Tensor:
    """First pixel [N] of crops along one axis; inside [N, S] is 1 where faces are."""
    size = inside.shape[1]
    position = torch.arange(size, device=inside.device)
    middle = (inside * position).sum(1) / inside.sum(1).clamp(min=1)
    around = middle - side / 2 + (_uniform(inside) - 0.5) * side / 2
    anywhere = _uniform(inside) * (size - side)
    start = torch.where(_uniform(inside) < _ANYWHERE, anywhere, around)
    return start.round().long().clamp(0, size - side)


def _uniform(rows: Tensor) -> Tensor:
    return torch.rand(len(rows), device=rows.device)


def vae_losses(
    error: Tensor, posterior: Any, faces: Tensor, config: VaeConfig
) -> dict[str, Tensor]:
    """Distance of pixels and of their gradients, more on faces, and the KL divergence (means).

    error [B, 3, H, W] of pictures in -1..1, faces [B, H, W].
    """
    weight = 1 + config.face_weight * faces
    distance = error.square() if config.pixel_loss == "mse" else error.abs()
    pixels = (distance.mean(1) * weight).mean() / weight.mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    losses = {"pixels": pixels, "kl": kl}
    if config.edge_weight:
        losses["edges"] = _edge_loss(error, weight, 2) + _edge_loss(error, weight, 3)
    loss = pixels + config.edge_weight * losses.get("edges", 0.0) + config.kl_weight * kl
    return {"loss": loss} | losses


def critic_losses(
    critic: Critic, target: Tensor, painted: Tensor, distance: Tensor, vae: Vae, weight: float
) -> dict[str, Tensor]:
    """`distance` with the critic's part added, and with the loss of the critic itself."""
    judged = critic_loss(critic, target, painted)
    fooling = painter_loss(critic, target, painted)
    factor = weight * balance(distance, fooling, vae.decoder.conv_out.weight)
    return {"loss": distance + factor * fooling + judged, "critic": judged, "fooling": fooling}


def _edge_loss(error: Tensor, weight: Tensor, axis: int) -> Tensor:
    """L1 of the gradient of the error along an axis of [B, C, H, W]; weight [B, H, W]."""
    slope = error.diff(dim=axis).abs().mean(1)
    weight = weight.narrow(axis - 1, 1, weight.shape[axis - 1] - 1)
    return (slope * weight).mean() / weight.mean()


@torch.no_grad()
def latent_scale(vae: Vae, count: int, device: torch.device) -> float:
    """1 / standard deviation of the latents (Rombach et al. 2022, appendix G)."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(1), people="mixed")
    vae.register_to_config(scaling_factor=1.0)
    latents = encode_images(vae, render(scenes.to(device)).images)
    return float(f"{1 / latents.std().item():.5f}")


@torch.no_grad()
def measure_vae(vae: Vae, count: int, device: torch.device) -> dict[str, Any]:
    """PSNR in dB over whole pictures and inside face boxes, on people never trained on."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(99), split="test")
    drawn = render(scenes.to(device))
    painted = decode_latents(vae, encode_images(vae, drawn.images))
    error = (painted - drawn.images).square().mean(1)
    faces = drawn.face_pixels()
    whole, inside = error.mean().item(), ((error * faces).sum() / faces.sum()).item()
    l1 = F.l1_loss(painted, drawn.images).item()
    return {"psnr": -10 * math.log10(whole), "psnr_face": -10 * math.log10(inside), "l1": l1}
