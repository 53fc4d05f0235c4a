"""Checkpoints for tests: small ones with weights, and real-sized ones that take no disk space."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from difflora_core import key_names
from difflora_core.checkpoint_names import unet_modules
from difflora_core.key_names import ModuleTable, module_table
from difflora_core.tensor_file import DTYPES
from difflora_core.weights_file import write_safetensors

TEXT_PREFIXES = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sd21": {},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer."},
    "mini": {"text_encoder": "cond_stage_model.transformer."},
}
REST = {"first_stage_model.decoder.conv_in.weight": (4, 3, 3, 3), "model_ema.decay": ()}


@contextmanager
def mini_layers(folder: Path, components: Mapping[str, list]) -> Iterator[None]:
    """Within, the mini model has these layers only: rows of name, original name, weight shape."""
    layouts = folder / "layouts"
    shutil.copytree(key_names.LAYOUTS, layouts)
    content = {"base": "mini", "components": components, "norms": {}}
    (layouts / "mini.json").write_text(json.dumps(content))
    before, key_names.LAYOUTS = key_names.LAYOUTS, layouts
    try:
        _forget_tables()
        yield
    finally:
        key_names.LAYOUTS = before
        _forget_tables()


def _forget_tables() -> None:
    module_table.cache_clear()
    unet_modules.cache_clear()


def parameter_shapes(base: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights and biases of all layers and norms, by canonical name."""
    table: ModuleTable = module_table(base)
    for name in (*table.shapes, *table.norms):
        yield f"{name}.weight", table.module_shape(name)
        if bias := table.bias_shape(name):
            yield f"{name}.bias", bias


def single_file_shapes(base: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a whole checkpoint with original names, as far as CLIP-L goes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(base):
        module, _, kind = name.rpartition(".")
        component, _, path = name.partition(".")
        if component == "unet":
            shapes[f"model.diffusion_model.{module_table(base).originals[module]}.{kind}"] = shape
        elif component in TEXT_PREFIXES[base]:
            shapes[TEXT_PREFIXES[base][component] + path] = shape
    return shapes | REST


def open_clip_shapes(prefix: str, blocks: int, width: int) -> dict[str, tuple[int, ...]]:
    """OpenCLIP's text tower in its own names."""
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    shapes = {f"transformer.resblocks.{i}.{k}": s for i in range(blocks) for k, s in block.items()}
    shapes |= {
        "token_embedding.weight": (20, width),
        "positional_embedding": (7, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
    }
    return {prefix + key: shape for key, shape in shapes.items()}


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: (0.05 * torch.randn(s, generator=generator)).to(dtype) for k, s in shapes.items()}


def with_low_rank(tensors: Mapping[str, Tensor], rank: int, seed: int = 7) -> dict[str, Tensor]:
    """The same checkpoint with a difference of exactly `rank` in every matrix and kernel."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for key, tensor in tensors.items():
        changed[key] = tensor
        if tensor.ndim >= 2 and not key.startswith("first_stage"):
            out, inner = tensor.flatten(1).shape
            up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
            down = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
            changed[key] = (tensor.double() + (0.01 * up @ down).view(tensor.shape)).to(
                tensor.dtype
            )
    return changed


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    write_safetensors(path, tensors, metadata or {}, overwrite=True)
    return path


def sparse_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Tensor] | None = None,
    dtype: str = "F16",
) -> Path:
    """A file of any size whose tensors are zeros that are stored nowhere, but for `values`."""
    size, header, end = DTYPES[dtype].itemsize, {}, 0
    for key, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * size
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for key, value in (values or {}).items():
            file.seek(8 + len(text) + header[key]["data_offsets"][0])
            file.write(value.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().data)
    return path
