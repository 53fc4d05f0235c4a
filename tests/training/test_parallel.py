from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difflora_core.errors import BadConfig
from tests.training import parallel_worker
from training.__main__ import main
from training.artifacts import command_line
from training.budget import train

ROOT = Path(__file__).parents[2]
MINI = str(ROOT / "training" / "configs" / "mini.toml")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _two_processes(folder: Path, stop_at: int = -1) -> list[dict[str, Tensor]]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [parallel_worker.__file__, str(folder), str(stop_at)]
    done = subprocess.run(
        [*start, *worker], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_train_what_one_does_with_both_batches(tmp_path: Path) -> None:
    first, second = _two_processes(tmp_path)
    alone = parallel_worker.train(tmp_path / "alone").averaged("model")
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], tensor, atol=1e-6)


def test_processes_draw_samples_of_their_own(tmp_path: Path) -> None:
    first, second = _two_processes(tmp_path)
    assert not torch.equal(first["own samples"], second["own samples"])


def test_every_process_gets_the_parts_of_all_in_their_order(tmp_path: Path) -> None:
    for result in _two_processes(tmp_path):
        assert result["parts"].tolist() == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path: Path) -> None:
    first, second = _two_processes(tmp_path, stop_at=2)
    assert "line stopped at step 3" in first
    assert "line stopped at step 3" in second
    assert [p.name for p in (tmp_path / "line" / "checkpoints").iterdir()] == ["step_00000003"]


def test_other_stages_refuse_several_processes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.ERROR):
        assert main(["train-dit", "--config", MINI, f"run.root={tmp_path}"]) == 2
    assert "train-dit runs in one process; start it without torchrun" in caplog.text
    assert not any(tmp_path.iterdir())


def test_minutes_are_refused_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadConfig, match="one process's clock"):
        train({}, parallel_worker.OPTIM, parallel_worker.RUN, None, None, batch=1, minutes=2.0)  # pyright: ignore[reportArgumentType]


def test_the_recorded_command_names_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "train-base"])
    assert command_line() == "python -m training train-base"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line() == "torchrun --nproc-per-node 2 -m training train-base"
