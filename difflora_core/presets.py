"""The two presets at every size, and a table of their parameter counts.

`python -m difflora_core.presets` builds each one on the meta device and prints the counts.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Literal

import torch

from .autoencoder.conv1d import Conv1dConfig
from .autoencoder.tokens import TokensConfig
from .diffusion import DiffusionConfig
from .dit import DitConfig
from .lora_space import Gauge, LoraSpace
from .mif import MixerConfig
from .predictor import Predictor
from .predictor_config import PredictorConfig, SamplingConfig

Preset = Literal["default", "paper"]
PARTS = ("autoencoder", "mixer", "dit")
SHOWN: tuple[tuple[Preset, Gauge], ...] = (
    ("default", "frozen_down"),
    ("paper", "frozen_down"),
    ("paper", "free"),
)


def preset(name: Preset, space: LoraSpace, face_width: int, image_width: int) -> PredictorConfig:
    """The configuration of a preset for a LoRA space; embeddings of the given widths."""
    make = paper if name == "paper" else default
    return make(space, face_width, image_width)


def default(space: LoraSpace, face_width: int, image_width: int) -> PredictorConfig:
    """What works best: layer tokens, features as tokens and by a linear path, few steps of v."""
    small = space.base == "mini"
    return PredictorConfig(
        space,
        MixerConfig(face_width, image_width),
        TokensConfig(width=96)
        if small
        else TokensConfig(width=512, heads=8, decoder_depth=2, channels=32),
        DitConfig(mlp_ratio=2.0)
        if small
        else DitConfig(width=512, depth=8, heads=8, head_width=64),
        name=f"{space.base}-default",
    )


def paper(space: LoraSpace, face_width: int, image_width: int) -> PredictorConfig:
    """After arXiv 2408.06740: 1-D convolutions over the flat vector, DiT with AdaLN, x0."""
    small = space.base == "mini"
    plain = {"modulation": "per_block", "condition_tokens": False, "direct": False}
    return PredictorConfig(
        space,
        MixerConfig(face_width, image_width, gate_groups=1),
        Conv1dConfig() if small else Conv1dConfig(widths=(32, 64, 128, 256, 256, 256), channels=14),
        DitConfig(width=72, depth=6, heads=3, head_width=24, **plain)
        if small
        else DitConfig(width=1454, depth=16, heads=16, head_width=64, **plain),
        DiffusionConfig("linear", "x0", "uniform", "uniform"),
        SamplingConfig(steps=50),
        name=f"{space.base}-paper",
    )


def count_parameters(config: PredictorConfig) -> dict[str, int]:
    """Parameters of each part and in all, without allocating them."""
    with torch.device("meta"):
        predictor = Predictor(config)
    counts = {p: sum(x.numel() for x in getattr(predictor, p).parameters()) for p in PARTS}
    latent = predictor.latent_shape[0] * predictor.latent_shape[1]
    return {**counts, "all": sum(counts.values()), "values": config.space.size, "latent": latent}


def main() -> None:
    columns = (*PARTS, "all", "values", "latent")
    rows = [f"{'predictor':<28}" + "".join(f"{column:>14}" for column in columns)]
    for base, (name, gauge) in product(("mini", "sd15", "sdxl"), SHOWN):
        counts = count_parameters(preset(name, LoraSpace.for_base(base, gauge=gauge), 512, 512))
        title = f"{base} {name} {gauge}"
        rows.append(f"{title:<28}" + "".join(f"{counts[column]:>14,}" for column in columns))
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
