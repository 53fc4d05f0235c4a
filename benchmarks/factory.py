"""LoRAs per hour: several people side by side in one batch, against a plain PEFT loop."""

from __future__ import annotations

import torch
from peft import LoraConfig

from difflora_core.lora_space import LoraSpace
from training.base.noise import NoiseSchedule
from training.base.painter import Painter
from training.config import Config
from training.loras.config import LorasConfig
from training.loras.teacher import photo_album, train_loras
from training.portraits import identities

from .measuring import Case, alternate, case, in_own_process

STEPS, GROUP, ROUNDS = 10, 8, 2
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def run() -> list[Case]:
    return [in_own_process(grouped)]


def grouped() -> Case:
    """Time per LoRA; both sides draw and encode the pictures too."""
    painter, settings = Painter.open(Config()), LorasConfig(steps=STEPS)
    space, people = LoraSpace.for_mini(), list(range(GROUP))
    sides = {
        "ours": lambda: train_loras(painter, space, settings, people),
        "peft_loop": lambda: [peft_lora(painter, settings, seed) for seed in people],
    }
    seconds = {name: value / GROUP for name, value in alternate(sides, ROUNDS).items()}
    per_hour = 3600 / (seconds["ours"] * LorasConfig().steps / STEPS)
    return case("factory/mini/grouped", seconds, steps=STEPS, group=GROUP, loras_per_hour=per_hour)


def peft_lora(painter: Painter, settings: LorasConfig, seed: int) -> None:
    """One LoRA as a PEFT user trains it: adapter on the U-Net, AdamW, the same batches in size."""
    person = identities(torch.tensor([seed]))
    album = photo_album(painter, person, settings.pictures, settings.draws)
    painter.unet.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS), "person"
    )
    trained = [p for n, p in painter.unet.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr)
    schedule = NoiseSchedule(painter.device)
    for _ in range(settings.steps):
        which = torch.randperm(settings.pictures)[: settings.batch]
        latents, context = album.latents[0, which], album.contexts[0, which]
        noise, t = torch.randn_like(latents), torch.randint(1000, (settings.batch,))
        noisy = schedule.add_noise(latents, noise, t)
        loss = schedule.loss(painter.unet(noisy, t, context).sample, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    painter.unet.delete_adapters("person")
