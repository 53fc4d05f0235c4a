"""Settings of the base model and its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..portraits.vocabulary import STYLES
from ..run_config import OptimConfig, at_least

SIDE = 128
"""Of drawn pictures, in pixels."""
NORM_GROUPS = 32
"""Groups of a U-Net's normalisations, as in Stable Diffusion."""


def _multiples(values: tuple[int, ...], of: int) -> bool:
    return all(value > 0 and value % of == 0 for value in values)


@dataclass(frozen=True)
class VaeConfig:
    """AutoencoderKL, f8, four latent channels."""

    channels: tuple[int, ...] = (16, 32, 64, 64)
    """Width of each level, from 128 px down to 16."""
    groups: int = 8
    """Groups of its normalisations."""
    batch: int = 8
    """Crops per step; a quarter as many where whole pictures are taken."""
    crop: int = 64
    """Side of the crops, most of them around faces; every fourth step takes whole pictures, on
    which the normalisations see what they will see in use. 0 = always whole pictures."""
    pool: int = 65536
    """Drawn pictures kept on the device; the oldest make way for new ones."""
    chunk: int = 512
    """Pictures drawn at a time."""
    reuse: float = 4.0
    """How often a drawn picture is used on average."""
    measured: int = 128
    """Held-out pictures of the figures, and pictures that set the latents' scale."""
    pixel_loss: Literal["mse", "l1"] = "mse"
    """Distance of pixels; from new weights l1 stays on a plateau for thousands of steps."""
    kl_weight: float = 5e-6
    """Weight of the mean KL divergence per latent value."""
    edge_weight: float = 0.0
    """Weight of the L1 distance of picture gradients, which sharpens a trained model."""
    face_weight: float = 3.0
    """Extra weight of pixels inside face boxes: identity lives there."""
    critic_weight: float = 0.0
    """Gradient of the critic's loss as a share of the distance's; 0 = no critic."""
    part: Literal["all", "decoder"] = "all"
    """What trains: with `decoder`, latents stay what they were for a trained U-Net."""
    start: Literal["fresh", "artifact"] = "fresh"
    """From new weights, or from the run's artifact (else the shipped one) of the same shape."""
    minutes: float = 0.0
    """Time for the training: the number of steps is set from the measured speed, at most
    optim.steps; 0 = optim.steps."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            steps=20000, lr=1e-3, muon_lr=0.01, warmup=50, ema=0.998
        )
    )
    """Optimiser."""

    def __post_init__(self) -> None:
        at_least(0, self, "crop", "minutes")
        at_least(1, self, "groups", "batch", "pool", "chunk", "reuse", "measured")
        if self.crop % 8 or self.crop > SIDE:
            raise ValueError(f"crop must be a multiple of 8 up to {SIDE}, or 0, found {self.crop}")
        if len(self.channels) != 4 or not _multiples(self.channels, self.groups):
            raise ValueError(
                f"channels must be four multiples of groups ({self.groups}), found {self.channels}"
            )


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text model on the real CLIP vocabulary; words the world lacks share one row."""

    width: int = 128
    """Hidden size."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        at_least(1, self, "width", "layers", "heads")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")


@dataclass(frozen=True)
class UnetConfig:
    """UNet2DConditionModel of SD 1.5's kind with other widths, and its training."""

    channels: tuple[int, ...] = (64, 128)
    """Width of each level; latents of 16x16 and 8x8."""
    layers: int = 1
    """Residual blocks per level."""
    heads: int = 4
    """Attention heads."""
    pool: int = 200_000
    """Pictures drawn and encoded once, then visited in random order."""
    batch: int = 768
    """Latents per step."""
    styles: tuple[float, ...] = ()
    """How much more often than in the world each style is drawn, in the vocabulary's order (photo,
    black and white, sketch, painting, cartoon); empty = as in the world."""
    mention: float = 0.8
    """Probability that a prompt mentions an attribute of its picture."""
    looks: float = 0.3
    """Probability that a prompt mentions hair and beard."""
    drop_prompt: float = 0.1
    """Share of empty prompts, for classifier-free guidance."""
    drop_token: float = 0.01
    """Share of tokens replaced by the row of unknown words."""
    min_snr: float = 5.0
    """Gamma of the min-SNR loss weight (Hang et al. 2023, eq. 5); 0 = plain epsilon loss."""
    face_weight: float = 3.0
    """Extra weight of latents inside face boxes: eyes and mouth are few of them."""
    compile: bool = False
    """Compile the network first: minutes of waiting, on a CPU a C++ compiler too, and then steps
    that are about a third shorter."""
    measured: int = 512
    """Held-out pictures of the figures."""
    start: Literal["fresh", "artifact"] = "fresh"
    """As for the VAE; text encoder included."""
    minutes: float = 0.0
    """As for the VAE; drawing the pool comes on top."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            steps=12000, lr=8e-4, warmup=300, ema=0.9995, weight_decay=0.01
        )
    )
    """Optimiser of U-Net and text encoder together."""

    def __post_init__(self) -> None:
        at_least(0, self, "styles", "minutes")
        at_least(1, self, "layers", "heads", "batch", "pool", "measured")
        if not self.channels or not _multiples(self.channels, NORM_GROUPS):
            raise ValueError(
                f"channels must be multiples of {NORM_GROUPS}, at least one, found {self.channels}"
            )
        if self.styles and (len(self.styles) != len(STYLES) or not any(self.styles)):
            raise ValueError(
                f"styles must be empty or {len(STYLES)} weights, not all 0, found {self.styles}"
            )


@dataclass(frozen=True)
class BaseConfig:
    """Stage train-base."""

    only: tuple[str, ...] = ("vae", "unet")
    """Which parts to train, in this order."""
    vae: VaeConfig = field(default_factory=VaeConfig)
    """The picture autoencoder."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text encoder, trained with the U-Net."""
    unet: UnetConfig = field(default_factory=UnetConfig)
    """The denoiser."""
