"""The pack inside ComfyUI: what is listed, and from a photo to a picture by several ways."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host, PromptFailed
from prompts import SHIPPED, kept, node, predicted, saved_lora, with_lora_file

EXPECTED = {
    "LoadMiniModel", "LoadPredictor", "LoadFaceEncoder", "LoadImageEncoder", "EncodeFaceFeatures",
    "SaveFaceFeatures", "LoadFaceFeatures", "PredictLora", "Personalize", "LoadLoraFile",
    "SaveLora", "Likeness", "ExamplePhoto", "MergeLoRAs", "CompareLoRAs", "ResizeLoRA",
    "MaskAwareGuidance", "GuidanceReport", "FaceMask", "LoadMiniControlNet",
}  # fmt: skip


def ours(host: Host) -> dict[str, Any]:
    mappings = host.nodes.NODE_CLASS_MAPPINGS
    return {key: cls for key, cls in mappings.items() if key.startswith("DiffLoRA_")}


def test_all_nodes_are_listed(host: Host) -> None:
    assert {key.removeprefix("DiffLoRA_") for key in ours(host)} == EXPECTED


def test_every_node_input_and_output_is_explained(host: Host) -> None:
    for cls in ours(host).values():
        schema = cls.define_schema()
        assert schema.category == "DiffLoRA" and len(schema.description) > 40
        for place in [*(schema.inputs or []), *(schema.outputs or [])]:
            assert place.tooltip and place.tooltip.endswith("."), (schema.node_id, place.id)


def test_same_seed_gives_equal_tensors(host: Host, world: Path) -> None:
    first = host.run(kept(predicted(seed=5), lora=["lora", 0]))["lora"]
    host.forget_outputs()
    second = host.run(kept(predicted(seed=5), lora=["lora", 0]))["lora"]
    other = host.run(kept(predicted(seed=6), lora=["lora", 0]))["lora"]
    assert first.keys() == second.keys() and len(first) == 3 * 56
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert not any(tensor.is_inference() for tensor in first.values())


def test_removing_the_nodes_restores_the_base_picture(host: Host, base_prompt: Any) -> None:
    base = host.run(base_prompt(1))["picture"]
    personal = host.run(base_prompt(1, model=["apply", 0], more=applied()))["picture"]
    assert (personal - base).abs().mean() > 1e-3
    assert torch.equal(host.run(base_prompt(1))["picture"], base)
    host.forget_outputs()
    assert torch.equal(host.run(base_prompt(1))["picture"], base)


def applied() -> dict[str, Any]:
    """Our LORA_MODEL through core's "Load LoRA Model"."""
    return {**predicted(), "apply": core_loader(["lora", 0])}


def core_loader(lora: list[Any]) -> dict[str, Any]:
    settings = {"strength_model": 1.0, "bypass": False}
    return node("LoraModelLoader", model=["mini", 0], lora=lora, **settings)


def test_all_ways_to_use_a_lora_give_one_picture(host: Host, base_prompt: Any) -> None:
    picture = host.run(base_prompt(2, model=["apply", 0], more=applied()))["picture"]
    file = saved_lora(host)
    by_file = host.run(base_prompt(2, model=["apply", 0], more=with_lora_file(file)))["picture"]
    assert torch.equal(by_file, picture)
    ours = {
        "file": node("DiffLoRA_LoadLoraFile", file=file),
        "apply": core_loader(["file", 0]),
    }
    again = host.run(base_prompt(2, model=["apply", 0], more=ours))["picture"]
    assert torch.equal(again, picture)


def test_saving_again_counts_up(host: Host, world: Path) -> None:
    first = saved_lora(host)
    host.forget_outputs()
    second = saved_lora(host)
    assert first < second


def test_header_of_a_saved_lora(host: Host, world: Path) -> None:
    from safetensors import safe_open

    with safe_open(host.base / "models" / "loras" / saved_lora(host), "pt") as file:
        header = file.metadata()
    assert header["modelspec.trigger_phrase"] == "sks person"
    assert header["ss_base_model_version"] == "difflora_mini"
    assert header["difflora.seed"] == "0"
    assert not any(str(host.base) in value for value in header.values())


def personalized(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["mini", 0],
        "clip": ["mini", 1],
        "photos": ["photo", 0],
        "predictor": SHIPPED,
        "strength": 1.0,
        "seed": 0,
        "face": "largest",
        "face_number": 1,
        "face_encoder": ["faces", 0],
    }
    return {
        "photo": node("TestPhoto", faces="one"),
        "faces": node("TestOldFaces"),
        "apply": node("DiffLoRA_Personalize", **{**inputs, **changes}),
    }


def test_personalize_equals_the_long_way(host: Host, base_prompt: Any) -> None:
    long = host.run(base_prompt(3, model=["apply", 0], more=applied()))["picture"]
    short = host.run(base_prompt(3, model=["apply", 0], more=personalized()))["picture"]
    assert torch.equal(short, long)


def test_a_list_of_photos_is_one_person(host: Host, world: Path) -> None:
    lora: dict[str, Any] = {}
    for source in ("both", "apart", "photo"):
        prompt = personalized(photos=[source, 0])
        prompt |= {
            "mini": node("DiffLoRA_LoadMiniModel"),
            "other": node("TestPhoto", faces="two"),
            "both": node("ImageBatch", image1=["photo", 0], image2=["other", 0]),
            "apart": node("RebatchImages", images=["both", 0], batch_size=1),
        }
        lora[source] = host.run(kept(prompt, lora=["apply", 2]))["lora"]
    keys = lora["both"].keys()
    assert all(torch.equal(lora["apart"][key], lora["both"][key]) for key in keys)
    assert any(not torch.equal(lora["photo"][key], lora["both"][key]) for key in keys)


def test_personalize_notices_other_encoders(host: Host, world: Path) -> None:
    state = host.nodes.NODE_CLASS_MAPPINGS["DiffLoRA_Personalize"].fingerprint_inputs
    before = state(predictor=[SHIPPED])
    pack = host.base / "models" / "insightface" / "models" / "other"
    pack.mkdir(parents=True)
    (pack / "det.onnx").write_bytes(b"a detector")
    with_pack = state(predictor=[SHIPPED])
    (pack / "det.onnx").write_bytes(b"another detector")
    try:
        assert len({before, with_pack, state(predictor=[SHIPPED])}) == 3
    finally:
        shutil.rmtree(pack)


def test_features_from_a_file_equal_the_ones_saved(host: Host, world: Path) -> None:
    save = node("DiffLoRA_SaveFaceFeatures", features=["features", 0], filename_prefix="anna")
    prompt = kept({**predicted(), "save": save}, path=["save", 0], lora=["lora", 0])
    before = host.run(prompt)
    prompt = predicted()
    prompt["features"] = node("DiffLoRA_LoadFaceFeatures", file=Path(before["path"]).name)
    after = host.run(kept(prompt, lora=["lora", 0]))
    assert all(torch.equal(before["lora"][key], after["lora"][key]) for key in before["lora"])


def test_face_can_be_chosen_by_number(host: Host, world: Path) -> None:
    prompt = predicted(red_faces="two")
    prompt["features"]["inputs"]["face"] = "by number"
    values = host.run(kept(prompt, crops=["features", 1], lora=["lora", 0]))
    assert values["crops"].shape[0] == 2
    prompt["features"]["inputs"]["face_number"] = 2
    other = host.run(kept(prompt, lora=["lora", 0]))["lora"]
    assert any(not torch.equal(values["lora"][key], other[key]) for key in other)


def test_likeness_ranks_pictures(host: Host, world: Path) -> None:
    prompt = {
        "same": node("TestPhoto", faces="one"),
        "none": node("TestPhoto", faces="none"),
        "both": node("ImageBatch", image1=["none", 0], image2=["same", 0]),
        "faces": node("TestFaces"),
        "score": node(
            "DiffLoRA_Likeness",
            pictures=["both", 0],
            photos=["same", 0],
            face_encoder=["faces", 0],
            keep=1,
        ),
    }
    links = {"best": ["score", 0], "percent": ["score", 1], "report": ["score", 2]}
    values = host.run(kept({**prompt, "same_again": prompt["same"]}, **links, photo=["same", 0]))
    assert torch.equal(values["best"], values["photo"])
    assert values["percent"] > 99 and "1: no face" in values["report"]
    prompt["apart"] = node("RebatchImages", images=["both", 0], batch_size=1)
    prompt["score"]["inputs"]["pictures"] = ["apart", 0]
    apart = host.run(kept({**prompt, "same_again": prompt["same"]}, **links, photo=["same", 0]))
    assert torch.equal(apart["best"], values["best"]) and apart["report"] == values["report"]


@pytest.mark.parametrize(
    ("faces", "sentence"),
    [
        ("none", "No face was found in photo 1."),
        ("nan", "Photo 1: The picture holds values that are not numbers"),
        ("tiny", "Photo 1: The picture is 32x32 pixels; at least 64x64 are needed."),
        ("no picture", "There is no picture in the batch."),
    ],
)
def test_bad_photos_are_explained(host: Host, world: Path, faces: str, sentence: str) -> None:
    with pytest.raises(PromptFailed) as failure:
        host.run(kept(predicted(red_faces=faces), lora=["lora", 0]))
    assert sentence in str(failure.value)
    assert failure.value.node == "DiffLoRA_EncodeFaceFeatures"


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("Likeness", {"pictures": ["no", 0], "photos": ["photo", 0], "keep": 1}),
        ("Likeness", {"pictures": ["photo", 0], "photos": ["no", 0], "keep": 1}),
        (
            "FaceMask",
            {"images": ["no", 0], "face": "all", "face_number": 1, "no_face": "empty mask"}
            | {"shape": "box", "grow": 0.0, "feather": 0.0},
        ),
    ],
)
def test_an_empty_batch_is_explained(
    host: Host, world: Path, kind: str, inputs: dict[str, Any]
) -> None:
    prompt = {
        "no": node("TestPhoto", faces="no picture"),
        "photo": node("TestPhoto", faces="one"),
        "faces": node("TestFaces"),
        "node": node(f"DiffLoRA_{kind}", face_encoder=["faces", 0], **inputs),
    }
    with pytest.raises(PromptFailed, match="There is no picture in the batch"):
        host.run(kept(prompt, result=["node", 0]))


def test_missing_face_number_is_explained(host: Host, world: Path) -> None:
    prompt = predicted()
    prompt["features"]["inputs"] |= {"face": "by number", "face_number": 4}
    with pytest.raises(PromptFailed, match="There is no face number 4: 1 face was found"):
        host.run(kept(prompt, lora=["lora", 0]))


def test_alpha_is_flattened(host: Host, world: Path) -> None:
    assert host.run(kept(predicted(red_faces="alpha"), lora=["lora", 0]))["lora"]


def test_another_base_model_is_refused(host: Host, world: Path) -> None:
    check = host.module("nodes.host").check_fits
    mismatch = host.module("difflora_core.errors").LayoutMismatch
    lora = host.run(kept(predicted(), lora=["lora", 0]))["lora"]
    model = host.run({**MINI, **kept({}, model=["mini", 0])})["model"]
    check(lora, model)
    wide = {key: torch.cat([t, t]) if "lora_up" in key else t for key, t in lora.items()}
    with pytest.raises(mismatch, match="made for another base model: 56 of 56 layers"):
        check(wide, model)
    # as SD 2.1's layers look to SD 1.5: only what reads the text has other inputs
    deep = {
        key: torch.cat([t, t], 1) if "attn2_to_k.lora_down" in key else t for key, t in lora.items()
    }
    with pytest.raises(mismatch, match="made for another base model: 7 of 56 layers"):
        check(deep, model)


def test_predict_lora_refuses_a_model_that_it_is_not_for(host: Host, world: Path) -> None:
    free = host.run(kept(predicted(), lora=["lora", 0]))["lora"]
    prompt = {**predicted(model=["mini", 0]), **MINI}
    checked = host.run(kept(prompt, lora=["lora", 0]))["lora"]
    assert all(torch.equal(free[key], checked[key]) for key in free)
    prompt = {
        **predicted(model=["other", 0]),
        **MINI,
        "other": node("TestOtherModel", model=["mini", 0]),
    }
    with pytest.raises(PromptFailed, match="made for another base model: 7 of 56 layers") as failed:
        host.run(kept(prompt, lora=["lora", 0]))
    assert failed.value.node == "DiffLoRA_PredictLora"


MINI = {"mini": node("DiffLoRA_LoadMiniModel")}


def test_interrupted_prediction_leaves_the_next_one_right(host: Host, world: Path) -> None:
    import comfy.model_management
    from comfy_host import Interrupted

    prompt = kept(predicted(seed=9), lora=["lora", 0])
    expected = host.run(prompt)["lora"]
    host.forget_outputs()
    host.on_progress = lambda _step: comfy.model_management.interrupt_current_processing()
    with pytest.raises(Interrupted):
        host.run(prompt)
    host.on_progress = None
    again = host.run(prompt)["lora"]
    assert all(torch.equal(expected[key], again[key]) for key in expected)
