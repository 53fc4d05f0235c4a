"""LoRAs that stay in their file until a layer is asked for, and files written layer by layer."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.errors import BadWeightsFile
from difflora_core.lora import LayerOutline, LazyLayers, Lora, LoraLayer
from difflora_core.lora_families import parse_part
from difflora_core.tensor_file import DTYPES, TensorFile
from difflora_core.tensor_writing import TensorOutline, write_safetensors, write_tensors
from difflora_core.weights_file import (
    lora_from_state_dict,
    lora_to_kohya,
    open_lora,
    read_safetensors,
    write_lora,
)
from tests.core.lora_layouts import ShapesOnly, layouts
from tests.core.lora_samples import attention_lora

NORM = "unet.conv_norm_out"


def lazy_copy(lora: Lora, asked: list[str]) -> Lora:
    """The same LoRA, whose layers are noted in `asked` when they are taken."""

    def make(name: str) -> LoraLayer:
        asked.append(name)
        return lora.layers[name]

    return replace(lora, layers=LazyLayers(lora.outline, make))


def same(one: Lora, other: Lora) -> bool:
    return list(one.layers) == list(other.layers) and all(
        torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.scale == b.scale
        for a, b in zip(one, other, strict=True)
    )


def with_offsets(lora: Lora) -> Lora:
    offsets = {
        f"{NORM}.weight": torch.randn(64),
        f"{NORM}.bias": torch.randn(64),
        "unet.mid_block.attentions.0.norm.bias": torch.randn(128),
        "unet.conv_in.bias": torch.randn(64),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.bias": torch.randn(512),
    }
    return replace(lora, offsets=offsets)


def test_a_lazy_lora_is_the_eager_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(attention_lora("mini", scale=0.5), path, {})
    eager, lazy = open_lora(path).lora, open_lora(path, lazy=True).lora
    assert isinstance(lazy.layers, LazyLayers)
    assert not isinstance(eager.layers, LazyLayers)
    assert lazy.outline == eager.outline
    assert lazy.ranks == eager.ranks
    assert len(lazy) == len(eager)
    assert same(eager, lazy)
    assert lazy.norms() == eager.norms()
    with pytest.raises(KeyError):
        lazy.layers["unet.nothing"]


def test_changes_of_a_lazy_lora_stay_lazy() -> None:
    asked: list[str] = []
    eager = with_offsets(attention_lora("mini", scale=0.5))
    lazy = lazy_copy(eager, asked)
    changed = lazy.scaled(2.0).to(torch.float16)
    assert asked == []
    first = next(iter(changed.layers))
    assert changed.outline[first] == LayerOutline(4, (64, 64), torch.float16, 1.0)
    assert changed.layers[first].outline == changed.outline[first]
    assert asked == [first]
    assert same(changed, eager.scaled(2.0).to(torch.float16))
    expected = (eager.offsets["unet.conv_in.bias"] * 2).half()
    assert torch.equal(changed.offsets["unet.conv_in.bias"], expected)


def test_writing_asks_for_every_layer_once_and_writes_the_same_bytes(tmp_path: Path) -> None:
    asked: list[str] = []
    lora = attention_lora("mini")
    write_lora(lazy_copy(lora, asked), tmp_path / "lazy.safetensors", {"note": "x"})
    write_lora(lora, tmp_path / "eager.safetensors", {"note": "x"})
    assert asked == list(lora.layers)
    lazy, eager = (tmp_path / f"{name}.safetensors" for name in ("lazy", "eager"))
    assert lazy.read_bytes() == eager.read_bytes()


def test_the_hash_is_that_of_the_bytes_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(with_offsets(attention_lora("mini")), path, {})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    assert TensorFile(path).metadata["modelspec.hash_sha256"] == f"0x{digest}"


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    lora = attention_lora("mini")

    def broken(name: str) -> LoraLayer:
        if name == list(lora.layers)[5]:
            raise RuntimeError("no more")
        return lora.layers[name]

    failing = replace(lora, layers=LazyLayers(lora.outline, broken))
    with pytest.raises(RuntimeError, match="no more"):
        write_lora(failing, tmp_path / "a.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_has_to_be_what_was_announced(tmp_path: Path) -> None:
    outlines = {"a": TensorOutline(torch.float32, (2,)), "b": TensorOutline(torch.float32, (1,))}
    path = tmp_path / "a.safetensors"
    for given in (
        [("a", torch.ones(3)), ("b", torch.ones(1))],
        [("b", torch.ones(1)), ("a", torch.ones(2))],
        [("a", torch.ones(2))],
    ):
        with pytest.raises(ValueError, match="announced"):
            write_tensors(path, outlines, given, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "C64"])
def test_every_number_type_goes_both_ways(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "odd": torch.tensor([1, 0, 1]).to(DTYPES[name]),
        "empty": torch.zeros(0, 3).to(DTYPES[name]),
        "scalar": torch.tensor(1).to(DTYPES[name]),
        "other": torch.tensor([1.5, 2.5]),
    }
    write_safetensors(path, tensors, {"a": "b"})
    file = TensorFile(path)
    with safe_open(path, framework="pt") as library:
        for key, tensor in tensors.items():
            assert file.shape(key) == tuple(tensor.shape)
            assert file.dtype(key) == tensor.dtype
            for read in (file.tensor(key), library.get_tensor(key)):
                assert read.dtype == tensor.dtype
                assert torch.equal(read.flatten().view(torch.uint8), bytes_of(tensor))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def test_strided_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    matrix = torch.arange(12.0).view(3, 4)
    write_safetensors(path, {"t": matrix.T, "s": matrix[:, ::2]}, {})
    assert torch.equal(load_file(path)["t"], matrix.T)
    assert torch.equal(read_safetensors(path)[0]["s"], matrix[:, ::2])


def test_a_file_that_changes_under_a_lazy_lora_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(attention_lora("mini"), path, {})
    lora = open_lora(path, lazy=True).lora
    write_lora(attention_lora("mini", seed=1), path, {}, overwrite=True)
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadWeightsFile, match="has changed since it was opened"):
        next(iter(lora))
    path.unlink()
    with pytest.raises(BadWeightsFile, match="cannot be read"):
        next(iter(lora))


def test_a_lora_can_be_written_over_the_file_that_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora = attention_lora("mini")
    write_lora(lora, path, {}, dtype=torch.float32)
    write_lora(open_lora(path, lazy=True).lora.scaled(0.5), path, {}, True, torch.float32)
    assert same(open_lora(path).lora, lora.scaled(0.5))


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ([[0, 4], [0, 4]], "begins at byte 0, expected 4"),
        ([[0, 4], [8, 12]], "begins at byte 8, expected 4"),
        ([[0, 8], [8, 12]], "needs 4 bytes, but has 8"),
        ([[0, 4], [4, 8]], "4 bytes at the end belong to no tensor"),
    ],
)
def test_places_of_tensors_fill_the_file_without_overlap(
    offsets: list[list[int]], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps(
        {
            k: {"dtype": "F32", "shape": [1], "data_offsets": o}
            for k, o in zip("ab", offsets, strict=True)
        }
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    with pytest.raises(BadWeightsFile, match=says):
        TensorFile(path)


@pytest.mark.parametrize("base", ["mini", "sdxl"])
def test_offsets_go_both_ways_in_the_spelling_of_core(base: str, tmp_path: Path) -> None:
    lora = with_offsets(attention_lora("mini")) if base == "mini" else sdxl_with_norms()
    path = tmp_path / "a.safetensors"
    write_lora(lora, path, {}, dtype=torch.float32)
    back = open_lora(path).lora
    assert back.offsets.keys() == lora.offsets.keys()
    for name, offset in lora.offsets.items():
        assert torch.equal(back.offsets[name], offset)
    keys = set(load_file(path))
    for name in ("w_norm", "b_norm", "diff_b"):
        assert any(key.endswith(name) for key in keys)
    # core takes a b_norm only together with its w_norm
    assert {k[:-6] for k in keys if k.endswith("b_norm")} <= {
        k[:-6] for k in keys if k.endswith("w_norm")
    }
    torch.testing.assert_close(
        lora_from_state_dict(lora_to_kohya(lora)).offsets, dict(lora.offsets)
    )


def sdxl_with_norms() -> Lora:
    block = "unet.mid_block.attentions.0.transformer_blocks.9"
    layer = LoraLayer(f"{block}.attn1.to_q", torch.ones(1, 1280), torch.ones(1280, 1))
    offsets = {
        f"{block}.norm1.weight": torch.randn(1280),
        f"{block}.norm1.bias": torch.randn(1280),
        f"{block}.attn1.to_out.0.bias": torch.randn(1280),
        "text_encoder_2.text_model.final_layer_norm.bias": torch.randn(1280),
    }
    return Lora({layer.name: layer}, {}, offsets)


OTHER_MODELS = [
    "must_refuse_for_sd_flux_lora_kohya_format",
    "must_refuse_for_sd_flux_lora_diffusers_format",
    "must_refuse_for_sd_flux_lora_xlabs_format",
    "must_refuse_for_sd_flux_lora_aitoolkit_format",
    "must_refuse_for_sd_qwen_image_lora_diffusers_format",
    "must_refuse_for_sd_anima_lora_peft_format",
    "must_refuse_for_sd_krea2_lora_kohya_format",
]


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_loras_of_other_models_keep_their_keys(name: str, tmp_path: Path) -> None:
    """The smallest module of each, with their keys and what they add, through a file and back."""
    keys = layouts()[name]["keys"]
    module = min((prod(shape), parse_part(key).module) for key, shape in keys.items() if shape)[1]
    source = ShapesOnly({k: s for k, s in keys.items() if parse_part(k).module == module})
    path = tmp_path / "a.safetensors"
    save_file({key: source.tensor(key) for key in source}, path)
    one = open_lora(path, any_model=True).lora
    write_lora(one, path, {}, overwrite=True, dtype=torch.float32)
    two = open_lora(path, any_model=True).lora
    assert set(load_file(path)) == set(source)
    assert two.naming == one.naming
    for a, b in zip(one, two, strict=True):
        assert a.name == b.name
        torch.testing.assert_close(a.down * a.scale, b.down * a.scale)
        torch.testing.assert_close(a.up * a.scale, b.up * b.scale)


def test_what_diffusers_cannot_say_goes_into_the_factor() -> None:
    module = "transformer.single_transformer_blocks.0.attn.to_k"
    tensors = {
        f"{module}.lora_A.weight": torch.ones(2, 8),
        f"{module}.lora_B.weight": torch.ones(8, 2),
    }
    lora = lora_from_state_dict(tensors, any_model=True)
    written = lora_to_kohya(lora.scaled(0.5))
    assert set(written) == set(tensors)
    assert torch.equal(written[f"{module}.lora_B.weight"], torch.full((8, 2), 0.5))
