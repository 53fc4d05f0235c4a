"""Settings of the LoRA data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from difflora_core.lora_space import LoraSpace

from ..portraits.factors import SPLIT_SIZE
from ..run_config import MAX_SEED, at_least, at_most


@dataclass(frozen=True)
class LorasConfig:
    """Stages train-identity-loras and collect-loras."""

    people: int = 480
    """How many people of the training range get a LoRA."""
    first: int = 0
    """Identity seed of the first one; the others follow."""
    rank: int = 4
    """Rank of every layer; alpha = rank."""
    gauge: Literal["frozen_down", "shared_init", "free", "svd"] = "frozen_down"
    """How the factors are made unique; see difflora_core/lora_space.py."""
    steps: int = 150
    """Optimiser steps per person."""
    pictures: int = 12
    """Training pictures per person: photos with captions, all different."""
    batch: int = 2
    """Pictures of each person per step."""
    draws: int = 0
    """Seed of the scenes, timesteps and noise, which are the same for everybody."""
    lr: float = 2e-2
    """Adam's peak learning rate: ten steps of warm-up, then linear decay to zero."""
    prior: float = 0.0
    """Weight of prior preservation: other people's pictures, captioned "a person", drawn as the
    base model knows them (DreamBooth, Ruiz et al. 2023, eq. 2); 0 = none."""
    group: int = 0
    """People trained side by side in one batch; 0 = 64 on cuda, 1 on cpu. Each person's LoRA is
    the same whatever the group, since nothing is shared between people but the frozen model."""
    shard: int = 512
    """LoRAs per file of the collected set."""

    def __post_init__(self) -> None:
        at_least(0, self, "first", "draws", "lr", "prior", "group")
        at_least(1, self, "people", "steps", "pictures", "batch", "shard")
        at_most(SPLIT_SIZE - self.people, self, "first")
        at_most(MAX_SEED, self, "draws")
        if self.batch > self.pictures:
            raise ValueError(
                f"batch must be at most pictures ({self.pictures}), found {self.batch}"
            )
        LoraSpace.for_mini(self.rank, self.gauge)  # it knows which ranks there are
