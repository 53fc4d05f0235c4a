"""The optimisers of a training loop: AdamW, and Muon for the matrices where it is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .run_config import OptimConfig

#: coefficients and iterations of the quintic iteration of Jordan et al. 2024
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
#: matrices with fewer rows or columns, such as the one that paints three colours, stay with AdamW
_SMALLEST = 8


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are made equal (Jordan et al. 2024, "Muon").

    Convolution kernels count as matrices [out, in * kh * kw]. Equal shapes are treated together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group)

    def _update(self, parameters: list[Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        directions = []
        for p in parameters:
            assert p.grad is not None
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - momentum)
            directions.append(torch.lerp(p.grad, mean, momentum).flatten(1))
        moves = orthogonalised(torch.stack(directions))
        step = group["lr"] * max(1.0, moves.shape[1] / moves.shape[2]) ** 0.5
        for p, move in zip(parameters, moves, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(move.view(shape), alpha=step)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[N, out, in] with singular values moved near 1 (0.7 to 1.2), directions unchanged."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    # x becomes P x with P a polynomial of its Gram matrix, five times: the product of the P is
    # collected in the small space of rows, and the long matrix is multiplied once
    gram = x @ x.mT
    one = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    product = one.expand_as(gram)
    for _ in range(_ITERATIONS):
        p = a * one + b * gram + c * gram @ gram
        product, gram = p @ product, p @ gram @ p
    x = product @ x
    return x.mT if tall else x


def build_optimizers(
    modules: Iterable[nn.Module], optim: OptimConfig
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon beside it where `muon_lr` is set; every group knows its `peak_lr`."""
    matrices, plain, bare = _sorted(modules, with_matrices=optim.muon_lr > 0)
    groups: list[dict[str, Any]] = [
        {"params": plain, "weight_decay": optim.weight_decay},
        {"params": bare, "weight_decay": 0.0},
    ]
    fused = any(p.is_cuda for p in plain + bare + matrices)
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=optim.betas,
        fused=fused,
        foreach=not fused,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimizers.append(Muon(matrices, optim.muon_lr, optim.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Moments and counts of a checkpoint; rates and decay stay as this run's settings say."""
    names = ("peak_lr", "weight_decay", "betas")
    own = [{n: group[n] for n in names if n in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _sorted(
    modules: Iterable[nn.Module], with_matrices: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon, other tensors with weight decay, tensors without."""
    matrices, plain, bare = [], [], []
    for module in (part for whole in modules for part in whole.modules()):
        for p in module.parameters(recurse=False):
            if not p.requires_grad:
                continue
            wide = p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= _SMALLEST
            if with_matrices and wide and not isinstance(module, nn.Embedding):
                matrices.append(p)
            else:
                (plain if p.ndim >= 2 else bare).append(p)
    return matrices, plain, bare
