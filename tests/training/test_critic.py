"""The critic of the picture decoder: whose gradients go where, and what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difflora_core.errors import BadConfig
from difflora_core.weights_file import read_safetensors
from tests.training.tiny_world import write_world
from training.__main__ import open_run
from training.artifacts import artifacts_folder
from training.base.critic import Critic, balance, critic_loss, painter_loss
from training.base.stage import run as train_base
from training.config import load_config


def scene() -> tuple[Critic, Tensor, Tensor]:
    torch.manual_seed(0)
    target, painted = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    return Critic(), target, painted.requires_grad_()


def test_each_side_learns_from_its_own_loss() -> None:
    critic, target, painted = scene()
    critic_loss(critic, target, painted).backward()
    assert painted.grad is None
    weights = [p for p in critic.parameters() if p.ndim > 1]  # biases may cancel out
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weights)
    critic.zero_grad(set_to_none=True)
    painter_loss(critic, target, painted).backward()
    assert painted.grad is not None and painted.grad.abs().max() > 0
    assert all(p.grad is None for p in critic.parameters())


def test_the_critic_learns_to_tell_and_a_painter_to_pass() -> None:
    critic, target, painted = scene()
    before = critic_loss(critic, target, painted).item()
    teacher = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for _ in range(30):
        teacher.zero_grad()
        critic_loss(critic, target, painted).backward()
        teacher.step()
    assert critic_loss(critic, target, painted).item() < before / 2
    unlike = painter_loss(critic, target, painted)
    (slope,) = torch.autograd.grad(unlike, painted)
    better = painted - 0.05 * slope / slope.abs().max()
    assert painter_loss(critic, target, better) < unlike
    assert painter_loss(critic, target, target) < unlike


def test_balance_gives_both_losses_the_same_gradient() -> None:
    layer = torch.randn(4, 4, requires_grad=True)
    first, second = (layer * 3).square().sum(), layer.sum() * 0.01
    factor = balance(first, second, layer)
    (ours,) = torch.autograd.grad(first, layer, retain_graph=True)
    (theirs,) = torch.autograd.grad(factor * second, layer)
    assert torch.allclose(ours.norm(), theirs.norm(), rtol=1e-4)


def test_a_decoder_beside_a_new_encoder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "run"}"\ndevice = "cpu"\n')
    config = load_config(file, ["base.only=[vae]", "base.vae.part=decoder"])
    with pytest.raises(BadConfig, match=r"base\.vae\.part is decoder"):
        train_base(config, open_run(config, "train-base"))


def test_a_decoder_trained_alone_leaves_the_latents_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "run"}"\ndevice = "cpu"\n')
    config = load_config(
        file,
        [
            "base.only=[vae]", "base.vae.start=artifact", "base.vae.part=decoder",
            "base.vae.channels=[32,32,32,32]", "base.vae.groups=8",
            "base.vae.critic_weight=0.5", "base.vae.optim.steps=3", "base.vae.batch=4",
            "base.vae.chunk=8", "base.vae.pool=8", "base.vae.measured=4", "run.log_every=1",
        ],
    )  # fmt: skip
    write_world(config)
    path = artifacts_folder(config) / "vae.safetensors"
    before, header = read_safetensors(path)
    train_base(config, open_run(config, "train-base"))
    after, new_header = read_safetensors(path)
    old, new = (json.loads(one["config"])["scaling_factor"] for one in (header, new_header))
    assert old == new, "the scale of the latents"
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
