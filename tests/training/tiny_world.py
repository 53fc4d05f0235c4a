"""All artifacts of the mini world with random weights, small enough to run in a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from difflora_core.autoencoder.tokens import TokensConfig
from difflora_core.dit import DitConfig
from difflora_core.face import Face, FaceEncoder
from difflora_core.image_encoder import ImageEncoder, ImageEncoderConfig
from difflora_core.lora_space import LoraSpace
from difflora_core.mif import MixerConfig
from difflora_core.photos import Pixels
from difflora_core.predictor import Predictor
from difflora_core.predictor_config import PredictorConfig
from difflora_core.recogniser import ConvNeXtConfig, IResNetConfig, Recogniser, RecogniserConfig
from training import artifacts
from training.artifacts import artifacts_folder, save_artifact
from training.base.config import TextConfig, UnetConfig, VaeConfig
from training.base.models import (
    build_compact_text,
    build_unet,
    build_vae,
    text_config,
    text_tensors,
    unet_config,
    vae_config,
)
from training.config import Config, load_config
from training.encoders.attributes_net import PortraitNet, PortraitNetConfig, checker_outputs
from training.encoders.face_pack import DETECTOR_FILE, face_encoder_name
from training.evaluation import measures
from training.loras.collect import LoraSet, write_set
from training.loras.stage import lora_space

FACE_WIDTH, IMAGE_WIDTH = 16, 16
TEMPLATE = np.array([[44, 56], [84, 56], [64, 76], [48, 92], [80, 92]], np.float32)


@dataclass(frozen=True)
class StandInFaces:
    """Stands for FaceEncoder: one face in the middle; its embedding is a fixed projection."""

    name: str = "tiny"

    def find(self, image: Pixels) -> list[Face]:
        return self.faces(image)

    def faces(self, image: Pixels) -> list[Face]:
        rng = np.random.default_rng(0)
        small = image[::8, ::8].astype(np.float32).ravel() / 255
        embedding = rng.standard_normal((FACE_WIDTH, small.size)).astype(np.float32) @ small
        box = np.array([32, 32, 96, 104], np.float32)
        return [
            Face(
                box=box,
                landmarks=TEMPLATE,
                score=0.9,
                embedding=embedding,
                sharpness=50.0,
                picture=(image.shape[1], image.shape[0]),
            )
        ]


def evaluated_world(folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    """A configuration in `folder` with a world that evaluations can judge; nothing is shipped."""
    file = folder / "tiny.toml"
    file.write_text(f'[run]\nroot = "{folder / "run"}"\n')
    config = load_config(file, words)
    write_world(config)
    monkeypatch.setattr(measures, "PREFERENCE_PICTURES", 16)
    let_stand_ins_judge(config, monkeypatch)
    return config


def let_stand_ins_judge(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the face pack of this run, and of everything shipped."""
    pack = artifacts_folder(config) / DETECTOR_FILE
    pack.parent.mkdir(parents=True)
    pack.touch()
    monkeypatch.setattr(artifacts, "SHIPPED", Path(config.run.root) / "nothing is shipped")
    faces = StandInFaces(face_encoder_name(config))
    monkeypatch.setattr(FaceEncoder, "open", lambda *args, **kwargs: faces)


def write_world(config: Config, space: LoraSpace | None = None) -> LoraSpace:
    """Write every artifact but the ONNX pack; returns the LoRA space of the predictor."""
    torch.manual_seed(0)
    _write_base(config)
    _write_judges(config)
    space = space or lora_space(config.loras)
    for name in ("predictor", "predictor_paper"):
        _tiny_predictor(space).save(artifacts_folder(config) / f"{name}.safetensors")
    known = LoraSet(space, 0.01 * torch.randn(3, space.size), torch.arange(3))
    write_set(artifacts_folder(config), known, config.loras)
    return space


def _write_base(config: Config) -> None:
    text = TextConfig(width=128, layers=1, heads=2)
    settings = unet_config(UnetConfig(), text)
    save_artifact(config, "unet", build_unet(settings).state_dict(), settings)
    settings = vae_config(VaeConfig(channels=(32, 32, 32, 32))) | {"scaling_factor": 1.0}
    save_artifact(config, "vae", build_vae(settings).state_dict(), settings)
    settings = text_config(text)
    state = text_tensors(build_compact_text(settings).state_dict())
    save_artifact(config, "text_encoder", state, settings)


def _write_judges(config: Config) -> None:
    folder = artifacts_folder(config)
    metric = ConvNeXtConfig(widths=(8, 8, 8), layers=(1, 1, 1), embedding=12)
    Recogniser(RecogniserConfig(metric)).save(folder / "metric_recogniser.safetensors")
    condition = IResNetConfig(stem=4, widths=(4, 4, 4), layers=(1, 1, 1), embedding=FACE_WIDTH)
    Recogniser(RecogniserConfig(condition)).save(folder / "recogniser.safetensors")
    for name, outputs in (("attribute_heads", checker_outputs()), ("self_supervised", {})):
        net = PortraitNet(PortraitNetConfig((4, 4, 4, 4), outputs))
        net.save(folder / f"{name}.safetensors")
    tower = {"image_size": 128, "patch_size": 32, "width": 32, "layers": 1, "head_width": 16}
    words = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    model = {"embed_dim": IMAGE_WIDTH, "vision_cfg": tower, "text_cfg": words}
    encoder = ImageEncoder.create(ImageEncoderConfig(model, name="tiny"))
    encoder.save(folder / "image_encoder.safetensors")


def _tiny_predictor(space: LoraSpace) -> Predictor:
    config = PredictorConfig(
        space,
        MixerConfig(FACE_WIDTH, IMAGE_WIDTH, width=16, gate_groups=16),
        TokensConfig(width=16, heads=2),
        DitConfig(width=16, depth=1, heads=2),
    )
    return Predictor(config)
