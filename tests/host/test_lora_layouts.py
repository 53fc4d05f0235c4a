"""Every layout and kind that core's own loader takes gives the same weights here and there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from torch import Tensor

from difflora_core.key_names import kohya_name, module_table
from difflora_core.lora import Lora
from difflora_core.lora_on_base import lora_on_base
from difflora_core.lora_reading import read_lora_source
from difflora_core.tensor_file import TensorsInMemory
from difflora_core.weights_file import lora_to_kohya

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
SQUARE, WIDE = f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj"
POINT, CONV = "unet.down_blocks.0.attentions.0.proj_in", "unet.down_blocks.0.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
LAYERS = [SQUARE, WIDE, POINT, CONV, TEXT]
RANK = 3
Tensors = dict[str, Tensor]
Kind = Callable[[tuple[int, ...]], Tensors]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.2


def alpha(value: float = 2.0) -> Tensors:
    return {"alpha": torch.tensor(value)}


def plain(shape: tuple[int, ...]) -> Tensors:
    ones = (1,) * (len(shape) - 2)
    return {
        "lora_down.weight": rand(RANK, *shape[1:]),
        "lora_up.weight": rand(shape[0], RANK, *ones),
    }


def tucker(shape: tuple[int, ...]) -> Tensors:
    if len(shape) == 2 or shape[2] == 1:
        return plain(shape)
    return {
        "lora_down.weight": rand(2, shape[1], 1, 1),
        "lora_mid.weight": rand(2, 2, *shape[2:]),
        "lora_up.weight": rand(shape[0], 2, 1, 1),
    }


def loha(shape: tuple[int, ...]) -> Tensors:
    n = torch.Size(shape[1:]).numel()
    sides = {f"hada_w{i}_a": rand(shape[0], RANK) for i in "12"}
    return sides | {f"hada_w{i}_b": rand(RANK, n) for i in "12"}


def loha_tucker(shape: tuple[int, ...]) -> Tensors:
    if len(shape) == 2 or shape[2] == 1:
        return loha(shape)
    made = {f"hada_t{i}": rand(RANK, RANK, *shape[2:]) for i in "12"}
    made |= {f"hada_w{i}_a": rand(RANK, shape[0]) for i in "12"}
    return made | {f"hada_w{i}_b": rand(RANK, shape[1]) for i in "12"}


def lokr(shape: tuple[int, ...], w1_split: bool = False, w2: str = "split") -> Tensors:
    out, inner, kernel = shape[0] // 4, shape[1] // 4, shape[2:]
    made = {"lokr_w1": rand(4, 4)}
    if w1_split:
        made = {"lokr_w1_a": rand(4, 2), "lokr_w1_b": rand(2, 4)}
    if w2 == "whole":
        return made | {"lokr_w2": rand(out, inner, *kernel)}
    if w2 == "tucker" and kernel and kernel[0] > 1:
        core = {"lokr_t2": rand(2, 2, *kernel)}
        return made | core | {"lokr_w2_a": rand(2, out), "lokr_w2_b": rand(2, inner)}
    n = inner * torch.Size(kernel).numel()
    return made | {"lokr_w2_a": rand(out, 2), "lokr_w2_b": rand(2, n)}


KINDS: dict[str, Kind] = {
    "lora": plain,
    "lora_alpha": lambda shape: plain(shape) | alpha(),
    "lora_alpha_shape_one": lambda shape: plain(shape) | {"alpha": torch.tensor([2.0])},
    "lora_alpha_bf16": lambda shape: plain(shape) | {"alpha": torch.tensor(94.0).bfloat16()},
    "lora_alpha_0": lambda shape: plain(shape) | alpha(0.0),
    "lora_fp16": lambda shape: {k: t.half() for k, t in (plain(shape) | alpha()).items()},
    "lora_rank_above_the_width": lambda shape: (
        {
            "lora_down.weight": rand(80, *shape[1:]),
            "lora_up.weight": rand(shape[0], 80, *(1,) * (len(shape) - 2)),
        }
        | alpha()
    ),
    "dylora": lambda shape: (
        {k: t.flatten(1) if "up" in k else t for k, t in plain(shape).items()} | alpha()
    ),
    "locon_tucker": lambda shape: tucker(shape) | alpha(),
    "loha": lambda shape: loha(shape) | alpha(),
    "loha_without_alpha": loha,
    "loha_tucker": lambda shape: loha_tucker(shape) | alpha(),
    "lokr": lambda shape: lokr(shape) | alpha(),
    "lokr_both_split": lambda shape: lokr(shape, w1_split=True) | alpha(),
    "lokr_whole": lambda shape: lokr(shape, w2="whole") | alpha(1e5),
    "lokr_w1_split": lambda shape: lokr(shape, w1_split=True, w2="whole") | alpha(),
    "lokr_tucker": lambda shape: lokr(shape, w2="tucker") | alpha(),
    "whole_difference": lambda shape: {"diff": rand(*shape)},
    "with_bias": lambda shape: plain(shape) | alpha() | {"diff_b": rand(shape[0])},
}


# The reference differences (tests/core/test_lora_deltas.py) decide against core in these.
CORE_IS_WRONG = {
    "lokr_tucker": "core logs an error of torch.kron and leaves the weight as it is",
    "dora_output_axis": "core divides by the norm of W instead of W + difference",
    "oft_constrained": "core limits the norm to alpha instead of alpha * out_features",
    "oft_rescaled": "core reads rescale and does not use it",
}


@pytest.fixture(scope="module")
def models(host: Host, random_world: Path) -> tuple[Any, Any]:
    loader = host.module("nodes.mini_model")
    return loader.load_model(random_world), loader.load_clip(random_world)


def core_key(parameter: str) -> str:
    """What core calls a parameter of the mini model."""
    name, _, kind = parameter.rpartition(".")
    if name.startswith("unet."):
        return f"diffusion_model.{module_table('mini').originals[name]}.{kind}"
    return f"clip_l.transformer.{name.removeprefix('text_encoder.')}.{kind}"


def of_core(models: tuple[Any, Any], tensors: Mapping[str, Tensor], on_zero: bool) -> Tensors:
    """What core adds to each parameter, by its own key; `on_zero` lets it start from zeros."""
    import comfy.lora
    import comfy.sd

    model, clip = comfy.sd.load_lora_for_models(*models, dict(tensors), 1.0, 1.0)
    added = {}
    for patcher in (model, clip.patcher):
        weights = patcher.model.state_dict()
        for key, patches in patcher.patches.items():
            weight = weights[key].float()
            start = torch.zeros_like(weight) if on_zero else weight.clone()
            changed = comfy.lora.calculate_weight(patches, start.clone(), key)
            added[key] = changed - start
    return added


def of_ours(lora: Lora) -> Tensors:
    layers = {core_key(f"{layer.name}.weight"): layer.delta() for layer in lora}
    return layers | {core_key(name): offset.float() for name, offset in lora.offsets.items()}


def assert_same(ours: Tensors, cores: Tensors, tolerance: float = 1e-5) -> None:
    assert ours.keys() == cores.keys()
    for key, expected in cores.items():
        difference = float((ours[key].reshape(expected.shape) - expected).norm())
        assert difference <= tolerance * max(float(expected.norm()), 1e-3), key


def file_of(kind: Kind, spell: Callable[[str], str], layers: list[str]) -> Tensors:
    torch.manual_seed(0)
    table = module_table("mini")
    parts = {name: kind(table.shapes[name]) for name in layers}
    return {f"{spell(name)}.{end}": t for name, made in parts.items() for end, t in made.items()}


def read(tensors: Tensors) -> Lora:
    return read_lora_source(TensorsInMemory(tensors)).lora


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, models: tuple[Any, Any]) -> None:
    """What core loads, what we read, and what core loads of what we write."""
    tensors = file_of(KINDS[kind], lambda name: kohya_name(name, "mini"), LAYERS)
    lora = read(tensors)
    if kind not in CORE_IS_WRONG:
        assert_same(of_ours(lora), of_core(models, tensors, on_zero=True))
    assert_same(of_ours(lora), of_core(models, lora_to_kohya(lora), on_zero=True))


SPELLINGS: dict[str, Callable[[str], str]] = {
    "kohya": lambda name: kohya_name(name, "mini"),
    "kohya_original": lambda name: "lora_unet_" + original(name).replace(".", "_"),
    "lycoris": lambda name: "lycoris_" + path(name).replace(".", "_"),
    "comfyui": lambda name: "diffusion_model." + original(name),
}


def original(name: str) -> str:
    return module_table("mini").originals[name]


def path(name: str) -> str:
    return name.removeprefix("unet.")


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora_A.weight", "lora.down.weight"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_the_u_net(spelling: str, suffix: str, models: tuple[Any, Any]) -> None:
    tensors = file_of(plain, SPELLINGS[spelling], LAYERS[:4])
    up = {"lora_A.weight": "lora_B.weight"}.get(suffix, suffix.replace("down", "up"))
    tensors = {
        k.replace("lora_down.weight", suffix).replace("lora_up.weight", up): t
        for k, t in tensors.items()
    }
    assert_same(of_ours(read(tensors)), of_core(models, tensors, on_zero=True))


def test_the_oldest_spelling_of_diffusers(models: tuple[Any, Any]) -> None:
    block = BLOCK.removeprefix("unet.")
    tensors = {}
    for start, end, layer in (("", "to_q", "to_q"), ("unet.", "to_out", "to_out.0")):
        shape = module_table("mini").shapes[f"{BLOCK}.attn1.{layer}"]
        made = plain(shape)
        key = f"{start}{block}.attn1.processor.{end}_lora"
        tensors[f"{key}.down.weight"] = made["lora_down.weight"]
        tensors[f"{key}.up.weight"] = made["lora_up.weight"]
    assert_same(of_ours(read(tensors)), of_core(models, tensors, on_zero=True))


@pytest.mark.parametrize(
    "start",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    ],
)
def test_spellings_of_the_text_encoder(start: str, models: tuple[Any, Any]) -> None:
    tensors = file_of(plain, lambda _: start, [TEXT])
    assert_same(of_ours(read(tensors)), of_core(models, tensors, on_zero=True))


@pytest.mark.parametrize("ends", [("w_norm", "b_norm"), ("diff", "diff_b"), ("w_norm",)])
def test_norms(ends: tuple[str, ...], models: tuple[Any, Any]) -> None:
    key = kohya_name(NORM, "mini")
    width = module_table("mini").norms[NORM][0]
    tensors = {f"{key}.{end}": rand(width) for end in ends}
    tensors |= file_of(plain, lambda name: kohya_name(name, "mini"), [SQUARE])
    lora = read(tensors)
    assert_same(of_ours(lora), of_core(models, tensors, on_zero=True))
    assert_same(of_ours(lora), of_core(models, lora_to_kohya(lora), on_zero=True))


def test_a_bias_of_a_norm_alone_is_written_so_that_core_loads_it(models: tuple[Any, Any]) -> None:
    tensors = file_of(plain, lambda name: kohya_name(name, "mini"), [SQUARE])
    width = module_table("mini").norms[NORM][0]
    lora = Lora(read(tensors).layers, {}, {f"{NORM}.bias": rand(width)})
    assert_same(of_ours(lora), of_core(models, lora_to_kohya(lora), on_zero=True))


def dora(shape: tuple[int, ...], by_input: bool) -> Tensors:
    ones = [1] * (len(shape) - 2)
    size = [1, shape[1], *ones] if by_input else [shape[0], 1, *ones]
    return plain(shape) | alpha() | {"dora_scale": 1 + rand(*size).abs()}


def glora(shape: tuple[int, ...]) -> Tensors:
    ones = (1,) * (len(shape) - 2)
    return {
        "a1.weight": rand(shape[1], RANK, *ones),
        "a2.weight": rand(RANK, shape[1], *ones),
        "b1.weight": rand(shape[0], RANK, *ones),
        "b2.weight": rand(RANK, *shape[1:]),
    } | alpha()


def oft(shape: tuple[int, ...], stages: int = 0, limit: float = 0.0) -> Tensors:
    blocks = rand(*([stages] if stages else []), shape[0] // 4, 4, 4)
    return {"oft_blocks": blocks} | alpha(limit)


def rescaled(shape: tuple[int, ...]) -> Tensors:
    return oft(shape) | {"rescale": 1 + rand(shape[0], *(1,) * (len(shape) - 1))}


ON_BASE: dict[str, Kind] = {
    "dora_input_axis": lambda shape: dora(shape, by_input=True),
    "dora_output_axis": lambda shape: dora(shape, by_input=False),
    "glora": glora,
    "oft": oft,
    "oft_constrained": lambda shape: oft(shape, limit=0.001),
    "oft_rescaled": rescaled,
    "boft": lambda shape: oft(shape, stages=2),
}


@pytest.mark.parametrize("kind", ON_BASE)
def test_kinds_on_the_base_weight(kind: str, models: tuple[Any, Any]) -> None:
    if kind in CORE_IS_WRONG:
        pytest.skip(CORE_IS_WRONG[kind])
    layers = [WIDE, CONV, TEXT] if kind != "oft" else [SQUARE, WIDE, CONV, TEXT]
    tensors = file_of(ON_BASE[kind], lambda name: kohya_name(name, "mini"), layers)
    opened = lora_on_base(TensorsInMemory(tensors), {}, None)
    weights = {k: t.float() for m in (models[0], models[1].patcher) for k, t in
               m.model.state_dict().items()}  # fmt: skip
    ours = {}
    for name, change in opened.deltas.items():
        weight = weights[core_key(f"{name}.weight")]
        shape = module_table("mini").shapes[name]
        ours[core_key(f"{name}.weight")] = change(weight.reshape(shape)).reshape(weight.shape)
    assert_same(ours, of_core(models, tensors, on_zero=False), tolerance=1e-4)
