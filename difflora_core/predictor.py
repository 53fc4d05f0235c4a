"""The predictor: photos' features in, LoRA out; one file holds everything that is needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .autoencoder.conv1d import Conv1dAutoencoder
from .autoencoder.tokens import TokensAutoencoder, TokensConfig
from .config import from_dict, to_dict
from .diffusion import Diffusion
from .dit import Dit
from .errors import BadConfig, BadWeightsFile, LayoutMismatch
from .features import Features
from .key_names import BASES
from .lora import Lora
from .mif import Condition, MixedImageFeatures
from .normalise import Standardise
from .predictor_config import PredictorConfig, SamplingConfig
from .sampler import MAX_STEPS, Progress, guided, sample, seeded_noise
from .weights_file import expecting, header_json, read_safetensors, write_safetensors

STATISTICS = ("mean", "std")  # kept in single precision: small numbers that scale everything
MAX_CANDIDATES = 64
LARGEST_FACTOR = 100
"""of guidance and strength: far beyond what is of any use, well within half precision"""
OTHER_VERSION = "The file is damaged or comes from another, maybe later, version of DiffLoRA."


@dataclass(frozen=True)
class Prediction:
    lora: Lora
    """of the candidate nearest to the mean of all, with the strength already applied"""
    candidates: tuple[Lora, ...]
    report: dict[str, Any]
    """JSON-ready: seed, steps, guidance, strength, chosen, spread, seconds, what predicted it"""


class Predictor(nn.Module):
    """Mixed image features, denoiser and LoRA autoencoder, with their statistics and LoRA space."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.space = config.space
        self.file_hash = ""
        kind = (
            TokensAutoencoder if isinstance(config.autoencoder, TokensConfig) else Conv1dAutoencoder
        )
        self.autoencoder = kind(config.autoencoder, config.space)  # type: ignore[arg-type]
        self.latent_shape: tuple[int, int] = self.autoencoder.latent_shape
        self.value_statistics = Standardise(config.space.size)
        self.latent_statistics = Standardise(*self.latent_shape)
        self.mixer = MixedImageFeatures(config.mixer)
        self.dit = Dit(config.dit, self.latent_shape, config.mixer.width)
        self.diffusion = Diffusion(config.diffusion)

    # --- differentiable parts, all batched, without branches on data -----------------------------

    def encode(self, vectors: Tensor) -> Tensor:
        """LoRA vectors [B, D] -> latents [B, T, C] of unit variance"""
        return self.latent_statistics(self.autoencoder.encode(self.value_statistics(vectors)))

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, T, C] -> LoRA vectors [B, D], float32"""
        values = self.autoencoder.decode(self.latent_statistics.inverse(latents))
        return self.value_statistics.inverse(values)

    def condition(
        self, face: Tensor, image: Tensor, has_face: Tensor, has_image: Tensor
    ) -> Condition:
        """face [B, Ef], image [B, Ei], has_face and has_image [B] bool -> condition of B rows.

        Both False gives the null condition: condition dropout in training is a change of masks.
        """
        return self.mixer(face, image, has_face, has_image)

    def no_condition(self, rows: int) -> Condition:
        """The null condition of classifier-free guidance."""
        device, widths = self.device, self.config.mixer
        absent = torch.zeros(rows, dtype=torch.bool, device=device)
        face = torch.zeros(rows, widths.face_width, device=device)
        image = torch.zeros(rows, widths.image_width, device=device)
        return self.mixer(face, image, absent, absent)

    def denoise(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """z_t [B, T, C], t [B] in 0..1 -> prediction of z_0 [B, T, C], float32"""
        return self.diffusion.to_x0(self.dit(z_t, t, condition), z_t, t)

    @property
    def device(self) -> torch.device:
        return self.value_statistics.mean.device

    # --- use --------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        features: Features,
        *,
        seed: int,
        steps: int | None = None,
        candidates: int = 1,
        guidance: float | None = None,
        strength: float | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Predict LoRAs from features; equal arguments give equal tensors on one machine.

        Candidate k depends on seed and k only. Whatever `progress` raises passes through.
        Errors: BadConfig for values out of range, LayoutMismatch for features of other encoders.
        """
        begin = time.perf_counter()
        options = self._options(steps, guidance, strength)
        if not 1 <= candidates <= MAX_CANDIDATES:
            raise BadConfig(f"candidates must be 1 to {MAX_CANDIDATES}, found {candidates}.")
        condition = self._condition_of(features, candidates)
        noise = seeded_noise(self.latent_shape, seed, range(candidates)).to(self.device)
        latents = self.sample_latents(noise, condition, options, progress)
        vectors = self.space.strengthened(self.decode(latents), options.strength)
        if not vectors.isfinite().all():
            raise BadWeightsFile(
                "The predictor gave numbers that are not finite.",
                hint="Its file is damaged or its training diverged; take another one.",
            )
        chosen, spread = central(vectors)
        loras = tuple(self.space.unpack(vector.cpu()) for vector in vectors)
        report = {
            **to_dict(options),
            "seed": seed,
            "candidates": candidates,
            "chosen": chosen,
            "spread": spread,
            **self.describe(),
            "photos": features.report(),
            "seconds": time.perf_counter() - begin,
        }
        return Prediction(loras[chosen], loras, report)

    def describe(self) -> dict[str, str]:
        """What reports and headers say of this predictor."""
        return {
            "base": self.space.base,
            "space": self.space.id,
            "trigger": self.config.trigger,
            "predictor": self.config.name,
            "predictor_hash": self.file_hash,
        }

    def average(self) -> Lora:
        """The mean LoRA of the training set, without any photo."""
        return self.space.unpack(self.value_statistics.mean.cpu())

    def sample_latents(
        self,
        noise: Tensor,
        condition: Condition,
        options: SamplingConfig,
        progress: Progress | None = None,
    ) -> Tensor:
        """noise [B, T, C] -> z_0 [B, T, C] by the few steps that `predict` takes."""
        null = self.no_condition(len(noise))

        def denoise(z_t: Tensor, t: Tensor) -> Tensor:
            x0 = self.denoise(z_t, t, condition)
            if options.guidance == 1:
                return x0
            return guided(x0, self.denoise(z_t, t, null), options.guidance)

        return sample(denoise, noise, self.diffusion, steps=options.steps, progress=progress)

    def _options(
        self, steps: int | None, guidance: float | None, strength: float | None
    ) -> SamplingConfig:
        given = {"steps": steps, "guidance": guidance, "strength": strength}
        chosen = {key: value for key, value in given.items() if value is not None}
        options = dataclasses.replace(self.config.sampling, **chosen)
        if not 1 <= options.steps <= MAX_STEPS:
            raise BadConfig(f"steps must be 1 to {MAX_STEPS}, found {options.steps}.")
        for key in ("guidance", "strength"):
            if not abs(value := getattr(options, key)) <= LARGEST_FACTOR:  # NaN, too
                raise BadConfig(
                    f"{key} must be -{LARGEST_FACTOR} to {LARGEST_FACTOR}, not {value}."
                )
        return options

    def _condition_of(self, features: Features, rows: int) -> Condition:
        """One condition, repeated `rows` times. Errors: LayoutMismatch."""
        config = self.config
        features.check_encoders(config.face_encoder.name, config.image_encoder.name)
        face, has_face = _one_row(features.fused_face(), config.mixer.face_width, "face")
        image, has_image = _one_row(features.fused_image(), config.mixer.image_width, "image")
        inputs = (x.to(self.device).expand(rows, *x.shape[1:]) for x in (face, image))
        present = (x.to(self.device).expand(rows) for x in (has_face, has_image))
        return self.condition(*inputs, *present)

    # --- the bundle -------------------------------------------------------------------------------

    def save(
        self, path: str | Path, *, dtype: torch.dtype = torch.float16, overwrite: bool = False
    ) -> None:
        """Write the bundle: tensors in `dtype`, statistics in float32, config in the header."""
        tensors = {
            name: tensor.detach().cpu().to(torch.float32 if _is_statistic(name) else dtype)
            for name, tensor in self.state_dict().items()
        }
        header = {"format": "difflora-predictor", "config": json.dumps(to_dict(self.config))}
        write_safetensors(Path(path), tensors, header, overwrite=overwrite)

    @classmethod
    def open(cls, path: str | Path, device: str | torch.device = "cpu") -> Predictor:
        """Open a bundle, in float32 and eval mode. Errors: BadWeightsFile."""
        path = Path(path)
        tensors, header = read_safetensors(path)
        if header.get("format") != "difflora-predictor" or "config" not in header:
            raise BadWeightsFile(
                f"{path.name} is not a DiffLoRA predictor: its header has no predictor config.",
                hint="Choose a file made by `python -m training`, or the one that ships with us.",
            )
        with expecting(path, "a predictor that this version can read", OTHER_VERSION):
            config = from_dict(PredictorConfig, header_json(path, header, "config"))
            if config.space.base not in BASES:
                raise BadConfig(f"its base model is {config.space.base!r}")
            with torch.device("meta"):  # without memory or time for initial weights
                predictor = cls(config)
        check_keys(path.name, tensors, predictor.state_dict())
        float32 = {name: tensor.float() for name, tensor in tensors.items()}
        predictor.load_state_dict(float32, assign=True)
        predictor.file_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        return predictor.to(device).eval()


def check_keys(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Errors: BadWeightsFile naming counts and the first three missing, unexpected or misshapen."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        key for key in expected if key in found and found[key].shape != expected[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    told = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in kinds.items() if keys]
    if told:
        raise BadWeightsFile(
            f"The tensors of {name} do not fit its config: {'; '.join(told)}.",
            hint=OTHER_VERSION,
        )


def central(vectors: Tensor) -> tuple[int, float]:
    """Index of the candidate nearest to the mean of vectors [N, D], and their relative spread."""
    mean = vectors.mean(0)
    distances = (vectors - mean).norm(dim=-1)
    spread = distances.mean() / mean.norm().clamp_min(1e-12)
    return int(distances.argmin()), float(spread)


def _is_statistic(name: str) -> bool:
    return "statistics." in name and name.endswith(STATISTICS)


def _one_row(embedding: Tensor | None, width: int, what: str) -> tuple[Tensor, Tensor]:
    """([1, width], [1] bool) from an embedding [width] or None. Errors: LayoutMismatch."""
    if embedding is None:
        return torch.zeros(1, width), torch.tensor([False])
    if embedding.shape != (width,):
        raise LayoutMismatch(
            f"The predictor expects {what} embeddings of {width} numbers, "
            f"found {tuple(embedding.shape)}.",
            hint=f"Encode the photos with the {what} encoder the predictor was trained with.",
        )
    return embedding[None].float(), torch.tensor([True])
