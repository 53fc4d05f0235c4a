"""A trained ControlNet as files: diffusers' folder, and one file that stock ComfyUI loads.

    <root>/artifacts/controlnet/<name>/config.json, diffusion_pytorch_model.safetensors
    <root>/artifacts/controlnet/<name>/<name>_comfyui.safetensors

ComfyUI reads the number of a hint's channels from `input_hint_block.0.weight` and fails without
it; the block that is written here ends in a convolution of zeros, so any hint adds nothing. For
those of the mini model there is our node Load Mini ControlNet, since ComfyUI guesses their number
of attention heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from difflora_core.errors import LayoutMismatch
from difflora_core.header import BASE_NAMES
from difflora_core.key_names import module_table
from difflora_core.weights_file import write_safetensors

from ..artifacts import MissingArtifact, artifacts_folder, read_manifest, record_artifact
from ..config import Config
from .control import Control, with_hint, without_hint

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: bases whose U-Nets have one text encoder and no other conditions
_BASES = ("sd15", "mini")
_PREFIX = "control_model."


def export(config: Config, name: str, control: Control, figures: Mapping[str, Any]) -> Path:
    """Write both forms in half precision; the folder. Errors: LayoutMismatch, OSError."""
    folder = control_folder(config, name)
    whole = with_hint(control).half()
    tensors, base = comfyui_tensors(whole.state_dict())
    single = f"{name}_comfyui.safetensors"
    with _whole_folder(folder) as place:
        whole.save_pretrained(place, safe_serialization=True)
        write_safetensors(place / single, tensors, _header(name, base))
    for file in (folder / WEIGHTS, folder / single):
        relative = file.relative_to(artifacts_folder(config)).as_posix()
        record_artifact(config, relative, figures)
    return folder


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` once the block has ended well."""
    path = path.resolve()  # what a link leads to is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        filled, former = Path(temporary) / "new", Path(temporary) / "former"
        yield filled
        if path.exists():
            path.rename(former)
        try:
            filled.rename(path)
        except OSError:
            if former.exists():
                former.rename(path)
            raise


def open_control(config: Config, name: str) -> Control:
    """A ControlNet that `export` wrote, frozen, float32, on the device. Errors: MissingArtifact."""
    folder = control_folder(config, name)
    if not (folder / WEIGHTS).exists():
        raise MissingArtifact(
            f"There is no ControlNet {name} in {config.run.root} yet.",
            hint="Run `python -m training train-controlnet --config ...` first.",
        )
    control = ControlNetModel.from_pretrained(folder, local_files_only=True)
    control = without_hint(control).to(config.run.torch_device(), torch.float32)
    return control.requires_grad_(False).eval()


def trained_objective(config: Config, name: str) -> dict[str, Any] | None:
    """What a ControlNet was trained for, as its manifest entry says; None without one."""
    folder = artifacts_folder(config)
    file = (control_folder(config, name) / WEIGHTS).relative_to(folder).as_posix()
    return read_manifest(folder).get(file, {}).get("figures", {}).get("objective")


def control_folder(config: Config, name: str) -> Path:
    return artifacts_folder(config) / "controlnet" / name


def comfyui_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """diffusers' names -> names of the original ControlNet, and the base model that they fit.

    Errors: LayoutMismatch.
    """
    base = base_of(state)
    names = _original_names(base) | _names_of_control(state)
    tensors = {}
    for key, tensor in state.items():
        module, _, role = key.rpartition(".")
        tensors[f"{_PREFIX}{names[module]}.{role}"] = tensor.contiguous()
    return tensors, base


def base_of(state: Iterable[str]) -> str:
    """The base model whose U-Net a ControlNet with these names is a copy of.

    Errors: LayoutMismatch.
    """
    copied = {key.rpartition(".")[0] for key in state if not key.startswith("controlnet_")}
    base = next((b for b in _BASES if copied == _names_of_copy(b)), None)
    if base is None:
        raise LayoutMismatch(
            "ComfyUI has no names for this ControlNet.",
            hint=f"Known are copies of the U-Nets of {', '.join(_BASES)}.",
        )
    return base


def _names_of_copy(base: str) -> set[str]:
    """Modules of a U-Net that its ControlNet is a copy of, whatever their widths."""
    known = {name for name in _original_names(base) if not name.startswith(("up_", "conv_"))}
    return {name for name in known if not name.startswith("add_embedding")} | {"conv_in"}


def _original_names(base: str) -> dict[str, str]:
    """Module names of the U-Net without component -> original names."""
    originals = module_table(base).originals.items()
    return {canonical.removeprefix("unet."): original for canonical, original in originals}


def _names_of_control(state: Mapping[str, Tensor]) -> dict[str, str]:
    return dict(_zero_convolutions(state)) | dict(_hint_block(state))


def _zero_convolutions(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    yield "controlnet_mid_block", "middle_block_out.0"
    for i in range(sum(key.startswith("controlnet_down_blocks.") for key in state) // 2):
        yield f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0"


def _hint_block(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Convolutions of the hint block; in the original every second module is an activation."""
    inner = sum(key.startswith("controlnet_cond_embedding.blocks.") for key in state) // 2
    modules = ["conv_in", *(f"blocks.{i}" for i in range(inner)), "conv_out"]
    for i, module in enumerate(modules):
        yield f"controlnet_cond_embedding.{module}", f"input_hint_block.{2 * i}"


def _header(name: str, base: str) -> dict[str, str]:
    names = BASE_NAMES[base]
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.architecture": f"{names.architecture}/controlnet",
        "modelspec.implementation": names.implementation,
        "modelspec.resolution": names.resolution,
        "modelspec.description": "ControlNet without a hint: any hint image adds nothing.",
    }
