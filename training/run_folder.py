"""A stage's run folder: config copy, environment record, log, samples and resumable checkpoints.

    <run.root>/<stage>/config.toml environment.json log.csv samples/ checkpoints/step_00001000/

A checkpoint is a folder with one safetensors file per module and `state.pt` (optimiser, averaged
weights, random state, place in the pool of examples; tensors and numbers only, read with
weights_only). It is written beside its place and renamed, so a checkpoint that has its name is
whole.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from difflora_core.errors import DiffLoRAError
from difflora_core.whole_file import LEFT_BEHIND, whole_file

from . import parallel

logger = logging.getLogger(__name__)

Weights = dict[str, dict[str, Tensor]]
"""Module name -> state dict."""

_STEP_NAME = re.compile(r"step_(\d{8})")
_RECORDED_PACKAGES = (
    "torch", "torchvision", "numpy", "diffusers", "transformers", "peft", "open_clip_torch",
    "insightface", "onnxruntime", "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    step: int
    """Optimiser steps done."""
    modules: Weights
    """Weights by module name, on cpu."""
    state: dict[str, Any]
    """Optimiser, averaged weights, random state and place in the pool, on cpu."""


@dataclass(frozen=True)
class RunFolder:
    """One stage's folder; `part` gives a sub-folder for each training loop of a longer stage."""

    path: Path

    @classmethod
    def create(cls, root: str | Path, stage: str) -> RunFolder:
        """Make `<root>/<stage>` (it may exist: that is how a stage resumes)."""
        folder = cls(Path(root) / stage)
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def name(self) -> str:
        """The folder's last name."""
        return self.path.name

    @property
    def log_path(self) -> Path:
        """The CSV log."""
        return self.path / "log.csv"

    def part(self, name: str) -> RunFolder:
        """A run folder inside this one, with a log and checkpoints of its own."""
        return RunFolder.create(self.path, name)

    def samples(self) -> Path:
        """The folder for sample pictures (made on the first call)."""
        path = self.path / "samples"
        path.mkdir(exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file whole or not at all."""
        return write_whole(self.path / name, text)

    def write_environment(self, device: torch.device) -> Path:
        """Record versions and the device (no paths, no host name)."""
        return self.write_text("environment.json", json.dumps(environment(device), indent=2) + "\n")

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        found = (self.path / "checkpoints").glob("step_*")
        return sorted(path for path in found if _STEP_NAME.fullmatch(path.name))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other run works in this folder; what a killed one left half-written is gone.

        Of several processes that train together the first one holds it. Errors: DiffLoRAError where
        another run does.
        """
        if parallel.rank() > 0:
            yield
            return
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DiffLoRAError(
                f"Another run is at work in {self.path}.",
                hint="Wait until it has ended, or choose another run.root.",
            ) from error
        try:
            for left in self.path.glob("**/checkpoints/.step_*"):
                shutil.rmtree(left, ignore_errors=True)
            for left in self.path.glob(f"**/{LEFT_BEHIND}"):
                left.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    @contextmanager
    def kept_if_refused(self, *names: str) -> Iterator[None]:
        """Text files that are as they were where the block is refused before it trains anything."""
        files = [path for path in map(self.path.joinpath, names) if path.exists()]
        before = {path.name: path.read_text(encoding="utf-8") for path in files}
        trained = self._all_checkpoints()
        try:
            yield
        except DiffLoRAError:
            # of several processes the first one: the others may have read what it wrote
            if parallel.rank() == 0 and self._all_checkpoints() == trained:
                for name, text in before.items():
                    self.write_text(name, text)
            raise

    def has_checkpoints(self) -> bool:
        """Whether this folder or one of its parts holds a checkpoint."""
        return bool(self._all_checkpoints())

    def _all_checkpoints(self) -> set[Path]:
        return set(self.path.glob("**/checkpoints/step_*"))

    def save(self, step: int, modules: Weights, state: dict[str, Any], keep_last: int) -> Path:
        """Write the checkpoint of `step` atomically, then delete all but the newest `keep_last`.

        Later ones go too: a run that starts again before them had found them damaged.
        """
        place = self.path / "checkpoints" / f"step_{step:08d}"
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            temporary.mkdir(parents=True)
            for name, weights in modules.items():
                save_file(_contiguous(weights), temporary / f"{name}.safetensors")
            torch.save(state, temporary / "state.pt")
            if place.exists():
                shutil.rmtree(place)
            temporary.rename(place)
        except (SafetensorError, RuntimeError) as error:  # what the libraries make of a full disk
            reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
            raise OSError(f"The checkpoint {place.name} could not be written: {reason}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        present = self.checkpoints()
        last = present.index(place) + 1
        for old in present[: max(last - max(keep_last, 1), 0)] + present[last:]:
            shutil.rmtree(old)
        return place

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that reads without error; damaged ones are named in a warning."""
        for path in reversed(self.checkpoints()):
            try:
                return read_checkpoint(path)
            except Exception as error:  # the libraries raise what they like, KeyError too
                logger.warning("checkpoint %s is damaged and is skipped: %s", path.name, error)
        return None


def write_whole(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; what was there before stays until then."""
    with whole_file(path) as file:
        file.write(text.encode())
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder onto the cpu."""
    modules = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(int(path.name.removeprefix("step_")), modules, state)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of Python and the libraries, and the device's name."""
    versions = {name: _version(name) for name in _RECORDED_PACKAGES}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "device": device_name(device),
        "packages": {name: version for name, version in versions.items() if version},
    }


def device_name(device: torch.device) -> str:
    """The accelerator's product name, or the number of CPU threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    # clone: safetensors refuses tensors that share memory (tied weights)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


def refused_by_system(error: OSError) -> str:
    """A sentence for a full disk, a folder that cannot be written to, and their like."""
    place = f": {error.filename}" if error.filename else ""
    reason = error.strerror or str(error)
    return f"{reason}{place}. Check that there is room and that you may write there."
