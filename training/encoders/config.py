"""Settings of the stages train-encoders and export-face-pack."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..run_config import OptimConfig, at_least

NAMES = (
    "detector", "recogniser", "metric_recogniser", "image_encoder", "attribute_heads",
    "self_supervised", "landmarks",
)  # fmt: skip
"""Encoders, in the order in which they are trained."""


@dataclass(frozen=True)
class DetectorConfig:
    """The face detector: SCRFD (Guo et al., 2021) in small."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=12000, lr=2e-3))
    """Optimiser; steps is the most that minutes allows."""
    batch: int = 128
    """Pictures per step at the smallest canvas; larger canvases take fewer."""
    widths: tuple[int, ...] = (16, 24, 40, 64, 80)
    """Channels at strides 2, 4, 8, 16, 32."""
    canvases: tuple[int, ...] = (128, 192, 256, 320, 640)
    """Sides of the square training pictures, drawn in turn; multiples of 32."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch")


@dataclass(frozen=True)
class RecogniserTraining:
    """A recogniser: margin softmax over drawn people (ArcFace, Deng et al., 2019)."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=20000, lr=2e-3))
    """Optimiser; steps is the most that minutes allows."""
    batch: int = 512
    """Pictures per step."""
    people: int = 16384
    """Different people in training, seeds 0 onwards of the training split."""
    margin: float = 0.3
    """Angular margin in radians."""
    scale: float = 32.0
    """Scale of the cosines before the softmax."""
    margin_weight: float = 0.1
    """Weight of the margin softmax; it needs millions of pictures before it leads anywhere."""
    factor_weight: float = 1.0
    """Weight of a second teacher that the drawn world offers for free: identity factors as a linear
    function of the embedding, and cosines of embeddings like those of the factors."""
    damage: float = 1.0
    """Strength of the damage done to training pictures."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch", "people")


@dataclass(frozen=True)
class ImageEncoderTraining:
    """The OpenCLIP image-text model, contrastive on picture and prompt."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=20000, lr=1e-3, warmup=300, weight_decay=0.1)
    )
    """Optimiser; steps is the most that minutes allows."""
    batch: int = 1024
    """Pairs per step."""
    width: int = 128
    """Width of the picture tower."""
    layers: int = 5
    """Its layers."""
    patch: int = 16
    """Side of a patch in pixels."""
    text_width: int = 64
    """Width of the text tower."""
    text_layers: int = 2
    """Its layers."""
    embedding: int = 128
    """Length of the shared embedding."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch")


@dataclass(frozen=True)
class AttributesTraining:
    """The checker of prompts: one head per attribute and a regression of the identity."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=20000, lr=2e-3))
    """Optimiser; steps is the most that minutes allows."""
    batch: int = 384
    """Pictures per step."""
    widths: tuple[int, ...] = (24, 48, 80, 128)
    """Channels of the stages; the first is at half the resolution."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch")


@dataclass(frozen=True)
class SelfSupervisedTraining:
    """DINO-style features: a network that never saw a label, by two views of one picture."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=20000, lr=2e-3))
    """Optimiser; steps is the most that minutes allows."""
    batch: int = 512
    """Pictures per step, two views of each."""
    widths: tuple[int, ...] = (24, 48, 80, 128)
    """Channels of the stages; the first is at half the resolution."""
    temperature: float = 0.1
    """Of the contrastive loss."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch")


@dataclass(frozen=True)
class LandmarksTraining:
    """The network of the landmark term: points of a face, read with gradients."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=20000, lr=2e-3))
    """Optimiser; steps is the most that minutes allows."""
    batch: int = 384
    """Faces per step."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch")


@dataclass(frozen=True)
class EncodersConfig:
    """The mini world's encoders."""

    only: tuple[str, ...] = NAMES
    """Which to train: detector, recogniser, metric_recogniser, image_encoder, attribute_heads,
    self_supervised, landmarks."""
    minutes: float = 0.0
    """Time for each encoder: the number of steps is set from the measured speed, at most
    optim.steps; 0 = optim.steps."""
    parallel: bool = False
    """Train all at once in processes of their own; on a GPU, where each alone leaves it idle."""
    pool: int = 65536
    """Drawn pictures kept on the device, per encoder; the oldest make way for new ones."""
    chunk: int = 1024
    """Pictures drawn at a time."""
    reuse: float = 6.0
    """How often a drawn picture is used on average, each time damaged in another way."""
    check_people: int = 500
    """Held-out people of the calibration and of the measured figures."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    """The face detector."""
    recogniser: RecogniserTraining = field(default_factory=RecogniserTraining)
    """The recogniser that predictors are conditioned on; it goes into the face pack."""
    metric_recogniser: RecogniserTraining = field(default_factory=RecogniserTraining)
    """The recogniser that only measures: of another build, on other pictures of the same people."""
    image_encoder: ImageEncoderTraining = field(default_factory=ImageEncoderTraining)
    """The image-text model."""
    attribute_heads: AttributesTraining = field(default_factory=AttributesTraining)
    """The checker of prompts."""
    self_supervised: SelfSupervisedTraining = field(default_factory=SelfSupervisedTraining)
    """The DINO-style features."""
    landmarks: LandmarksTraining = field(default_factory=LandmarksTraining)
    """The network of the landmark term."""

    def __post_init__(self) -> None:
        at_least(0, self, "minutes")
        at_least(1, self, "pool", "chunk", "reuse")
        at_least(2, self, "check_people")  # strangers are pairs
