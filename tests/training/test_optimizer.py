from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.loop import Trainer
from training.optimizer import Muon, build_optimizers, orthogonalised
from training.run_config import OptimConfig, RunConfig
from training.run_folder import RunFolder


@pytest.mark.parametrize("shape", [(2, 12, 40), (1, 40, 12), (3, 16, 16)])
def test_orthogonalised_keeps_directions_and_evens_out_sizes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.linspace(1.0, 0.05, u.shape[-1])
    made = u.mT @ orthogonalised(u * sizes @ vt) @ vt.mT
    assert made.diagonal(dim1=1, dim2=2).sub(1).abs().max() < 0.35
    assert (made - torch.diag_embed(made.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    words, paint = nn.Embedding(30, 16), nn.Conv2d(16, 3, 3)
    inner = nn.Sequential(nn.Conv2d(8, 16, 3), nn.LayerNorm(16), nn.Linear(16, 16))
    adamw, muon = build_optimizers([words, paint, inner], OptimConfig(muon_lr=0.02))
    by_muon = [p for group in muon.param_groups for p in group["params"]]
    assert isinstance(muon, Muon)
    assert {id(p) for p in by_muon} == {id(inner[0].weight), id(inner[2].weight)}
    assert sum(len(group["params"]) for group in adamw.param_groups) == 7
    assert len(build_optimizers([inner], OptimConfig())) == 1


def run(folder: Path, steps: tuple[int, ...]) -> Tensor:
    """Weights after training a small network, in one go or with restarts in between."""
    for last in steps:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        optim = OptimConfig(steps=40, lr=0.01, muon_lr=0.02, warmup=2, ema=0.0)
        config = RunConfig(device="cpu", checkpoint_every=last, log_every=40)
        trainer = Trainer({"model": model}, optim, config, RunFolder.create(folder, "job"))

        def step(i: int, model: nn.Module = model, trainer: Trainer = trainer) -> dict[str, Tensor]:
            x = torch.randn(64, 8, generator=trainer.generator)
            return {"loss": (model(x) - x.flip(1)).square().mean()}

        if last == 40:
            trainer.fit(step)
            return model[0].weight.detach()
        for _ in range(last):
            trainer._advance(step)
        trainer.save()
    raise AssertionError("the last part must end at step 40")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    assert torch.equal(run(tmp_path / "whole", (40,)), run(tmp_path / "parts", (13, 40)))


def test_a_resumed_run_trains_by_its_own_settings(tmp_path: Path) -> None:
    folder, config = RunFolder.create(tmp_path, "job"), RunConfig(device="cpu")
    before = OptimConfig(steps=2, lr=0.1, muon_lr=0.2, weight_decay=0.1, betas=(0.9, 0.99))
    after = OptimConfig(steps=4, lr=0.01, muon_lr=0.02, weight_decay=0.3, betas=(0.8, 0.95))
    for optim in (before, after):
        model = nn.Linear(8, 8)
        trainer = Trainer({"model": model}, optim, config, folder)
        trainer.fit(lambda i, model=model: {"loss": model(torch.ones(1, 8)).square().mean()})
    adamw, muon = (optimizer.param_groups[0] for optimizer in trainer.optimizers)
    assert (adamw["peak_lr"], adamw["betas"]) == (0.01, (0.8, 0.95))
    assert (muon["peak_lr"], muon["weight_decay"]) == (0.02, 0.3)
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 4, "its moments go on"
