"""A critic of patches: it sharpens a trained picture decoder (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

_WIDTHS = (32, 64, 128)
#: share of the generator's loss that asks for the critic's features of the target
_MATCHING = 4.0
#: the balance of gradients is kept within this factor, as in Esser et al. 2021
_LARGEST_BALANCE = 1e4


class Critic(nn.Module):
    """PatchGAN (Isola et al. 2017): one score for each patch of about 40 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        before = 3
        for width in _WIDTHS:
            self.layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            before = width
        self.score = nn.Conv2d(before, 1, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures [B, 3, H, W] in -1..1 -> scores [B, 1, H/8, W/8] and each layer's features."""
        features = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        return self.score(images), features


def critic_loss(critic: Critic, target: Tensor, painted: Tensor) -> Tensor:
    """Hinge loss of the critic, which learns to tell painted pictures from drawn ones."""
    real, _ = critic(target)
    fake, _ = critic(painted.detach())
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def painter_loss(critic: Critic, target: Tensor, painted: Tensor) -> Tensor:
    """What a decoder minimises to pass: bad scores, and features unlike the target's.

    No gradient reaches the critic. The features follow Wang et al. 2018 (pix2pixHD, eq. 4).
    """
    fixed = {name: p.detach() for name, p in critic.named_parameters()}
    scores, features = functional_call(critic, fixed, (painted,))
    with torch.no_grad():
        _, wanted = critic(target)
    unlike = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(features, wanted, strict=True)]
    return _MATCHING * torch.stack(unlike).mean() - scores.mean()


def balance(first: Tensor, second: Tensor, layer: Tensor) -> Tensor:
    """Factor that gives `second` the gradient of `first` at a layer (Esser et al. 2021, eq. 7)."""
    ours = torch.autograd.grad(first, layer, retain_graph=True)[0].norm()
    theirs = torch.autograd.grad(second, layer, retain_graph=True)[0].norm()
    return (ours / theirs.clamp(min=1e-8)).clamp(max=_LARGEST_BALANCE).detach()
