"""Stage train-controlnet: every variant of the loss from every seed, then figures and files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig
from difflora_core.mask_aware.landmarks import open_landmark_network
from difflora_core.mask_aware.networks import FaceNetwork, open_face_network
from difflora_core.mask_aware.perceptual import open_lpips

from .. import trained_for
from ..artifacts import artifact
from ..base.noise import NoiseSchedule
from ..base.picture_decoder import PictureDecoder
from ..budget import train
from ..config import Config
from ..run_config import with_seed
from ..run_folder import RunFolder
from . import record
from .base_model import BaseModel, open_base
from .batches import People
from .checking import Checker, held_out
from .config import ControlnetConfig, ObjectiveConfig
from .control import Control, control_names, new_control, predict_noise
from .drawn_people import DrawnPeople
from .export import base_of, export
from .objective import MaskAware, draw_steps, objectives_of
from .people import Index
from .people_stage import open_split
from .read_people import ReadPeople

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workshop:
    """What all variants and seeds share."""

    config: Config
    base: BaseModel
    loss: MaskAware
    """Its objective is replaced by that of each variant."""
    people: People
    checker: Checker

    @classmethod
    def open(cls, config: Config) -> Workshop:
        """Models and data. Errors: BadConfig, MissingArtifact, BadWeightsFile, DiffLoRAError."""
        base = open_base(config)
        base_of(control_names(base.unet))  # what cannot be exported need not be trained
        loss = open_loss(config, base)
        check_taps(loss.network, config.controlnet.objective.tap_weights, base.device)
        held = held_out(config, base, config.controlnet.check)
        return cls(config, base, loss, open_people(config, base), Checker(base, config, held, loss))


def run(config: Config, folder: RunFolder) -> None:
    """Train `controlnet.variants` from `controlnet.seeds` and export each. Errors: BadConfig."""
    settings = config.controlnet
    objectives = objectives_of(settings)
    if not objectives or not settings.seeds:
        raise BadConfig("controlnet.variants and controlnet.seeds must not be empty.")
    check_networks(settings, list(objectives.values()))
    check_records(config, folder, objectives)
    workshop = Workshop.open(config)
    before = workshop.checker.figures(None)
    for seed in settings.seeds:
        for variant, objective in objectives.items():
            name = run_name(variant, seed)
            control, steps = train_control(workshop, objective, seed, folder.part(name))
            figures = {
                "steps": steps,
                "objective": to_dict(objective),
                "base": before,
                "control": workshop.checker.figures(control),
            }
            export(config, name, control, figures)
            logger.info("%s: %s", name, figures)


def check_networks(settings: ControlnetConfig, objectives: Sequence[ObjectiveConfig]) -> None:
    """Errors: BadConfig where a network of the drawn world would look at photos."""
    for term, key in (("face", "face_network"), ("landmark", "landmark_network")):
        used = any(getattr(objective, term) > 0 for objective in objectives)
        if settings.model and used and not getattr(settings, key):
            raise BadConfig(
                f"controlnet.{key} is empty, and the mini world's network does not know photos.",
                hint=f"Give a file of insightface's packs, or set controlnet.objective.{term}=0.",
            )


def check_records(
    config: Config, folder: RunFolder, objectives: Mapping[str, ObjectiveConfig]
) -> None:
    """Errors: BadConfig where a training would go on with other settings than it began with."""
    for seed in config.controlnet.seeds:
        for variant, objective in objectives.items():
            part = RunFolder(folder.path / run_name(variant, seed))
            trained_for.check(part, record.decisive(config, objective))


def check_taps(network: FaceNetwork | None, weights: Sequence[float], device: torch.device) -> None:
    """Errors: BadConfig where weights are given, but not one for each stage."""
    if network is None or not weights:
        return
    crop = torch.zeros(1, 3, network.size, network.size, device=device)
    stages = len(network(crop).taps)
    if len(weights) != stages:
        raise BadConfig(
            f"controlnet.objective.tap_weights has {len(weights)} entries, but {network.name} has "
            f"{stages} stages.",
            hint="Give one weight for each, or none for equal ones.",
        )


def check_faces(index: Index, objectives: Sequence[ObjectiveConfig]) -> None:
    """Errors: BadConfig where faces are to be compared, and no picture has one with landmarks."""
    wanted = any(objective.face > 0 or objective.landmark > 0 for objective in objectives)
    people = (person for picture in index.pictures for person in picture.people)
    if wanted and not any(person.landmarks for person in people):
        raise BadConfig(
            "The data set has no faces with landmarks, but the objective compares faces.",
            hint="Give people.train.wholebody and build it again, or set face and landmark to 0.",
        )


def run_name(variant: str, seed: int) -> str:
    """File name of one training: "last=200 face=0.7", 1 -> "last-200_face-0.7-seed1"."""
    return f"{'_'.join(variant.split()).replace('=', '-')}-seed{seed}"


def train_control(
    workshop: Workshop, objective: ObjectiveConfig, seed: int, folder: RunFolder
) -> tuple[Control, int]:
    """One ControlNet with its averaged weights, frozen, and the steps it took.

    Errors: Interrupted where `run.max_minutes` came first.
    """
    config, base, settings = workshop.config, workshop.base, workshop.config.controlnet
    loss = replace(workshop.loss, objective=objective)
    trained_for.begin(folder, record.decisive(config, objective))
    torch.manual_seed(seed)
    control = new_control(base.unet, checkpointing=settings.checkpointing)

    def step(i: int) -> dict[str, Tensor]:
        if i and settings.sample_every and i % settings.sample_every == 0:
            workshop.checker.save_samples(control, folder, i)
        batch = workshop.people.draw(i, settings.batch, seed)
        context = base.encode(drop_prompts(batch.prompts, settings.drop_prompt))
        noise = torch.randn_like(batch.latents)
        t, weight = draw_steps(len(batch), objective, base.device)
        noisy = loss.schedule.add_noise(batch.latents, noise, t)
        predicted = predict_noise(base, control, noisy, t, context)
        return loss.losses(batch, noisy, predicted, noise, t, weight)

    run = with_seed(config.run, seed)
    modules = {"control": control}
    trainer = train(modules, settings.optim, run, folder, step, batch=settings.batch)
    control.load_state_dict(trainer.averaged("control"))
    workshop.checker.save_samples(control.eval(), folder, trainer.step)
    return control.requires_grad_(False), trainer.step


def drop_prompts(prompts: tuple[str, ...], share: float) -> list[str]:
    """Some of the prompts made empty, so that classifier-free guidance has its other half."""
    kept = torch.rand(len(prompts)) >= share
    return [prompt if keep else "" for prompt, keep in zip(prompts, kept.tolist(), strict=True)]


def open_loss(config: Config, base: BaseModel) -> MaskAware:
    """The loss with its networks. Errors: MissingArtifact, BadWeightsFile."""
    settings = config.controlnet
    network = landmarks = None
    if settings.face_network or not settings.model:  # the mini world's does not know photos
        path = settings.face_network or artifact(config, "recogniser")
        network = open_face_network(path).to(base.device)
    if any(objective.landmark for objective in objectives_of(settings).values()):
        path = settings.landmark_network or artifact(config, "landmarks")
        landmarks = open_landmark_network(path).to(base.device)
    return MaskAware(
        ObjectiveConfig() if network else ObjectiveConfig(face=0.0),
        PictureDecoder(base.vae),
        network,
        landmarks,
        open_lpips(*settings.vgg).to(base.device) if settings.vgg else None,
        NoiseSchedule(base.device),
    )


def open_people(config: Config, base: BaseModel) -> People:
    """The training pictures. Errors: MissingArtifact, BadIndex."""
    settings = config.controlnet
    if settings.data == "people":
        index = open_split(config, "train")
        check_faces(index, list(objectives_of(settings).values()))
        return ReadPeople.open(index, base, settings)
    return DrawnPeople.make(base, settings, config.run.seed)
