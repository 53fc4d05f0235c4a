"""Stage evaluate: paints every row, measures it, writes figures, table and picture sheet."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig, DiffLoRAError
from training.artifacts import MissingArtifact
from training.base.painter import Painter
from training.config import Config
from training.run_folder import RunFolder, device_name

from .config import EvalConfig
from .judges import Judges
from .measures import Yardstick, measure
from .nearest import training_distance
from .protocol import Trial, draw_trial
from .rows import ROWS, Bench, Personalised, paint_row
from .sheet import save_sheet
from .summary import Figure, summarise, summarise_ratio
from .table import Rows, markdown, results

logger = logging.getLogger(__name__)

SHEET_LINES = ("base", "average_lora", "predicted", "teacher")
"""Rows on the picture sheet, under each person's photo."""


def run(config: Config, folder: RunFolder) -> None:
    """Evaluate the rows of `eval.rows`; a row whose weights do not exist is left out, and named."""
    check_rows(config.eval)
    bench = open_bench(config)
    yardstick = Yardstick.make(bench.judges, bench.trial, config.eval.seed)
    rows: Rows = {}
    sheet: dict[str, Tensor] = {}
    similarity: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for name in (row for row in ROWS if row in config.eval.rows):
        try:
            personalised = ROWS[name](bench)
        except MissingArtifact as error:
            logger.warning("row %s is left out: %s", name, error.message)
            skipped[name] = error.message
            continue
        begin = time.monotonic()
        pictures = paint_row(bench, personalised)
        measured = measure(yardstick, pictures)
        rows[name], similarity[name] = measured.figures, measured.face_sim
        rows[name] |= _of_loras(bench, personalised)
        sheet[name] = pictures[: config.eval.sheet_people, 0]
        took = time.monotonic() - begin
        logger.info("%s: face_sim %.3f (%.0f s)", name, rows[name]["face_sim"]["mean"], took)
    if not rows:
        raise DiffLoRAError("No row could be evaluated.", hint=" ".join(skipped.values()))
    add_recovery(rows, similarity, config.eval.seed)
    write(config, folder, results(protocol(config, bench.trial, skipped), rows))
    if config.eval.sheet_people:
        _save_sheet(folder, bench.trial, sheet, config.eval.sheet_people)


def check_rows(settings: EvalConfig) -> None:
    """Errors: BadConfig for rows that do not exist or too few people or prompts."""
    unknown = [name for name in settings.rows if name not in ROWS]
    if unknown or not settings.rows:
        raise BadConfig(f"eval.rows has {unknown}; the rows are {', '.join(ROWS)}.")
    if settings.people < 2 or settings.prompts < 2:
        raise BadConfig("eval.people and eval.prompts must be at least 2 for an interval.")


def open_bench(config: Config) -> Bench:
    """Models, people and prompts of an evaluation."""
    device = config.run.torch_device()
    trial = draw_trial(config.eval, device)
    return Bench(config, trial, Painter.open(config), Judges.open(config))


def add_recovery(rows: Rows, similarity: dict[str, Tensor], seed: int) -> None:
    """Add each row's face_sim over the teacher's, if the teacher was evaluated."""
    if "teacher" not in similarity:
        return
    for name, values in similarity.items():
        rows[name]["recovery"] = summarise_ratio(values, similarity["teacher"], seed)


def protocol(config: Config, trial: Trial, skipped: dict[str, str]) -> dict[str, Any]:
    """Everything needed to repeat the evaluation and to read its figures."""
    settings = {k: v for k, v in to_dict(config.eval).items() if k not in ("json", "predictor")}
    device = config.run.torch_device()
    return settings | {
        "predictor": Path(config.eval.predictor).name or "predictor.safetensors",
        "prompts_used": list(trial.prompts),
        "person_seeds": trial.person_seeds.tolist(),
        "split": "test identities, held-out combinations of attributes",
        "cosines": "raw",
        "ci95": "percentile bootstrap over people",
        "teacher_steps": config.loras.steps,
        "teacher_pictures": config.loras.pictures,
        "device": device_name(device),
        "torch": torch.__version__,
        "skipped": skipped,
    }


def write(config: Config, folder: RunFolder, outcome: dict[str, Any]) -> None:
    """Write the figures where they are asked for, and the table into the run folder."""
    text = json.dumps(outcome, indent=2) + "\n"
    folder.write_text("results.json", text)
    if config.eval.json:
        path = Path(config.eval.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    table = markdown(outcome["rows"])
    folder.write_text("table.md", table)
    logger.info("\n%s", table)


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
