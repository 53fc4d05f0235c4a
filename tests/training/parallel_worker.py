"""One of several processes of test_parallel.py: trains a line and writes what it ended with.

Arguments: folder, and the step at which the last process gets a SIGTERM (-1: none).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from training import parallel
from training.loop import Interrupted, Trainer
from training.run_config import OptimConfig, RunConfig
from training.run_folder import RunFolder

OPTIM = OptimConfig(steps=6, lr=0.05, warmup=2, ema=0.9, grad_clip=0.5)
RUN = RunConfig(device="cpu", log_every=2, checkpoint_every=4)
SAMPLES = 8


def train(folder: Path, stop_at: int = -1) -> Trainer:
    """Every process has weights of its own at first and takes its share of the eight samples."""
    torch.manual_seed(parallel.rank())
    model = nn.Linear(3, 1)
    trainer = Trainer({"model": model}, OPTIM, RUN, RunFolder.create(folder, "line"))

    def step(i: int) -> dict[str, Tensor]:
        if i == stop_at and parallel.rank() == parallel.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(i))
        x = x[parallel.rank() :: parallel.count()]
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    trainer.fit(step)
    return trainer


def main(folder: Path, stop_at: int) -> None:
    try:
        result: dict[str, Tensor] = train(folder, stop_at).averaged("model")
    except Interrupted as stop:
        result = {str(stop): torch.zeros(0)}
    result["own samples"] = torch.rand(1)
    parts = [torch.tensor([i, parallel.rank()]) for i in range(5)[parallel.share()]]
    result["parts"] = torch.stack(parallel.exchange(parts, 5))
    torch.save(result, folder / f"{parallel.rank()}.pt")
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
