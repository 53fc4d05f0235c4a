"""Names of every layer of every base model, in every spelling, against the renaming rule."""

from __future__ import annotations

import pytest

from difflora_core.errors import LayoutMismatch
from difflora_core.key_names import BASES, Spelled, detect_base, kohya_name, module_table
from difflora_core.lora import Lora
from tests.core.lora_samples import attention_lora, random_lora

RESNETS_PER_LEVEL = {"sd15": 2, "sd21": 2, "sdxl": 2, "mini": 1}
COUNTS = {"sd15": (282, 72), "sd21": (282, 138), "sdxl": (794, 72 + 193), "mini": (119, 18)}
IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def original_by_rule(name: str, n: int, with_attention: set[str]) -> str:
    """The ldm name of a U-Net layer, by the rule for `n` resnets per level."""
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    side, level, *rest = name.split(".")
    if side == "mid_block":
        kind, index, inner = level, int(rest[0]), ".".join(rest[1:])
        head = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
    else:
        kind, index, inner, i = rest[0], int(rest[1]), ".".join(rest[2:]), int(level)
        if kind == "downsamplers":
            return f"input_blocks.{(n + 1) * (i + 1)}.0.op"
        if kind == "upsamplers":
            position = 2 if f"{side}.{level}" in with_attention else 1
            return f"output_blocks.{(n + 1) * i + n}.{position}.conv"
        first = 1 if side == "down_blocks" else 0
        start = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}[side]
        head = f"{start}.{first + (n + 1) * i + index}.{0 if kind == 'resnets' else 1}"
    return f"{head}.{IN_RESNET[inner] if kind == 'resnets' else inner}"


@pytest.mark.parametrize("base", BASES)
def test_original_names_follow_the_rule(base: str) -> None:
    table = module_table(base)
    paths = [name.removeprefix("unet.") for name in table.shapes if name.startswith("unet.")]
    attention = {".".join(p.split(".")[:2]) for p in paths if ".attentions." in p}
    rule = {p: original_by_rule(p, RESNETS_PER_LEVEL[base], attention) for p in paths}
    assert rule == {p: table.originals[f"unet.{p}"] for p in paths}
    assert (len(paths), len(table.shapes) - len(paths)) == COUNTS[base]


@pytest.mark.parametrize("base", BASES)
def test_every_spelling_leads_to_one_layer(base: str) -> None:
    table = module_table(base)
    for name in table.shapes:
        component, _, path = name.partition(".")
        flat = path.replace(".", "_")
        spellings = [name, f"{component}.base_model.model.{path}", kohya_name(name, base)]
        if component == "unet":
            dotted = table.originals[name]
            flat_original = dotted.replace(".", "_")
            spellings += [f"lora_unet_{flat}", f"lora_unet_{flat_original}", path, dotted]
            spellings += [f"unet.unet.{path}", f"diffusion_model.{dotted}", f"lora_unet__{flat}_"]
        else:
            spellings += [name.replace("text_model.", "", 1)]
        for spelling in spellings:
            assert list(table.find(Spelled.parse(spelling))) == [name], spelling


def test_a_text_encoder_name_without_a_component_may_mean_either() -> None:
    spelled = Spelled.parse("base_model.model.text_model.encoder.layers.0.mlp.fc1")
    assert list(module_table("sdxl").find(spelled)) == [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ]


@pytest.mark.parametrize("base", BASES)
def test_kohya_names_do_not_collide(base: str) -> None:
    names = list(module_table(base).shapes)
    assert len({kohya_name(name, base) for name in names}) == len(names)


def test_kohya_names_are_those_that_the_trainer_writes() -> None:
    attention = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    encoder = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert kohya_name(attention, "sd15") == (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert kohya_name(attention, "sdxl") == (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    )
    assert kohya_name(encoder, "sd15") == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_name(encoder, "sdxl") == "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize("base", BASES)
def test_base_is_told_by_names_and_shapes(base: str) -> None:
    assert detect_base(attention_lora(base)) == base


def test_base_stays_open_for_a_shallow_self_attention_until_the_header_decides() -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = random_lora("sd21", [name])
    assert detect_base(lora) == "sd15"
    assert detect_base(Lora(lora.layers, {"ss_base_model_version": "sd_v2"})) == "sd21"
    assert detect_base(Lora(lora.layers, {"ss_base_model_version": "sdxl_1.0"})) == "sd15"


def test_unknown_base_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="no base model named 'sd3'"):
        module_table("sd3")
