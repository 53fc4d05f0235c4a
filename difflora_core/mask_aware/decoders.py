"""Latents to pictures with gradients: a small fast decoder, and any other on private weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadWeightsFile
from ..weights_file import read_safetensors
from .upsampling import DoublingConv

Built = TypeVar("Built")

ENCODERS = ("encoder.", "quant_conv.", "taesd_encoder.")
"""Parts of a VAE, in diffusers' and ComfyUI's names, that decoding has no use for."""


class Part(NamedTuple):
    """Rows and columns of latents."""

    top: int
    bottom: int
    left: int
    right: int


@runtime_checkable
class Decoder(Protocol):
    """Latents of the denoiser's space, as samplers see them, to pictures; differentiable."""

    upscale: int
    """Pixels per latent, each way."""

    def __call__(self, latents: Tensor, part: Part | None = None) -> Tensor:
        """[B, C, h, w] -> [B, 3, upscale h, upscale w] about 0..1, never clamped: a clamp has no
        gradient where a picture is too bright or too dark. Pixels that are more than one away from
        `part` may be rough; it saves time not to work them out."""
        ...


class FastDecoder(nn.Module):
    """TAESD's decoder (Bohan, 2023): 1.2 M parameters at width 64, a hundredth of a KL decoder.

    It takes latents exactly as samplers see them (x_0 of the denoiser, scaled by the VAE's
    factor), so nothing has to be multiplied first. Width, depth and channels come from the file.
    """

    upscale = 8

    def __init__(self, channels: int = 4, width: int = 64, blocks: tuple[int, ...] = (3, 3, 3, 1)):
        super().__init__()
        layers: list[nn.Module] = [_SoftClamp(), nn.Conv2d(channels, width, 3, padding=1)]
        layers.append(nn.ReLU())
        for stage, count in enumerate(blocks):
            layers += [_Block(width) for _ in range(count)]
            if stage + 1 < len(blocks):
                # TAESD counts a layer for the doubling
                layers += [nn.Identity(), DoublingConv(width, width)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))
        self.channels, self.upscale = channels, 2 ** (len(blocks) - 1)

    @classmethod
    def open(cls, path: str | Path) -> FastDecoder:
        """Read `taesd_decoder.safetensors` and its kin, by ComfyUI's or by diffusers' names.

        Float32, frozen. Errors: BadWeightsFile.
        """
        tensors, _ = read_safetensors(path)
        return cls.from_tensors(tensors, Path(path).name)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str = "the decoder") -> FastDecoder:
        """From a state dict; encoder weights beside the decoder's are passed over."""
        numbered = _by_number(tensors)
        try:
            width, channels = numbered["1.weight"].shape[:2]
            # the weights must outlive ComfyUI's inference mode to take part in a backward pass
            with torch.inference_mode(False):
                model = cls(channels, width, _blocks(numbered))
                model.layers.load_state_dict(numbered)
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadWeightsFile(
                f"{name} is not a decoder of TAESD's shape.",
                hint="Take taesd_decoder.safetensors (or taesdxl_, taesd3_, taef1_) as it is "
                "published for models/vae_approx, or choose VAE.",
            ) from error
        return model.requires_grad_(False).eval()

    def forward(self, latents: Tensor, part: Part | None = None) -> Tensor:
        if part is None:
            return self.layers(latents)
        x, top, left, scale = latents, 0, 0, 1
        for layer, reach in zip(self.layers, _reaches(self.layers), strict=True):
            if isinstance(layer, DoublingConv):
                rows = _near(part.top, part.bottom, scale, reach, top, x.shape[-2])
                columns = _near(part.left, part.right, scale, reach, left, x.shape[-1])
                x = x[..., rows, columns]
                top, left = 2 * (top + rows.start), 2 * (left + columns.start)
                scale = 2 * scale
            x = layer(x)
        below = scale * latents.shape[-2] - top - x.shape[-2]
        right = scale * latents.shape[-1] - left - x.shape[-1]
        return F.pad(x, (left, right, top, below), mode="replicate")


class _SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    """Three convolutions beside the input; names as TAESD's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def _reaches(layers: Iterable[nn.Module]) -> list[int]:
    """How far around a part each layer's input is looked at, up to the final sampling of pixels."""
    reach, reaches = 1, []
    for layer in reversed(list(layers)):
        if isinstance(layer, DoublingConv):
            reach = -(-(reach + 1) // 2)
        else:
            reach += sum(isinstance(m, nn.Conv2d) for m in layer.modules())
        reaches.append(reach)
    return reaches[::-1]


def _near(low: int, high: int, scale: int, reach: int, start: int, size: int) -> slice:
    """Of a map of `size` rows from row `start` on, those within reach of scale * low..high."""
    return slice(max(scale * low - reach - start, 0), min(scale * high + reach - start, size))


def _by_number(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TAESD's own numbering "3.conv.0.weight", whatever stands before it.

    diffusers' AutoencoderTiny has no module for the soft clamp, so its numbers are one lower.
    """
    decoder = re.compile(r"(?:taesd_)?decoder\.(layers\.)?(\d+)\.(.+)|(\d+)\.(.+)")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = decoder.fullmatch(name)
        if match is None:
            continue
        number = int(match[2] or match[4]) + (match[1] is not None)
        found[f"{number}.{match[3] or match[5]}"] = tensor.float()
    return found


def _blocks(numbered: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks per resolution, from which numbers are blocks."""
    last = max(int(name.partition(".")[0]) for name in numbered)
    counts = [0]
    for number in range(3, last):
        if f"{number}.conv.0.weight" in numbered:
            counts[-1] += 1
        elif f"{number}.weight" in numbered:
            counts.append(0)
    return tuple(counts)


class ModuleDecoder:
    """A whole VAE as a Decoder, on private float32 clones of its weights.

    Args:
        module: has the method `method`, from unscaled latents to pictures in -1..1 (diffusers'
            AutoencoderKL, ComfyUI's first_stage_model).
        to_vae: from the denoiser's latents to the VAE's (division by the scaling factor).
    """

    def __init__(
        self,
        module: nn.Module,
        to_vae: Callable[[Tensor], Tensor],
        upscale: int = 8,
        method: str = "decode",
    ) -> None:
        self.upscale = upscale
        self._frozen = frozen_clone(module, method, without=ENCODERS)
        self._to_vae = to_vae

    def __call__(self, latents: Tensor, part: Part | None = None) -> Tensor:
        # norms and attention span the picture, so all of it is decoded
        decoded = self._frozen(self._to_vae(latents))
        # diffusers wraps the picture in an output object
        return getattr(decoded, "sample", decoded) / 2 + 0.5

    def to(self, device: torch.device) -> ModuleDecoder:
        """Move the private weights; the module itself stays where it is."""
        self._frozen.to(device)
        return self

    @property
    def bytes(self) -> int:
        """Memory of the private weights."""
        return self._frozen.bytes


class FrozenClone:
    """A module's method on copies of its weights; see `frozen_clone`."""

    def __init__(self, module: nn.Module, method: str, tensors: dict[str, Tensor]) -> None:
        self._caller = _Caller(module, method)
        self.tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._caller, self.tensors, args, kwargs)

    def to(self, device: torch.device) -> FrozenClone:
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class _Caller(nn.Module):
    """Makes a method the forward of a module, which is all that functional_call calls."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)


def frozen_clone(
    module: nn.Module,
    method: str = "__call__",
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
) -> FrozenClone:
    """A module's method as a callable on private copies of its parameters and buffers.

    ComfyUI loads weights inside inference mode, and autograd refuses to keep such tensors for the
    backward pass. Copies made outside it are ordinary tensors, whatever the dtypes; they need no
    gradient themselves. The module's own weights are never touched. Parts whose names start with
    one of `without` are not copied: the method must not need them.
    """
    with torch.inference_mode(False):
        tensors = {
            name: _copied(tensor, dtype)
            for part in (module.named_parameters(), module.named_buffers())
            for name, tensor in part
            if not name.startswith(without)
        }
    return FrozenClone(module, method, tensors)


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    copy = tensor.detach().clone()
    return copy.to(dtype) if copy.is_floating_point() else copy
