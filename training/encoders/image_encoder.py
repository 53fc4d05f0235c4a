"""Training of the OpenCLIP image-text model on drawn portraits and their prompts."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflora_core.image_encoder import (
    TOKEN_TABLE,
    ImageEncoder,
    ImageEncoderConfig,
    tokenise,
)

from ..budget import train
from ..drawing import generator_for, render_in_parts
from ..example_pool import Examples, as_bytes
from ..portraits import describe, sample_scenes
from ..run_config import RunConfig
from ..run_folder import RunFolder
from .attributes import move
from .config import EncodersConfig, ImageEncoderTraining
from .damage import damage
from .drawn_pool import drawn_pool

_HALF = (0.5, 0.5, 0.5)
#: scenes whose prompts are read to learn which tokens the drawn world uses
_VOCABULARY_SCENES = 4000
_MOST_LOGIT_SCALE = 4.6052  # ln 100, as in CLIP


def model_config(settings: ImageEncoderTraining) -> ImageEncoderConfig:
    """The arguments of open_clip.model.CLIP for these settings."""
    vision = {
        "image_size": 128, "patch_size": settings.patch, "width": settings.width,
        "layers": settings.layers, "head_width": 32,
    }  # fmt: skip
    text = {
        "context_length": 77, "vocab_size": 49408, "width": settings.text_width,
        "heads": max(settings.text_width // 32, 1), "layers": settings.text_layers,
    }  # fmt: skip
    model = {"embed_dim": settings.embedding, "vision_cfg": vision, "text_cfg": text}
    return ImageEncoderConfig(model, _HALF, _HALF)


def train_image_encoder(config: EncodersConfig, run: RunConfig, folder: RunFolder) -> ImageEncoder:
    """Train; returns the model on the CPU, its token table reduced to the words of the world."""
    settings, device = config.image_encoder, run.torch_device()
    torch.manual_seed(run.seed)
    encoder = ImageEncoder.create(model_config(settings)).to(device)
    encoder.visual.output_tokens = False
    known = known_tokens(run.seed)
    pool = drawn_pool(draw_examples, config, run)

    def step(i: int) -> dict[str, Tensor]:
        batch = pool.draw(settings.batch)
        images = encoder.visual(encoder.prepare(damage(move(batch["images"], 4.0))))
        return contrastive(encoder.clip, images, encoder.clip.encode_text(batch["tokens"].long()))

    modules: dict[str, nn.Module] = {"clip": encoder.clip}
    trainer = train(
        modules, settings.optim, run, folder, step,
        batch=settings.batch, minutes=config.minutes, pool=pool,
    )  # fmt: skip
    encoder.clip.load_state_dict(trainer.averaged("clip"))
    encoder.visual.output_tokens = True
    encoder.eval()
    merge_unknown_tokens(encoder.clip, known)
    figures = measure_image_encoder(encoder, config.check_people, run.seed)
    encoder.config = replace(encoder.config, name=own_name(encoder), figures=figures)
    return encoder.cpu()


def own_name(encoder: ImageEncoder) -> str:
    """A name that another training does not get: embeddings of two encoders do not mix."""
    return f"mini image encoder {fingerprint(encoder.visual)}"


def fingerprint(module: nn.Module) -> str:
    """Eight hexadecimal digits of the weights as a file keeps them, in fp16."""
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def contrastive(clip: Any, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """CLIP's symmetric cross-entropy over the batch (Radford et al., 2021)."""
    images, texts = (F.normalize(x.float(), dim=-1) for x in (images, texts))
    scale = clip.logit_scale.clamp(max=_MOST_LOGIT_SCALE).exp()
    with torch.autocast(images.device.type, enabled=False):
        logits = scale * images @ texts.T
    own = torch.arange(len(images), device=images.device)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return {"loss": loss, "accuracy": (logits.argmax(-1) == own).float().mean()}


def draw_examples(count: int, generator: torch.Generator, device: torch.device) -> Examples:
    """Pictures and the tokens of their prompts (int32), which mention most of what they show."""
    scene = sample_scenes(count, generator, people="mixed")
    prompts = describe(scene, _speaker(generator), mention=0.85, looks=0.3)
    images = as_bytes(render_in_parts(scene.to(device)).images)
    return {"images": images, "tokens": tokenise(prompts).to(device, torch.int32)}


def known_tokens(seed: int) -> Tensor:
    """The tokens that prompts of the drawn world use, start and end included: [n], sorted."""
    generator = generator_for(seed, 2 * 10**6)
    scene = sample_scenes(_VOCABULARY_SCENES, generator, people="mixed")
    prompts = describe(scene, _speaker(generator), looks=1.0)
    prompts += describe(scene[:200], _speaker(generator), subject="sks person")
    return tokenise(prompts).unique()


def merge_unknown_tokens(clip: nn.Module, known: Tensor) -> None:
    """Give all words outside the drawn world one embedding, their mean: the file stays small."""
    table = clip.get_parameter(TOKEN_TABLE)
    unknown = torch.ones(len(table), dtype=torch.bool)
    unknown[known] = False
    with torch.no_grad():
        table[unknown] = table[unknown].mean(0)


@torch.no_grad()
def measure_image_encoder(encoder: ImageEncoder, count: int, seed: int) -> dict[str, float]:
    """How often a held-out picture finds its prompt among `count`, and the mean cosines."""
    generator = generator_for(seed, 10**6)
    device = encoder.mean.device
    scene = sample_scenes(count, generator, split="test", device=device)
    texts = encoder.encode_text(describe(scene))
    drawn = render_in_parts(scene).images
    images = torch.cat([encoder.encode(part)[0] for part in drawn.split(100)])
    cosine = images @ texts.T
    own = torch.arange(count, device=device)
    return {
        "among": float(count),
        "top1": float((cosine.argmax(-1) == own).double().mean()),
        "cosine_own": float(cosine.diag().mean()),
        "cosine_other": float((cosine.sum() - cosine.diag().sum()) / (count * (count - 1))),
    }


def _speaker(generator: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(1 << 30, (), generator=generator)))
