"""OpenCLIP image-text models: ours from one file, real ones from their name and checkpoint.

Nothing is ever downloaded. open_clip is imported when a model is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import from_dict, to_dict
from .errors import BadWeightsFile, DiffLoRAError
from .tensor_file import TensorFile
from .weights_file import expecting, header_json, read_safetensors, write_safetensors

TOKEN_TABLE = "token_embedding.weight"
#: OpenAI's picture statistics, which nearly all CLIP models keep
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HINT = (
    "Choose image_encoder.safetensors or a file that train-encoders wrote; for an OpenCLIP "
    "checkpoint also choose the name of its model, such as ViT-L-14."
)


@dataclass(frozen=True)
class ImageEncoderConfig:
    """What the header of our image-text model says."""

    model: dict[str, Any]
    """Arguments of open_clip.model.CLIP: embed_dim, vision_cfg, text_cfg."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Subtracted from pictures in 0..1."""
    std: tuple[float, ...] = CLIP_STD
    """Then divided by."""
    name: str = "mini image encoder"
    """What the model is called in reports."""
    figures: dict[str, float] = field(default_factory=dict)
    """Measured on held-out pictures and prompts when it was trained."""


class ImageEncoder(nn.Module):
    """Pictures to embedding and patch tokens; prompts to embeddings."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.clip: Any = clip
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        if hasattr(self.visual, "output_tokens"):
            self.visual.output_tokens = True

    @classmethod
    def create(cls, config: ImageEncoderConfig) -> ImageEncoder:
        """An untrained model. Errors: DiffLoRAError when open_clip is missing."""
        return cls(_open_clip().model.CLIP(**config.model), config)

    @classmethod
    def open(cls, path: str | Path, model: str = "") -> ImageEncoder:
        """Read our file, or with `model` (an open_clip model name) an OpenCLIP checkpoint.

        Returns: float32, in evaluation mode, frozen.
        Errors: BadWeightsFile; DiffLoRAError when open_clip is missing or lacks the model.
        """
        encoder = _open_checkpoint(Path(path), model) if model else _open_ours(Path(path))
        return encoder.float().eval().requires_grad_(False)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write fp16 weights, equal rows of the token table once, the config in the header."""
        tensors = {k: v.half() for k, v in self.clip.state_dict().items()}
        rows, index = compact_rows(tensors.pop(TOKEN_TABLE))
        tensors |= {"token_rows": rows, "token_index": index}
        metadata = {"config": json.dumps(to_dict(self.config))}
        write_safetensors(path, tensors, metadata, overwrite=overwrite)

    @property
    def visual(self) -> Any:
        """open_clip's picture tower."""
        return self.clip.visual

    @property
    def image_size(self) -> int:
        """Side of the square picture that the tower takes, in pixels."""
        size = self.visual.image_size
        return int(size if isinstance(size, int) else size[0])

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] in 0..1 -> unit embeddings [B, D] and patch tokens [B, N, W].

        The middle square is taken. Towers without tokens give the embedding as their only token.
        Differentiable.
        """
        output = self.visual(self.prepare(images))
        pooled, tokens = output if isinstance(output, tuple) else (output, output[:, None])
        return F.normalize(pooled, dim=-1), tokens

    def encode_text(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Prompts (or their tokens [B, 77]) -> unit embeddings [B, D]."""
        tokens = prompts if isinstance(prompts, Tensor) else tokenise(prompts)
        return F.normalize(self.clip.encode_text(tokens.to(self.mean.device)), dim=-1)

    def prepare(self, images: Tensor) -> Tensor:
        """Middle square, bicubic with antialiasing to the tower's size, normalised."""
        side = min(images.shape[-2:])
        top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
        images = images[..., top : top + side, left : left + side].float()
        if side != self.image_size:
            shape = (self.image_size, self.image_size)
            images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.mean) / self.std


def tokenise(prompts: Sequence[str]) -> Tensor:
    """CLIP's own BPE: tokens [B, 77] (start 49406, end 49407, padded with 0)."""
    return _tokenizer()(list(prompts))


@cache
def _tokenizer() -> Any:
    return _open_clip().SimpleTokenizer()


def compact_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """Token table [V, W] -> its distinct rows [n, W] and int32 [V], the row of each token."""
    rows, index = torch.unique(table, dim=0, return_inverse=True)
    return rows, index.to(torch.int32)


def _open_ours(path: Path) -> ImageEncoder:
    tensors, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise BadWeightsFile(
            f"{path.name} is not an image encoder of ours: its header has no config.", hint=HINT
        )
    state = dict(tensors)
    with expecting(path, "an image encoder of ours", HINT):
        found = header_json(path, metadata, "config")
        encoder = ImageEncoder.create(from_dict(ImageEncoderConfig, found, "image_encoder"))
        if "token_rows" in state and "token_index" in state:
            state[TOKEN_TABLE] = state.pop("token_rows")[state.pop("token_index").long()]
    _load(encoder.clip, state, path)
    return encoder


def _load(clip: Any, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        clip.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise BadWeightsFile(
            f"{path.name} does not fit the config in its header: {first}"
        ) from error


def _open_checkpoint(path: Path, model: str) -> ImageEncoder:
    open_clip = _open_clip()
    if model not in open_clip.list_models():
        raise DiffLoRAError(
            f"open_clip has no model {model!r}.", hint="Names look like ViT-L-14 or ViT-H-14."
        )
    if not path.is_file():
        raise BadWeightsFile(f"There is no checkpoint at {path}.")
    if path.suffix == ".safetensors":
        TensorFile(path)  # says what a damaged file is
    try:
        clip = open_clip.create_model(model, pretrained=str(path))
    except (RuntimeError, OSError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise BadWeightsFile(f"{path.name} is no checkpoint of {model}: {first}") from error
    except Exception as error:  # of pickle, whose advice is to run the code that the file holds
        raise BadWeightsFile(
            f"{path.name} is no checkpoint of {model}: it holds no plain tensors.",
            hint="Download it again; a web page or another kind of file may lie in its place.",
        ) from error
    mean = getattr(clip.visual, "image_mean", None) or CLIP_MEAN
    std = getattr(clip.visual, "image_std", None) or CLIP_STD
    return ImageEncoder(clip, ImageEncoderConfig({}, tuple(mean), tuple(std), model))


def _open_clip() -> Any:
    try:
        import open_clip
        import open_clip.model
    except ImportError as error:
        raise DiffLoRAError(
            "Reading pictures needs the package open_clip_torch, which cannot be imported "
            f"({error}).",
            hint="Install it with: pip install open_clip_torch",
        ) from error
    return open_clip
