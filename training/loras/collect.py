"""Stage collect-loras: checks the LoRAs of many people and packs them into shards."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difflora_core.errors import DiffLoRAError
from difflora_core.lora_space import LoraSpace
from difflora_core.weights_file import read_lora, read_safetensors, write_safetensors

from ..artifacts import artifact, artifacts_folder
from ..config import Config
from ..json_file import read_object
from ..run_folder import RunFolder, write_whole
from .config import LorasConfig
from .learnable import explained_by_identity
from .stage import lora_space, recipe, recipe_of

logger = logging.getLogger(__name__)
INDEX = "loras/index.json"
#: more of its energy outside the space than this, and a LoRA is left out
LARGEST_LOSS = 0.05


@dataclass(frozen=True)
class LoraSet:
    """Packed LoRAs: vectors [N, D] float32 and the identity seeds [N] of their people."""

    space: LoraSpace
    vectors: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.seeds)


def run(config: Config, folder: RunFolder) -> None:
    """Read every LoRA of the data set, refuse what does not fit, write shards and the index."""
    space = lora_space(config.loras)
    files = sorted(Path(config.run.root, "train-identity-loras", "people").glob("*.safetensors"))
    if not files:
        raise DiffLoRAError(
            "There are no identity LoRAs to collect.", hint="Run train-identity-loras first."
        )
    seeds, vectors, refused, how = [], [], {}, recipe(config)
    for file in files:
        try:
            vectors.append(_usable_vector(file, space, how))
        except DiffLoRAError as error:
            refused[file.name] = error.message
            continue
        seeds.append(int(file.stem))
    for name, reason in list(refused.items())[:3]:
        logger.warning("%s left out: %s", name, reason)
    if not vectors:
        name, reason = next(iter(refused.items()))
        raise DiffLoRAError(
            f"None of the {len(files)} identity LoRAs can be used; of {name}: {reason}",
            hint="Run train-identity-loras again with this config and an empty folder.",
        )
    collected = LoraSet(space, torch.stack(vectors), torch.tensor(seeds))
    write_set(artifacts_folder(config), collected, config.loras, len(refused))


def _usable_vector(file: Path, space: LoraSpace, how: str) -> Tensor:
    """The LoRA of a person's file in the space. Errors: DiffLoRAError saying why it is left out."""
    if not file.stem.isdecimal():
        raise DiffLoRAError("its name is not the number of a person")
    projection = space.project(read_lora(file))
    if projection.lost > LARGEST_LOSS:
        raise DiffLoRAError(f"{projection.lost:.0%} of its energy lies outside the space")
    if (found := recipe_of(file)) != how:
        raise DiffLoRAError(f"it was trained otherwise: {found or 'by an earlier version'}")
    return projection.vector


def write_set(folder: Path, loras: LoraSet, config: LorasConfig, refused: int = 0) -> None:
    """Shards first, the index last: an index that is there describes whole shards."""
    shards = []
    edition = _edition(loras)  # an earlier set stays readable until the index changes
    (folder / "loras").mkdir(parents=True, exist_ok=True)
    for i in range(0, len(loras), config.shard):
        name = f"loras/shard_{edition}_{i // config.shard:03d}.safetensors"
        part = slice(i, i + config.shard)
        tensors = {"vectors": loras.vectors[part].half(), "seeds": loras.seeds[part]}
        write_safetensors(folder / name, tensors, {"space": loras.space.id}, overwrite=True)
        shards.append(name)
    norms = loras.vectors.norm(dim=1)
    explained = explained_by_identity(loras.vectors, loras.seeds)
    index = {
        "space": loras.space.id,
        "count": len(loras),
        "refused": refused,
        "shards": shards,
        "norm": {"mean": norms.mean().item(), "std": norms.std(correction=0).item()},
        "mean_cosine_to_average": _cosine_to_average(loras.vectors),
        "explained_by_identity": explained,
    }
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for old in set((folder / "loras").glob("*.safetensors")) - {folder / name for name in shards}:
        old.unlink()
    logger.info("%d LoRAs in %d shards, %d refused", len(loras), len(shards), refused)
    if explained is not None:
        logger.info("%.0f %% of what differs between them is who it is", 100 * explained)


def _edition(loras: LoraSet) -> str:
    """Of the content, so that collecting the same LoRAs again makes the same set."""
    digest = hashlib.sha256(loras.vectors.half().cpu().numpy().tobytes())
    digest.update(loras.seeds.cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def read_set(config: Config) -> LoraSet:
    """The collected data set of a run. Raises DiffLoRAError when it belongs to another space."""
    space = lora_space(config.loras)
    path = artifact(config, INDEX)
    index = read_object(path, "space", "shards")
    if index["space"] != space.id:
        raise DiffLoRAError(
            f"The collected LoRAs are of space {index['space']}, the config asks for {space.id}.",
            hint="Run collect-loras again with this config, or use the config they were made with.",
        )
    shards = [read_safetensors(path.parent.parent / name)[0] for name in index["shards"]]
    vectors = torch.cat([shard["vectors"] for shard in shards]).float()
    return LoraSet(space, vectors, torch.cat([shard["seeds"] for shard in shards]))


def _cosine_to_average(vectors: Tensor) -> float:
    average = vectors.mean(0, keepdim=True)
    return torch.cosine_similarity(vectors, average).mean().item()
