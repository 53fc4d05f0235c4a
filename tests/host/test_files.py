"""Files in and out: other spellings, core's own LORA_MODEL, broken and foreign files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host, PromptFailed
from mini_files import random_predictor
from prompts import kept, node, predicted, saved_lora
from safetensors.torch import load_file, save_file

from difflora_core.weights_file import lora_from_state_dict, read_lora


def deltas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {layer.name: layer.delta() for layer in lora_from_state_dict(tensors)}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def models(host: Host, world: Path) -> Iterator[Path]:
    """models/difflora, emptied afterwards."""
    folder = host.base / "models" / "difflora"
    yield folder
    for path in folder.iterdir():
        path.unlink()


def test_peft_file_is_read(host: Host, world: Path) -> None:
    lora = read_lora(host.base / "models" / "loras" / saved_lora(host))
    tensors = {}
    for layer in lora:
        tensors[f"{layer.name}.lora_A.weight"] = layer.down.float().contiguous()
        tensors[f"{layer.name}.lora_B.weight"] = (layer.up * layer.scale).float().contiguous()
    save_file(tensors, host.base / "models" / "loras" / "peft.safetensors")
    prompt = {"file": node("DiffLoRA_LoadLoraFile", file="peft.safetensors")}
    values = host.run(kept(prompt, lora=["file", 0], info=["file", 1]))
    assert_same(deltas(values["lora"]), {layer.name: layer.delta() for layer in lora})
    assert "base mini" in values["info"] and "56 layers" in values["info"]


def test_lora_model_of_core_is_saved(host: Host, world: Path) -> None:
    """ComfyUI's trainer passes keys like diffusion_model.input_blocks...lora_up.weight."""
    import comfy.lora

    prompt = kept({**predicted(), "mini": node("DiffLoRA_LoadMiniModel")}, model=["mini", 0])
    values = host.run(kept(prompt, lora=["lora", 0]))
    names = comfy.lora.model_lora_keys_unet(values["model"].model, {})
    theirs = {}
    for key, tensor in values["lora"].items():
        layer, _, part = key.partition(".")
        theirs[f"{names[layer].removesuffix('.weight')}.{part}"] = tensor
    save = host.nodes.NODE_CLASS_MAPPINGS["DiffLoRA_SaveLora"]
    (path,) = save.execute(theirs, "core", "models/loras", "fp32", "sks person").args
    assert_same(deltas(load_file(path)), deltas(values["lora"]))


def test_convolutions_of_cores_trainer_are_saved(host: Host, world: Path) -> None:
    """It trains every module, and stores kernels flat: down is [rank, in * kernel]."""
    up, down = torch.randn(64, 4), torch.randn(4, 36)
    name = "diffusion_model.input_blocks.0.0"
    theirs = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    theirs[f"{name}.alpha"] = torch.tensor(2.0)
    save = host.nodes.NODE_CLASS_MAPPINGS["DiffLoRA_SaveLora"]
    (path,) = save.execute(theirs, "convolution", "models/loras", "fp32", "").args
    (delta,) = deltas(load_file(path)).values()
    assert torch.allclose(delta, (0.5 * up @ down).view(delta.shape), atol=1e-5)


def test_alphas_of_a_header_count_once(host: Host) -> None:
    """LoRAs of foreign models in diffusers' spelling: alpha / rank goes into B when read."""
    key, factors = "transformer.single_transformer_blocks.0.attn.to_q", {}
    factors[f"{key}.lora_A.weight"], factors[f"{key}.lora_B.weight"] = torch.randn(2, 4, 32)
    factors[f"{key}.lora_B.weight"] = factors[f"{key}.lora_B.weight"].T.contiguous()
    header = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 8}'}
    file = host.base / "models" / "loras" / "flux.safetensors"
    save_file(factors, file, metadata=header)
    prompt = {"file": node("DiffLoRA_LoadLoraFile", file=file.name)}
    value = host.run(kept(prompt, lora=["file", 0]))["lora"]
    (layer,) = host.module("nodes.lora_models").opened([value])[0]
    up, down = factors[f"{key}.lora_B.weight"], factors[f"{key}.lora_A.weight"]
    assert torch.allclose(layer.delta(), 2 * up @ down, atol=1e-4)


def test_a_prefix_may_end_in_a_slash(host: Host, world: Path) -> None:
    value = host.run(kept(predicted(), lora=["lora", 0]))["lora"]
    save = host.nodes.NODE_CLASS_MAPPINGS["DiffLoRA_SaveLora"]
    paths = [save.execute(value, "folk/", "models/loras", "fp32", "").args[0] for _ in range(2)]
    assert [Path(path).name for path in paths] == [
        "folk_00001_.safetensors",
        "folk_00002_.safetensors",
    ]


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("../elsewhere/person", "leads out of the folder loras"),
        ("taken/person", "person could not be written: "),
    ],
)
def test_where_nothing_can_be_saved_is_one_sentence(
    host: Host, world: Path, prefix: str, says: str
) -> None:
    (host.base / "models" / "loras" / "taken").write_text("a file where a folder should be")
    save = node("DiffLoRA_SaveLora", lora=["lora", 0], filename_prefix=prefix)
    save["inputs"] |= {"folder": "models/loras", "precision": "fp32", "trigger": ""}
    with pytest.raises(PromptFailed, match=says):
        host.run(kept({**predicted(), "save": save}, path=["save", 0]))
    assert not (host.base / "models" / "elsewhere").exists()


def test_a_folder_that_leads_elsewhere_by_a_link_is_one_sentence(
    host: Host, world: Path, tmp_path: Path
) -> None:
    import folder_paths

    link = host.base / "models" / "loras" / "linked"
    link.symlink_to(tmp_path, target_is_directory=True)
    save = node("DiffLoRA_SaveLora", lora=["lora", 0], filename_prefix="linked/anna")
    save["inputs"] |= {"folder": "models/loras", "precision": "fp32", "trigger": ""}
    prompt = kept({**predicted(), "save": save}, path=["save", 0])
    try:
        if hasattr(folder_paths, "is_within_directory"):  # later than the oldest ComfyUI
            with pytest.raises(PromptFailed, match=r"'linked/anna': by a link it leads out of"):
                host.run(prompt)
        else:
            assert Path(host.run(prompt)["path"]).is_file()
    finally:
        link.unlink()


def test_a_file_is_read_again_with_another_configuration(host: Host, world: Path) -> None:
    loras = host.base / "models" / "loras" / "peft"
    loras.mkdir()
    save_file({"x": torch.zeros(1)}, loras / "adapter_model.safetensors")
    state = host.nodes.NODE_CLASS_MAPPINGS["DiffLoRA_LoadLoraFile"].fingerprint_inputs
    states = [state(file="peft/adapter_model.safetensors")]
    for text in ('{"lora_alpha": 4}', '{"lora_alpha": 16}'):
        (loras / "adapter_config.json").write_text(text)
        states.append(state(file="peft/adapter_model.safetensors"))
    shutil.rmtree(loras)
    assert len(set(states)) == 3


def test_damaged_predictor_is_explained(host: Host, models: Path, world: Path) -> None:
    whole = (world / "predictor.safetensors").read_bytes()
    (models / "damaged.safetensors").write_bytes(whole[: len(whole) // 2])
    prompt = predicted()
    prompt["predictor"]["inputs"]["predictor"] = "damaged.safetensors"
    with pytest.raises(PromptFailed, match=r"damaged\.safetensors is truncated"):
        host.run(kept(prompt, lora=["lora", 0]))


def test_other_files_are_no_predictors(host: Host, models: Path, world: Path) -> None:
    shutil.copy(world / "vae.safetensors", models / "vae.safetensors")
    prompt = predicted()
    prompt["predictor"]["inputs"]["predictor"] = "vae.safetensors"
    with pytest.raises(PromptFailed, match=r"vae\.safetensors is not a DiffLoRA predictor"):
        host.run(kept(prompt, lora=["lora", 0]))


def test_features_of_another_encoder_are_refused(host: Host, models: Path) -> None:
    random_predictor("mini image encoder", "antelopev2").save(models / "other.safetensors")
    prompt = predicted()
    prompt["predictor"]["inputs"]["predictor"] = "other.safetensors"
    with pytest.raises(PromptFailed, match="comes from mini; the predictor knows antelopev2"):
        host.run(kept(prompt, lora=["lora", 0]))


def test_missing_face_pack_is_explained(host: Host, world: Path) -> None:
    open_encoder: Any = host.module("nodes.loaders").open_face_encoder
    error = host.module("difflora_core.errors").BadWeightsFile
    with pytest.raises(error, match="The face pack 'nobody' is not in"):
        open_encoder("nobody")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_explained_and_leaves_nothing(host: Host, world: Path) -> None:
    """A process that may write 96 kB only fails in the middle of the file, not at previews."""
    import resource

    folder = host.base / "models" / "loras"
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (98_304, hard))
    try:
        with pytest.raises(PromptFailed, match=r"could not be written: File too large.*free space"):
            saved_lora(host)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
