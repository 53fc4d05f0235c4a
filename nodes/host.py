"""What ComfyUI provides, in the words of the core: folders, devices, progress, pictures, LoRAs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import numpy as np
import torch
from torch import Tensor, nn

from ..difflora_core.errors import BadImage, BadWeightsFile, DiffLoRAError, LayoutMismatch
from ..difflora_core.lora import Lora
from ..difflora_core.mini_world import MINI_FOLDER
from ..difflora_core.photos import Pixels, load_photo
from ..difflora_core.weights_file import lora_to_kohya
from ..difflora_core.whole_file import refusals

MODELS, FACES = "difflora", "difflora_faces"
SHIPPED = "mini (ships with DiffLoRA)"
"""How widgets call the files of the mini world."""


def register_folders() -> None:
    """Add models/difflora and output/difflora_faces to ComfyUI's folders, keeping what is there."""
    places = {
        MODELS: Path(folder_paths.models_dir) / "difflora",
        FACES: Path(folder_paths.get_output_directory()) / "difflora_faces",
    }
    for name, place in places.items():
        with contextlib.suppress(OSError):  # on a read-only disk there is just nothing to list
            place.mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path(name, str(place))
        folder_paths.folder_names_and_paths[name][1].add(".safetensors")


def model_files() -> list[str]:
    """Choices of a widget for files in models/difflora; the shipped one comes first."""
    return [SHIPPED, *folder_paths.get_filename_list(MODELS)]


def model_path(choice: str, shipped: str) -> Path:
    """The file behind a choice of `model_files`; `shipped` is its name in the mini world."""
    if choice == SHIPPED:
        return MINI_FOLDER / shipped
    return listed_path(MODELS, choice)


def listed_path(folder: str, name: str) -> Path:
    """A file of one of ComfyUI's folders. Errors: BadWeightsFile where it has gone."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise BadWeightsFile(
            f"{name} is not in ComfyUI's folder {folder!r} any more.",
            hint="Choose another file, or press R to refresh the lists.",
        )
    return Path(path)


def file_state(path: Path) -> str:
    """Changes when the file does; for `fingerprint_inputs`."""
    stat = path.stat() if path.is_file() else None
    return "" if stat is None else f"{path}:{stat.st_mtime_ns}:{stat.st_size}"


def insightface_roots() -> list[Path]:
    """Folders that hold `models/PACK`: the shipped one, every registered one, the usual one."""
    roots = [MINI_FOLDER / "insightface"]
    if "insightface" in folder_paths.folder_names_and_paths:
        roots += [Path(path) for path in folder_paths.get_folder_paths("insightface")]
    usual = Path(folder_paths.models_dir) / "insightface"
    return roots if usual in roots else [*roots, usual]


def face_packs() -> list[str]:
    """Names of the face packs that are there."""
    folders = (folder for root in insightface_roots() for folder in (root / "models").glob("*"))
    return list(dict.fromkeys(folder.name for folder in folders if folder.is_dir())) or ["mini"]


class Hosted(nn.Module):
    """A model of ours with room for the attributes that ComfyUI's patcher hangs on models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def hosted(open_model: Callable[[], nn.Module]) -> comfy.model_patcher.ModelPatcher:
    """Load a model of ours and put it under ComfyUI's memory management.

    Its weights are made outside inference mode, so that gradients can flow through them later.
    """
    with torch.inference_mode(False):
        model = Hosted(open_model())
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def on_device(patcher: comfy.model_patcher.ModelPatcher) -> Any:
    """The model of ours inside a patcher, moved to its device."""
    # whole: layers of ours cannot be used from where half of them are left behind
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher.model.model


def progress(total: int) -> Callable[[int, int], None]:
    """A callback (done, in all) that moves the node's bar and stops when the user cancels."""
    bar = comfy.utils.ProgressBar(total)

    def step(done: int, in_all: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, in_all)

    return step


def to_pixels(images: Sequence[Tensor], what: str = "Photo") -> list[Pixels]:
    """IMAGE batches [B, H, W, C] in 0..1 -> uint8 pictures.

    `what` a user calls one of them. Errors: BadImage with it and the number, from 1.
    """
    pictures = [picture for batch in images for picture in batch]
    if not pictures:
        raise BadImage(
            "There is no picture in the batch.", hint="Connect at least one picture to this node."
        )
    return [_pixels(picture, f"{what} {k}") for k, picture in enumerate(pictures, start=1)]


def _pixels(picture: Tensor, name: str) -> Pixels:
    try:
        return load_photo(picture)
    except BadImage as error:
        raise BadImage(f"{name}: {error.message}", hint=error.hint) from error


def to_images(pictures: Iterable[Pixels]) -> Tensor:
    """uint8 pictures of any size -> one IMAGE [B, H, W, 3]; smaller ones get a black border."""
    pictures = list(pictures)
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    canvas = np.zeros((len(pictures), height, width, 3), np.uint8)
    for place, picture in zip(canvas, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return torch.from_numpy(canvas).float() / 255


class LoraModel(dict[str, Tensor]):
    """The value of a LORA_MODEL socket: core's state dict, with the header for saving it."""

    def __init__(self, lora: Lora, metadata: Mapping[str, str]) -> None:
        with torch.inference_mode(False):
            super().__init__({key: t.clone() for key, t in lora_to_kohya(lora).items()})
        # its alphas are in the tensors now, as keys or in `up`
        self.metadata = {k: v for k, v in metadata.items() if k != "lora_adapter_metadata"}


def check_fits(lora: Mapping[str, Tensor], model: comfy.model_patcher.ModelPatcher) -> None:
    """Errors: LayoutMismatch unless the model has every U-Net layer of a LoRA, at its shape."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model.state_dict()
    names = [key.rpartition(".lora_up")[0] for key in lora if ".lora_up." in key]
    layers = [name for name in names if name.startswith("lora_unet_")]
    strange = [name for name in layers if not _fits(weights.get(keys.get(name)), lora, name)]
    if strange:
        raise LayoutMismatch(
            f"This LoRA was made for another base model: {len(strange)} of {len(layers)} layers "
            f"do not fit the connected one ({strange[0]}).",
            hint="Use the model that the predictor was trained for.",
        )


def _fits(weight: Tensor | None, lora: Mapping[str, Tensor], name: str) -> bool:
    """SD 1.5 and SD 2.1 differ only in the inputs of the layers that see the text."""
    if weight is None:
        return False
    up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
    return up.shape[0] == weight.shape[0] and down[0].numel() == weight[0].numel()


def number_list(text: str) -> list[float]:
    """Numbers from a widget, such as "1, 0.5". Errors: DiffLoRAError."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise DiffLoRAError(
            f"{text!r} is no list of numbers.", hint="Write them like this: 1, 0.5, 0.5"
        ) from error


def numbered_path(folder: Path, prefix: str) -> Path:
    """The next free `PREFIX_00001_.safetensors` in a folder, counted as Save Image counts.

    Errors: BadWeightsFile.
    """
    if not Path(prefix).name.strip():
        raise BadWeightsFile(f"{prefix!r} names no file.", hint="Type a name, such as person.")
    target = folder / prefix.rstrip("/\\")
    if not os.path.abspath(target).startswith(os.path.join(os.path.abspath(folder), "")):
        raise BadWeightsFile(
            f"{prefix!r} leads out of the folder {folder.name}.", hint="Type a name inside of it."
        )
    try:
        with refusals(target, BadWeightsFile):
            place, name, counter, _subfolder, _prefix = folder_paths.get_save_image_path(
                prefix.rstrip("/\\"), str(folder)
            )
    except DiffLoRAError:
        raise
    except Exception as error:  # ComfyUI's own has no narrower class
        raise BadWeightsFile(
            f"ComfyUI saves nothing under {prefix!r}: by a link it leads out of {folder.name}.",
            hint="Type a name inside of the folder.",
        ) from error
    return Path(place) / f"{name}_{counter:05}_.safetensors"
