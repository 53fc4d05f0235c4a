"""Settings of the data set of people, of the ControlNet's training and of its evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..run_config import OptimConfig, at_least


@dataclass(frozen=True)
class PeopleFiles:
    """One split of MS COCO 2017."""

    instances: str = ""
    """Annotation file of masks, instances_train2017.json or instances_val2017.json."""
    captions: str = ""
    """Annotation file of captions."""
    wholebody: str = ""
    """COCO-WholeBody's annotation file; without it no person has a face."""
    pictures: str = ""
    """Folder of the pictures."""


@dataclass(frozen=True)
class PeopleConfig:
    """Stage build-people-dataset."""

    count: int = 37470
    """Training pictures wanted: the threshold that lets nearest to so many pass is found, and used
    for both splits. 0 = the threshold below."""
    threshold: float = 0.0
    """Least share of a picture that its people cover, 0..1; used where count is 0."""
    train: PeopleFiles = field(default_factory=PeopleFiles)
    """Files to train on."""
    validation: PeopleFiles = field(default_factory=PeopleFiles)
    """Files to evaluate on."""

    def __post_init__(self) -> None:
        at_least(0, self, "count")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The mask-aware loss for t < last: body * L_body + face * L_face + landmark * L_landmark, and
    L_LDM with what they leave of 1.

    Features are compared at unit length, so that a weight means the same for every network.
    """

    body: float = 0.2
    """Weight of the distance of the decoder's features inside the masks of people (lambda 1)."""
    face: float = 0.5
    """Weight of the distance of faces in the eyes of the face network (lambda 2)."""
    landmark: float = 0.0
    """Weight of the distance of landmarks as the landmark network reads them, in face widths."""
    last: int = 100
    """T: the terms count at timesteps below, where the estimate of the picture can be trusted."""
    share: float = 0.4
    """Share of samples drawn from the timesteps below `last`, with weights that leave the expected
    loss as it is; up to last / 1000, the natural share, = uniform timesteps."""
    min_snr: float = 5.0
    """Gamma of the min-SNR weight of L_LDM; 0 = plain epsilon loss."""
    per_person: bool = True
    """Every person counts alike; if not, every pixel of the union of all people."""
    tap_weights: tuple[float, ...] = ()
    """Weights of the face network's stages, shallow to deep; empty: alike, 1 together."""
    embedding_weight: float = 1.0
    """Weight of the face network's embedding beside its stages."""

    def __post_init__(self) -> None:
        at_least(0, self, "tap_weights", "embedding_weight")
        if self.tap_weights and not any(self.tap_weights) and not self.embedding_weight:
            raise ValueError("tap_weights and embedding_weight are all 0: no face term is left")


@dataclass(frozen=True)
class ControlnetEvalConfig:
    """Stage evaluate-controlnet, on the mini world."""

    portraits: int = 64
    """Held-out pictures of one person, drawn from the seed."""
    groups: int = 32
    """Held-out pictures of two or three people; 0 = none."""
    seed: int = 0
    """Draws people, scenes, prompts and painting noise; any seed is a fresh held-out set."""
    fid_pictures: int = 2000
    """Freshly drawn portraits that stand for real pictures in fid."""
    factor_pictures: int = 1500
    """Drawn portraits that the reader of identity factors is fitted on."""
    sheet: int = 8
    """Pictures on the sheet; 0 = no sheet."""

    def __post_init__(self) -> None:
        at_least(0, self, "groups")
        at_least(2, self, "fid_pictures")
        at_least(4, self, "factor_pictures")


@dataclass(frozen=True)
class ControlnetConfig:
    """Stage train-controlnet: a ControlNet without a hint that sees x_t, t and the prompt."""

    model: str = ""
    """Folder of a Stable Diffusion 1.5 model in diffusers' layout; empty: the mini model."""
    data: Literal["drawn", "people"] = "drawn"
    """drawn: portraits, drawn for this stage. people: what build-people-dataset has made."""
    variants: tuple[str, ...] = ("baseline", "mask_aware")
    """What to train: baseline (L_LDM only), mask_aware (the objective below), changes of it such
    as "last=200" or "body=0.1 face=0.7", or the authors' settings with uniform timesteps and no
    SNR weight: paper (0.2, 0.5, T = 100), second (T = 400), logged, script."""
    seeds: tuple[int, ...] = (0,)
    """Every variant is trained once per seed; variants of one seed start alike and see the same
    pictures."""
    resolution: int = 128
    """Side of the pictures in pixels."""
    batch: int = 64
    """Pictures per step."""
    pool: int = 50_000
    """Portraits drawn and encoded once (data drawn)."""
    mention: float = 0.8
    """Probability that a prompt mentions an attribute of its portrait (data drawn)."""
    drop_prompt: float = 0.1
    """Share of empty prompts, for classifier-free guidance."""
    smallest_face: float = 0.1
    """Narrowest face that is compared, as a share of the picture."""
    face_network: str = ""
    """Recogniser of the face term, .safetensors of ours or .onnx as in insightface's packs;
    empty: the recogniser of the mini world."""
    landmark_network: str = ""
    """Network of the landmark term, .safetensors of ours or 2d106det.onnx of insightface's packs;
    empty: that of the mini world."""
    vgg: tuple[str, ...] = ()
    """VGG-16 and the weights of the package lpips, as .safetensors: the body term is then LPIPS, as
    the authors had it; empty: the maps of the VAE's decoder, which need no file."""
    checkpointing: bool = False
    """Keep fewer activations and compute them again (SD 1.5 on small cards)."""
    check: int = 64
    """Held-out pictures of the figures and of the sample sheet."""
    sample_every: int = 2000
    """Steps between sample sheets; 0 = only the one at the end."""
    from_step: int = 600
    """Timestep that sample sheets and evaluation noise true pictures to, before painting on."""
    paint_steps: int = 20
    """Steps from pure noise to a picture; from `from_step` on it takes its share of them."""
    guidance: float = 3.0
    """Classifier-free guidance scale of a picture."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss of the variant mask_aware."""
    evaluation: ControlnetEvalConfig = field(default_factory=ControlnetEvalConfig)
    """What is measured of `variants` and `seeds`."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=6000, lr=2e-4, warmup=200, ema=0.999)
    )
    """Optimiser."""

    def __post_init__(self) -> None:
        at_least(0, self, "sample_every", "seeds")
        at_least(1, self, "batch", "pool", "check", "paint_steps")
        last = round(1000 / self.paint_steps) - 1  # as repaint.py spaces them
        if last > self.from_step:
            raise ValueError(
                f"from_step {self.from_step} leaves no step to paint: the last of "
                f"{self.paint_steps} paint_steps lies at timestep {last}"
            )
