"""Pictures drawn and encoded once: what the U-Net trains on, all of it on the device."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from difflora_core.weights_file import read_safetensors, write_safetensors

from .. import parallel
from ..artifacts import artifact, sha256
from ..config import Config
from ..portraits import Scene, describe, render, renderer_digest, sample_scenes
from ..portraits.vocabulary import STYLES, WEIGHTS
from .config import UnetConfig
from .models import Vae, open_vae
from .tokens import rows

CHUNK = 2048
#: below this many pictures, starting worker processes costs more than they save
_PARALLEL_FROM = 20_000
#: pictures that go through the autoencoder together on a CPU: more fall out of its cache
_CPU_CHUNK = 8


@dataclass(frozen=True)
class LatentPool:
    """What training sees of N pictures.

    latents [N, 4, 16, 16] (scaled, half precision), prompts [N, 77] (table rows) and faces
    [N, 16, 16], the share of each latent's pixels that lies in a face box (half precision).
    """

    latents: Tensor
    prompts: Tensor
    faces: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """A random batch: latents and faces as float32, prompt rows as int64."""
        device = self.latents.device
        index = torch.randint(len(self), (batch,), device=device)
        return self.latents[index].float(), self.prompts[index].long(), self.faces[index].float()


def open_pool(config: Config, path: Path, device: torch.device) -> LatentPool:
    """The pool of train-base: drawn and written to `path`, or found there by a resumed run.

    A file that was made from other settings, by another renderer or with another VAE is made anew.
    Every process of a training must call this (see `parallel`): each draws a part.
    """
    settings, seed = config.base.unet, config.run.seed
    vae = sha256(artifact(config, "vae"))
    drawn_by = [settings.pool, settings.styles, settings.mention, settings.looks]
    made_of = json.dumps([*drawn_by, seed, vae, renderer_digest()])
    found = _found(path, made_of, device)
    parallel.join()
    missing = parallel.agree(found is None, device=device)[0]  # a disk may not be the others' disk
    if found is not None and not missing:
        return found
    pool = build_pool(open_vae(config).to(device), settings, seed, device, together=True)
    if parallel.rank() == 0:
        tensors = {name: tensor.cpu() for name, tensor in vars(pool).items()}
        write_safetensors(path, tensors, {"made_of": made_of}, overwrite=True)
    return pool


def _found(path: Path, made_of: str, device: torch.device) -> LatentPool | None:
    if not path.exists():
        return None
    tensors, header = read_safetensors(path)
    if header.get("made_of") != made_of:
        return None
    return LatentPool(**{name: tensor.to(device) for name, tensor in tensors.items()})


def build_pool(
    vae: Vae,
    config: UnetConfig,
    seed: int,
    device: torch.device,
    split: str = "train",
    together: bool = False,
) -> LatentPool:
    """Draw `config.pool` pictures of training people (or "test" ones) and encode them.

    `together`: every process calls this, draws its share of the chunks and gets the whole.
    """
    share = parallel.share() if together else slice(None)
    chunks = [
        _encoded(vae, scene.to(device), spoken)
        for scene, spoken in _scenes_with_prompts(config, seed, split, share)
    ]
    if together:
        chunks = parallel.exchange(chunks, len(_sizes(config)))
    return LatentPool(*(torch.cat(part).to(device) for part in zip(*chunks, strict=True)))


def _encoded(vae: Vae, scene: Scene, spoken: Future[Tensor] | Tensor) -> tuple[Tensor, ...]:
    """The fields of a pool, on the cpu."""
    drawn = render(scene)
    latents = encode_images(vae, drawn.images).half()
    prompts = spoken.result() if isinstance(spoken, Future) else spoken
    high, wide = latents.shape[-2:]
    faces = F.adaptive_avg_pool2d(drawn.face_pixels(), (high, wide)).half()
    return latents.cpu(), prompts.short(), faces.cpu()


@torch.no_grad()
def encode_images(vae: Vae, images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 -> scaled latents [B, 4, H/8, W/8] float32 (posterior mean)."""
    chunk = 512 if images.is_cuda else _CPU_CHUNK
    parts = [vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(chunk)]
    return torch.cat(parts).float() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Vae, latents: Tensor) -> Tensor:
    """Scaled latents -> pictures [B, 3, H, W] in 0..1."""
    chunk = 128 if latents.is_cuda else _CPU_CHUNK
    parts = [vae.decode(part).sample for part in (latents / vae.config.scaling_factor).split(chunk)]
    return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)


def _sizes(config: UnetConfig) -> list[int]:
    return [min(CHUNK, config.pool - i) for i in range(0, config.pool, CHUNK)]


def _scenes_with_prompts(
    config: UnetConfig, seed: int, split: str, share: slice
) -> Iterator[tuple[Scene, Future[Tensor] | Tensor]]:
    """Those chunks of the pool that lie in `share`."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [_draw_scenes(size, config, generator, split) for size in _sizes(config)]
    numbered = list(enumerate(scenes, seed))[share]
    if config.pool < _PARALLEL_FROM:
        for number, scene in numbered:
            yield scene, _speak(scene, config.mention, config.looks, number)
        return
    # spawn: a process that has touched a GPU must not fork
    context, count = get_context("spawn"), max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(count, context) as workers:
        spoken = [
            workers.submit(_speak, scene, config.mention, config.looks, number)
            for number, scene in numbered
        ]
        yield from zip((scene for _, scene in numbered), spoken, strict=True)


def _draw_scenes(n: int, config: UnetConfig, generator: torch.Generator, split: str) -> Scene:
    """Scenes of any number of people, styles as often as the config wants them."""
    pairs = zip(WEIGHTS["style"], config.styles or [1.0] * len(STYLES), strict=True)
    weights = {"style": tuple(usual * factor for usual, factor in pairs)}
    return sample_scenes(n, generator, people="mixed", split=split, weights=weights)


def _speak(scene: Scene, mention: float, looks: float, seed: int) -> Tensor:
    rng = random.Random(seed)
    prompts = describe(scene, rng, mention=mention, looks=looks)
    # a few prompts already say "sks person", so that the trigger means a person to the base model
    prompts = [
        p.replace("a person", "sks person", 1) if rng.random() < 0.05 else p for p in prompts
    ]
    return rows(prompts)
