"""Training of one encoder within a number of steps or of minutes."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace

import torch
from torch import nn

from difflora_core.errors import BadConfig

from . import parallel
from .example_pool import Pool
from .json_file import read_object
from .loop import OutOfTime, Step, Trainer
from .run_config import OptimConfig, RunConfig
from .run_folder import RunFolder

logger = logging.getLogger(__name__)

_PLAN = "plan.json"
_WARM, _TIMED = 5, 20
#: share of the time for which steps are planned; the rest is reserve
_PLANNED = 0.85


def train(
    modules: dict[str, nn.Module],
    optim: OptimConfig,
    run: RunConfig,
    folder: RunFolder,
    step: Step,
    *,
    batch: int,
    minutes: float = 0.0,
    pool: Pool | None = None,
) -> Trainer:
    """Train to the last step or for `minutes`; returns the trainer with its weights.

    Errors: BadConfig for a time in minutes where several processes train together, Interrupted
    where `run.max_minutes` came first.
    """
    if minutes > 0 and parallel.count() > 1:
        raise BadConfig(
            f"minutes={minutes:g} plans by one process's clock, but {parallel.count()} train.",
            hint="Set minutes=0 and optim.steps, and run.max_minutes if time is short.",
        )
    own_time = 0 < minutes <= (run.max_minutes or minutes)
    if minutes > 0:
        planned = _planned_steps(modules, folder, step, minutes)
        optim = replace(optim, steps=min(optim.steps, planned))
    if own_time:
        run = replace(run, max_minutes=minutes)
    optim = replace(optim, warmup=min(optim.warmup, optim.steps // 10))
    trainer = Trainer(modules, optim, run, folder, items_per_step=batch, pool=pool)
    logger.info("%s: %d steps of %d", folder.name, optim.steps, batch)
    try:
        trainer.fit(step)
    except OutOfTime:
        if not own_time:  # unfinished weights are no result unless this much was asked for
            raise
        # its time is used up: the same command plans these steps again, not more
        _keep_plan(folder, _PLANNED * 60 * minutes / (trainer.step + 0.5))
    return trainer


def _planned_steps(
    modules: dict[str, nn.Module], folder: RunFolder, step: Step, minutes: float
) -> int:
    """Steps that fit the time; one is timed once per run folder, so that a resumed run agrees."""
    path = folder.path / _PLAN
    if not path.exists() or not folder.has_checkpoints():
        _keep_plan(folder, _time_step(modules, step))
    seconds = read_object(path, "seconds_per_step")["seconds_per_step"]
    return max(int(_PLANNED * 60 * minutes / seconds), 1)


def _keep_plan(folder: RunFolder, seconds: float) -> None:
    folder.write_text(_PLAN, json.dumps({"seconds_per_step": seconds}))


def _time_step(modules: dict[str, nn.Module], step: Step) -> float:
    """Seconds of a step's forward and backward pass."""
    device = next(p.device for m in modules.values() for p in m.parameters())
    start = time.monotonic()
    for i in range(_WARM + _TIMED):
        if i == _WARM:
            _finish(device)
            start = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = step(i)["loss"]
        loss.backward()
    _finish(device)
    return (time.monotonic() - start) / _TIMED


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
