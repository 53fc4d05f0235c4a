from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from difflora_core.errors import BadConfig, DiffLoRAError
from difflora_core.whole_file import LEFT_BEHIND, whole_file
from training import budget
from training.example_pool import Pool
from training.loop import Interrupted, OutOfTime, Trainer, TrainingDiverged, lr_factor
from training.run_config import OptimConfig, RunConfig
from training.run_folder import RunFolder
from training.run_log import RunLog, read_csv

OPTIM = OptimConfig(steps=8, lr=0.05, warmup=2, weight_decay=0.1, ema=0.9)
RUN = RunConfig(device="cpu", log_every=2, checkpoint_every=4, keep_last=2)


class Job:
    """A noisy regression: global and local random numbers, dropout, a norm layer's buffers."""

    def __init__(self, folder: Path, optim: OptimConfig = OPTIM, run: RunConfig = RUN) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        torch.manual_seed(1)
        self.folder = RunFolder.create(folder, "job")
        self.trainer = Trainer({"model": self.model}, optim, run, self.folder, items_per_step=16)
        self.seen: list[int] = []

    def step(self, i: int) -> dict[str, Tensor]:
        self.seen.append(i)
        x = torch.randn(16, 4, generator=self.trainer.generator)
        y = x.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1)
        return {"loss": (self.model(x) - y).square().mean()}

    def weights(self) -> dict[str, Tensor]:
        averaged = {f"ema.{k}": v for k, v in self.trainer.averaged("model").items()}
        return {k: v.clone() for k, v in self.model.state_dict().items()} | averaged


def _assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = Job(tmp_path / "whole")
    whole.trainer.fit(whole.step)

    first = Job(tmp_path / "parts")

    def stop_at_four(i: int) -> dict[str, Tensor]:
        if i == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return first.step(i)

    with pytest.raises(Interrupted, match="step 4"):
        first.trainer.fit(stop_at_four)
    second = Job(tmp_path / "parts")
    second.trainer.fit(second.step)
    assert second.seen == [4, 5, 6, 7]
    _assert_equal(second.weights(), whole.weights())
    _assert_equal(
        second.trainer.optimizers[0].state_dict()["state"][0],
        whole.trainer.optimizers[0].state_dict()["state"][0],
    )


def test_finished_run_does_no_further_step(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.trainer.fit(first.step)
    again = Job(tmp_path)
    again.trainer.fit(again.step)
    assert again.seen == []
    _assert_equal(again.weights(), first.weights())


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.trainer.fit(first.step)
    again = Job(tmp_path, dataclasses.replace(OPTIM, steps=6))
    with pytest.raises(BadConfig, match="job has trained for 8 steps, more than the 6 that are"):
        again.trainer.fit(again.step)


def test_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path, run=dataclasses.replace(RUN, max_minutes=1e-9))
    with pytest.raises(OutOfTime, match="job stopped at step 1: its time was up"):
        job.trainer.fit(job.step)
    assert [p.name for p in job.folder.checkpoints()] == ["step_00000001"]


@pytest.mark.parametrize(("minutes", "limit"), [(1e-5, 0.0), (1e-5, 1.0), (1.0, 1e-9), (0.0, 1e-9)])
def test_own_minutes_end_a_training_and_those_of_the_run_interrupt_it(
    tmp_path: Path, minutes: float, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_planned_steps", lambda *_: 10**6)
    job, run = Job(tmp_path), dataclasses.replace(RUN, max_minutes=limit)
    optim = dataclasses.replace(OPTIM, steps=10**6)

    def step_at_which_it_ends() -> int:
        return budget.train(
            {"m": job.model}, optim, run, job.folder, job.step, batch=16, minutes=minutes
        ).step

    if minutes == 1e-5:
        assert 0 < step_at_which_it_ends() < 10**6
    else:
        with pytest.raises(OutOfTime):
            step_at_which_it_ends()


def test_a_training_whose_time_is_used_up_is_finished(tmp_path: Path) -> None:
    optim = dataclasses.replace(OPTIM, steps=10**6)

    def trained(job: Job) -> int:
        job.folder.write_text(budget._PLAN, '{"seconds_per_step": 1e-9}')
        job.trainer.save()
        return budget.train(
            {"model": job.model}, optim, RUN, job.folder, job.step, batch=16, minutes=2e-3
        ).step

    first = Job(tmp_path)
    done = trained(first)
    assert 0 < done < 10**6
    again = Job(tmp_path)
    steps = budget.train(
        {"model": again.model}, optim, RUN, again.folder, again.step, batch=16, minutes=2e-3
    ).step
    assert steps == done and again.seen == []
    _assert_equal(again.model.state_dict(), first.model.state_dict())


def test_damaged_newest_checkpoint_is_skipped(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.trainer.fit(job.step)
    assert [p.name for p in job.folder.checkpoints()] == ["step_00000004", "step_00000008"]
    damaged = job.folder.checkpoints()[-1] / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = Job(tmp_path)
    again.trainer.fit(again.step)
    assert again.seen == [4, 5, 6, 7]
    _assert_equal(again.weights(), job.weights())


def test_what_follows_a_checkpoint_is_given_up_with_it(tmp_path: Path) -> None:
    folder, weights = RunFolder.create(tmp_path, "job"), {"model": {"w": torch.zeros(1)}}
    for step in (1000, 2000):
        folder.save(step, weights, {}, keep_last=2)
    (folder.checkpoints()[-1] / "state.pt").write_bytes(b"damaged")
    folder.save(1500, weights, {}, keep_last=1)
    assert [path.name for path in folder.checkpoints()] == ["step_00001500"]
    folder.save(2500, weights, {}, keep_last=2)
    assert [path.name for path in folder.checkpoints()] == ["step_00001500", "step_00002500"]


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "job")
    left = folder.part("model").path / "checkpoints" / ".step_00000004.1234"
    left.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), whole_file(folder.part("people").path / "a.b") as file:
        (half,) = Path(file.name).parent.glob(LEFT_BEHIND)
        kept = half.read_bytes()
        raise ZeroDivisionError
    half.write_bytes(kept)  # as after kill -9
    held = folder.held()
    with held:
        assert not left.exists() and not half.exists()
        with pytest.raises(DiffLoRAError, match=r"Another run is at work in .*job"), folder.held():
            pass
    with folder.held():
        pass


def test_a_resumed_pool_holds_what_an_uninterrupted_one_holds() -> None:
    for chunks in (1, 2, 3, 7):
        whole = Pool(lambda k: {"number": torch.full((4,), k)}, capacity=13, reuse=1)
        while whole.chunks < chunks:
            whole.draw(4)
        again = Pool(whole.make, capacity=13, reuse=1)
        again.restore(whole.position())
        assert again.position() == whole.position()
        for _ in range(6):
            torch.manual_seed(chunks)
            expected = whole.draw(3)["number"]
            torch.manual_seed(chunks)
            assert torch.equal(again.draw(3)["number"], expected)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.trainer.fit(job.step)
    other = nn.Linear(3, 1)
    with pytest.raises(DiffLoRAError, match="does not fit"):
        Trainer({"model": other}, OPTIM, RUN, job.folder).resume()


def test_diverged_loss_is_reported(tmp_path: Path) -> None:
    job = Job(tmp_path)
    with pytest.raises(TrainingDiverged, match="nan"):
        job.trainer.fit(lambda i: {"loss": job.step(i)["loss"] * math.nan})


def _bad_loss(loss: Tensor, weight: Tensor) -> Tensor:
    return loss * math.nan


def _bad_slope(loss: Tensor, weight: Tensor) -> Tensor:
    """The loss itself stays as it is."""
    return loss + (0 * weight).abs().sqrt().sum()


@pytest.mark.parametrize(
    ("spoil", "first", "sentence"),
    [(_bad_loss, 2, "The loss"), (_bad_slope, 2, "The loss"), (_bad_slope, 3, "The weights")],
)
def test_a_diverged_training_writes_no_checkpoint(
    tmp_path: Path, spoil: Callable[[Tensor, Tensor], Tensor], first: int, sentence: str
) -> None:
    run = dataclasses.replace(RUN, log_every=8, checkpoint_every=2, keep_last=1)
    job = Job(tmp_path, run=run)

    def step(i: int) -> dict[str, Tensor]:
        loss = job.step(i)["loss"]
        return {"loss": spoil(loss, next(job.model.parameters())) if i == first else loss}

    with pytest.raises(TrainingDiverged, match=f"{sentence} of job .* no longer finite at step 4"):
        job.trainer.fit(step)
    assert [p.name for p in job.folder.checkpoints()] == ["step_00000002"]


def test_ema_follows_its_formula(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    folder = RunFolder.create(tmp_path, "ema")
    trainer = Trainer({"model": model}, dataclasses.replace(OPTIM, steps=3, ema=0.2), RUN, folder)
    expected, path = model.weight.item(), []

    def step(i: int) -> dict[str, Tensor]:
        path.append(model.weight.item())
        return {"loss": model.weight.square().sum()}

    trainer.fit(step)
    for t, value in enumerate([*path[1:], model.weight.item()], start=1):
        decay = min(0.2, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    assert trainer.averaged("model")["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_learning_rate_by_hand() -> None:
    optim = OptimConfig(steps=12, lr=2.0, warmup=2, final_lr=0.1)
    assert lr_factor(0, optim) == 0.5
    assert lr_factor(2, optim) == 1.0
    assert lr_factor(7, optim) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(12, optim) == pytest.approx(0.1)


def test_log_keeps_rows_up_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = RunLog(path, 10)
    for step in (2, 4, 6):
        log.write(step, {"loss": step / 10})
    log = RunLog(path, 10, start_step=4)
    log.write(6, {"loss": 9.0, "extra": 1.0})
    rows = read_csv(path)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert rows[-1]["loss"] == "9" and rows[0]["extra"] == ""


def test_a_log_that_cannot_be_written_anew_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.csv"
    RunLog(path, 10).write(2, {"loss": 0.5})
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        RunLog(path, 10, start_step=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_log_is_written_by_training(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.trainer.fit(job.step)
    rows = read_csv(job.folder.log_path)
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert {"loss", "lr", "items_per_s"} <= set(rows[0])


@pytest.mark.parametrize("content", [b"text", b"\x00", b""])
def test_a_damaged_state_is_skipped_whatever_is_in_it(tmp_path: Path, content: bytes) -> None:
    job = Job(tmp_path)
    job.trainer.fit(job.step)
    (job.folder.checkpoints()[-1] / "state.pt").write_bytes(content)
    found = job.folder.newest()
    assert found is not None and found.step == 4


@pytest.mark.parametrize("broken", ["save_file", "torch.save"])
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise {"save_file": SafetensorError, "torch.save": RuntimeError}[broken]("No space.\nx")

    monkeypatch.setattr(f"training.run_folder.{broken}", full)
    job = Job(tmp_path)
    with pytest.raises(OSError, match=r"step_00000004 could not be written: No space$"):
        job.trainer.fit(job.step)
    assert not list((job.folder.path / "checkpoints").iterdir())
