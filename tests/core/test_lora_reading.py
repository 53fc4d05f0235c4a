"""Reading every spelling of a plain LoRA, and refusing everything else with a reason."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from difflora_core.errors import BadLoraFile
from difflora_core.lora_reading import LoraReading, read_lora_tensors
from difflora_core.lora_scales import ConfiguredScales, scale_from_alpha
from tests.core.lora_layouts import layouts
from tests.core.lora_samples import DTYPES, filled

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
K = Q[:-1] + "k"
Q_NAME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOTTED_Q = Q_NAME.removeprefix("unet.")


def pair(module: str = Q, rank: int = 4, width: int = 320, **more: Tensor) -> dict[str, Tensor]:
    tensors = filled(
        {f"{module}.lora_down.weight": [rank, width], f"{module}.lora_up.weight": [width, rank]}
    )
    return tensors | {f"{module}.{name}": tensor for name, tensor in more.items()}


def only_layer(reading: LoraReading):
    (layer,) = reading.lora
    return layer


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (torch.tensor(2.0), 0.5),
        (torch.tensor([2.0]), 0.5),
        (torch.tensor(2), 0.5),
        (torch.tensor(94.0, dtype=torch.bfloat16), 23.5),
        (torch.tensor(0.0), 0.0),
    ],
)
def test_alpha_of_any_kind(alpha: Tensor | None, scale: float) -> None:
    reading = read_lora_tensors(pair() if alpha is None else pair(alpha=alpha))
    assert only_layer(reading).scale == scale
    assert any("alpha 0" in warning for warning in reading.warnings) == (scale == 0)


HUGE = torch.tensor(1e200, dtype=torch.float64)


@pytest.mark.parametrize(
    "alpha", [torch.ones(4), torch.tensor(math.inf), torch.tensor(math.nan), HUGE, -HUGE]
)
def test_impossible_alpha_is_refused(alpha: Tensor) -> None:
    with pytest.raises(BadLoraFile, match=r"alpha of unet\.down_blocks.* not one finite number"):
        read_lora_tensors(pair(alpha=alpha))


def test_the_scale_of_a1111_takes_the_place_of_alpha_over_rank() -> None:
    reading = read_lora_tensors(pair(scale=torch.tensor(0.25), alpha=torch.tensor(4.0)))
    assert only_layer(reading).scale == 0.25
    assert any("A1111" in warning for warning in reading.warnings)


def test_ranks_and_alphas_are_read_per_layer() -> None:
    tensors = pair(Q, 10, alpha=torch.tensor(10.0)) | pair(K, 18, alpha=torch.tensor(9.0))
    lora = read_lora_tensors(tensors).lora
    assert [(layer.rank, layer.scale) for layer in lora] == [(10, 1.0), (18, 0.5)]


def test_alpha_kept_after_a_change_of_rank_is_warned_of() -> None:
    tensors = pair(Q, 1, alpha=torch.tensor(181.0)) | pair(K, alpha=torch.tensor(4.0))
    tensors |= pair(K[:-1] + "v", alpha=torch.tensor(4.0))
    assert any("1 layer" in warning for warning in read_lora_tensors(tensors).warnings)


def test_alpha_from_the_header_of_diffusers() -> None:
    keys = {f"unet.{DOTTED_Q}.lora_A.weight": [4, 320], f"unet.{DOTTED_Q}.lora_B.weight": [320, 4]}
    header = {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'}
    assert only_layer(read_lora_tensors(filled(keys), header)).scale == 2.0
    assert only_layer(read_lora_tensors(filled(keys), {"lora_adapter_metadata": "{"})).scale == 1.0


def test_alpha_patterns_of_peft() -> None:
    config = {"lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 16}, "use_rslora": True}
    scales = ConfiguredScales({}, config)
    assert scales.scale(Q_NAME, 4) == 8.0
    assert scales.scale(Q_NAME.replace("to_q", "to_k"), 4) == 2.0
    assert ConfiguredScales({}, {"lora_alpha": None}).scale(Q_NAME, 4) is None
    assert ConfiguredScales({}, {"lora_alpha": 10**400, "r": 4}).scale(Q_NAME, 4) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_small_number_types(dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in pair().items()}
    expected = tensors[f"{Q}.lora_up.weight"].float() @ tensors[f"{Q}.lora_down.weight"].float()
    torch.testing.assert_close(only_layer(read_lora_tensors(tensors)).delta(), expected)


KINDS_OF_FACTORS = {
    "loha": dict.fromkeys(("hada_w1_a", "hada_w2_a"), (64, 4))
    | dict.fromkeys(("hada_w1_b", "hada_w2_b"), (4, 64)),
    "lokr": {"lokr_w1": (8, 8), "lokr_w2": (8, 8)},
    "lokr of factors": {"lokr_w1": (8, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
}


@pytest.mark.parametrize("kind", KINDS_OF_FACTORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_number_types_of_other_kinds(kind: str, dtype: torch.dtype) -> None:
    shapes = KINDS_OF_FACTORS[kind]
    tensors = {f"{Q}.{role}": torch.randn(shape).to(dtype) for role, shape in shapes.items()}
    wide = {key: tensor.float() for key, tensor in tensors.items()}
    expected = only_layer(read_lora_tensors(wide)).delta()
    torch.testing.assert_close(only_layer(read_lora_tensors(tensors)).delta(), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_broken_numbers_are_refused_with_their_key(bad: float, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in pair().items()}
    tensors[f"{Q}.lora_up.weight"][3, 1] = bad
    with pytest.raises(BadLoraFile, match=rf"{Q}\.lora_up\.weight holds NaN or infinite"):
        read_lora_tensors(tensors)


def test_rank_1_and_rank_above_the_width_are_fine() -> None:
    assert only_layer(read_lora_tensors(pair(rank=1))).rank == 1
    assert only_layer(read_lora_tensors(pair(rank=1024))).rank == 1024


def test_rank_0_and_alpha_alone_are_left_out_with_a_warning() -> None:
    tensors = pair(rank=0) | pair(K) | {f"{K[:-1]}v.alpha": torch.tensor(1.0)}
    reading = read_lora_tensors(tensors)
    assert [layer.name for layer in reading.lora] == [Q_NAME[:-1] + "k"]
    assert any("rank 0" in warning for warning in reading.warnings)
    assert any("no weights" in warning for warning in reading.warnings)
    with pytest.raises(BadLoraFile, match="rank above 0"):
        read_lora_tensors(pair(rank=0))


def test_untrained_layers_are_counted() -> None:
    tensors = pair() | {f"{Q}.lora_up.weight": torch.zeros(320, 4)}
    assert any("1 of 1 layers change nothing" in w for w in read_lora_tensors(tensors).warnings)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (
            {"lora_down.weight": [4, 320], "lora_up.weight": [320, 8]},
            r"ranks of .* differ.*\[4, 320\]",
        ),
        ({"lora_down.weight": [320, 1], "lora_up.weight": [320, 1]}, r"ranks of .* differ"),
        ({"lora_down.weight": [4, 333], "lora_up.weight": [320, 4]}, r"wrong shape.*\[4, 333\]"),
        ({"lora_down.weight": [4, 320, 3], "lora_up.weight": [320, 4]}, "no matrices"),
        ({"lora_down.weight": [4], "lora_up.weight": [320, 4]}, "no matrices"),
        ({"lora_down.weight": [4, 320], "alpha": []}, "incomplete: only lora_unet_down"),
        ({"lora_up.weight": [320, 4]}, "incomplete: only lora_unet_down"),
    ],
)
def test_damaged_layers_are_refused_by_name(shapes: dict[str, list[int]], says: str) -> None:
    tensors = filled({f"{Q}.{suffix}": shape for suffix, shape in shapes.items()})
    with pytest.raises(BadLoraFile, match=says) as caught:
        read_lora_tensors(tensors)
    assert Q_NAME in caught.value.message


def test_one_wrong_layer_among_good_ones_is_found() -> None:
    tensors = pair(Q) | pair(K) | pair(K[:-1] + "v", width=640)
    with pytest.raises(BadLoraFile, match=r"attn1\.to_v has the wrong shape"):
        read_lora_tensors(tensors)


def test_the_refiner_is_named() -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    shapes = {f"{module}.lora_down.weight": [4, 1280], f"{module}.lora_up.weight": [768, 4]}
    with pytest.raises(BadLoraFile, match="refiner"):
        read_lora_tensors(filled(shapes))


def test_linear_stored_as_a_1x1_convolution_and_the_reverse() -> None:
    conv = "lora_unet_down_blocks_0_attentions_0_proj_in"
    shapes = {f"{Q}.lora_down.weight": [4, 320, 1, 1], f"{Q}.lora_up.weight": [320, 4, 1, 1]}
    shapes |= {f"{conv}.lora_down.weight": [4, 320], f"{conv}.lora_up.weight": [320, 4]}
    layers = read_lora_tensors(filled(shapes), {"ss_base_model_version": "sd_v1"}).lora.layers
    assert layers[Q_NAME].weight_shape == (320, 320)
    assert layers["unet.down_blocks.0.attentions.0.proj_in"].weight_shape == (320, 320, 1, 1)


def test_projections_without_a_kernel_are_those_of_sd_2() -> None:
    tensors = pair(Q) | pair("lora_unet_down_blocks_0_attentions_0_proj_in")
    assert read_lora_tensors(tensors).base == "sd21"


def test_stray_keys_are_left_out_and_listed() -> None:
    stray = {
        "diffusion_model.x.lora_down.weight": [4, 8],
        "diffusion_model.x.lora_up.weight": [8, 4],
    }
    reading = read_lora_tensors(pair(Q) | pair(K) | filled(stray))
    assert len(reading.lora) == 2
    assert any("2 keys (diffusion_model.x" in warning for warning in reading.warnings)


def test_embeddings_and_helpers_beside_the_layers_are_no_unknown_keys() -> None:
    beside = {"bundle_emb.token.string_to_param.*": [4, 768], "_aux.something": [1]}
    (warning,) = read_lora_tensors(
        pair(Q) | pair("lora_unet_mid_block_attentions_0_proj_in", width=1280) | filled(beside)
    ).warnings[:1]
    assert "2 keys (bundle_emb" in warning


def test_files_of_unknown_keys_are_refused_with_the_first_three() -> None:
    tensors = {f"layer{i}.weight": torch.zeros(2, 2) for i in range(5)}
    with pytest.raises(BadLoraFile, match=r"5 keys \(layer0.weight, layer1.weight, layer2.weight"):
        read_lora_tensors(tensors)
    unknown = pair("lora_unet_some_other_net_7_to_q")
    with pytest.raises(BadLoraFile, match=r"1 name \(lora_unet_some_other_net_7_to_q\)"):
        read_lora_tensors(unknown)


def test_both_block_namings_for_one_layer_are_a_collision() -> None:
    sgm = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    diffusers = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"
    with pytest.raises(BadLoraFile, match="twice: as") as caught:
        read_lora_tensors(pair(sgm, width=640) | pair(diffusers, width=640))
    assert sgm in str(caught.value)
    assert diffusers in str(caught.value)


def test_two_adapters_in_one_file_are_refused() -> None:
    shapes = {}
    for adapter in ("default", "other"):
        shapes[f"unet.{DOTTED_Q}.lora_A.{adapter}.weight"] = [4, 320]
        shapes[f"unet.{DOTTED_Q}.lora_B.{adapter}.weight"] = [320, 4]
    with pytest.raises(BadLoraFile, match=r"several adapters .*: default, other"):
        read_lora_tensors(filled(shapes))


@pytest.mark.parametrize(
    "spelled",
    [
        f"unet.unet.{DOTTED_Q}",
        f"unet.base_model.model.{DOTTED_Q}",
        f"base_model.model.unet.{DOTTED_Q}",
        Q.replace("lora_unet_", "lora_unet__"),
        f"{Q}_",
        Q.replace("_to_q", ".to_q"),
    ],
)
def test_odd_containers_and_separators(spelled: str) -> None:
    assert only_layer(read_lora_tensors(pair(spelled))).name == Q_NAME


def test_layouts_are_told_in_words() -> None:
    def layout(name: str) -> str:
        return read_lora_tensors(filled(layouts()[name]["keys"])).layout

    assert layout("kohya_sd15") == "kohya"
    assert layout("kohya_sdxl_sgm") == "kohya, original block names"
    assert layout("diffusers_pipeline_sdxl") == "diffusers"
    assert layout("diffusers_mixed_suffix_sd15") == "diffusers and diffusers (PEFT suffixes)"
    assert layout("peft_unet_sd15") == "PEFT"


def test_a_header_that_contradicts_the_shapes_is_warned_of() -> None:
    tensors = pair("lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_q", width=1280)
    reading = read_lora_tensors(tensors, {"ss_base_model_version": "sd_v1"})
    assert reading.base == "sdxl"
    assert any("header says sd15" in warning for warning in reading.warnings)


def test_stored_number_types_of_the_format() -> None:
    """Integer and 16-bit alphas survive as the numbers that they are."""
    for dtype in DTYPES.values():
        value = torch.tensor(2.0).to(dtype)
        assert scale_from_alpha("x", value, 4) == 0.5
