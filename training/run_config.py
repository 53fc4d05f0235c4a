"""Settings that every stage shares: where results go and how the training loop runs."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from difflora_core.errors import BadConfig

from .parallel import count, local_rank

MAX_SEED = 2**32 - 1
"""what all libraries take"""


@dataclass(frozen=True)
class RunConfig:
    """Where results go, and how often a stage logs and saves."""

    root: str = "runs/mini"
    """Folder of everything this configuration produces; one folder per stage plus artifacts/."""
    seed: int = 0
    """Seed of initial weights, data order and noise."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda or cuda:N."""
    max_minutes: float = 0.0
    """Stop a training loop with a checkpoint after this many minutes, train-identity-loras after
    the people in work; 0 = no limit."""
    log_every: int = 50
    """Steps between log lines; losses are read from the device only then."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Checkpoints kept per training loop."""

    def __post_init__(self) -> None:
        at_least(1, self, "log_every", "checkpoint_every")
        at_least(0, self, "max_minutes", "seed")
        at_most(MAX_SEED, self, "seed")
        if self.root.encode(errors="replace").decode() != self.root:
            raise ValueError("root is no valid text; choose another folder")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, found {self.device!r}")

    def deadline(self) -> float:
        """When `max_minutes` from now are over, in time.monotonic()'s seconds."""
        return time.monotonic() + 60 * self.max_minutes if self.max_minutes else math.inf

    def torch_device(self) -> torch.device:
        """The device to train on. Errors: BadConfig where the machine does not have it."""
        kind, _, number = self.device.partition(":")
        found = torch.cuda.device_count()
        if kind == "cuda" and int(number or 0) >= found:
            raise BadConfig(
                f"run.device is {self.device}, but torch finds {found} CUDA devices here.",
                hint="Set run.device=auto or cpu, or install a torch that knows the GPU.",
            )
        if self.device != "auto":
            return torch.device(self.device)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank()) if count() > 1 else torch.device("cuda")


def with_seed(run: RunConfig, offset: int) -> RunConfig:
    """The same run with a seed of its own."""
    return replace(run, seed=(run.seed + offset) % (MAX_SEED + 1))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon beside it: linear warm-up, cosine decay, clipping, averaged copy (EMA)."""

    steps: int = 1000
    """Optimiser steps."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.0
    """Peak learning rate of Muon for matrices and convolution kernels; 0 = AdamW for them too."""
    warmup: int = 100
    """Steps of linear warm-up."""
    final_lr: float = 0.01
    """Learning rate at the last step as a fraction of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay; tensors with fewer than two axes (biases, norms) have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moments."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    ema: float = 0.999
    """Decay of the averaged weights, warmed up as (1+t)/(10+t); 0 = no averaging."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the forward pass: auto is bf16 autocast on cuda and fp32 on cpu."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps")
        at_least(0, self, "lr", "muon_lr", "warmup", "final_lr", "weight_decay", "grad_clip")
        if not all(0 <= decay < 1 for decay in (*self.betas, self.ema)):
            raise ValueError(
                f"betas and ema must lie from 0 to below 1, found {self.betas} and {self.ema}"
            )


def at_most(highest: float, settings: Any, *names: str) -> None:
    """For `__post_init__`: none of these settings is above `highest`. Errors: ValueError."""
    for name in names:
        value = getattr(settings, name)
        if not value <= highest:
            raise ValueError(f"{name} must be {highest} or less, found {value}")


def at_least(lowest: int, settings: Any, *names: str) -> None:
    """For `__post_init__`: these settings, or their entries, are finite and not below `lowest`.

    Errors: ValueError.
    """
    for name in names:
        value = getattr(settings, name)
        entries = value if isinstance(value, tuple) else (value,)
        if not all(lowest <= entry < math.inf for entry in entries):
            raise ValueError(f"{name} must be {lowest} or more, found {value}")
