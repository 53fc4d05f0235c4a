"""Guidance inside ComfyUI's samplers: what a run loads, hooks in, and takes out again."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.utils
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor, nn

from ..difflora_core.errors import BadWeightsFile, DiffLoRAError, LayoutMismatch
from ..difflora_core.mask_aware.decoders import FastDecoder, ModuleDecoder
from ..difflora_core.mask_aware.guidance import GuidanceSettings, Guide
from ..difflora_core.mask_aware.networks import FaceNetwork
from ..difflora_core.mask_aware.run_log import GuidanceLog, GuidedRun
from ..difflora_core.mask_aware.tracking import Finder
from ..difflora_core.mask_aware.window import (
    SigmaWindow,
    window_between,
    window_named,
    window_of_percent,
)

logger = logging.getLogger(__name__)

KEY = "difflora_guidance"
CUSTOM, SIGMA, TIMESTEP = "custom", "sigma", "timestep"
_TRIAL_SIDE = 4


@dataclass(frozen=True)
class WindowChoice:
    """When to guide, as the user said it."""

    name: str
    """A preset, or in what `start` and `end` are: CUSTOM for shares of the run, SIGMA, TIMESTEP."""
    start: float = 0.0
    end: float = 1.0

    def of(self, sampling: Any) -> SigmaWindow:
        """For a model's own schedule. Errors: DiffLoRAError where it is empty."""
        if self.name == SIGMA:
            return SigmaWindow(self.start, self.end)
        if self.name == TIMESTEP:
            return window_between(self.start, self.end)
        if self.name != CUSTOM:
            return window_named(self.name)  # type: ignore[arg-type]
        return window_of_percent(
            self.start,
            self.end,
            lambda share: noise_ratio(sampling, float(sampling.percent_to_sigma(share))),
        )


def noise_ratio(sampling: Any, sigma: float) -> float:
    """Noise to signal at a sampler's sigma: the same for diffusion; flow models blend the two."""
    if not isinstance(sampling, comfy.model_sampling.CONST):
        return sigma
    return sigma / (1 - sigma) if sigma < 1 else float("inf")


@dataclass(frozen=True, eq=False)
class GuidedSampling:
    """A wrapper around whole runs (OUTER_SAMPLE) that guides each with a Guide of its own.

    Nothing outlives a run but its log: the weights that guidance needs are brought to the device
    when the run begins and let go when it ends, however it ends.
    """

    network: FaceNetwork
    """On the CPU between runs."""
    references: Tensor
    """[R, D]"""
    settings: GuidanceSettings
    """But for the window, which depends on the model's schedule."""
    window: WindowChoice
    vae: Any
    """comfy.sd.VAE"""
    fast: FastDecoder | None
    """A small decoder to take instead of the VAE's; on the CPU between runs."""
    decoder_name: str
    """What the report calls the decoder."""
    finder: Finder | None
    mask: Tensor | None
    """[B, H, W] in 0..1"""
    log: GuidanceLog

    def applied(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A clone of the model whose runs are guided. Errors: LayoutMismatch, DiffLoRAError."""
        check_fits(model.get_model_object("latent_format"), self.vae)
        self.window.of(model.get_model_object("model_sampling"))
        model = model.clone()
        outer = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
        model.add_wrapper_with_key(outer, KEY, self)
        return model

    def __call__(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        guider, begin = executor.class_obj, time.perf_counter()
        sampling = guider.model_patcher.get_model_object("model_sampling")
        run = self._begun(tuple(noise_ratio(sampling, float(sigma)) for sigma in sigmas))
        with contextlib.ExitStack() as stack:
            if not run.note:
                window = self.window.of(sampling)
                run.note = window.warning(run.schedule)
                guide = stack.enter_context(self._guide(guider.model_patcher, window, noise))
                run.steps, run.strips = guide.log, guide.strips
                Steering(guide, sampling, run).hook_into(guider.model_options)
            if run.note:
                logger.warning("Mask-Aware Guidance: %s", run.note)
            try:
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            finally:
                run.seconds = time.perf_counter() - begin

    def _begun(self, schedule: tuple[float, ...]) -> GuidedRun:
        """A new entry in the log, with a note where there is nothing to do."""
        run = GuidedRun(schedule, self.decoder_name)
        if self.settings.strength == 0:
            run.note = "Nothing is guided: the strength is 0."
        elif self.mask is not None and not bool((self.mask > 0).any()):
            run.note = "Nothing is guided: the mask is empty."
        context = get_executing_context()
        return self.log.begin(context.prompt_id if context else "", run)

    @contextlib.contextmanager
    def _guide(
        self, model: comfy.model_patcher.ModelPatcher, window: SigmaWindow, noise: Tensor
    ) -> Iterator[Guide]:
        mask = self.mask
        if mask is not None:
            mask = comfy.utils.repeat_to_batch_size(mask, len(noise))
        settings = replace(self.settings, window=window)
        try:
            decoder = self._loaded(model, noise)
            yield Guide(decoder, self.network, self.references, settings, self.finder, mask)
        finally:
            self._unload()

    def _loaded(
        self, model: comfy.model_patcher.ModelPatcher, noise: Tensor
    ) -> FastDecoder | ModuleDecoder:
        """The decoder; it and the face network are on the model's device then.

        Not by ComfyUI's patchers: they move weights in inference mode, and autograd refuses what
        was made there. Room is asked for in the same way.
        """
        device = model.load_device
        with torch.inference_mode(False):
            decoder = self.fast or vae_decoder(self.vae, model.get_model_object("latent_format"))
        # not within the block: ComfyUI may have to move weights of its own, which are used to it
        comfy.model_management.free_memory(_bytes(decoder) + _bytes(self.network), device)
        with torch.inference_mode(False):
            decoder.to(device)
            self.network.to(device)
            check_decoder(decoder, noise, device)
        return decoder

    def _unload(self) -> None:
        with torch.inference_mode(False):
            self.network.to("cpu")
            if self.fast:
                self.fast.to("cpu")


@dataclass(eq=False)
class Steering:
    """Guides the estimate of each step of one run, after everything else that changes it.

    Guiders may scale what classifier-free guidance gives (Dual CFG does, eight times), so a step is
    taken where the sampler gets the estimate; behind classifier-free guidance we only listen.
    """

    guide: Guide
    sampling: Any
    """The model's comfy.model_sampling."""
    run: GuidedRun
    direction: Tensor | None = None
    """Conditional minus unconditional estimate of the step; None without the latter."""
    scale: float = 1.0
    """Of classifier-free guidance."""

    def hook_into(self, options: dict[str, Any]) -> None:
        """Listen and guide in a run with these model options."""
        comfy.model_patcher.set_model_options_post_cfg_function(options, self.listen)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.PREDICT_NOISE,
            KEY,
            self,
            options,
            is_model_options=True,
        )

    def listen(self, seen: dict[str, Any]) -> Tensor:
        """Stands behind classifier-free guidance (sampler_post_cfg_function)."""
        # Perp-Neg's guider scales the distance to an empty prompt, and may have no negative one
        kind = "empty_cond" if seen.get("empty_cond") is not None else "uncond"
        # at CFG 1 samplers leave the unconditional half out and pass zeros instead of it
        both = seen.get(kind) is not None
        self.direction = seen["cond_denoised"] - seen[f"{kind}_denoised"] if both else None
        self.scale = float(seen["cond_scale"])
        return seen["denoised"]

    def __call__(
        self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.direction = None
        estimate = executor(x, timestep, *args, **kwargs)
        comfy.model_management.throw_exception_if_processing_interrupted()
        begin = time.perf_counter()
        sigma = noise_ratio(self.sampling, float(timestep.max()))
        guided = self.guide.guide(estimate, self.direction, self.scale, sigma)
        self.run.guiding += time.perf_counter() - begin
        return guided


def _bytes(module: nn.Module | ModuleDecoder) -> int:
    if isinstance(module, ModuleDecoder):
        return module.bytes
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def vae_decoder(vae: Any, latents: Any) -> ModuleDecoder:
    """The VAE's own decoder on private weights; `latents` is the model's comfy.latent_formats."""
    # some formats hold tensors, made in inference mode too
    return ModuleDecoder(vae.first_stage_model, copy.deepcopy(latents).process_out)


def check_fits(latents: Any, vae: Any) -> None:
    """Errors: LayoutMismatch unless a model's latents are pictures that the VAE decodes."""
    if getattr(vae, "first_stage_model", None) is None:
        raise DiffLoRAError(
            "The connected VAE is empty.",
            hint="The checkpoint holds none: connect Load VAE with the model's own VAE.",
        )
    if latents.latent_dimensions != 2 or vae.latent_dim != 2:
        raise LayoutMismatch(
            f"Guidance works on pictures, whose latents have 2 dimensions; those of this model "
            f"have {latents.latent_dimensions}, those of the VAE {vae.latent_dim}.",
            hint="Connect a model that makes single pictures, such as SD 1.5, SDXL, SD 3 or Flux.",
        )
    if latents.latent_channels != vae.latent_channels:
        raise LayoutMismatch(
            f"The latents of this model have {latents.latent_channels} channels; the connected VAE "
            f"decodes {vae.latent_channels}.",
            hint="Connect the VAE that belongs to the model.",
        )


def check_decoder(
    decoder: FastDecoder | ModuleDecoder, noise: Tensor, device: torch.device
) -> None:
    """Decode a few latents; sets the decoder's scale. Errors: LayoutMismatch, BadWeightsFile."""
    if noise.ndim != 4:
        raise LayoutMismatch(
            f"Guidance works on latents [pictures, channels, height, width]; these are "
            f"{list(noise.shape)}.",
            hint="Connect a latent of pictures, such as Empty Latent Image.",
        )
    latents = torch.zeros(1, noise.shape[1], _TRIAL_SIDE, _TRIAL_SIDE, device=device)
    name = "The fast decoder" if isinstance(decoder, FastDecoder) else "The VAE"
    with torch.no_grad():
        picture = decoder(latents)
    if picture.ndim != 4 or picture.shape[1] != 3:
        raise LayoutMismatch(
            f"{name} makes {list(picture.shape)} of latents {list(latents.shape)}, expected a "
            "picture of 3 colours.",
            hint="Connect the VAE that belongs to the model.",
        )
    if not bool(picture.isfinite().all()):
        raise BadWeightsFile(
            f"{name} makes pictures of numbers that are not finite (NaN), so its weights are "
            "damaged.",
            hint="Get its file again, or choose another one.",
        )
    decoder.upscale = picture.shape[-1] // _TRIAL_SIDE
