"""Training of face recognisers on drawn people: aligned crops, margin softmax, calibration."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflora_core.face_crop import TEMPLATE, TEMPLATE_SIZE, inverted, similarity, warp
from difflora_core.likeness import Calibration, fit_calibration
from difflora_core.recogniser import ConvNeXtConfig, IResNetConfig, Recogniser, RecogniserConfig

from ..budget import train
from ..drawing import generator_for, people_scenes, pictures_of, somebody
from ..example_pool import Examples, Pool, as_bytes
from ..portraits import FACTORS, Portraits, render
from ..portraits.factors import SPLIT_SIZE
from ..run_config import RunConfig
from ..run_folder import RunFolder
from .config import EncodersConfig, RecogniserTraining
from .damage import damage

logger = logging.getLogger(__name__)

#: pooled crops show this many pixels more on each side, as room for inexact alignment
ROOM = 12
#: sides of the drawn pictures, in turn: the mini world's own, and sharper ones
DRAWN_SIZES = (128, 128, 192, 128, 256)
#: how far an alignment may be off: shift in pixels of the crop, turn in radians, scale
SHIFT, TURN, SCALE = 3.0, 0.08, 0.06


class MarginHead(nn.Module):
    """ArcFace (Deng et al., 2019, eq. 3): the angle to the person's own centre gets a margin."""

    def __init__(self, people: int, settings: RecogniserTraining, embedding: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(people, embedding) * 0.05)
        self.factors = nn.Linear(embedding, len(FACTORS))
        self.settings = settings

    def forward(self, embedding: Tensor, person: Tensor, factors: Tensor) -> dict[str, Tensor]:
        embedding = embedding.float()
        with torch.autocast(embedding.device.type, enabled=False):
            cosine = F.normalize(embedding, dim=-1) @ F.normalize(self.centres, dim=-1).T
            own = cosine.gather(1, person[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
            harder = torch.cos((own.acos() + self.settings.margin).clamp(max=math.pi))
            logits = self.settings.scale * cosine.scatter(1, person[:, None], harder)
            identity = F.cross_entropy(logits, person)
            # both in units of the variance that there is to explain
            regression = 12 * F.mse_loss(self.factors(embedding), factors)
            relation = len(FACTORS) * F.mse_loss(_cosines(embedding), _cosines(factors - 0.5))
        loss = self.settings.margin_weight * identity
        loss = loss + self.settings.factor_weight * (regression + relation)
        return {"loss": loss, "identity": identity, "factors": regression, "relation": relation}


def _cosines(vectors: Tensor) -> Tensor:
    """All cosines of a batch [B, D] among itself: [B, B]."""
    vectors = F.normalize(vectors, dim=-1)
    return vectors @ vectors.T


def train_recogniser(
    config: EncodersConfig,
    settings: RecogniserTraining,
    network: IResNetConfig | ConvNeXtConfig,
    run: RunConfig,
    folder: RunFolder,
) -> Recogniser:
    """Train and calibrate; returns the recogniser with weights that fp16 holds exactly."""
    device = run.torch_device()
    torch.manual_seed(run.seed)
    recogniser = Recogniser(RecogniserConfig(network, name=folder.name)).to(device)
    head = MarginHead(settings.people, settings, network.embedding).to(device)

    def make(k: int) -> Examples:
        generator = generator_for(run.seed, k)
        return draw_examples(config.chunk, k, generator, device, settings.people)

    pool = Pool(make, config.pool, config.reuse)

    def step(i: int) -> dict[str, Tensor]:
        batch = pool.draw(settings.batch)
        crops = damage(misalign(batch["images"]), settings.damage)
        return head(recogniser(crops), batch["person"], batch["factors"])

    modules: dict[str, nn.Module] = {"recogniser": recogniser, "head": head}
    trainer = train(
        modules, settings.optim, run, folder, step,
        batch=settings.batch, minutes=config.minutes, pool=pool,
    )  # fmt: skip
    recogniser.load_state_dict(trainer.averaged("recogniser"))
    recogniser.eval().half().float()  # what the file will hold
    calibration = calibrate(recogniser, config.check_people, run.seed)
    recogniser.config = replace(recogniser.config, calibration=calibration)
    return recogniser


def draw_examples(
    count: int, chunk: int, generator: torch.Generator, device: torch.device, population: int
) -> Examples:
    """Aligned crops with some room around them: images, person (seed), factors."""
    scene, seeds = people_scenes(count, generator, device, people="mixed", population=population)
    drawn = render(scene, DRAWN_SIZES[chunk % len(DRAWN_SIZES)])
    one = somebody(drawn, generator)
    crops = roomy_crops(drawn.images, drawn.landmarks[one])
    return {
        "images": as_bytes(crops),
        "person": seeds.to(device)[one],
        "factors": drawn.identity[one],
    }


def roomy_crops(images: Tensor, landmarks: Tensor) -> Tensor:
    """ArcFace's alignment with ROOM more pixels on each side."""
    template = torch.tensor(TEMPLATE, device=images.device).expand(len(images), 5, 2) + ROOM
    return warp(images, inverted(similarity(landmarks, template)), TEMPLATE_SIZE + 2 * ROOM)


def misalign(crops: Tensor, amount: float = 1.0) -> Tensor:
    """Roomy crops -> crops [B, 3, 112, 112], shifted, turned and scaled a little."""

    def around(most: float, *shape: int) -> Tensor:
        return amount * most * (2 * torch.rand(len(crops), *shape, device=crops.device) - 1)

    angle, scale = around(TURN), 1 + around(SCALE)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    middle = (TEMPLATE_SIZE - 1) / 2
    shift = middle + ROOM + around(SHIFT, 2) - middle * turn.sum(-1)
    return warp(crops, torch.cat([turn, shift[..., None]], -1), TEMPLATE_SIZE)


@torch.no_grad()
def embed_people(
    recogniser: Recogniser, people: int, each: int, seed: int, style: str | None = None
) -> Tensor:
    """Unit embeddings [people, each, D] of held-out people, in different pictures each."""
    device = next(recogniser.parameters()).device
    generator = generator_for(seed, 10**6)
    parts = []
    for start in range(0, people, 64):
        count = min(64, people - start)
        first = (seed + 1) * 10**6 % (SPLIT_SIZE - 10**6)  # any seed of a run names people
        seeds = first + torch.arange(start, start + count)
        drawn: Portraits = pictures_of(seeds, each, generator, device)
        crops = misalign(roomy_crops(drawn.images, drawn.landmarks[:, 0]), 0.5)
        parts.append(F.normalize(recogniser(crops), dim=-1).view(count, each, -1))
    return torch.cat(parts)


def calibrate(recogniser: Recogniser, people: int, seed: int, each: int = 6) -> Calibration:
    """Cosines of held-out people, same against same and against others, and the logistic fit."""
    same, different = verification_pairs(embed_people(recogniser, people, each, seed))
    return fit_calibration(same.cpu(), different.cpu())


def verification_pairs(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs of one person's pictures, and of each picture with other people's."""
    people, each, _ = embeddings.shape
    inside = embeddings @ embeddings.transpose(1, 2)
    upper = torch.triu_indices(each, each, 1)
    same = inside[:, upper[0], upper[1]].flatten()
    others = [
        (embeddings * embeddings.roll(k, 0)).sum(-1).flatten()
        for k in range(1, min(people, each + 1))
    ]
    return same, torch.cat(others)


def measure_recogniser(recogniser: Recogniser, people: int, seed: int) -> dict[str, float]:
    """Verification on held-out people: means, area under the curve, hits at 0.1 % false alarms."""
    same, different = verification_pairs(embed_people(recogniser, people, 6, seed + 1))
    order = different.sort().values
    below = torch.searchsorted(order, same).double() / len(order)
    threshold = order[int(0.999 * (len(order) - 1))]
    return {
        "same_mean": float(same.mean()),
        "different_mean": float(different.mean()),
        "auc": float(below.mean()),
        "hits_at_0.1%_false": float((same > threshold).double().mean()),
    }
