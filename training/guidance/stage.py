"""Stage evaluate-guidance: likeness against strength and window, and what it costs.

Likeness is measured by the metric recogniser, which had no part in guiding, on pictures of the
person that guidance has not seen; `gap` is how much more the guiding network believes to have
gained, both in units of what two real pictures of one person have in common.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig
from training.config import Config
from training.evaluation.config import EvalConfig
from training.evaluation.figures_file import check_place, write_figures
from training.evaluation.measures import Yardstick, measure
from training.evaluation.metrics import reference_similarity
from training.evaluation.rows import Bench
from training.evaluation.sheet import save_sheet
from training.evaluation.stage import open_bench, sheet_prompt
from training.evaluation.summary import Figure, summarise
from training.evaluation.table import Rows, markdown, results
from training.portraits import FACTORS
from training.run_folder import RunFolder, device_name

from .factors import FactorReader
from .painting import Painted, Studio, paint, rows

logger = logging.getLogger(__name__)

COLUMNS = (
    "face_sim", "gain", "guide_sim", "guide_gain", "gap", "factor_sim", "factor_gain",
    "prompt_accuracy", "accuracy_change", "clip_t", "dino", "fid", "diversity", "seconds",
)  # fmt: skip
"""Measures in the order of the table."""


@dataclass(frozen=True)
class Scales:
    """What two real pictures of one person have in common, in the eyes of both recognisers."""

    metric: float
    guide: float


@dataclass(frozen=True)
class Gauge:
    """Everything that measures rows."""

    yardstick: Yardstick
    factors: FactorReader
    guide_references: Tensor
    """[P, R, D] of the guiding network."""
    scales: Scales
    real_factors: float
    """`factor_sim` of drawn pictures of the people themselves, the yardstick of the others."""


def run(config: Config, folder: RunFolder) -> None:
    """Paint and measure all rows; figures, table and sheet are written after every row."""
    settings = config.guidance
    check_references(config.eval)
    check_place(config)
    config = replace(
        config,
        eval=replace(
            config.eval, people=settings.people, prompts=settings.prompts, seed=settings.seed
        ),
    )
    plan = list(rows(settings))
    bench = open_bench(config)
    studio = Studio.open(config, bench)
    gauge = open_gauge(studio)
    so_far = Outcome({}, {}, {}, {})
    for row in plan:
        begin = time.monotonic()
        painted = paint(studio, row)
        add_row(so_far, row.name, painted, gauge, studio)
        figures = so_far.rows[row.name]
        shown = COLUMNS[: COLUMNS.index("clip_t")]
        words = [f"{name} {figures[name]['mean']:.3f}" for name in shown]
        logger.info("%s: %s (%.0f s)", row.name, ", ".join(words), time.monotonic() - begin)
        write(folder, gauge, studio.bench, so_far)
    logger.info("\n%s", markdown(so_far.rows, COLUMNS))


def check_references(settings: EvalConfig) -> None:
    """Errors: BadConfig where no two pictures of a person tell what they have in common."""
    if settings.references < 2:
        raise BadConfig(
            f"eval.references is {settings.references}, but evaluate-guidance compares every "
            "person's references with each other; it must be at least 2."
        )


@dataclass(frozen=True)
class Outcome:
    """What is known so far, by row."""

    rows: Rows
    values: dict[str, dict[str, Tensor]]
    """Measures of every picture, [P, Q] each."""
    samples: dict[str, Tensor]
    """One picture per person of the sheet."""
    curves: dict[str, list[dict[str, float]]]
    """Likeness to the reference step by step, as guidance sees it."""


def open_gauge(studio: Studio) -> Gauge:
    """Look at the references with both recognisers, and fit what measures."""
    bench, settings = studio.bench, studio.bench.config.guidance
    yardstick = Yardstick.make(bench.judges, bench.trial, settings.seed)
    people = len(bench.seeds)
    pictures, points = bench.trial.references.flatten(0, 1), bench.trial.landmarks.flatten(0, 1)
    own = _embed(studio, pictures, points).unflatten(0, (people, -1))
    metric = yardstick.references.face.unflatten(0, (people, -1))
    factors = FactorReader.fit(bench.judges, settings.factor_pictures, settings.seed)
    real = factors.likeness(bench.trial.references, bench.trial.identity).mean()
    return Gauge(yardstick, factors, own, Scales(common(metric), common(own)), float(real))


def common(embeddings: Tensor) -> float:
    """Mean cosine of two different pictures of one person: [P, R, D]."""
    cosines = torch.einsum("prd,psd->prs", embeddings, embeddings)
    different = ~torch.eye(cosines.shape[1], dtype=torch.bool)
    return float(cosines[:, different].mean())


def add_row(so_far: Outcome, name: str, painted: Painted, gauge: Gauge, studio: Studio) -> None:
    """Measure a row, and compare it with the row that it builds on."""
    seed = studio.bench.config.guidance.seed
    measured = measure(gauge.yardstick, painted.pictures)
    values = measured.values | {
        "guide_sim": guide_similarity(studio, gauge, painted.pictures),
        "factor_sim": gauge.factors.likeness(painted.pictures, studio.bench.trial.identity),
    }
    before = so_far.values.get("predicted" if name.startswith("predicted+") else "base", values)
    values |= comparison(values, before, gauge.scales)
    so_far.values[name] = values
    figures: dict[str, Figure] = {k: summarise(v, seed) for k, v in values.items()}
    figures["seconds"] = summarise(torch.full((len(painted.pictures),), painted.seconds), seed)
    so_far.rows[name] = measured.figures | figures
    so_far.curves[name] = curve(painted)
    shown, count = sheet_prompt(studio.bench.trial), studio.bench.config.guidance.sheet_people
    so_far.samples[name] = painted.pictures[:count, shown]


def comparison(
    values: dict[str, Tensor], before: dict[str, Tensor], scales: Scales
) -> dict[str, Tensor]:
    """What changed per picture, [P, Q] each: gains, their gap in common units, accuracy."""
    gain = values["face_sim"] - before["face_sim"]
    guide_gain = values["guide_sim"] - before["guide_sim"]
    return {
        "gain": gain,
        "guide_gain": guide_gain,
        "gap": guide_gain / scales.guide - gain / scales.metric,
        "factor_gain": values["factor_sim"] - before["factor_sim"],
        "accuracy_change": values["prompt_accuracy"] - before["prompt_accuracy"],
    }


def guide_similarity(studio: Studio, gauge: Gauge, pictures: Tensor) -> Tensor:
    """Mean cosine to the person's references in the eyes of the guiding network: [P, Q]."""
    shape, flat = pictures.shape[:2], pictures.flatten(0, 1)
    landmarks, found = studio.bench.judges.find_faces(flat)
    own = _embed(studio, flat, landmarks).nan_to_num().unflatten(0, shape)
    return reference_similarity(own, gauge.guide_references, found.unflatten(0, shape))


def curve(painted: Painted) -> list[dict[str, float]]:
    """Mean likeness of the faces at each noise level, over the batches of a row."""
    levels: dict[float, list[tuple[float, int]]] = {}
    for step in painted.steps:
        if step.faces:
            levels.setdefault(step.sigma, []).append((step.similarity, step.faces))
    return [
        {"sigma": sigma, "similarity": sum(s * n for s, n in seen) / sum(n for _, n in seen)}
        for sigma, seen in levels.items()
    ]


def write(folder: RunFolder, gauge: Gauge, bench: Bench, so_far: Outcome) -> None:
    """Figures, curves, table and sheet into the run folder."""
    people = bench.config.guidance.sheet_people
    outcome = results(protocol(bench, gauge), so_far.rows)
    outcome["curves"] = so_far.curves
    write_figures(bench.config, folder, outcome)
    folder.write_text("table.md", markdown(so_far.rows, COLUMNS))
    if people:
        photos = bench.trial.photos[:people].cpu()
        save_sheet(folder.path / "sheet.png", {"photo": photos} | so_far.samples)


_OF_PREDICTED = ("strength", "inputs", "steps", "candidates")
"""Settings of the rows of predicted LoRAs"""


def protocol(bench: Bench, gauge: Gauge) -> dict[str, Any]:
    """Everything needed to repeat the evaluation and to read its figures."""
    config = bench.config
    shared = ("references", "paint_steps", "guidance", "fid_pictures", "batch")
    painting = {name: getattr(config.eval, name) for name in shared}
    return to_dict(config.guidance) | painting | {
        "predicted": {n: getattr(config.eval, n) for n in _OF_PREDICTED}
        | {"predictor": Path(config.eval.predictor).name or "predictor.safetensors"},
        "prompts_used": list(bench.trial.prompts),
        "split": "test identities, held-out combinations of attributes",
        "reference": "one photo per person; measured against other pictures of the person",
        "cosines": "raw",
        "common": asdict(gauge.scales),
        "factor_r2": dict(zip(FACTORS, gauge.factors.trust.tolist(), strict=True)),
        "factor_sim_of_real": gauge.real_factors,
        "ci95": "percentile bootstrap over people",
        "weights": dict(bench.weights),
        "device": device_name(config.run.torch_device()),
        "torch": torch.__version__,
    }  # fmt: skip


@torch.no_grad()
def _embed(studio: Studio, pictures: Tensor, landmarks: Tensor) -> Tensor:
    device, parts = studio.bench.painter.device, []
    for some, points in zip(pictures.split(256), landmarks.split(256), strict=True):
        parts.append(studio.network.embed(some.to(device), points.to(device)).cpu())
    return torch.cat(parts)
