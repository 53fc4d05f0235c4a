"""Names and shapes of checkpoints, against diffusers' own converters."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import single_file_utils

from difflora_core.checkpoint_names import parameters
from difflora_core.checkpoints import Checkpoint
from difflora_core.errors import BadWeightsFile
from difflora_core.key_names import module_table
from tests.core.checkpoint_files import (
    open_clip_shapes,
    parameter_shapes,
    random_tensors,
    single_file_shapes,
    sparse_file,
    write,
)

UNET = "model.diffusion_model."
# what diffusers' converter reads of a U-Net's config
CONFIGS = {
    "sd15": {"layers_per_block": 2},
    "sdxl": {"layers_per_block": 2, "addition_embed_type": "text_time"},
}
OPEN_CLIP = "conditioner.embedders.1.model."
WIDTH = 8


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_unet_names_agree_with_diffusers(base):
    table = module_table(base)
    names = [n for n, _ in parameter_shapes(base) if n.startswith("unet.")]
    keys = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        keys[f"{UNET}{table.originals[module]}.{kind}"] = torch.zeros(0)
    converted = single_file_utils.convert_ldm_unet_checkpoint(keys, CONFIGS[base])
    theirs = {id(tensor): f"unet.{name}" for name, tensor in converted.items()}
    assert len(theirs) == len(names)
    for key, tensor in keys.items():
        [(name, slot)] = parameters(key, base)
        assert (name, slot.key) == (theirs[id(tensor)], key)
        assert [n for n, _ in parameters(name.removeprefix("unet."), base)] == [name]


def test_open_clip_agrees_with_diffusers_and_fuses_exactly():
    tensors = random_tensors(open_clip_shapes(OPEN_CLIP, 2, WIDTH), seed=1)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH))
    theirs = single_file_utils.convert_open_clip_checkpoint(model, tensors, OPEN_CLIP)
    ours = {
        name.removeprefix("text_encoder_2."): slot.view(tensor)
        for key, tensor in tensors.items()
        for name, slot in parameters(key, "sdxl")
    }
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    back = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    for key in back:
        for name, slot in parameters(key, "sdxl"):
            slot.view(back[key]).copy_(ours[name.removeprefix("text_encoder_2.")])
            assert slot.shape(tuple(back[key].shape)) == tuple(theirs[name[15:]].shape)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_real_sized_file_is_recognised(base, tmp_path):
    checkpoint = Checkpoint.open(
        sparse_file(tmp_path / "model.safetensors", single_file_shapes(base))
    )
    assert checkpoint.bases == (base,)
    assert checkpoint.components == ("unet", "text_encoder")
    stated = {n for n, _ in parameter_shapes(base) if not n.startswith("text_encoder_2")}
    assert set(checkpoint.places) == stated
    assert checkpoint.special_input() is None


def test_second_text_encoder_of_sdxl(tmp_path):
    shapes = single_file_shapes("sdxl") | open_clip_shapes(OPEN_CLIP, 32, 1280)
    checkpoint = Checkpoint.open(sparse_file(tmp_path / "m.safetensors", shapes))
    assert checkpoint.components == ("unet", "text_encoder", "text_encoder_2")
    layer = "text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj.weight"
    assert checkpoint.places[layer].shape == (1280, 1280)


def test_stable_diffusion_2_has_a_layer_more_than_diffusers(tmp_path):
    """The 24th layer of its text encoder is not used, and no LoRA has a name for it."""
    shapes = single_file_shapes("sd21") | open_clip_shapes("cond_stage_model.model.", 24, 1024)
    checkpoint = Checkpoint.open(sparse_file(tmp_path / "m.safetensors", shapes))
    assert checkpoint.bases == ("sd21",)
    assert not any(".23." in name for name in checkpoint.small_parameters("text_encoder"))
    others = checkpoint.other_parameters("text_encoder")
    assert len(others) == 16 + 3
    assert "text_encoder.text_model.encoder.layers.23.self_attn.k_proj.weight" in others


def test_broken_index_of_shards(tmp_path):
    (tmp_path / "unet").mkdir()
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(BadWeightsFile, match="no index of a model"):
            Checkpoint.open(tmp_path)


def diffusers_tensors(component: str) -> dict[str, torch.Tensor]:
    start = f"{component}."
    shapes = {n.removeprefix(start): s for n, s in parameter_shapes("mini") if n.startswith(start)}
    return random_tensors(shapes, seed=3)


def test_diffusers_folder_with_shards(tmp_path):
    unet, text = diffusers_tensors("unet"), diffusers_tensors("text_encoder")
    half = list(unet)[: len(unet) // 2]
    first = {key: unet[key] for key in half}
    second = {key: tensor for key, tensor in unet.items() if key not in first}
    write(tmp_path / "unet/one.safetensors", first)
    write(tmp_path / "unet/two.safetensors", second)
    shards = dict.fromkeys(first, "one.safetensors") | dict.fromkeys(second, "two.safetensors")
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    write(tmp_path / "text_encoder/model.safetensors", text)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.components == ("unet", "text_encoder")
    assert torch.equal(checkpoint.weight("unet.conv_out"), unet["conv_out.weight"])


def test_text_encoder_alone_may_be_of_several_models(tmp_path):
    start = "text_encoder.text_model."
    shapes = {n.removeprefix(start): s for n, s in parameter_shapes("sd15") if n.startswith(start)}
    checkpoint = Checkpoint.open(sparse_file(tmp_path / "clip_l.safetensors", shapes))
    assert checkpoint.bases == ("sd15", "sdxl")
    assert checkpoint.components == ("text_encoder",)


def test_inpainting_model_is_told(tmp_path):
    shapes = single_file_shapes("sd15")
    shapes[f"{UNET}input_blocks.0.0.weight"] = (320, 9, 3, 3)
    checkpoint = Checkpoint.open(sparse_file(tmp_path / "m.safetensors", shapes))
    assert checkpoint.special_input() == "an inpainting model"


def broken(change) -> dict[str, tuple[int, ...]]:
    shapes = single_file_shapes("mini")
    change(shapes)
    return shapes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop(f"{UNET}out.2.weight"), "lacks 1 layer (unet.conv_out) of 137 of mini"),
        (lambda s: s.update({f"{UNET}out.2.weight": (4, 65, 3, 3)}), "has the shape [4, 65, 3, 3]"),
        (lambda s: s.update({"a.lora_down.weight": (4, 4)}), "is a LoRA, not a checkpoint"),
        (lambda s: s.update({f"{UNET}out.2.scale_weight": ()}), "scaled 8-bit weights"),
        (lambda s: (s.clear(), s.update({"transformer.x.weight": (4, 4)})), "no checkpoint of a"),
    ],
)
def test_refusals(change, sentence, tmp_path):
    path = sparse_file(tmp_path / "model.safetensors", broken(change))
    with pytest.raises(BadWeightsFile, match="model") as caught:
        Checkpoint.open(path)
    assert sentence in caught.value.message
    assert caught.value.hint or "LoRA" in sentence


def test_weights_in_whole_numbers_are_refused(tmp_path):
    tensors = random_tensors(single_file_shapes("mini"), 1)
    tensors[f"{UNET}out.2.weight"] = torch.zeros(4, 64, 3, 3, dtype=torch.int8)
    with pytest.raises(BadWeightsFile, match=r"as whole numbers .*Take the 16-bit checkpoint"):
        Checkpoint.open(write(tmp_path / "model.safetensors", tensors))


def test_pickle_truncated_and_folder_are_refused(tmp_path):
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02}q\x00." * 10)
    with pytest.raises(BadWeightsFile, match="pickle"):
        Checkpoint.open(pickle)
    whole = sparse_file(tmp_path / "model.safetensors", single_file_shapes("mini"))
    with whole.open("r+b") as file:
        file.truncate(whole.stat().st_size - 100)
    with pytest.raises(BadWeightsFile, match="truncated"):
        Checkpoint.open(whole)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadWeightsFile, match="no model"):
        Checkpoint.open(tmp_path / "empty")


@pytest.mark.parametrize("shape", [(), (3,), (385, 128), (2, 3, 4)])
def test_fused_projections_that_cannot_be_taken_apart(shape, tmp_path):
    prefix = "cond_stage_model.model."
    shapes = single_file_shapes("mini") | open_clip_shapes(prefix, 3, 128)
    shapes = {k: s for k, s in shapes.items() if ".text_model." not in k}
    shapes[f"{prefix}transformer.resblocks.0.attn.in_proj_weight"] = shape
    with pytest.raises(BadWeightsFile, match=r"3 layers|has the shape"):
        Checkpoint.open(sparse_file(tmp_path / "m.safetensors", shapes))
