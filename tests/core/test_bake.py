"""LoRAs baked into checkpoints: the sums are right, and nothing else changes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from difflora_core import bake as bake_module
from difflora_core.bake import BakeInput, bake
from difflora_core.errors import BadWeightsFile, LayoutMismatch
from difflora_core.key_names import module_table
from difflora_core.lora import Lora, LoraLayer, Naming
from difflora_core.tensor_file import TensorFile
from difflora_core.weights_file import read_safetensors
from tests.core.checkpoint_files import mini_layers, random_tensors, single_file_shapes, write
from tests.core.lora_samples import attention_lora, random_lora

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer."


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return random_tensors(single_file_shapes("mini"), seed=1)


def baked(folder, tensors, *inputs: BakeInput, metadata=None) -> tuple[dict[str, Tensor], dict]:
    path = write(folder / "base.safetensors", tensors, metadata)
    report = bake(path, inputs, folder / "out.safetensors", overwrite=True)
    return read_safetensors(folder / "out.safetensors")[0], report


def key_of(layer: str) -> str:
    component, _, path = layer.partition(".")
    if component == "unet":
        return f"{UNET}{module_table('mini').originals[layer]}.weight"
    return f"{TEXT}{path}.weight"


def everything_lora(rank: int = 2, seed: int = 0) -> Lora:
    return random_lora("mini", list(module_table("mini").shapes), rank, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_the_sum_rounded_once(dtype, base, tmp_path):
    stored = {key: tensor.to(dtype) for key, tensor in base.items()}
    one, two = everything_lora(seed=1), attention_lora("mini", seed=2)
    result, report = baked(tmp_path, stored, BakeInput(one, "a", 0.7), BakeInput(two, "b", -1.5))
    for layer in one.layers:
        exact = stored[key_of(layer)].double() + 0.7 * one.layers[layer].delta().double()
        if layer in two.layers:
            exact -= 1.5 * two.layers[layer].delta().double()
        found = result[key_of(layer)]
        assert found.dtype == dtype
        step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 4)
        assert torch.allclose(found.double(), exact, rtol=step, atol=1e-7)
    assert report["changed"] == len(one.layers)


def test_everything_else_stays_bit_for_bit(base, tmp_path):
    """Mixed number types, NaN in an unused tensor, integers, order and header fields included."""
    odd = {
        "first_stage_model.a": torch.tensor([math.nan, -0.0, math.inf]),
        "model_ema.num_updates": torch.tensor(7),
        "first_stage_model.b": torch.randn(3).to(torch.float8_e4m3fn),
        "first_stage_model.c": torch.randn(5).bfloat16(),
    }
    tensors = {**base, **odd}
    fields = {"modelspec.title": "my model", "modelspec.hash_sha256": "0xold", "other": "kept"}
    lora = attention_lora("mini")
    result, report = baked(tmp_path, tensors, BakeInput(lora, "person"), metadata=fields)
    changed = {key_of(layer) for layer in lora.layers}
    assert set(result) == set(tensors)
    for key in set(tensors) - changed:
        assert result[key].dtype == tensors[key].dtype
        ours, theirs = (
            t.contiguous().flatten().view(torch.uint8) for t in (result[key], tensors[key])
        )
        assert torch.equal(ours, theirs)
    metadata = TensorFile(tmp_path / "out.safetensors").metadata
    assert (metadata["modelspec.title"], metadata["other"]) == ("my model", "kept")
    assert metadata["modelspec.hash_sha256"] != "0xold"
    assert json.loads(metadata["difflora.baked"]) == [{"title": "person", "weight": 1.0}]
    assert report["tensors"] == len(tensors)


def test_eight_bit_weights_keep_their_type(base, tmp_path):
    stored = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in base.items()}
    lora = attention_lora("mini")
    result, _ = baked(tmp_path, stored, BakeInput(lora, "x"))
    layer = next(iter(lora))
    expected = (stored[key_of(layer.name)].float() + layer.delta()).to(torch.float8_e4m3fn)
    assert torch.equal(result[key_of(layer.name)].float(), expected.float())


def test_weight_zero_changes_nothing(base, tmp_path):
    result, report = baked(tmp_path, base, BakeInput(everything_lora(), "x", 0.0))
    assert report["changed"] == 0
    assert all(torch.equal(result[key], base[key]) for key in base)


def test_minus_one_takes_back_what_one_gave(base, tmp_path):
    lora = everything_lora()
    there, _ = baked(tmp_path, base, BakeInput(lora, "x"))
    back, _ = baked(tmp_path, there, BakeInput(lora, "x", -1.0))
    assert all(torch.allclose(back[key], base[key], atol=1e-6) for key in base)


def test_offsets_of_biases_and_norms(base, tmp_path):
    name = "unet.down_blocks.0.resnets.0.norm1.weight"
    offsets = {name: torch.ones(64), "unet.conv_out.bias": torch.arange(4.0)}
    result, _ = baked(tmp_path, base, BakeInput(Lora({}, {}, offsets), "x", 2.0))
    norm, bias = f"{UNET}input_blocks.1.0.in_layers.0.weight", f"{UNET}out.2.bias"
    assert torch.allclose(result[norm], base[norm] + 2)
    assert torch.allclose(result[bias], base[bias] + 2 * torch.arange(4.0))


def test_fused_projections_change_by_thirds(tmp_path):
    """OpenCLIP keeps query, key and value in one tensor, and the last projection on its side."""
    start, block = "conditioner.embedders.1.model.", "transformer.resblocks.0."
    fused, flat = f"{start}{block}attn.in_proj_weight", f"{start}text_projection"
    shapes = {fused: (24, 8), flat: (8, 8), f"{start}{block}mlp.c_fc.weight": (32, 8)}
    inner = "text_model.encoder.layers.0."
    names = [f"{inner}self_attn.{letter}_proj" for letter in "qkv"]
    rows = [[name, None, [8, 8]] for name in (*names, "text_projection")]
    rows.append([f"{inner}mlp.fc1", None, [32, 8]])
    tensors = random_tensors(shapes, seed=1)
    with mini_layers(tmp_path, {"text_encoder_2": rows}):
        changed = [f"text_encoder_2.{name}" for name in (names[0], names[2], "text_projection")]
        lora = random_lora("mini", changed)
        result, report = baked(tmp_path, tensors, BakeInput(lora, "x"))
    q, v, projection = (lora.layers[name].delta() for name in changed)
    expected = torch.cat([q, torch.zeros(8, 8), v])
    assert torch.allclose(result[fused], tensors[fused] + expected)
    assert torch.equal(result[fused][8:16], tensors[fused][8:16])
    assert torch.allclose(result[flat], tensors[flat] + projection.T)
    assert report["changed"] == 2


def test_inpainting_models_take_ordinary_loras(base, tmp_path):
    wide = {**base, f"{UNET}input_blocks.0.0.weight": torch.randn(64, 9, 3, 3)}
    lora = random_lora("mini", ["unet.conv_in", "unet.conv_out"])
    result, _ = baked(tmp_path, wide, BakeInput(lora, "x"))
    key = f"{UNET}input_blocks.0.0.weight"
    assert torch.allclose(
        result[key][:, :4], wide[key][:, :4] + lora.layers["unet.conv_in"].delta()
    )
    assert torch.equal(result[key][:, 4:], wide[key][:, 4:])


def test_missing_text_encoder_is_warned_of(base, tmp_path):
    unet = {key: tensor for key, tensor in base.items() if key.startswith(UNET)}
    _, report = baked(tmp_path, unet, BakeInput(everything_lora(), "person"))
    [warning] = report["warnings"]
    assert warning.startswith("base.safetensors holds no text encoder; what person changes")
    text = random_lora("mini", ["text_encoder.text_model.encoder.layers.0.mlp.fc1"])
    with pytest.raises(LayoutMismatch, match=r"person does not fit base\.safetensors"):
        baked(tmp_path, unet, BakeInput(text, "person"))


def test_loras_of_other_models_are_refused(base, tmp_path):
    with pytest.raises(LayoutMismatch, match=r"which is of mini: .* have no place there"):
        baked(tmp_path, base, BakeInput(attention_lora("sd15"), "person"))
    layer = LoraLayer("transformer.x", torch.zeros(1, 4), torch.zeros(4, 1))
    flux = Lora({layer.name: layer}, naming=Naming("Flux, kohya names", "kohya"))
    with pytest.raises(LayoutMismatch, match="1 parameter"):
        baked(tmp_path, base, BakeInput(flux, "flux"))
    assert not (tmp_path / "out.safetensors").exists()


def test_overflow_leaves_nothing(base, tmp_path):
    stored = {key: tensor.half() for key, tensor in base.items()}
    with pytest.raises(BadWeightsFile, match="not finite in float16"):
        baked(tmp_path, stored, BakeInput(attention_lora("mini"), "x", 1e9))
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_folder_existing_file_and_full_disk(base, tmp_path, monkeypatch):
    path = write(tmp_path / "base.safetensors", base)
    given = [BakeInput(attention_lora("mini"), "x")]
    with pytest.raises(BadWeightsFile, match="is a folder"):
        bake(tmp_path, given, tmp_path / "out.safetensors")
    with pytest.raises(BadWeightsFile, match="exists already"):
        bake(path, given, path)

    def full(*_):
        raise BadWeightsFile("full")

    monkeypatch.setattr(bake_module, "refuse_full_disk", full)
    with pytest.raises(BadWeightsFile, match="full"):
        bake(path, given, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_checkpoint_can_be_replaced_by_itself(base, tmp_path):
    path = write(tmp_path / "base.safetensors", base)
    lora = attention_lora("mini")
    bake(path, [BakeInput(lora, "x")], path, overwrite=True)
    layer = next(iter(lora))
    found = TensorFile(path).tensor(key_of(layer.name))
    assert torch.allclose(found, base[key_of(layer.name)] + layer.delta())
