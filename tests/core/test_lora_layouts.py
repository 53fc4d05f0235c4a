"""Every key layout found in the wild is read under the right names, or refused by name."""

from __future__ import annotations

from math import prod

import pytest
import torch

from difflora_core.errors import BadLoraFile
from difflora_core.key_names import module_table
from difflora_core.lora_families import parse_part
from difflora_core.lora_on_base import lora_on_base
from difflora_core.lora_reading import read_lora_source
from tests.core.lora_layouts import (
    ShapesOnly,
    expected_name,
    layouts,
    role_of,
    whole_layers,
    with_shapes,
)

# fmt: off
READ = [
    "aitoolkit_sdxl", "animatediff_v3_domain_adapter_sd15_real",
    "bundle_emb_lora_with_embeddings", "comfyui_extracted_text_encoder_real",
    "diffusers_mixed_suffix_sd15", "diffusers_old_processor_noprefix_sdxl_real",
    "diffusers_old_processor_sdxl_real", "diffusers_oldest_text_encoder_wasted_keys_real",
    "diffusers_pipeline_lora_A_B_sd15", "diffusers_pipeline_sdxl", "diffusers_text_encoder_2_mlp",
    "diffusers_text_encoder_flattened_transformers56",
    "diffusers_text_encoder_lora_linear_layer_real", "diffusers_unet_only_noprefix_sd15",
    "kohya_dylora_sd15", "kohya_names_without_alpha_faceid_sd15_real",
    "kohya_old_without_alpha_sd15_real", "kohya_sd15", "kohya_sd15_conv3x3",
    "kohya_sd15_locon_unet_real", "kohya_sd21", "kohya_sdxl_sgm", "kohya_sdxl_sgm_conv3x3",
    "lcm_lora_sd15", "lcm_lora_sdxl", "lcm_lora_sdxl_loaded_names_real", "lycoris_dylora_sd15",
    "lycoris_full_diff_sd15", "lycoris_locon_sd15", "lycoris_locon_sdxl_diffusersblocks",
    "lycoris_locon_tucker_sd15", "lycoris_loha_sd15", "lycoris_loha_tucker_sd15",
    "lycoris_lokr_both_tucker_sd15", "lycoris_lokr_full_matrix_sd15", "lycoris_lokr_sd15",
    "lycoris_sd15_te_flattened_transformers56", "lycoris_train_norm_sd15", "omi_sdxl",
    "peft_loha_effective_conv_sd15", "peft_loha_sd15", "peft_lokr_sd15",
    "peft_named_adapter_default_sd15", "peft_unet_sd15", "sd15_with_ldm_block_names_real",
    "sdxl_both_block_namings_in_one_file_real", "simpletuner_lycoris_lokr_sdxl",
    "slider_sdxl_attn1_only_real", "weights2weights_peft_identity1_sd15",
]
# fmt: on
BY_INDEX = ["cloneofsimo_sd15_real", "cloneofsimo_sd15_with_embeddings_real"]
ON_BASE = {
    "aitoolkit_dora_sdxl": "DoRA",
    "diffusers_kohya_export_dora_broken_sdxl": "DoRA",
    "diffusers_pipeline_dora_sdxl": "DoRA",
    "dora_sdxl_kohya_diffusersblocks_unet_real": "DoRA",
    "kohya_oft_sdxl": "OFT",
    "lycoris_boft_sd15": "BOFT",
    "lycoris_diag_oft_rescaled_sd15": "OFT",
    "lycoris_diag_oft_sd15": "OFT",
    "lycoris_dora_in_sd15": "DoRA",
    "lycoris_dora_out_sd15": "DoRA",
    "lycoris_glora_sd15": "GLoRA",
    "lycoris_ia3_sd15_real": "IA3",
    "lycoris_lokr_dora_sd15": "DoRA",
    "peft_dora_sd15": "DoRA",
    "peft_ia3_sd15": "IA3",
    "peft_oft_sd15": "OFT",
}
REFUSED = {
    "aitoolkit_fullrank_sdxl": "full-rank difference",
    "peft_conv_lora_bias_sd15": "changes a bias, but",
    "cloneofsimo_sd2_pt_list_real": "without layer names",
    "dora_sdxl_sgm_real": "DoRA",
    "ip_adapter_faceid_index_names_real": "IP-Adapter",
    "must_refuse_animatediff_motion_lora": "AnimateDiff motion",
    "must_refuse_control_lora_v3_peft_real": "ControlNet",
    "must_refuse_for_sd_flux_control_lora_format": "Flux control",
    "must_refuse_full_checkpoint_named_lora_real": "checkpoint",
    "must_refuse_lllite_sdxl": "LLLite",
    "must_refuse_sai_control_lora": "ControlNet",
    "tlora_lycoris": "T-LoRA",
    "tlora_sdxl_original_attnprocs": "T-LoRA",
}
# What it is called when it is refused, then the label of its names when any model is taken, or what
# it is refused for even then.
OTHER_MODELS = {
    "mixed_rank_resized_flux_real": ("Flux", "Flux, kohya names"),
    "must_refuse_for_sd_anima_lora_kohya_format": ("Anima", "kohya names"),
    "must_refuse_for_sd_anima_lora_kohya_with_te_format": ("Anima", "kohya names"),
    "must_refuse_for_sd_anima_lora_lokr_format": ("Anima", "DoRA"),
    "must_refuse_for_sd_anima_lora_peft_format": ("Anima", "ComfyUI names"),
    "must_refuse_for_sd_flux2_peft_dora_real": ("Flux", "DoRA"),
    "must_refuse_for_sd_flux_comfyui_extracted_real": ("Flux", "Flux, ComfyUI names"),
    "must_refuse_for_sd_flux_dora_onetrainer_format": ("Flux", "DoRA"),
    "must_refuse_for_sd_flux_lokr_bfl_format": ("Flux", "Flux, ComfyUI names"),
    "must_refuse_for_sd_flux_lokr_simpletuner_real": ("Flux", "Flux, LyCORIS names"),
    "must_refuse_for_sd_flux_lora_aitoolkit_format": ("Flux", "Flux, ComfyUI names"),
    "must_refuse_for_sd_flux_lora_diffusers_base_model_format": ("Flux", "Flux, PEFT names"),
    "must_refuse_for_sd_flux_lora_diffusers_format": ("Flux", "Flux, diffusers names"),
    "must_refuse_for_sd_flux_lora_diffusers_no_proj_mlp_format": ("Flux", "Flux, diffusers names"),
    "must_refuse_for_sd_flux_lora_kohya_format": ("Flux", "Flux, kohya names"),
    "must_refuse_for_sd_flux_lora_kohya_with_te1_format": ("Flux", "Flux, kohya names"),
    "must_refuse_for_sd_flux_lora_xlabs_format": ("Flux", "Flux, plain names"),
    "must_refuse_for_sd_flux_oft_kohya_real": ("Flux", "OFT"),
    "must_refuse_for_sd_flux_onetrainer_real": ("Flux", "OneTrainer names"),
    "must_refuse_for_sd_flux_trailing_underscore_real": ("Flux", "kohya names"),
    "must_refuse_for_sd_krea2_lora_kohya_format": ("Krea", "kohya names"),
    "must_refuse_for_sd_qwen_image_lora_diffusers_format": ("Qwen", "plain names"),
    "must_refuse_for_sd_qwen_image_lora_kohya_format": ("Qwen", "kohya names"),
    "must_refuse_for_sd_sd3_double_container_real": ("SD3", "diffusers names"),
    "must_refuse_for_sd_wan_mixed_dots_real": ("Wan", "kohya names"),
}
# Several formats or files in one list; each has a test of its own.
LISTS = ["adapter_name_infix_variants_real", "onetrainer_five_outputs_sdxl"]
# Layers whose bases look alike; all others are told without doubt.
BASES_LEFT_OPEN = {
    "aitoolkit_dora_sdxl": "sd15",
    "bundle_emb_lora_with_embeddings": "sdxl",
    "comfyui_extracted_text_encoder_real": "sd15",
    "diffusers_oldest_text_encoder_wasted_keys_real": "sd15",
    "diffusers_text_encoder_lora_linear_layer_real": "sd15",
    "weights2weights_peft_identity1_sd15": "sd15",
}
OFFSETS = {"diff_b": "bias", "w_norm": "weight", "b_norm": "bias", "lora_B.bias": "bias"}


def test_all_layouts_are_covered() -> None:
    named = [*READ, *BY_INDEX, *ON_BASE, *REFUSED, *OTHER_MODELS, *LISTS]
    assert sorted(named) == sorted(layouts())
    assert len(named) == 107


def base_of(name: str) -> str:
    return BASES_LEFT_OPEN.get(name, layouts()[name]["base"])


def shapes_of(name: str) -> dict[str, list[int]]:
    base = base_of(name)
    return whole_layers(with_shapes(layouts()[name]["keys"], base), base)


@pytest.mark.parametrize("name", READ)
def test_layers_have_the_names_that_the_file_gives_them(name: str) -> None:
    base, shapes = base_of(name), shapes_of(name)
    source = ShapesOnly(shapes)
    reading = read_lora_source(source)
    lora, table = reading.lora, module_table(reading.base)
    assert (reading.base, lora.naming) == (base, None)
    by_name: dict[str, dict[str, list[int]]] = {}
    for key, shape in shapes.items():
        canonical = expected_name(key, base)
        if canonical:
            by_name.setdefault(canonical, {})[role_of(key)] = shape
    layers = {n: parts for n, parts in by_name.items() if n in table.shapes}
    assert set(lora.outline) == set(layers)
    assert {n: lora.outline[n].weight_shape for n in layers} == {n: table.shapes[n] for n in layers}
    assert {n: lora.outline[n].rank for n in layers} == {
        n: exact_rank(parts, table.shapes[n]) for n, parts in layers.items()
    }
    assert set(lora.offsets) == offset_names(by_name)
    assert source.read == 0, "weights were read while opening"
    for canonical in sorted(layers, key=lambda n: prod(table.shapes[n]))[:2]:
        assert lora.layers[canonical].outline == lora.outline[canonical]


def test_biases_of_peft_are_read_where_the_model_has_them() -> None:
    keys = layouts()["peft_conv_lora_bias_sd15"]["keys"]
    shapes = {k: s for k, s in keys.items() if ".to_" not in k or ".to_out" in k}
    lora = read_lora_source(ShapesOnly(shapes)).lora
    assert set(lora.offsets) == {f"{name}.bias" for name in lora.layers}


def offset_names(by_name: dict[str, dict[str, list[int]]]) -> set[str]:
    names = {f"{n}.{OFFSETS[r]}" for n, parts in by_name.items() for r in parts if r in OFFSETS}
    return names | {
        f"{n}.weight" for n, parts in by_name.items() if len(parts.get("diff", (1, 1))) == 1
    }


def exact_rank(parts: dict[str, list[int]], shape: tuple[int, ...]) -> int:
    """Rank of the factors that give a layer's difference exactly, by the rules of each kind."""
    smaller = min(shape[0], prod(shape[1:]))
    if "up" in parts:
        return parts["up"][1]
    if "diff" in parts:
        return smaller
    if "hada_w1_b" in parts:
        return min(parts["hada_w1_b"][0] * parts["hada_w2_b"][0], smaller)
    rank = 1
    for w in ("lokr_w1", "lokr_w2"):
        if w in parts:
            rank *= min(parts[w][0], prod(parts[w][1:]))
        else:
            turned = w == "lokr_w2" and "lokr_t2" in parts
            out = parts[f"{w}_a"][1 if turned else 0]
            inner = parts[f"{w}_b"][1] * (prod(parts["lokr_t2"][2:]) if turned else 1)
            rank *= min(parts[f"{w}_b"][0], out, inner)
    return rank


@pytest.mark.parametrize("name", BY_INDEX)
def test_layers_without_names_are_counted_in_the_order_of_their_trainer(name: str) -> None:
    keys = layouts()[name]["keys"]
    lora = read_lora_source(ShapesOnly(keys)).lora
    assert len(lora) == sum(key.endswith(":up") for key in keys)
    first = lora.outline["unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"]
    assert first.weight_shape == (2560, 320)  # unet:4
    source = ShapesOnly(keys)
    last = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"  # unet:143
    assert torch.equal(read_lora_source(source).lora.layers[last].up, source.tensor("unet:143:up"))
    with pytest.raises(BadLoraFile, match="without layer names"):
        read_lora_source(ShapesOnly({**keys, "unet:144:up": [320, 4], "unet:144:down": [4, 320]}))


@pytest.mark.parametrize("name", ON_BASE)
def test_kinds_on_the_base_weight_are_refused_with_a_way_out_and_open_on_a_base(name: str) -> None:
    base, shapes = base_of(name), shapes_of(name)
    with pytest.raises(BadLoraFile, match=ON_BASE[name]) as caught:
        read_lora_source(ShapesOnly(shapes))
    assert "weights of the base model" in caught.value.message
    assert "difflora_core extract --lora" in caught.value.hint
    opened = lora_on_base(ShapesOnly(shapes), {}, {})
    assert opened.base == base
    table = module_table(base)
    names = {expected_name(key, base) for key in shapes}
    assert set(opened.deltas) == {n for n in names if n in table.shapes}
    for layer in sorted(opened.deltas, key=lambda n: prod(table.shapes[n]))[:2]:
        delta = opened.deltas[layer](torch.randn(table.shapes[layer]))
        assert delta.shape == table.shapes[layer]
        assert delta.dtype == torch.float32
        assert delta.isfinite().all()


@pytest.mark.parametrize("any_model", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_of_a_model_is_refused_by_name(name: str, any_model: bool) -> None:
    shapes = {key: shape or [] for key, shape in layouts()[name]["keys"].items()}
    with pytest.raises(BadLoraFile) as caught:
        read_lora_source(ShapesOnly(shapes), any_model=any_model)
    assert REFUSED[name] in str(caught.value)
    assert caught.value.hint


def foreign_shapes(name: str) -> dict[str, list[int]]:
    """Stated shapes, or small ones where an excerpt has none; whole layers only."""
    made = {"down": [4, 64], "up": [64, 4], "lokr_w1": [8, 8], "lokr_w2": [8, 8], "alpha": []}
    keys = layouts()[name]["keys"]
    shapes = {k: made.get(role_of(k), [64]) if s is None else s for k, s in keys.items()}
    modules: dict[str, set[str]] = {}
    for key in shapes:
        part = parse_part(key)
        modules.setdefault(part.module if part else key, set()).add(role_of(key))
    return {
        key: shape
        for key, shape in shapes.items()
        if not (part := parse_part(key)) or len({"down", "up"} & modules[part.module]) != 1
    }


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_refused_or_read_under_their_own_names(name: str) -> None:
    model, label = OTHER_MODELS[name]
    shapes = foreign_shapes(name)
    with pytest.raises(BadLoraFile, match=model):
        read_lora_source(ShapesOnly(shapes))
    if "names" not in label:
        with pytest.raises(BadLoraFile, match=label):
            read_lora_source(ShapesOnly(shapes), any_model=True)
        return
    source = ShapesOnly(shapes)
    lora = read_lora_source(source, any_model=True).lora
    assert source.read == 0
    assert lora.naming
    assert lora.naming.label.endswith(label)
    modules = {parse_part(key).module for key in shapes}  # type: ignore[union-attr]
    assert {*lora.layers, *(n.rpartition(".")[0] for n in lora.offsets)} == modules
    first = next(iter(lora.layers))
    assert lora.layers[first].outline == lora.outline[first]


def test_adapter_names_inside_keys() -> None:
    keys = list(layouts()["adapter_name_infix_variants_real"]["keys"])
    parts = {key: parse_part(key) for key in keys}
    assert all(part and "lora" not in part.module for part in parts.values())
    sd15 = [k for k in keys if k.startswith("down_blocks") and "downsamplers" not in k]
    lora = read_lora_source(ShapesOnly(with_shapes(dict.fromkeys(sd15), "sd15"))).lora
    assert set(lora.layers) == {
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.0.resnets.0.time_emb_proj",
    }


ONETRAINER = {
    "unet.": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_unet_input": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "diffusion_model.": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
}


@pytest.mark.parametrize("start", ONETRAINER)
def test_the_outputs_of_onetrainer(start: str) -> None:
    keys = layouts()["onetrainer_five_outputs_sdxl"]["keys"]
    shapes = {k: s for k, s in keys.items() if k.startswith(start) and "magnitude" not in k}
    assert list(read_lora_source(ShapesOnly(shapes)).lora.layers) == [ONETRAINER[start]]
