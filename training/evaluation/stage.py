"""Stage evaluate: paints every row, measures it, writes figures, table and picture sheet."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig, DiffLoRAError
from difflora_core.predictor import Predictor
from training.artifacts import BASE_PARTS, MissingArtifact, artifact, digests, sha256
from training.base.painter import Painter
from training.config import Config
from training.loras.collect import read_set
from training.portraits import ATTRIBUTES
from training.predictor.bundle import check_encoders
from training.run_folder import RunFolder, device_name

from .config import EvalConfig
from .figures_file import check_place, write_figures
from .judges import NETWORKS, Judges
from .measures import Yardstick, measure
from .nearest import training_distance
from .protocol import Trial, draw_trial
from .rows import ROWS, Bench, Personalised, paint_row
from .sheet import save_sheet
from .summary import Figure, summarise, summarise_difference, summarise_ratio
from .table import Rows, markdown, results

logger = logging.getLogger(__name__)

SHEET_LINES = ("base", "average_lora", "predicted", "teacher")
"""Rows on the picture sheet, under each person's photo."""
PREDICTED = ("predicted", "best_of_4", "refined")
"""Rows of `eval.predictor`."""


def run(config: Config, folder: RunFolder) -> None:
    """Evaluate the rows of `eval.rows`; a row whose weights do not exist is left out, and named.

    Figures are written after every row, so that a long run that is stopped leaves its first rows.
    """
    check_rows(config.eval)
    check_inputs(config)
    check_place(config)
    bench = open_bench(config)
    yardstick = Yardstick.make(bench.judges, bench.trial, config.eval.seed)
    so_far = Outcome({}, {}, {}, {})
    for name in (row for row in ROWS if row in config.eval.rows):
        try:
            evaluate_row(name, bench, yardstick, so_far)
        except MissingArtifact as error:
            logger.warning("row %s is left out: %s", name, error.message)
            so_far.skipped[name] = error.message
            continue
        add_recovery(so_far, config.eval.seed)
        add_lead(so_far, config.eval.seed)
        write(bench, folder, so_far)
    if not so_far.rows:
        raise DiffLoRAError("No row could be evaluated.", hint=" ".join(so_far.skipped.values()))
    write(bench, folder, so_far)
    logger.info("\n%s", markdown(so_far.rows))


@dataclass(frozen=True)
class Outcome:
    """What is known so far, by row."""

    rows: Rows
    face_sim: dict[str, Tensor]
    """Of every picture, [P, Q]."""
    samples: dict[str, Tensor]
    """One picture per person of the sheet."""
    skipped: dict[str, str]
    """Why a row is missing."""


def evaluate_row(name: str, bench: Bench, yardstick: Yardstick, so_far: Outcome) -> None:
    """Personalise, paint and measure one row. Errors: MissingArtifact."""
    begin = time.monotonic()
    personalised = ROWS[name](bench)
    pictures = paint_row(bench, personalised)
    measured = measure(yardstick, pictures)
    so_far.rows[name] = measured.figures | _of_loras(bench, personalised)
    so_far.face_sim[name] = measured.values["face_sim"]
    shown = sheet_prompt(bench.trial)
    so_far.samples[name] = pictures[: bench.config.eval.sheet_people, shown]
    mean = measured.figures["face_sim"]["mean"]
    logger.info("%s: face_sim %.3f (%.0f s)", name, mean, time.monotonic() - begin)


def sheet_prompt(trial: Trial) -> int:
    """The prompt of the picture sheet: the first that asks for a photo, where likeness shows."""
    photo = ATTRIBUTES["style"].index("photo")
    wanted = [asked.get("style") == photo for asked in trial.wanted]
    return wanted.index(True) if any(wanted) else 0


def check_rows(settings: EvalConfig) -> None:
    """Errors: BadConfig for rows that do not exist or too few people or prompts."""
    unknown = [name for name in settings.rows if name not in ROWS]
    if unknown or not settings.rows:
        raise BadConfig(f"eval.rows has {unknown}; the rows are {', '.join(ROWS)}.")
    if settings.people < 2 or settings.prompts < 2:
        raise BadConfig("eval.people and eval.prompts must be at least 2 for an interval.")


def check_inputs(config: Config) -> None:
    """Open what only later rows would. What does not exist is left for them to name.

    Errors: BadWeightsFile for predictors and LoRA sets that cannot be read, DiffLoRAError for a set
    of another LoRA space, LayoutMismatch for a predictor that has learnt from other encoders.
    """
    with suppress(MissingArtifact):
        read_set(config)
    if not set(PREDICTED).isdisjoint(config.eval.rows):
        with suppress(MissingArtifact):
            _check_predictor(config, config.eval.predictor or artifact(config, "predictor"))
    if "predicted_paper" in config.eval.rows:
        with suppress(MissingArtifact):
            _check_predictor(config, artifact(config, "predictor_paper"))


def _check_predictor(config: Config, path: str | Path) -> None:
    check_encoders(config, Predictor.open(path), f"The predictor {Path(path).name}")


def open_bench(config: Config) -> Bench:
    """Models, people and prompts of an evaluation."""
    device = config.run.torch_device()
    trial = draw_trial(config.eval, device)
    weights = weights_used(config)
    return Bench(config, trial, Painter.open(config), Judges.open(config), weights)


def add_recovery(so_far: Outcome, seed: int) -> None:
    """Add each row's face_sim over the teacher's, once the teacher was evaluated."""
    if "teacher" not in so_far.face_sim:
        return
    for name, values in so_far.face_sim.items():
        ratio = summarise_ratio(values, so_far.face_sim["teacher"], seed)
        so_far.rows[name]["recovery"] = ratio


def add_lead(so_far: Outcome, seed: int) -> None:
    """Add each row's face_sim above the average LoRA's, once that was evaluated."""
    if "average_lora" not in so_far.face_sim:
        return
    average = so_far.face_sim["average_lora"]
    for name, values in so_far.face_sim.items():
        so_far.rows[name]["above_average"] = summarise_difference(values, average, seed)


def protocol(bench: Bench, skipped: dict[str, str]) -> dict[str, Any]:
    """Everything needed to repeat the evaluation and to read its figures."""
    config, trial = bench.config, bench.trial
    settings = {k: v for k, v in to_dict(config.eval).items() if k not in ("json", "predictor")}
    device = config.run.torch_device()
    return settings | {
        "predictor": Path(config.eval.predictor).name or "predictor.safetensors",
        "prompts_used": list(trial.prompts),
        "person_seeds": trial.person_seeds.tolist(),
        "split": "test identities, held-out combinations of attributes",
        "cosines": "raw",
        "ci95": "percentile bootstrap over people",
        "teacher": to_dict(config.loras),
        "weights": dict(bench.weights),
        "device": device_name(device),
        "torch": torch.__version__,
        "skipped": skipped,
    }


def weights_used(config: Config) -> dict[str, str]:
    """Digests of base model, judges and predictor: rows of one set of weights can be compared."""
    names = (*BASE_PARTS, *NETWORKS, "recogniser", "predictor", "predictor_paper")
    chosen = Path(config.eval.predictor)
    own = {chosen.name: sha256(chosen)[:16]} if chosen.is_file() else {}
    return digests(config, names) | own


def write(bench: Bench, folder: RunFolder, so_far: Outcome) -> None:
    """Write figures where they are asked for; figures, table and sheet into the run folder."""
    outcome = results(protocol(bench, so_far.skipped), so_far.rows)
    write_figures(bench.config, folder, outcome)
    folder.write_text("table.md", markdown(so_far.rows))
    if bench.config.eval.sheet_people:
        _save_sheet(folder, bench.trial, so_far.samples, bench.config.eval.sheet_people)


def _of_loras(bench: Bench, row: Personalised) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if row.loras is not None:
        distance = training_distance(bench, row.loras)
        figures |= {} if distance is None else {"nearest_distance": distance}
    return figures | {"seconds": summarise(torch.tensor(row.seconds), bench.config.eval.seed)}


def _save_sheet(folder: RunFolder, trial: Trial, rows: dict[str, Tensor], people: int) -> None:
    lines = {"photo": trial.photos[:people].cpu()}
    lines |= {name: rows[name] for name in SHEET_LINES if name in rows}
    lines |= {name: pictures for name, pictures in rows.items() if name not in lines}
    save_sheet(folder.path / "sheet.png", lines)
