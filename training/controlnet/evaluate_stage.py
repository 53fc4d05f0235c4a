"""Stage evaluate-controlnet: the seed paper's table on the mini world, and what it lacked.

Rows: `ceiling` (true pictures through the autoencoder), `base`, and every variant of
`controlnet.variants` with all its seeds. A ControlNet without a hint has no reference person;
repaint.py says what its faces are compared with instead. Grids are lists of variants, as
`controlnet.variants=["baseline","last=100","last=200","last=400"]`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig

from ..artifacts import MissingArtifact
from ..config import Config
from ..evaluation.figures_file import check_place, write_figures
from ..evaluation.judges import Judges
from ..evaluation.measures import pooled
from ..evaluation.metrics import frechet_distance
from ..evaluation.sheet import save_sheet
from ..evaluation.summary import summarise_statistic
from ..guidance.factors import FactorReader
from ..run_folder import RunFolder, device_name
from .base_model import BaseModel, open_base
from .checking import paint_settings
from .control import Control
from .export import open_control, trained_objective
from .intervals import SeededFigure, gains, row_figure
from .measures import Ruler, Values
from .repaint import paint
from .stage import run_name
from .tables import markdown
from .trial import ControlTrial, ceiling, draw_trial

logger = logging.getLogger(__name__)

BASELINE = "baseline"
CHUNK = 16
FID_RESAMPLES = 40
Rows = dict[str, dict[str, SeededFigure]]


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    config: Config
    base: BaseModel
    trial: ControlTrial
    ruler: Ruler
    real: Tensor
    """Pooled attribute features of real portraits [M, W]."""

    @classmethod
    def open(cls, config: Config) -> Bench:
        """Models, judges and held-out scenes. Errors: MissingArtifact."""
        base, judges = open_base(config), Judges.open(config)
        settings = config.controlnet.evaluation
        trial = draw_trial(settings, base)
        factors = FactorReader.fit(judges, settings.factor_pictures, settings.seed)
        real = pooled(judges.look_past_faces(trial.real).attributes)
        return cls(config, base, trial, Ruler.make(judges, trial, factors), real)


@dataclass(frozen=True)
class Painted:
    """One training's pictures [N, 3, H, W] on the CPU."""

    repainted: Tensor
    fresh: Tensor


def run(config: Config, folder: RunFolder) -> None:
    """Write results.json, table.md and sheet.png. A missing training is named and left out."""
    check(config)
    check_place(config)
    bench = Bench.open(config)
    lines = {"true": bench.trial.drawn.images.cpu()}
    true = ceiling(bench.base, bench.trial).cpu()
    rows: Rows = {"ceiling": _figures(bench, [bench.ruler.repainted(true)])}
    skipped: dict[str, str] = {}
    for name in ("base", *config.controlnet.variants):
        begin = time.monotonic()
        try:
            painted = [paint_all(bench, control) for control in _controls(config, name)]
        except MissingArtifact as error:
            logger.warning("row %s is left out: %s", name, error)
            skipped[name] = error.message
            continue
        rows[name] = measured(bench, painted)
        lines[name] = painted[0].repainted
        write(config, folder, rows, skipped)
        logger.info("%s: %.0f s", name, time.monotonic() - begin)
    write(config, folder, rows, skipped)
    if config.controlnet.evaluation.sheet:
        shown = {k: v[: config.controlnet.evaluation.sheet] for k, v in lines.items()}
        save_sheet(folder.path / "sheet.png", shown)
    logger.info("\n%s", markdown(rows, gains(rows, BASELINE)))


def check(config: Config) -> None:
    """Errors: BadConfig where there is nothing to compare with."""
    settings = config.controlnet
    if settings.model or settings.data != "drawn":
        raise BadConfig(
            "evaluate-controlnet needs the drawn world, where everything about a picture is known.",
            hint="Leave controlnet.model empty and controlnet.data drawn; train-controlnet "
            "measures models of real pictures itself, on their validation split.",
        )
    if not settings.seeds:
        raise BadConfig("controlnet.seeds is empty; expected at least one number.")
    if settings.evaluation.portraits < 2:
        raise BadConfig("controlnet.evaluation.portraits must be at least 2 for an interval.")


def paint_all(bench: Bench, control: Control | None) -> Painted:
    """Every picture of the trial, repainted and painted from noise."""
    return Painted(
        _paint(bench, control, bench.config.controlnet.from_step), _paint(bench, control, 1000)
    )


def _paint(bench: Bench, control: Control | None, from_step: int) -> Tensor:
    trial, settings, parts = bench.trial, paint_settings(bench.config, from_step), []
    for i in range(0, len(trial), CHUNK):
        few = slice(i, i + CHUNK)
        painted = paint(
            bench.base, control, trial.prompts[few], trial.latents[few], trial.seeds[few], settings
        )
        parts.append(painted.cpu())
    return torch.cat(parts)


def measured(bench: Bench, painted: list[Painted]) -> dict[str, SeededFigure]:
    """All figures of a row from the pictures of its trainings."""
    repainted = _figures(bench, [bench.ruler.repainted(p.repainted) for p in painted])
    fresh = _figures(bench, [bench.ruler.fresh(p.fresh) for p in painted])
    fresh["fid"] = _fid(bench, [p.fresh[: bench.trial.portraits] for p in painted])
    return repainted | {f"fresh_{name}": figure for name, figure in fresh.items()}


def _figures(bench: Bench, values: list[Values]) -> dict[str, SeededFigure]:
    seed = bench.config.controlnet.evaluation.seed
    return {name: row_figure(torch.stack([v[name] for v in values]), seed) for name in values[0]}


def _fid(bench: Bench, pictures: list[Tensor]) -> SeededFigure:
    """Fréchet distance of the attribute network's pooled features, resampled over pictures."""
    seed = bench.config.controlnet.evaluation.seed
    features = [pooled(bench.ruler.judges.look_past_faces(p).attributes) for p in pictures]
    together = torch.stack(features, 1)

    def mean_distance(rows: Tensor) -> float:
        distances = [frechet_distance(rows[:, s], bench.real) for s in range(rows.shape[1])]
        return sum(distances) / len(distances)

    figure = summarise_statistic(mean_distance, together, FID_RESAMPLES, seed)
    return {**figure, "by_seed": [frechet_distance(f, bench.real) for f in features]}


def _controls(config: Config, name: str) -> list[Control | None]:
    if name == "base":
        return [None]
    return [open_control(config, run_name(name, seed)) for seed in config.controlnet.seeds]


def write(config: Config, folder: RunFolder, rows: Rows, skipped: Mapping[str, str]) -> None:
    """Figures as JSON and as a table, after every row."""
    compared = gains(rows, BASELINE)
    outcome: dict[str, Any] = {
        "protocol": protocol(config, skipped), "rows": rows, "gains_over_baseline": compared
    }  # fmt: skip
    write_figures(config, folder, outcome)
    folder.write_text("table.md", markdown(rows, compared))


def protocol(config: Config, skipped: Mapping[str, str]) -> dict[str, Any]:
    """Everything needed to repeat the evaluation and to read its figures."""
    settings = to_dict(config.controlnet)
    del settings["objective"]  # of a training to come; those that were painted with have their own
    return settings | {
        "objectives": _objectives(config),
        "faces": "repainted from true latents noised to from_step, compared with the true picture",
        "rows": "ci95: percentile bootstrap over pictures, trainings averaged",
        "gains": "paired by seed; ci95: Student's t over seeds",
        "device": device_name(config.run.torch_device()),
        "torch": torch.__version__,
        "skipped": dict(skipped),
    }


def _objectives(config: Config) -> dict[str, Any]:
    """Training -> what it was trained for."""
    settings = config.controlnet
    names = [run_name(variant, seed) for variant in settings.variants for seed in settings.seeds]
    found = {name: trained_objective(config, name) for name in names}
    return {name: objective for name, objective in found.items() if objective}
