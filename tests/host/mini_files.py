"""A mini world of random weights, written as the shipped one is: for parity, not for pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from difflora_core.face_crop import TEMPLATE, TEMPLATE_SIZE
from difflora_core.image_encoder import ImageEncoder, ImageEncoderConfig
from difflora_core.lora_space import LoraSpace
from difflora_core.predictor import Predictor
from difflora_core.predictor_config import EncoderInfo
from difflora_core.presets import preset
from difflora_core.recogniser import IResNetConfig, Recogniser, RecogniserConfig

UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE_CONFIG = {
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.9,
}
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
KNOWN_TOKENS = 64
IMAGE_ENCODER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"width": 16, "heads": 1, "layers": 1},
}
FACE_WIDTH, LORA_SIZE = 8, 0.1


def build_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(config).eval()


def build_vae(config: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL.from_config(config).eval()


def build_text_encoder(config: dict[str, Any]) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**config)).eval()


def write_random_world(folder: Path, seed: int = 0, channels: int = 4) -> None:
    """Write the files of a mini world, with latents of so many channels, into `folder`."""
    torch.manual_seed(seed)
    unet = UNET_CONFIG | {"in_channels": channels, "out_channels": channels}
    vae = VAE_CONFIG | {"latent_channels": channels}
    _write(folder / "unet.safetensors", build_unet(unet), unet)
    _write(folder / "vae.safetensors", build_vae(vae), vae)
    encoder = build_text_encoder(TEXT_CONFIG)
    _write(folder / "text_encoder.safetensors", encoder, TEXT_CONFIG)
    image_encoder = ImageEncoder.create(ImageEncoderConfig(IMAGE_ENCODER))
    image_encoder.save(folder / "image_encoder.safetensors")
    random_predictor(image_encoder.config.name).save(folder / "predictor.safetensors")
    shape = IResNetConfig(stem=4, widths=(8, 8, 8), embedding=FACE_WIDTH)
    Recogniser(RecogniserConfig(shape, name="random")).save(folder / "recogniser.safetensors")


def random_predictor(image_encoder: str, face_encoder: str = "mini") -> Predictor:
    """An untrained predictor of LoRAs big enough to change pictures."""
    config = preset("default", LoraSpace.for_mini(), FACE_WIDTH, IMAGE_ENCODER["embed_dim"])
    faces, images = EncoderInfo(face_encoder), EncoderInfo(image_encoder)
    predictor = Predictor(replace(config, face_encoder=faces, image_encoder=images))
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.1)
    predictor.value_statistics.std.fill_(LORA_SIZE)
    return predictor


class FakeAnalysis:
    """Stands in for insightface's FaceAnalysis: faces are where a picture is mostly red."""

    model_dir = "insightface/models/mini"

    def __init__(self) -> None:
        self.models = {"detection": self, "recognition": self}

    def detect(self, bgr: np.ndarray, input_size: tuple[int, int]) -> tuple[Any, Any]:
        """One face per third of the picture that is red, as boxes [N, 5] and points [N, 5, 2]."""
        height, width = bgr.shape[:2]
        thirds = [(x, x + width / 3) for x in (0, width / 3, 2 * width / 3)]
        red = [bgr[:, int(a) : int(b), 2].mean() > 200 for a, b in thirds]
        pairs = zip(thirds, red, strict=True)
        boxes = [[a, height / 4, b, 3 * height / 4, 0.9] for (a, b), is_red in pairs if is_red]
        shape = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.55], [0.35, 0.7], [0.65, 0.7]])
        points = [[[a + u * (b - a), v * height] for u, v in shape] for a, _, b, _, _ in boxes]
        return np.array(boxes).reshape(-1, 5), np.array(points).reshape(-1, 5, 2)

    def get(self, bgr: np.ndarray, face: Any) -> np.ndarray:
        """Mean and spread of the colours in the box, as an embedding."""
        x1, y1, x2, y2 = face.bbox.astype(int)
        inside = bgr[y1:y2, x1:x2].reshape(-1, 3).astype(np.float32) / 255
        return np.concatenate([inside.mean(0), inside.std(0), [0.1, 0.2]]) - 0.4


class FixedFaces(FakeAnalysis):
    """Finds faces at the same places of every picture: boxes as shares of width and height."""

    def __init__(self, *boxes: tuple[float, float, float, float]) -> None:
        super().__init__()
        self.boxes = boxes

    def detect(self, bgr: np.ndarray, input_size: tuple[int, int]) -> tuple[Any, Any]:
        """Boxes with scores [N, 5] and points [N, 5, 2], in pixels, faces upright."""
        height, width = bgr.shape[:2]
        template = np.array(TEMPLATE) / TEMPLATE_SIZE
        boxes = [np.array(box) * (width, height, width, height) for box in self.boxes]
        points = [box[:2] + template * (box[2:] - box[:2]) for box in boxes]
        scored = [np.append(box, 0.9) for box in boxes]
        return np.array(scored).reshape(-1, 5), np.array(points).reshape(-1, 5, 2)

    def get(self, bgr: np.ndarray, face: Any) -> np.ndarray:
        return np.ones(FACE_WIDTH, np.float32)


def _write(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if isinstance(model, CLIPTextModel):
        tensors = _compact({key.removeprefix("text_model."): t for key, t in tensors.items()})
    halves = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
    save_file(halves, path, {"config": json.dumps(config)})


def _compact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    table = tensors.pop("embeddings.token_embedding.weight")
    tensors.pop("embeddings.position_ids", None)
    index = torch.randint(KNOWN_TOKENS, (len(table),), dtype=torch.int32)
    return {"token_rows": table[:KNOWN_TOKENS].clone(), "token_index": index, **tensors}
