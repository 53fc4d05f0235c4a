"""What guidance did while a sampler ran, kept for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .guidance import GuideStep


@dataclass
class GuidedRun:
    """One run of a sampler; it fills while the sampler runs."""

    schedule: tuple[float, ...]
    """Noise levels of its steps, as ratios of noise to signal; the last is where it ends."""
    decoder: str
    """What turned latents into pictures."""
    note: str = ""
    """What the user should know of the run as a whole."""
    steps: list[GuideStep] = field(default_factory=list)
    """Guided steps, in order; a sampler of higher order guides several times in a step."""
    strips: list[NDArray[np.uint8]] = field(default_factory=list)
    """Aligned faces [N, size, size, 3] of those steps that had any, before each was taken."""
    guiding: float = 0.0
    """Seconds spent on guidance."""
    seconds: float = 0.0
    """Seconds of the whole run."""

    @property
    def with_faces(self) -> list[GuideStep]:
        """The steps that `strips` belongs to."""
        return [step for step in self.steps if step.faces]


@dataclass
class GuidanceLog:
    """The runs of the last job in which a guided model was sampled from."""

    job: str = ""
    runs: list[GuidedRun] = field(default_factory=list)

    def begin(self, job: str, run: GuidedRun) -> GuidedRun:
        """Add a run; the first one of another job forgets those before."""
        if job != self.job:
            self.job, self.runs = job, []
        self.runs.append(run)
        return run


def describe_runs(runs: Sequence[GuidedRun]) -> str:
    """The report as text: what was guided, how it went and what it took."""
    if not runs:
        return "No sampler has run with the guided model yet."
    parts = [_describe(run) for run in runs]
    if len(parts) == 1:
        return parts[0]
    return "\n\n".join(f"Run {number}\n{part}" for number, part in enumerate(parts, start=1))


def _describe(run: GuidedRun) -> str:
    total = len(run.schedule) - 1
    lines = [run.note] if run.note else []
    if not run.steps:
        return "\n".join([*lines, f"None of {total} steps was guided."])
    first, last = run.steps[0].sigma, run.steps[-1].sigma
    lines.append(
        f"{len(run.steps)} guided steps, from sigma {first:.2f} to {last:.2f}; the run has {total} "
        f"steps. Decoder: {run.decoder}."
    )
    lines.append(f"Guidance took {run.guiding:.1f} s of {run.seconds:.1f} s.")
    lines += _progress(run)
    lines.append("sigma  similarity  loss   faces")
    return "\n".join([*lines, *map(_row, run.steps)])


def _progress(run: GuidedRun) -> list[str]:
    seen = [step.similarity for step in run.with_faces]
    if not seen:
        return ["No face was guided."]
    return [
        f"Similarity to the reference: {seen[0]:.2f} before the first of them, {seen[-1]:.2f} "
        "before the last (cosine, by the network that guides, which flatters itself)."
    ]


def _row(step: GuideStep) -> str:
    known = not math.isnan(step.similarity)
    figures = f"{step.similarity:10.3f} {step.loss:6.3f}" if known else f"{'-':>10} {'-':>6}"
    return f"{step.sigma:5.2f} {figures} {step.faces:6d}  {step.note}".rstrip()
