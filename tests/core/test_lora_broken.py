"""58 broken or odd files, each with what has to happen to it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from difflora_core.errors import BadLoraFile, DiffLoRAError
from difflora_core.lora_on_base import open_lora_needing_base
from difflora_core.lora_reading import LoraReading
from difflora_core.tensor_file import DTYPES
from difflora_core.weights_file import open_lora
from tests.core.lora_layouts import packed

CASES = {case["id"]: case for case in packed("lora_broken")["cases"]}
Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
K = Q[:-1] + "k"
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
CONV = "unet.down_blocks.0.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"


@dataclass(frozen=True)
class Reads:
    """The layers with their ranks and scales, the base, and words of a warning."""

    layers: dict[str, tuple[int, float]]
    base: str = "sd15"
    warns: str = ""
    any_model: bool = False
    offsets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    says: str
    hint: str = ""
    write: Callable[[dict[str, Tensor], Path], None] | None = None
    on_base: bool = False
    """an extraction with the base model takes it"""


def truncated(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])


def login_page(_: dict[str, Tensor], path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Please log in</html>")


def pickled(_: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def doubled(_: dict[str, Tensor], path: Path) -> None:
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = f'{{"a": {entry}, "a": {entry}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")


def one(rank: int = 4, scale: float = 1.0, name: str = Q) -> dict[str, tuple[int, float]]:
    return {name: (rank, scale)}


NO_ALPHA = "taken to be the rank"
EXPECTED: dict[str, Reads | Refused] = {
    "alpha_missing": Reads(one(), warns=NO_ALPHA),
    "alpha_zero": Reads(one(scale=0.0), warns="no effect here, full effect in kohya"),
    "alpha_shape_one": Reads(one(scale=0.5)),
    "alpha_shape_many": Refused(f"alpha of {Q} is not one finite number"),
    "alpha_low_precision": Reads(one(scale=0.5)),
    "alpha_int": Reads(one(scale=0.5)),
    "alpha_full_matrix_lokr": Reads(one(rank=320)),
    "alpha_stale_after_rank_change": Reads(one(rank=1, scale=181.0)),
    "alpha_fused_qkv": Reads(
        {"lora_unet_double_blocks_0_img_attn_qkv": (12, 4 / 12)}, base="Flux", any_model=True
    ),
    "alpha_lost_in_peft_style_export": Reads(one(), warns=NO_ALPHA),
    "mixed_ranks_with_alpha": Reads(one(10) | one(18, name=K)),
    "mixed_ranks_without_alpha": Reads(one(10) | one(18, name=K), warns=NO_ALPHA),
    "rank_one": Reads(one(rank=1, scale=2.0)),
    "rank_zero_empty_tensor": Refused("no layer with a rank above 0"),
    "rank_larger_than_layer": Reads(one(rank=1024, scale=2 / 1024)),
    "up_down_rank_mismatch": Refused("ranks of", "[rank, in]"),
    "odd_linear_1x1": Reads(one(scale=0.5, name="unet.down_blocks.0.attentions.0.proj_in")),
    "resized_to_wrong_layout": Refused("ranks of"),
    "one_half_missing": Refused(f"{Q} is incomplete: only lora_unet"),
    "alpha_only_module": Refused("no layer with a rank above 0"),
    "nan_weights": Refused("lora_up.weight holds NaN or infinite"),
    "all_zero_up": Reads(one(scale=0.5), warns="1 of 1 layers change nothing"),
    "fp8_weights": Reads(one(scale=0.5)),
    "bf16_weights": Reads(one(scale=0.5)),
    "truncated_file": Refused("truncated", "incomplete", write=truncated),
    "html_or_text_instead_of_file": Refused("no safetensors", "web page", write=login_page),
    "pickle_named_safetensors": Refused("no safetensors", "pickle", write=pickled),
    "both_block_namings": Refused("twice: as", "two namings"),
    "stray_foreign_keys": Reads(one(scale=0.5), warns="diffusion_model.x.lora_down.weight"),
    "bundled_embedding": Reads(one(scale=0.5), warns="bundle_emb.mytoken"),
    "double_unet_prefix": Reads(one(), warns="Odd names"),
    "container_then_peft": Reads(one()),
    "adapter_infix": Reads(one()),
    "two_adapters_in_one_file": Refused("several adapters", "file of its own"),
    "double_underscore": Reads(one(scale=0.5), warns="Odd names"),
    "trailing_underscore": Reads(one(scale=0.5), warns="Odd names"),
    "dots_in_flat_name": Reads(one(scale=0.5)),
    "te_flattened": Reads(
        one(scale=0.5, name="text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    ),
    "text_encoder_only": Reads(one(scale=0.5, name=FC1)),
    "te1_prefix_in_sd15": Reads(one(name=FC1) | one(scale=0.5)),
    "ldm_names_in_sd15": Reads(one(scale=0.5)),
    "base_ambiguous_attn1_only": Reads(
        one(scale=0.5, name="unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"),
        base="sdxl",
    ),
    "sdxl_refiner": Refused("wrong shape", "refiner"),
    "oldest_diffusers_te_duplicates": Reads(
        one(name="text_encoder.text_model.encoder.layers.0.self_attn.k_proj")
    ),
    "aux_keys": Reads(one(scale=0.5), warns="_aux.something"),
    "lora_bias": Refused("changes a bias, but", "lora_bias"),
    "lycoris_sparse_bias": Refused("changes a bias, but"),
    "norm_diffs": Reads({}, offsets=(f"{NORM}.weight", f"{NORM}.bias")),
    "dora_1d_magnitude": Refused("DoRA", "extract --lora", on_base=True),
    "dora_square_axis": Refused("DoRA", "extract --lora", on_base=True),
    "dora_magnitude_wrong_name": Refused("DoRA", "extract --lora", on_base=True),
    "mid_without_tucker_flag": Reads(one(scale=0.5, name=CONV)),
    "dylora_conv_up_2d": Reads(one(scale=0.5, name=CONV)),
    "shape_mismatch_with_base": Reads(one(name=Q.replace("attn1.to_q", "attn2.to_k")), base="sd21"),
    "inpainting_conv_in": Refused("unet.conv_in has the wrong shape", "[320, 4, 3, 3]"),
    "full_checkpoint": Refused("a full checkpoint"),
    "metadata_not_json": Reads(one(scale=0.5)),
    "duplicate_header_keys": Refused("a key is there twice", write=doubled),
}
READS = {name: e for name, e in EXPECTED.items() if isinstance(e, Reads)}
REFUSED = {name: e for name, e in EXPECTED.items() if isinstance(e, Refused)}


def test_all_cases_are_covered() -> None:
    assert set(EXPECTED) == set(CASES)
    assert len(CASES) == 58


def tensor_of(case: dict, key: str) -> Tensor:
    shape, value = case["keys"][key], case.get("values", {}).get(key)
    dtype = DTYPES[case.get("dtypes", {}).get(key, "F32")]
    if key.endswith("bias_size"):
        return torch.tensor([320])
    if key.endswith("bias_indices"):
        return torch.tensor([[1, 2, 3]])
    if value == "nan":
        return torch.full(shape, torch.nan)
    if value == "zeros":
        return torch.zeros(shape)
    if key.endswith("alpha"):
        return torch.full(shape, 2.0 if value is None else value).to(dtype)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The file of a case, written as a real one."""
    case, expected = CASES[request.param], EXPECTED[request.param]
    tensors = {key: tensor_of(case, key) for key in case["keys"]}
    path = tmp_path / "case.safetensors"
    if isinstance(expected, Refused) and expected.write:
        expected.write(tensors, path)
    else:
        broken = {"ss_network_args": "{broken", "lora_adapter_metadata": "]"}
        save_file(tensors, path, broken if request.param == "metadata_not_json" else None)
    return path


@pytest.mark.parametrize(("file", "name"), [(n, n) for n in READS], indirect=["file"], ids=READS)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_odd_files_are_read_right(file: Path, name: str, lazy: bool) -> None:
    expected = READS[name]
    reading = open_lora(file, lazy=lazy, any_model=expected.any_model)
    lora = reading.lora
    assert {n: (o.rank, pytest.approx(o.scale)) for n, o in lora.outline.items()} == expected.layers
    assert reading.base == expected.base
    assert set(lora.offsets) == set(expected.offsets)
    if not lazy or "change nothing" not in expected.warns:
        assert expected.warns in " ".join(reading.warnings)
    assert_deltas(reading, CASES[name])


def assert_deltas(reading: LoraReading, case: dict) -> None:
    """Up times down, by the one pair of factors that a layer of these cases has."""
    for layer in reading.lora:
        assert layer.delta().isfinite().all()
        ups = [k for k in case["keys"] if "up.weight" in k or "lora_B" in k]
        if len(ups) != 1 or any("mid" in key for key in case["keys"]):
            continue
        (down,) = (k for k in case["keys"] if "down.weight" in k or "lora_A" in k)
        up, down = (tensor_of(case, key).float().flatten(1) for key in (ups[0], down))
        expected = (layer.scale * up @ down).view(layer.weight_shape)
        torch.testing.assert_close(layer.delta(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("file", "name"), [(n, n) for n in REFUSED], indirect=["file"], ids=REFUSED
)
def test_broken_files_are_refused_in_one_sentence(file: Path, name: str) -> None:
    expected = REFUSED[name]
    with pytest.raises(DiffLoRAError) as caught:
        open_lora(file)
    assert expected.says in caught.value.message
    assert expected.hint in caught.value.hint
    assert "\n" not in str(caught.value)
    if expected.on_base:
        opened = open_lora_needing_base(file)
        assert list(opened.deltas) == [Q]
        assert opened.deltas[Q](torch.randn(320, 320)).shape == (320, 320)


@pytest.mark.parametrize("file", ["nan_weights"], indirect=True)
def test_nan_is_found_when_a_lazy_layer_is_taken(file: Path) -> None:
    reading = open_lora(file, lazy=True)
    with pytest.raises(BadLoraFile, match="holds NaN"):
        reading.lora.layers[Q]


def test_an_alpha_that_overflowed_counts_only_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    flat = "lora_unet_" + Q.removeprefix("unet.").replace(".", "_")
    alpha = {f"{flat}.alpha": torch.tensor(torch.inf, dtype=torch.float16)}
    whole = {f"{flat}.lokr_w1": torch.ones(4, 4), f"{flat}.lokr_w2": torch.ones(80, 80)}
    save_file(whole | alpha, path)
    assert open_lora(path).lora.layers[Q].scale == 1.0
    save_file({f"{flat}.lora_down.weight": torch.ones(4, 320)} | alpha | {
        f"{flat}.lora_up.weight": torch.ones(320, 4)}, path)  # fmt: skip
    with pytest.raises(BadLoraFile, match="not one finite number"):
        open_lora(path)


def test_a_sparse_bias_is_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    tensors = {
        f"{flat}.lora_down.weight": torch.ones(4, 320),
        f"{flat}.lora_up.weight": torch.ones(320, 4),
        f"{flat}.bias_indices": torch.tensor([[1, 7]]),
        f"{flat}.bias_values": torch.tensor([0.5, -2.0]),
        f"{flat}.bias_size": torch.tensor([320]),
    }
    save_file(tensors, path)
    (bias,) = open_lora(path).lora.offsets.values()
    assert bias.nonzero().flatten().tolist() == [1, 7]
    assert bias[[1, 7]].tolist() == [0.5, -2.0]
    save_file(tensors | {f"{flat}.bias_size": torch.tensor([320, 320])}, path)
    with pytest.raises(BadLoraFile, match="corrects the whole weight"):
        open_lora(path)
    save_file(tensors | {f"{flat}.bias_indices": torch.tensor([[1, 900]])}, path)
    with pytest.raises(BadLoraFile, match="does not fit its size"):
        open_lora(path)


def test_weights_that_replace_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"diffusion_model.input_blocks.0.0.set_weight": torch.ones(320, 4, 3, 3)}, path)
    with pytest.raises(BadLoraFile, match="whole replaced weights"):
        open_lora(path)
