"""What mask-aware guidance adds to a step of SD 1.5 and SDXL, in time, operations and memory.

Weights are random, the sizes are the real ones: a classifier-free-guidance step of the U-Net, and
one call of the guide on one face that fills a quarter of the picture's width, with ArcFace's R50.
`crop-taesd` decodes a window with TAESD, `crop-vae` with Stable Diffusion's own VAE, and `full`
differentiates through the U-Net and the whole VAE, as DPS does. `first-look-taesd` is what finding
faces with a detector adds to the first guided step, `look-taesd` to every third one after it, the
detector's own milliseconds left out. Memory is that of the tensors that autograd keeps for the
backward pass, and of the face network's weights.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from difflora_core.mask_aware.decoders import Decoder, FastDecoder, ModuleDecoder
from difflora_core.mask_aware.full_guidance import guide_through
from difflora_core.mask_aware.guidance import GuidanceSettings, Guide
from difflora_core.mask_aware.networks import FaceNetwork, as_chain
from difflora_core.mask_aware.tiles import decode_around, decode_in_tiles
from difflora_core.recogniser import IResNet, IResNetConfig

from .measuring import Case, alternate, case, in_own_process
from .predict import SDXL

#: runwayml/stable-diffusion-v1-5, unet/config.json, where it differs from the defaults
SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
#: stabilityai/sd-vae-ft-mse, config.json, where it differs from the defaults
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
#: ArcFace's R50
R50 = IResNetConfig(
    stem=64, stem_stride=1, widths=(64, 128, 256, 512), layers=(3, 4, 14, 3), embedding=512
)
ROUNDS = {"sd15": 3, "sdxl": 1}
SIGMA, CFG = 1.0, 7.0
GB = 1e9


@dataclass(frozen=True)
class Model:
    """A denoiser with everything that it takes beside the latents."""

    unet: nn.Module
    context: Tensor
    extra: dict[str, Tensor]
    size: int
    """side of the latents"""

    @classmethod
    def random(cls, name: str, device: str) -> Model:
        config: dict[str, Any] = SD15 if name == "sd15" else SDXL
        build: Any = UNet2DConditionModel  # its decorated methods do not survive a type checker
        unet = build(**config).eval().requires_grad_(False).to(device)
        context = torch.randn(2, 77, config["cross_attention_dim"], device=device)
        extra = {}
        if name == "sdxl":
            embeds, times = torch.randn(2, 1280), torch.zeros(2, 6)
            extra = {"text_embeds": embeds.to(device), "time_ids": times.to(device)}
        return cls(unet, context, extra, config["sample_size"])

    def denoise(self, noisy: Tensor) -> Tensor:
        """The estimate of x_0 after classifier-free guidance, [1, 4, h, w]."""
        t = torch.tensor(500, device=noisy.device)
        extra = {"added_cond_kwargs": self.extra} if self.extra else {}
        pair = torch.cat([noisy, noisy])
        both = self.unet(pair, t, self.context, **extra).sample
        wanted, plain = both.chunk(2)
        return noisy - SIGMA * (plain + CFG * (wanted - plain))


def run() -> list[Case]:
    cases = [in_own_process(partial(measured, "sd15", mode)) for mode in MODES]
    looks = [in_own_process(partial(look, name, mode)) for name in ROUNDS for mode in LOOKS]
    return [*cases, in_own_process(partial(measured, "sdxl", "crop-taesd")), *looks]


@torch.no_grad()
def measured(name: str, mode: str) -> Case:
    """One guided step beside one plain step; `overhead` is what guidance adds to it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, guide = Model.random(name, device), make_guide(mode, device, name)
    noisy = torch.randn(1, 4, model.size, model.size, device=device)
    x0, direction = torch.randn_like(noisy), torch.randn_like(noisy)
    if mode == "full":
        added = partial(guide_through, guide, model.denoise, noisy, x0, direction, CFG, SIGMA)
    else:
        added = partial(guide.guide, x0, direction, CFG, SIGMA)
    step = partial(model.denoise, noisy)
    sides = {"ours": finished(added, device), "cfg_step": finished(step, device)}
    found = compared(name, mode, sides)
    weights = guide.network.parameters()  # a decoder of VAE size is the model's own
    weights_gb = sum(p.numel() * p.element_size() for p in weights) / GB
    return found | {"kept_gb": kept_bytes(sides["ours"]) / GB, "weights_gb": weights_gb}


@torch.no_grad()
def look(name: str, mode: str) -> Case:
    """One look for faces beside one plain step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, decoder = Model.random(name, device), fast(device)
    noisy = torch.randn(1, 4, model.size, model.size, device=device)
    step = finished(partial(model.denoise, noisy), device)
    looking = finished(partial(LOOKS[mode], decoder, noisy), device)
    return compared(name, mode, {"ours": looking, "cfg_step": step})


def compared(name: str, mode: str, sides: dict[str, Callable[[], object]]) -> Case:
    """Time and operations of both sides, in turn."""
    plain, extra = operations(sides["cfg_step"]), operations(sides["ours"])  # warms up, too
    seconds = alternate(sides, ROUNDS[name], warm_up=False)
    share = seconds["ours"] / seconds["cfg_step"]
    facts = {"overhead": share, "operations_overhead": extra / plain}
    return case(f"guidance/{name}/{mode}", seconds, **facts)


def finished(run: Callable[[], object], device: str) -> Callable[[], object]:
    """The same call, waiting until the device has done its work."""

    def wait() -> object:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return wait


def make_guide(mode: str, device: str, name: str) -> Guide:
    """A guide for a face a quarter as wide as the picture, in its upper middle."""
    pixels = 512 if name == "sd15" else 1024
    middle, half = pixels // 2, pixels // 8
    mask = torch.zeros(1, pixels, pixels)
    top = pixels // 4
    mask[:, top : top + 5 * half // 2, middle - half : middle + half] = 1
    network = FaceNetwork("r50", as_chain(IResNet(R50))).to(device)
    references = torch.randn(1, R50.embedding)
    return Guide(MODES[mode](device), network, references, GuidanceSettings(), mask=mask)


def fast(device: str) -> Decoder:
    return FastDecoder().requires_grad_(False).to(device)


def whole(device: str) -> Decoder:
    vae: Any = AutoencoderKL(**VAE).eval().requires_grad_(False)
    return ModuleDecoder(vae, lambda latents: latents / 0.18215).to(torch.device(device))


MODES: dict[str, Callable[[str], Decoder]] = {
    "crop-taesd": fast,
    "crop-vae": whole,
    "full": whole,
}


def look_near(decoder: Decoder, latents: Tensor) -> Tensor:
    """Around the crop of a face a quarter as wide as the picture."""
    pixels = decoder.upscale * latents.shape[-1]
    return decode_around(decoder, latents, pixels * torch.tensor([3 / 8, 1 / 4, 5 / 8, 1 / 2]))


LOOKS: dict[str, Callable[[Decoder, Tensor], Tensor]] = {
    "first-look-taesd": decode_in_tiles,
    "look-taesd": look_near,
}


class Operations(TorchDispatchMode):
    """Counts multiplications and additions; unlike FlopCounterMode, of autograd.grad too."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **kwargs, out_val=result)
        return result


def operations(run: Callable[[], object]) -> int:
    """Of convolutions, matrix products and attention, backward passes included."""
    with Operations() as counter:
        run()
    return counter.total


def kept_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors that autograd keeps at once for the backward pass, weights left out."""
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, _Saved.unpack):
        run()
    return kept.most


class _Kept:
    """Counts storages while anything that was saved for a backward pass refers to them."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        if tensor.grad_fn is not None or tensor.requires_grad:
            storage = tensor.untyped_storage()
            self._change(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(saved, self._change, storage.data_ptr(), storage.nbytes(), -1)
        return saved

    def _change(self, place: int, size: int, users: int) -> None:
        before = self.users[place] > 0
        self.users[place] += users
        self.now += size * ((self.users[place] > 0) - before)
        self.most = max(self.most, self.now)


class _Saved:
    """Lives as long as the backward pass needs its tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.tensor
