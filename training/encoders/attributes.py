"""Training of the checker of prompts, and of the self-supervised features."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflora_core.face_crop import warp

from ..budget import train
from ..drawing import generator_for, people_scenes, render_in_parts
from ..example_pool import Examples, as_bytes
from ..portraits import ATTRIBUTES, sample_scenes
from ..run_config import RunConfig
from ..run_folder import RunFolder
from .attributes_net import SIDE, PortraitNet, PortraitNetConfig, checker_outputs
from .config import EncodersConfig
from .damage import damage
from .drawn_pool import drawn_pool

#: weight of the regression of the identity factors beside the attributes' cross-entropies
IDENTITY_WEIGHT = 20.0


def train_attribute_heads(config: EncodersConfig, run: RunConfig, folder: RunFolder) -> PortraitNet:
    """Train; returns the averaged network on the CPU, in evaluation mode."""
    settings, device = config.attribute_heads, run.torch_device()
    torch.manual_seed(run.seed)
    net = PortraitNet(PortraitNetConfig(settings.widths, checker_outputs())).to(device)
    pool = drawn_pool(draw_examples, config, run)

    def step(i: int) -> dict[str, Tensor]:
        batch = pool.draw(settings.batch)
        outputs = net(damage(move(batch["images"], 3.0)))
        losses = {n: F.cross_entropy(outputs[n].float(), batch[n]) for n in ATTRIBUTES}
        identity = F.mse_loss(outputs["identity"].float(), batch["identity"])
        total = torch.stack(list(losses.values())).sum() + IDENTITY_WEIGHT * identity
        return {"loss": total, "identity": identity, **losses}

    modules: dict[str, nn.Module] = {"net": net}
    trainer = train(
        modules, settings.optim, run, folder, step,
        batch=settings.batch, minutes=config.minutes, pool=pool,
    )  # fmt: skip
    net.load_state_dict(trainer.averaged("net"))
    figures = measure_checker(net.eval(), 2 * config.check_people, run.seed)
    net.config = replace(net.config, figures=figures)
    return net.cpu()


def draw_examples(count: int, generator: torch.Generator, device: torch.device) -> Examples:
    """Portraits of one person: images, an index per attribute, identity [N, 20].

    A third has a held-out combination of attributes: the checker must know those too.
    """
    third = count // 3
    parts = []
    for n, split in ((count - third, "train"), (third, "test")):
        scene = sample_scenes(n, generator, split=split, device=device)
        drawn = render_in_parts(scene)
        parts.append({"images": as_bytes(drawn.images), "identity": drawn.identity[:, 0]}
                     | drawn.attributes)  # fmt: skip
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def move(images: Tensor, most: float) -> Tensor:
    """Shift by up to `most` pixels and scale by up to 4 %, black outside."""
    count, device = len(images), images.device
    scale = 1 + 0.04 * (2 * torch.rand(count, 1, device=device) - 1)
    middle = (images.shape[-1] - 1) / 2
    shift = most * (2 * torch.rand(count, 2, device=device) - 1) + middle * (1 - scale)
    turn = torch.diag_embed(scale.expand(-1, 2))
    return warp(images, torch.cat([turn, shift[..., None]], -1), images.shape[-1])


@torch.no_grad()
def measure_checker(net: PortraitNet, count: int, seed: int) -> dict[str, float]:
    """Accuracy per attribute and R^2 of the identity on held-out people and combinations."""
    device = next(net.parameters()).device
    generator = generator_for(seed, 10**6)
    who = people_scenes(count, generator, device, split="test")[0].identity
    drawn = render_in_parts(
        sample_scenes(count, generator, identity=who, split="test", device=device)
    )
    outputs = [net(part) for part in drawn.images.split(100)]
    result = {}
    for name in ATTRIBUTES:
        found = torch.cat([o[name] for o in outputs]).argmax(-1)
        result[name] = float((found == drawn.attributes[name]).double().mean())
    error = torch.cat([o["identity"] for o in outputs]) - who[:, 0]
    result["identity_r2"] = float(1 - error.pow(2).mean() / who.var(dim=0).mean())
    return result


def train_self_supervised(config: EncodersConfig, run: RunConfig, folder: RunFolder) -> PortraitNet:
    """Contrast two views of one picture (SimCLR, Chen et al., 2020); no label is ever seen."""
    settings, device = config.self_supervised, run.torch_device()
    torch.manual_seed(run.seed)
    net = PortraitNet(PortraitNetConfig(settings.widths)).to(device)
    width = 3 * settings.widths[-1]
    projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 96)).to(device)
    pool = drawn_pool(draw_examples, config, run)

    def step(i: int) -> dict[str, Tensor]:
        images = pool.draw(settings.batch)["images"]
        views = torch.cat([damage(zoom_in(images)), damage(zoom_in(images))])
        codes = F.normalize(projector(net.features(views)).float(), dim=-1)
        return {"loss": two_view_loss(codes, settings.temperature)}

    modules: dict[str, nn.Module] = {"net": net, "projector": projector}
    trainer = train(
        modules, settings.optim, run, folder, step,
        batch=settings.batch, minutes=config.minutes, pool=pool,
    )  # fmt: skip
    net.load_state_dict(trainer.averaged("net"))
    return net.cpu().eval()


def zoom_in(images: Tensor) -> Tensor:
    """A random square of 60 to 100 % of the side, at full size."""
    count, device = len(images), images.device
    scale = 0.6 + 0.4 * torch.rand(count, 1, device=device)
    shift = (images.shape[-1] - 1) * (1 - scale) * torch.rand(count, 2, device=device)
    turn = torch.diag_embed(scale.expand(-1, 2))
    return warp(images, torch.cat([turn, shift[..., None]], -1), SIDE)


def two_view_loss(codes: Tensor, temperature: float) -> Tensor:
    """NT-Xent: codes [2 B, D] of length 1, the views of picture i at i and B + i."""
    count = len(codes) // 2
    with torch.autocast(codes.device.type, enabled=False):
        logits = codes @ codes.T / temperature
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * count, device=codes.device).roll(count)
    return F.cross_entropy(logits, partner)
