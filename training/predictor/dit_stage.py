"""Stage train-dit: the denoiser over LoRA latents and the mixed image features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from difflora_core.mif import Condition
from difflora_core.predictor import Predictor

from .. import trained_for
from ..artifacts import record_artifact
from ..config import Config
from ..loop import Trainer
from ..loras.collect import INDEX, read_set
from ..portraits import identities
from ..run_folder import RunFolder
from .bundle import check_widths, open_bundle, save_bundle
from .calibrate import calibrate
from .conditions import Embeddings, PhotoEncoders
from .config import DitTraining


def run(config: Config, folder: RunFolder) -> None:
    name, settings = config.predictor.name, config.predictor.dit
    part, values = folder.part(name), trained_for.settings(config, "predictor", "predictor.dit")
    read = (f"{name}_autoencoder", INDEX, "recogniser", "image_encoder")
    trained_for.begin(part, values | trained_for.inputs(config, *read) | trained_for.drawings())
    torch.manual_seed(config.run.seed)
    predictor = open_bundle(config, f"{name}_autoencoder")
    loras = read_set(config)
    loras.space.check_same(predictor.space, f"The artifact {name}_autoencoder")
    with torch.no_grad():
        latents = predictor.encode(loras.vectors.to(predictor.device))
    people = identities(loras.seeds)
    encoders = PhotoEncoders(config)
    check_widths(predictor, encoders, f"The artifact {name}_autoencoder")
    photos = encoders.embed_people(people, settings.photos, config.run.seed)
    predictor.mixer.fit(photos.face.flatten(0, 1), photos.image.flatten(0, 1))
    trainer = Trainer(
        {"dit": predictor.dit, "mixer": predictor.mixer},
        settings.optim,
        config.run,
        part,
        items_per_step=settings.batch,
    )
    trainer.fit(lambda i: dit_losses(predictor, latents, photos, settings, trainer.generator))
    predictor.dit.load_state_dict(trainer.averaged("dit"))
    predictor.mixer.load_state_dict(trainer.averaged("mixer"))
    figures = {"loras": len(loras), "steps": trainer.step}
    finish(config, predictor, [f"{name}_dit"], figures, final=not config.predictor.end_to_end)


def finish(
    config: Config,
    predictor: Predictor,
    names: list[str],
    figures: Mapping[str, float],
    *,
    final: bool,
) -> None:
    """Calibrate the strength, then write the bundle under its names."""
    predictor.eval().requires_grad_(False)
    figures = {**figures, **calibrate(config, predictor)}
    for name in [*names, *([config.predictor.name] if final else [])]:
        save_bundle(config, predictor, name)
        record_artifact(config, f"{name}.safetensors", figures)


def dit_losses(
    predictor: Predictor,
    latents: Tensor,
    photos: Embeddings,
    config: DitTraining,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The diffusion loss, each LoRA conditioned on a random photo of its person."""
    device = latents.device
    people = torch.randint(len(latents), (config.batch,), generator=generator, device=device)
    condition = random_condition(
        predictor, photos, people, generator, config.drop_source, config.drop
    )
    z0 = latents[people]
    t = predictor.diffusion.sample_times(config.batch, generator, str(device))
    noise = torch.randn(z0.shape, generator=generator, device=device)
    x0 = predictor.denoise(predictor.diffusion.add_noise(z0, noise, t), t, condition)
    return {"loss": predictor.diffusion.loss(x0, z0, t)}


def random_condition(
    predictor: Predictor,
    photos: Embeddings,
    people: Tensor,
    generator: torch.Generator | None,
    drop_source: float,
    drop: float = 0.0,
) -> Condition:
    """The condition of a random photo of each person, its sources dropped at random."""
    face, image = photos.pick(people, generator)
    u = torch.rand(len(people), generator=generator, device=people.device)
    nothing = u < drop
    no_face = (u >= drop) & (u < drop + drop_source)
    no_image = (u >= drop + drop_source) & (u < drop + 2 * drop_source)
    return predictor.condition(face, image, ~(nothing | no_face), ~(nothing | no_image))
