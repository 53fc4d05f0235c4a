"""The same guidance through the denoiser: dearer by far, and there to compare with.

DPS (Chung et al., 2023) and FreeDoM (Yu et al., 2023) take the gradient with respect to x_t, so
the whole denoiser is differentiated and its activations are kept: about five times the time of a
step and gigabytes of memory for models of Stable Diffusion's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .guidance import Guide
from .steps import scaled_step


def guide_through(
    guide: Guide,
    denoise: Callable[[Tensor], Tensor],
    noisy: Tensor,
    x0: Tensor,
    direction: Tensor | None,
    cfg: float,
    sigma: float,
) -> Tensor:
    """The estimate after one step down the gradient with respect to x_t; see `Guide.guide`.

    The step is as long as without the denoiser and stays inside the mask, so that the two modes
    differ in its direction only. Inner iterations and smoothing do not apply.

    Args:
        denoise: x_t [B, C, h, w] to the estimate of x_0, differentiable, frozen.
        noisy: x_t as `denoise` takes it.
    """
    if not guide.acts(sigma):
        return x0
    with torch.inference_mode(False), torch.enable_grad():
        kept = x0.detach().clone()
        estimate = kept.float()
        plans = guide.plans(estimate, direction, cfg, sigma)
        leaf = noisy.detach().clone().requires_grad_(True)
        guided, looks = estimate, []
        if plans:
            turn, seen = guide.turns(1)[0], denoise(leaf).float()
            looks = [guide.look(plan.windows.cut(seen), plan, turn) for plan in plans]
            total = torch.cat([look.loss for look in looks]).sum()
            gradient = torch.autograd.grad(total, leaf)[0].float()
            for i, plan in enumerate(plans):
                step, note = scaled_step(plan.windows.cut(gradient), plan)
                guided = plan.windows.add_back(guided, step)
                looks[i] = replace(looks[i], note=note)
        guide.note(sigma, plans, looks)
        return torch.where(guided != estimate, guided.to(kept.dtype), kept)
