"""LoRAs that depend on the base weights, as plain ones: every reference case, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difflora_core.bake import BakeInput, bake
from difflora_core.errors import BadLoraFile, LayoutMismatch
from difflora_core.extract import ExtractSettings, extract
from difflora_core.extract_sources import LoraOnCheckpoint
from difflora_core.lora_on_base import open_lora_needing_base
from difflora_core.merging import RankRule
from difflora_core.weights_file import open_lora, read_lora, read_safetensors
from tests.core.checkpoint_files import mini_layers, random_tensors, single_file_shapes, write
from tests.core.lora_layouts import packed

CASES = {case["id"]: case for case in packed("lora_deltas")["cases"]}
ON_BASE = [name for name in CASES if name.split("_")[0] in ("dora", "glora", "ia3", "diag", "boft")]
ON_BASE += [
    "lokr_linear_dora_output_axis",
    "peft_dora_linear",
    "peft_oft_linear",
    "peft_ia3_linear",
]
LAYER, ORIGINAL = "mid_block.proj", "middle_block.0.proj"
EXACT = ExtractSettings(RankRule(), torch.float32)


def one_layer(case: dict, folder: Path):
    """The mini model as one layer, which the reference case fits."""
    return mini_layers(folder, {"unet": [[LAYER, ORIGINAL, case["base_weight"]["shape"]]]})


def values(entry: dict) -> Tensor:
    return torch.tensor(entry["data"], dtype=torch.float32).reshape(entry["shape"])


def files_of(case: dict, folder: Path) -> tuple[Path, Path]:
    """The LoRA as its trainer saves it, and a checkpoint with the base weight."""
    peft = case["source"].startswith("peft")
    module = f"base_model.model.{LAYER}" if peft else f"lora_unet_{LAYER.replace('.', '_')}"
    tensors = {f"{module}.{suffix}": values(entry) for suffix, entry in case["tensors"].items()}
    if "config" in case:
        (folder / "adapter_config.json").write_text(json.dumps(case["config"]))
    weight = values(case["base_weight"])
    base = {f"{LAYER}.weight": weight, f"{LAYER}.bias": torch.zeros(len(weight))}
    return write(folder / "lora.safetensors", tensors), write(folder / "base.safetensors", base)


@pytest.mark.parametrize("name", list(CASES))
def test_reference_cases(name, tmp_path):
    case = CASES[name]
    lora, base = files_of(case, tmp_path)
    with one_layer(case, tmp_path):
        extract(LoraOnCheckpoint.open(lora, base), tmp_path / "plain.safetensors", EXACT)
        found = open_lora(tmp_path / "plain.safetensors").lora.layers[f"unet.{LAYER}"]
    assert torch.allclose(found.delta(), values(case["delta"]), atol=1e-5)


@pytest.mark.parametrize("name", ON_BASE)
def test_baking_needs_no_detour(name, tmp_path):
    case = CASES[name]
    lora, base = files_of(case, tmp_path)
    with one_layer(case, tmp_path):
        with pytest.raises(BadLoraFile, match="depends on the weights of the base model"):
            open_lora(lora)
        given = BakeInput(open_lora_needing_base(lora), "x", 0.5)
        bake(base, [given], tmp_path / "baked.safetensors")
    baked, _ = read_safetensors(tmp_path / "baked.safetensors")
    expected = values(case["base_weight"]) + 0.5 * values(case["delta"])
    assert torch.allclose(baked[f"{LAYER}.weight"], expected, atol=1e-5)


def dora_tensors(module: str, out: int, inner: int) -> dict[str, Tensor]:
    shapes = {
        f"{module}.lora_down.weight": (4, inner),
        f"{module}.lora_up.weight": (out, 4),
        f"{module}.dora_scale": (out, 1),
    }
    return random_tensors(shapes, seed=5) | {f"{module}.alpha": torch.tensor(2.0)}


def test_trigger_is_kept_and_stale_fields_are_not(tmp_path):
    base = write(tmp_path / "base.safetensors", random_tensors(single_file_shapes("mini"), 1))
    unit = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = dora_tensors(f"lora_unet_{unit}", 64, 64)
    fields = {"modelspec.trigger_phrase": "sks person", "modelspec.hash_sha256": "0x1"}
    lora = write(tmp_path / "dora.safetensors", tensors, fields | {"ss_network_dim": "4"})
    out = tmp_path / "plain.safetensors"
    report = extract(LoraOnCheckpoint.open(lora, base), out, ExtractSettings(RankRule(rank=8)))
    metadata = read_lora(out).metadata
    assert metadata["modelspec.trigger_phrase"] == "sks person"
    assert metadata["ss_network_dim"] == "8"
    assert metadata["modelspec.hash_sha256"] != "0x1"
    assert (report["layers"], report["ranks"]) == (1, {"8": 1})


def test_lora_of_another_part_or_model(tmp_path):
    shapes = single_file_shapes("mini")
    unet = {key: shape for key, shape in shapes.items() if "diffusion_model" in key}
    base = write(tmp_path / "base.safetensors", random_tensors(unet, 1))
    text = dora_tensors("lora_te_text_model_encoder_layers_0_mlp_fc1", 512, 128)
    lora = write(tmp_path / "dora.safetensors", text)
    with pytest.raises(LayoutMismatch, match="1 parameter") as caught:
        LoraOnCheckpoint.open(lora, base)
    assert "holds no text encoder" in caught.value.hint
    other = dora_tensors("lora_unet_mid_block_attentions_0_proj_in", 1280, 1280)
    with pytest.raises(LayoutMismatch, match=r"does not fit base\.safetensors, which is of mini"):
        LoraOnCheckpoint.open(write(tmp_path / "dora.safetensors", other), base)


def test_only_models_that_extract_knows_are_sent_to_it(tmp_path):
    ours = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    hints = {}
    for module in (ours, "lora_unet_double_blocks_0_img_attn_qkv"):
        lora = write(tmp_path / "dora.safetensors", dora_tensors(module, 64, 64))
        with pytest.raises(BadLoraFile, match="depends on the weights of the base") as caught:
            open_lora(lora, any_model=True)
        hints[module] = caught.value.hint
    assert [("extract --lora" in hint) for hint in hints.values()] == [True, False]
