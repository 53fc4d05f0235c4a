"""Stage train-autoencoder: the LoRA autoencoder on the collected LoRAs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difflora_core.autoencoder.tokens import TokensAutoencoder
from difflora_core.lora_space import LoraSpace
from difflora_core.predictor import Predictor
from difflora_core.presets import preset

from .. import trained_for
from ..artifacts import record_artifact
from ..config import Config
from ..loop import Trainer
from ..loras.collect import INDEX, read_set
from ..run_folder import RunFolder
from .bundle import save_bundle
from .conditions import PhotoEncoders
from .config import AutoencoderTraining
from .losses import delta_loss, weight_preserved_loss

#: every tenth LoRA is kept back to measure reconstruction
_KEPT_BACK = 10


def run(config: Config, folder: RunFolder) -> None:
    settings, device = config.predictor.autoencoder, config.run.torch_device()
    part = folder.part(config.predictor.name)
    values = trained_for.settings(config, "predictor", "predictor.autoencoder")
    trained_for.begin(part, values | trained_for.inputs(config, INDEX))
    torch.manual_seed(config.run.seed)
    loras = read_set(config)
    vectors = loras.vectors.to(device)
    held = torch.arange(len(vectors), device=device) % _KEPT_BACK == _KEPT_BACK - 1
    train, test = vectors[~held], vectors[held]
    predictor = new_predictor(config, loras.space).to(device)
    predictor.value_statistics.fit(train)
    values = predictor.value_statistics(train)
    if isinstance(predictor.autoencoder, TokensAutoencoder):
        predictor.autoencoder.layer_heads.fit(values)
    trainer = Trainer(
        {"autoencoder": predictor.autoencoder},
        settings.optim,
        config.run,
        part,
        items_per_step=settings.batch,
    )

    if loras.space.predicts_down:
        # half of one A with half of another is nobody's: only with a shared A are blends LoRAs
        settings = replace(settings, mix=0.0)

    def step(i: int) -> dict[str, Tensor]:
        batch = draw_values(values, settings, trainer.generator)
        return autoencoder_losses(predictor, batch, settings, trainer.generator)

    trainer.fit(step)
    predictor.autoencoder.load_state_dict(trainer.averaged("autoencoder"))
    fit_latents(predictor, train)
    name = f"{config.predictor.name}_autoencoder"
    save_bundle(config, predictor, name)
    record_artifact(config, f"{name}.safetensors", measure(predictor, train, test))


def new_predictor(config: Config, space: LoraSpace) -> Predictor:
    """An untrained predictor of the configured preset for the encoders of this run."""
    return Predictor(preset(config.predictor.preset, space, *PhotoEncoders(config).widths))


def draw_values(values: Tensor, config: AutoencoderTraining, generator: torch.Generator) -> Tensor:
    """A batch [B, D] in standard units, some of it blends of two LoRAs."""
    device = values.device
    index = torch.randint(len(values), (2, config.batch), generator=generator, device=device)
    first, second = values[index[0]], values[index[1]]
    share = torch.rand(config.batch, 1, generator=generator, device=device)
    blended = torch.rand(config.batch, 1, generator=generator, device=device) < config.mix
    # independent deviations from the mean partly cancel in a blend; rescaled, they look like people
    blend = (share * first + (1 - share) * second) / (share**2 + (1 - share) ** 2).sqrt()
    return torch.where(blended, blend, first)


def autoencoder_losses(
    predictor: Predictor, values: Tensor, config: AutoencoderTraining, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weight-preserved loss on standard values, direction and size of each layer's delta W."""
    latents = predictor.autoencoder.encode(values)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    spread = latents.detach().std(0, correction=0, keepdim=True)
    rebuilt = predictor.autoencoder.decode(latents + config.jitter * spread * noise)
    weighted = weight_preserved_loss(rebuilt.float(), values, config.magnitude)
    restore = predictor.value_statistics.inverse
    delta = delta_loss(predictor.space, restore(rebuilt), restore(values))
    return {"loss": weighted + config.delta * delta, "values": weighted, "delta": delta}


@torch.no_grad()
def fit_latents(predictor: Predictor, vectors: Tensor) -> None:
    """Give latents unit variance."""
    raw = predictor.autoencoder.encode(predictor.value_statistics(vectors))
    predictor.latent_statistics.fit(raw)


@torch.no_grad()
def measure(predictor: Predictor, train: Tensor, test: Tensor) -> dict[str, float]:
    """Share of variance explained and cosine of delta W, on LoRAs trained on and kept back."""
    figures: dict[str, float] = {"compression": predictor.space.size / predictor.latent_shape[0]}
    figures["compression"] /= predictor.latent_shape[1]
    for name, vectors in (("train", train[:256]), ("test", test[:256])):
        if not len(vectors):  # of a few LoRAs none is kept back
            continue
        rebuilt = predictor.decode(predictor.encode(vectors))
        error = (rebuilt - vectors).square().sum()
        spread = (vectors - predictor.value_statistics.mean).square().sum()
        figures[f"explained_{name}"] = 1 - (error / spread).item()
        cosine = torch.cosine_similarity(rebuilt, vectors).mean()
        figures[f"cosine_{name}"] = cosine.item()
    return figures
