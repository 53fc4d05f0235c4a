"""Stage finetune-predictor: the whole predictor through the frozen U-Net.

The loss is the U-Net's own denoising loss on other pictures of the person in the photo, with the
face term of the mask-aware loss beside it, so no LoRA data set limits how many people it sees. The
predictor is trained on its own few-step sampling: some steps without gradient, in turn from none to
all but the last, then one with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difflora_core.mask_aware.losses import Term, Weights, combine
from difflora_core.mask_aware.networks import open_face_network
from difflora_core.mask_aware.pairing import FlatFaces
from difflora_core.mif import Condition
from difflora_core.predictor import Predictor

from .. import parallel, trained_for
from ..artifacts import BASE_PARTS, artifact
from ..base.noise import STEPS, NoiseSchedule
from ..base.painter import Painter, denoised
from ..base.picture_decoder import PictureDecoder
from ..base.side_path import Factors, spread_factors
from ..budget import train
from ..config import Config
from ..face_term import FaceTerm
from ..loras.stage import lora_space
from ..run_folder import RunFolder
from .autoencoder_stage import new_predictor
from .bundle import check_encoders, check_widths, open_bundle
from .conditions import PhotoEncoders
from .config import FinetuneTraining
from .dit_stage import finish, random_condition
from .people_pool import PeoplePool, build_people_pool

PARTS = ("dit", "mixer", "autoencoder")


def run(config: Config, folder: RunFolder) -> None:
    name, settings = config.predictor.name, config.predictor.finetune
    part = folder.part(name)
    trained_for.begin(part, decisive(config))
    torch.manual_seed(config.run.seed)
    painter = Painter.open(config)
    encoders = PhotoEncoders(config)
    check_start(config, encoders)
    pool = build_people_pool(painter, encoders, settings, config.run.seed)
    predictor = starting_predictor(config, pool)
    trainer = train(
        {part: getattr(predictor, part) for part in PARTS},
        settings.optim,
        config.run,
        part,
        EndToEnd(predictor, painter, pool, open_face_term(config, painter), settings).step,
        batch=settings.batch * settings.per_person,
        minutes=settings.minutes,
    )
    if parallel.rank() > 0:
        return
    for part in PARTS:
        getattr(predictor, part).load_state_dict(trainer.averaged(part))
    # what it was trained to take is what it takes in use
    sampling = replace(predictor.config.sampling, steps=settings.rollout)
    predictor.config = replace(predictor.config, sampling=sampling)
    figures = {"people": len(pool), "steps": trainer.step}
    finish(config, predictor, [], figures, final=True)


def decisive(config: Config) -> dict[str, Any]:
    """What the training depends on, see `trained_for`."""
    name, begun = config.predictor.name, config.predictor.finetune.start
    values = trained_for.settings(config, "predictor", "predictor.finetune")
    values |= {"loras.rank": config.loras.rank, "loras.gauge": config.loras.gauge}
    values |= trained_for.drawings()
    values |= trained_for.inputs(config, *BASE_PARTS, "recogniser", "image_encoder")
    if begun == "dit":
        values |= trained_for.inputs(config, f"{name}_dit")
    return values | (trained_for.start(config, name) if begun == "artifact" else {})


def check_start(config: Config, encoders: PhotoEncoders) -> None:
    """Before anything is drawn. Errors: LayoutMismatch where the start fits other encoders."""
    if config.predictor.finetune.start != "fresh":
        name = _start(config)
        check_widths(Predictor.open(artifact(config, name)), encoders, f"The artifact {name}")


def _start(config: Config) -> str:
    """The artifact to go on from."""
    name = config.predictor.name
    return f"{name}_dit" if config.predictor.finetune.start == "dit" else name


def starting_predictor(config: Config, pool: PeoplePool) -> Predictor:
    """What train-dit has learnt, the finished predictor again, or an untrained one."""
    start, name = config.predictor.finetune.start, _start(config)
    if start == "fresh":
        predictor = untrained(config)
    else:
        predictor = open_bundle(config, name)
        lora_space(config.loras).check_same(predictor.space, f"The artifact {name}")
    if start == "dit":
        check_encoders(config, predictor, f"The artifact {name}")
    else:
        # the encoders may have been trained again since
        predictor.mixer.fit(pool.photos.face.flatten(0, 1), pool.photos.image.flatten(0, 1))
    return predictor


def untrained(config: Config) -> Predictor:
    """A predictor whose LoRA values have a mean and a spread without any trained LoRA."""
    predictor = new_predictor(config, lora_space(config.loras))
    predictor.value_statistics.std.fill_(config.predictor.finetune.fresh_scale)
    return predictor.to(config.run.torch_device())


def open_face_term(config: Config, painter: Painter) -> FaceTerm:
    """Seen by the recogniser that predictors are conditioned on. Errors: BadWeightsFile."""
    network = open_face_network(artifact(config, "recogniser")).to(painter.device)
    return FaceTerm(PictureDecoder(painter.vae), network)


class EndToEnd:
    """One training step: photo -> latent -> LoRA -> U-Net -> face -> loss."""

    def __init__(
        self,
        predictor: Predictor,
        painter: Painter,
        pool: PeoplePool,
        faces: FaceTerm,
        config: FinetuneTraining,
    ) -> None:
        self.predictor, self.painter, self.pool, self.config = predictor, painter, pool, config
        self.faces = faces
        self.schedule = NoiseSchedule(painter.device)

    def step(self, i: int) -> dict[str, Tensor]:
        config, device = self.config, self.painter.device
        people = self._integers(len(self.pool), config.batch)
        condition = random_condition(
            self.predictor, self.pool.photos, people, None, config.drop_source
        )
        vectors = self.predictor.decode(self.own_estimate(condition, i % config.rollout))
        shuffled = torch.rand(config.batch, config.pictures, device=device).argsort(1)
        which = shuffled[:, : config.per_person]
        losses = self.painting_loss(vectors, people, which)
        size = vectors.square().mean()
        return losses | {"loss": losses["loss"] + config.shrink * size, "size": size}

    def own_estimate(self, condition: Condition, done: int) -> Tensor:
        """The predictor's estimate of z_0 after `done` of its sampling steps from pure noise."""
        steps, rows = self.config.rollout, len(condition.vector)
        shape = (rows, *self.predictor.latent_shape)
        z = torch.randn(shape, device=condition.vector.device)
        times = torch.linspace(1, 0, steps + 1, device=z.device)
        with torch.no_grad():
            for k in range(done):
                t, s = times[k].expand(rows), times[k + 1].expand(rows)
                z = self.predictor.diffusion.step(self.predictor.denoise(z, t, condition), z, t, s)
        return self.predictor.denoise(z, times[done].expand(rows), condition)

    def painting_loss(self, vectors: Tensor, people: Tensor, which: Tensor) -> dict[str, Tensor]:
        """The loss on pictures `which` [B, m] of the people [B], and what to log of it."""
        rows = people[:, None]
        latents = self.pool.latents[rows, which].flatten(0, 1).float()
        prompts = self.pool.prompts[rows, which].flatten(0, 1).long()
        noise = torch.randn_like(latents)
        t = self._integers(STEPS, len(latents))
        context = self.painter.text(prompts).last_hidden_state
        noisy = self.schedule.add_noise(latents, noise, t)
        with self.painter.side_path.using(self.factors(vectors, which.shape[1])):
            predicted = self.painter.unet(noisy, t, context).sample.float()
        x0 = denoised(noisy, predicted, self.schedule.alpha[t][:, None, None, None])
        face = self.face_term(x0, latents, people, which, t)
        plain = self.schedule.loss(predicted, noise, t)
        ldm = plain * self.schedule.min_snr_weight(t, self.config.min_snr)
        weights = Weights(face=self.config.face, body=0.0)
        loss = combine(ldm, {"face": face}, weights).mean()
        shown = face.value.sum() / face.present.sum().clamp_min(1)
        return {"loss": loss, "epsilon": plain.mean(), "face": shown}

    def face_term(
        self, x0: Tensor, latents: Tensor, people: Tensor, which: Tensor, t: Tensor
    ) -> Term:
        """Distance of the faces of estimates x0 from those of `latents`, where t < face_last."""
        rows = people[:, None]
        boxes = self.pool.boxes[rows, which].flatten(0, 1)
        points = self.pool.landmarks[rows, which].flatten(0, 1)
        usable = boxes.isfinite().all(1) & points.isfinite().all((1, 2))
        seen = (usable & (t < self.config.face_last) & (self.config.face > 0)).nonzero()[:, 0]
        faces = FlatFaces(seen, boxes[seen], points[seen], len(x0))
        return self.faces.of_latents(x0, latents, faces)

    def factors(self, vectors: Tensor, times: int) -> Factors:
        """LoRA vectors [B, D] -> factors for a batch with each person `times` times in a row."""
        space = self.predictor.space
        pairs = space.unpack_factors(vectors)
        shared = {n: d.to(vectors.device) for n, d in space.downs().items()}
        factors = {
            name: (down if space.predicts_down else shared[name], up * space.scale)
            for name, (down, up) in pairs.items()
        }
        return spread_factors(factors, times)

    def _integers(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=self.painter.device)
