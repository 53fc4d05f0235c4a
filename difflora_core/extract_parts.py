"""Finished layers of a long extraction, kept on disk until the result is complete.

They lie in a folder `.NAME.parts` beside the result, one file per layer, under a fingerprint of
inputs and settings: the next run with the same arguments goes on where the last one stopped, any
other run starts afresh.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import BadWeightsFile
from .merging import Certificate
from .tensor_file import TensorFile
from .weights_file import write_safetensors

log = logging.getLogger(__name__)

_FINGERPRINT = "fingerprint"


@dataclass(frozen=True, eq=False)
class Part:
    """One finished layer: delta W = up @ down, as the result will hold it."""

    down: Tensor
    """[rank, in], kernels flattened"""
    up: Tensor
    """[out, rank]"""
    certificate: Certificate


class PartStore:
    """The folder of finished layers. A layer that does not differ is finished too."""

    def __init__(self, result: Path) -> None:
        self.folder = result.with_name(f".{result.name}.parts")

    def open(self, inputs: object) -> None:
        """Make the folder; parts that were made from other `inputs` (JSON values) go."""
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        note = self.folder / _FINGERPRINT
        try:
            if self.folder.exists() and not (note.is_file() and note.read_text() == fingerprint):
                log.info("Inputs or settings are others than before: starting from the first layer")
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            note.write_text(fingerprint)
        except OSError as error:
            raise BadWeightsFile(f"{self.folder} cannot be used: {error.strerror}.") from error

    def __contains__(self, layer: str) -> bool:
        return self._path(layer).is_file()

    def size(self) -> int:
        """Bytes of the finished layers."""
        return sum(path.stat().st_size for path in self.folder.glob("*"))

    def put(self, layer: str, part: Part | None) -> None:
        """Keep a finished layer, atomically; None: it does not differ. Raises BadWeightsFile."""
        tensors = {"same": torch.zeros(1)}
        if part:
            tensors = {"down": part.down.contiguous(), "up": part.up.contiguous()}
        fields = {"certificate": json.dumps(asdict(part.certificate))} if part else {}
        write_safetensors(self._path(layer), tensors, fields, overwrite=True)

    def get(self, layer: str) -> Part:
        """A finished layer that differs."""
        file = TensorFile(self._path(layer))
        return Part(file.tensor("down"), file.tensor("up"), _certificate(file.metadata))

    def certificate(self, layer: str) -> Certificate | None:
        """The certificate of a finished layer; None where it does not differ."""
        file = TensorFile(self._path(layer))
        return _certificate(file.metadata) if "down" in file else None

    def remove(self) -> None:
        """The result is complete: forget the parts."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)

    def _path(self, layer: str) -> Path:
        return self.folder / f"{layer}.safetensors"


def refuse_full_disk(result: Path, needed: int, there: int = 0) -> None:
    """Raises BadWeightsFile unless `needed` bytes, some of them `there`, fit beside `result`."""
    folder = next(parent for parent in result.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free + there
    if needed > free:
        raise BadWeightsFile(
            f"{result.name} needs {needed / 1e9:.1f} GB of free disk space, "
            f"but {free / 1e9:.1f} GB are left.",
            hint="Free some space, or write to another disk.",
        )


def _certificate(fields: Mapping[str, str]) -> Certificate:
    values = json.loads(fields["certificate"])
    return Certificate(**{**values, "singular_values": tuple(values["singular_values"])})
