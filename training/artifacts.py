"""Results of the stages: `<run.root>/artifacts/` over the weights shipped in `difflora_core/mini/`.

Every weights file is safetensors with its config as JSON under the header key "config";
`manifest.json` says of each file by which command it was made, with which seed, on what, its
sha256 and its figures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

import difflora_core
from difflora_core.errors import BadWeightsFile, DiffLoRAError
from difflora_core.weights_file import header_json, read_safetensors, write_safetensors
from difflora_core.whole_file import whole_file

from . import parallel
from .config import Config
from .json_file import read_object
from .run_folder import RunFolder, device_name, write_whole

logger = logging.getLogger(__name__)

SHIPPED = Path(difflora_core.__file__).parent / "mini"
"""Weights that come with the package."""
SHIPPED_LIMIT = 30_000_000
"""Largest size of all shipped files together, bytes."""
BASE_PARTS = ("unet", "vae", "text_encoder")
"""the artifacts of a base model"""
MANIFEST = "manifest.json"
_SUFFIXES = (".safetensors", ".onnx", ".json")
"""of artifacts; what follows another dot is part of a name"""

MADE_BY = {
    "unet": "train-base",
    "vae": "train-base",
    "text_encoder": "train-base",
    "recogniser": "train-encoders",
    "metric_recogniser": "train-encoders",
    "image_encoder": "train-encoders",
    "attribute_heads": "train-encoders",
    "self_supervised": "train-encoders",
    "landmarks": "train-encoders",
    "detector": "train-encoders",
    "det_mini": "export-face-pack",
    "rec_mini": "export-face-pack",
    "predictor": "train-dit",
    "predictor_paper": "train-dit",
    "predictor_dit": "train-dit",
    "predictor_paper_dit": "train-dit",
    "predictor_autoencoder": "train-autoencoder",
    "predictor_paper_autoencoder": "train-autoencoder",
    "index": "collect-loras",
}
"""Artifact -> the stage that makes it, for error messages."""


_MATERIAL = re.compile(r"index|detector|.*_(dit|autoencoder)")
"""Artifacts that only a later stage needs; they stay in the run folder."""


class MissingArtifact(DiffLoRAError):
    """A stage's result that is neither in the run nor shipped."""


def artifact(config: Config, name: str, shipped: Path | None = None) -> Path:
    """Path of an artifact: the run's own if there is one, else the shipped one.

    `name` is relative to the artifacts folder; without a suffix it means `.safetensors`.
    Errors: MissingArtifact that names the stage to run.
    """
    name = _file_name(name)
    for folder in (artifacts_folder(config), shipped or SHIPPED):
        if (folder / name).exists():
            return folder / name
    stage = MADE_BY.get(Path(name).stem)
    hint = f"Run `python -m training {stage} --config ...` first." if stage else ""
    raise MissingArtifact(
        f"There is no {name} yet, neither in {config.run.root} nor shipped.", hint=hint
    )


def digests(config: Config, names: Iterable[str]) -> dict[str, str]:
    """File name -> first digits of its sha256, of those artifacts that exist."""
    found = {}
    for name in names:
        with suppress(MissingArtifact):
            path = artifact(config, name)
            found[path.name] = sha256(path)[:16]
    return found


def artifacts_folder(config: Config) -> Path:
    """Where this configuration's artifacts are written."""
    return Path(config.run.root) / "artifacts"


def read_artifact(config: Config, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of an artifact. Errors: DiffLoRAError, BadWeightsFile."""
    path = artifact(config, name)
    tensors, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise BadWeightsFile(f"{path.name} has no config in its header.")
    return tensors, header_json(path, metadata, "config")


def save_artifact(
    config: Config,
    name: str,
    tensors: Mapping[str, Tensor],
    config_dict: Mapping[str, Any],
    figures: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write `<run.root>/artifacts/<name>` (floating tensors as `dtype`) and its manifest entry."""
    path = artifacts_folder(config) / _file_name(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: _stored(tensor, dtype) for key, tensor in tensors.items()}
    write_safetensors(path, stored, {"config": json.dumps(config_dict)}, overwrite=True)
    record_artifact(config, _file_name(name), figures)
    return path


def record_artifact(config: Config, name: str, figures: Mapping[str, Any] | None = None) -> None:
    """Write the manifest entry of a file that lies in the artifacts folder (ONNX files, say)."""
    folder = artifacts_folder(config)
    entry = {
        "command": command_line(),
        "seed": config.run.seed,
        "machine": device_name(config.run.torch_device()),
        "sha256": sha256(folder / name),
        "figures": dict(figures or {}),
    }
    with FileLock(folder / f".{MANIFEST}.lock"):  # several encoders may train at once
        write_manifest(folder, read_manifest(folder) | {Path(name).as_posix(): entry})


def ship(config: Config, folder: RunFolder, shipped: Path | None = None) -> None:
    """Stage `ship`: copy the shipped kinds of artifacts into `difflora_core/mini/`.

    Copied is what the run's manifest lists, training material left out, and either all of it or
    nothing. Errors: DiffLoRAError when there is nothing, when a file is not the one that the
    manifest tells of, or when the folder would grow past SHIPPED_LIMIT; OSError.
    """
    source, target = artifacts_folder(config), shipped or SHIPPED
    entries = {n: e for n, e in read_manifest(source).items() if _is_shipped(n)}
    if not entries:
        raise DiffLoRAError(
            f"There is nothing to ship in {source}.", hint="Check run.root, or train something."
        )
    sizes = {p.relative_to(target).as_posix(): p.stat().st_size for p in _weights(target)}
    sizes |= {name: (source / name).stat().st_size for name in entries}
    total = sum(sizes.values())
    if total > SHIPPED_LIMIT:
        largest = max(sizes, key=lambda name: sizes[name])
        raise DiffLoRAError(
            f"The shipped files would take {total / 1e6:.1f} MB, the limit is "
            f"{SHIPPED_LIMIT / 1e6:.0f} MB.",
            hint=f"The largest is {largest} with {sizes[largest] / 1e6:.1f} MB.",
        )
    with ExitStack() as files:  # which take their places once all are copied
        for name, entry in entries.items():
            copy = files.enter_context(whole_file(target / name))
            _refuse_other(source / name, entry)
            with (source / name).open("rb") as file:
                shutil.copyfileobj(file, copy)
            copy.flush()  # here, so that at the end nothing but the names has to change
            os.fsync(copy.fileno())
    write_manifest(target, read_manifest(target) | entries)
    logger.info("%s: %d files, %.1f MB shipped", folder.name, len(entries), total / 1e6)


def _refuse_other(path: Path, entry: Mapping[str, Any]) -> None:
    if sha256(path) != entry["sha256"]:
        raise DiffLoRAError(
            f"{path.name} is another file than {MANIFEST} tells of: its sha256 differs.",
            hint="Run the stage that makes it again, so that both are of one training.",
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """File name -> entry; empty without a manifest."""
    path = folder / MANIFEST
    return read_object(path) if path.exists() else {}


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write the manifest whole or not at all, sorted by name."""
    text = json.dumps(dict(sorted(entries.items())), indent=2, ensure_ascii=False)
    write_whole(folder / MANIFEST, text + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command_line() -> str:
    """The running command, with absolute paths cut to their last part."""
    together = parallel.count()
    start = f"torchrun --nproc-per-node {together}" if together > 1 else "python"
    return " ".join([start, "-m training", *map(_without_folders, sys.argv[1:])])


def _without_folders(word: str) -> str:
    key, equals, value = word.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def _file_name(name: str) -> str:
    return name if Path(name).suffix in _SUFFIXES else f"{name}.safetensors"


def _is_shipped(name: str) -> bool:
    stem = Path(name).stem
    return stem in MADE_BY and not _MATERIAL.fullmatch(stem)


def _weights(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".onnx")]


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
