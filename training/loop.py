"""The training loop: steps, logging, averaging, checkpoints, resuming. It knows no model.

    trainer = Trainer({"unet": unet}, config.base.optim, config.run, folder, items_per_step=256)
    trainer.fit(step)                     # step(i) -> {"loss": scalar, ...}; resumes by itself
    weights = trainer.averaged("unet")    # EMA weights, for the artifact

A resumed run equals an uninterrupted one bit for bit (on one device) as long as `step(i)` depends
on i, the modules, the global torch random state, `trainer.generator` and the pool only.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn

from difflora_core.errors import BadConfig, DiffLoRAError

from . import parallel
from .example_pool import Pool
from .meter import Meter
from .optimizer import build_optimizers, load_state
from .run_config import OptimConfig, RunConfig
from .run_folder import Checkpoint, RunFolder
from .run_log import RunLog

Step = Callable[[int], dict[str, Tensor]]
"""step(i) -> scalar tensors by name; "loss" is minimised, the others are logged."""


class Interrupted(Exception):
    """A signal stopped the loop after its checkpoint was written."""


class OutOfTime(Interrupted):
    """`run.max_minutes` did."""


class TrainingDiverged(DiffLoRAError):
    """The loss or the weights are no longer finite numbers."""


class Trainer:
    """AdamW (and Muon): warm-up, cosine decay, clipping, EMA, autocast, resumable checkpoints."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optim: OptimConfig,
        run: RunConfig,
        folder: RunFolder,
        *,
        items_per_step: int = 1,
        pool: Pool | None = None,
    ) -> None:
        """`modules`: every module that trains, on its device; they are saved under their names.

        pool: where `step` draws its examples, so that a resumed run goes on with the next ones.
        """
        self.modules, self.optim, self.run, self.folder = modules, optim, run, folder
        self.pool = pool
        self.items_per_step = items_per_step * parallel.count()
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizers = build_optimizers(modules.values(), optim)
        self.generator = torch.Generator(self.device).manual_seed(run.seed)
        self.shadow = [p.detach().float().clone() for p in self.parameters] if optim.ema else []
        self.step = 0
        self._signal: int | None = None

    def fit(self, step: Step) -> None:
        """Train to the last step.

        Raises Interrupted after Ctrl-C or SIGTERM, OutOfTime when `run.max_minutes` are over first,
        TrainingDiverged when the loss is not finite or a checkpoint's weights would not be.
        """
        parallel.join()
        self.resume()
        modules = self.modules.values()
        parallel.copy_from_first(t for m in modules for t in (*m.parameters(), *m.buffers()))
        parallel.copy_from_first(self.shadow)
        self._draw_own_samples()
        first = parallel.rank() == 0
        log = RunLog(self.folder.log_path, self.optim.steps, self.step) if first else None
        meter = Meter(self.items_per_step)
        deadline = self.run.deadline()
        with self._signals():
            while self.step < self.optim.steps:
                meter.add(self._advance(step))
                last = self.step == self.optim.steps
                if log is not None and (last or self.step % self.run.log_every == 0):
                    self._log(log, meter)
                told, late = parallel.agree(
                    self._signal is not None, time.monotonic() > deadline, device=self.device
                )
                if told or late or last or self.step % self.run.checkpoint_every == 0:
                    self._check(meter)
                    self.save()
                if told:
                    raise Interrupted(f"{self.folder.name} stopped at step {self.step}")
                if late and not last:
                    raise OutOfTime(
                        f"{self.folder.name} stopped at step {self.step}: its time was up"
                    )

    def averaged(self, name: str) -> dict[str, Tensor]:
        """State dict of one module with its averaged weights (its own without EMA); a copy."""
        with self.averaged_weights():
            state = self.modules[name].state_dict()
            return {key: tensor.detach().clone() for key, tensor in state.items()}

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the modules carry the averaged weights (for samples and validation)."""
        if not self.shadow:
            yield
            return
        own = [p.detach().clone() for p in self.parameters]
        _copy(self.shadow, self.parameters)
        try:
            yield
        finally:
            _copy(own, self.parameters)

    def save(self) -> None:
        """Write a checkpoint of the present step (of several processes, the first one does)."""
        if parallel.rank() > 0:
            return
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        state = {
            "optimizers": [o.state_dict() for o in self.optimizers],
            "shadow": self.shadow,
            "random": self._random_state(),
            "pool": self.pool.position() if self.pool else {},
        }
        self.folder.save(self.step, modules, state, self.run.keep_last)

    def resume(self) -> bool:
        """Load the newest checkpoint of the run folder, if there is one."""
        checkpoint = self.folder.newest()
        if checkpoint is None:
            return False
        try:
            self._load(checkpoint)
        except (RuntimeError, KeyError, ValueError) as error:
            raise DiffLoRAError(
                f"The checkpoint in {self.folder.name} does not fit this configuration: {error}",
                hint="Choose another run.root, or delete that folder to start afresh.",
            ) from error
        return True

    def _load(self, checkpoint: Checkpoint) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(checkpoint.modules[name])
        states = checkpoint.state["optimizers"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_state(optimizer, state)
        if self.shadow:
            _copy(checkpoint.state["shadow"], self.shadow)
        if self.pool and checkpoint.step < self.optim.steps:
            self.pool.restore(checkpoint.state["pool"])
        self._set_random_state(checkpoint.state["random"])
        self.step = checkpoint.step
        if self.step > self.optim.steps:
            raise BadConfig(
                f"{self.folder.name} has trained for {self.step} steps, more than the "
                f"{self.optim.steps} that are asked for now.",
                hint="Ask for as many or more, or choose another run.root.",
            )

    def _advance(self, step: Step) -> dict[str, Tensor]:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor(self.step, self.optim)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast()):
            losses = step(self.step)
        losses["loss"].backward()
        parallel.average_gradients(self.parameters)
        if self.optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self._average()
        return losses

    @torch.no_grad()
    def _average(self) -> None:
        if self.shadow:
            decay = min(self.optim.ema, (1 + self.step) / (10 + self.step))
            own = [p.detach().float() for p in self.parameters]
            torch._foreach_lerp_(self.shadow, own, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def _autocast(self) -> bool:
        if self.optim.precision == "auto":
            return self.device.type == "cuda"
        return self.optim.precision == "bf16"

    def _log(self, log: RunLog, meter: Meter) -> None:
        figures = meter.read()
        log.write(self.step, figures | {"lr": self.optim.lr * lr_factor(self.step - 1, self.optim)})
        if not math.isfinite(figures["loss"]):
            raise self._diverged(f"The loss of {self.folder.name} is {figures['loss']}")

    def _check(self, meter: Meter) -> None:
        """Before a checkpoint. Errors: TrainingDiverged."""
        if not meter.is_finite():
            raise self._diverged(f"The loss of {self.folder.name} is no longer finite")
        # a loss is older than its step's weights, which may be the first to go
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise self._diverged(f"The weights of {self.folder.name} are no longer finite")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} at step {self.step}.",
            hint="Lower the learning rate; the newest checkpoint is still good.",
        )

    def _draw_own_samples(self) -> None:
        # checkpoints hold the first process's random state; the others start a stream of their own
        if parallel.rank() > 0:
            seed = hash((self.run.seed, self.step, parallel.rank()))
            torch.manual_seed(seed)
            self.generator.manual_seed(seed)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"torch": torch.get_rng_state(), "generator": self.generator.get_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        # the states of cpu and cuda generators differ in size: a run moved to another device
        # goes on with a fresh stream rather than failing
        if state["generator"].numel() == self.generator.get_state().numel():
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(self.run.seed + self.step + 1)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def remember(number: int, frame: FrameType | None) -> None:
            self._signal = number

        signals = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(number, remember) for number in signals]
        except ValueError:  # not the main thread: its owner handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


def lr_factor(step: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then half a cosine."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    progress = min((step - optim.warmup) / max(optim.steps - optim.warmup, 1), 1.0)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return optim.final_lr + (1 - optim.final_lr) * cosine


@torch.no_grad()
def _copy(source: list[Tensor], target: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(target), source)  # pyright: ignore[reportPrivateImportUsage]
