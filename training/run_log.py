"""The log of one training loop: a CSV file, a progress line, and tensorboard where installed."""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import time
from pathlib import Path
from typing import Any

from .run_folder import write_whole

logger = logging.getLogger(__name__)


class RunLog:
    """Writes one row per call of `write`; rows after a resumed step are dropped first."""

    def __init__(self, path: Path, total_steps: int, start_step: int = 0) -> None:
        self.path = path
        self.total_steps = total_steps
        self._rows = [row for row in read_csv(path) if int(row["step"]) <= start_step]
        self._columns = list(self._rows[0]) if self._rows else []
        self._write_all()
        self._start = time.monotonic()
        self._start_step = start_step
        self._board = _tensorboard(path.parent)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Append a row: `step`, `minutes` of this run, then the figures by name."""
        minutes = (time.monotonic() - self._start) / 60
        row = {"step": str(step), "minutes": f"{minutes:.3f}"}
        row |= {name: f"{value:.6g}" for name, value in figures.items()}
        self._rows.append(row)
        self._append(row)
        for name, value in figures.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        logger.info("%s", self._line(step, minutes, figures))

    def _line(self, step: int, minutes: float, figures: dict[str, float]) -> str:
        texts = [f"{name} {value:.4g}" for name, value in figures.items()]
        done = max(step - self._start_step, 1)
        left = minutes * (self.total_steps - step) / done
        head = f"{self.path.parent.name} {step}/{self.total_steps}"
        return "  ".join([head, *texts, f"left {left:.1f} min"])

    def _append(self, row: dict[str, str]) -> None:
        if set(row) - set(self._columns):
            self._columns += [name for name in row if name not in self._columns]
            self._write_all()
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _write_all(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_whole(self.path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a log file; a half-written last row is dropped; no file gives no rows."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _tensorboard(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
