"""Guided and unguided runs of the stock graph, and what is read out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comfy_host import Host, PromptFailed
from prompts import guided, node, unguided
from torch import Tensor


def latents(values: dict[str, Any]) -> Tensor:
    return values["latents"]["samples"]


def the_run(values: dict[str, Any]) -> Any:
    (run,) = values["log"].runs
    return run


def steps(values: dict[str, Any]) -> list[Any]:
    return the_run(values).steps


def faces(values: dict[str, Any]) -> list[int]:
    return [step.faces for step in steps(values)]


def notes(values: dict[str, Any]) -> set[str]:
    return {step.note for step in steps(values)} | {run.note for run in values["log"].runs}


def mask_of(
    box: Sequence[float], width: int = 64, height: int = 64, batch: int = 1
) -> dict[str, Any]:
    shape = {"width": width, "height": height, "batch": batch}
    return {"mask": node("TestRectangle", **shape, box=str(list(box)))}


def assert_guided(host: Host, more: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Run with and without; guidance must act at some step, and the picture be a picture."""
    base = host.run(unguided(**settings))
    values = host.run(guided(more, **settings))
    assert values["picture"].isfinite().all() and latents(values).isfinite().all()
    assert not torch.equal(latents(values), latents(base))
    assert max(faces(values)) > 0 and not any("not finite" in note for note in notes(values))
    return values


def refused(host: Host, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PromptFailed, match=sentence):
        host.run(guided(more))
