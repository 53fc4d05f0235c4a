"""Merging, comparing and resizing inside ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host, PromptFailed
from prompts import kept, node, predicted, with_lora_file
from safetensors import safe_open

from difflora_core.weights_file import lora_from_state_dict

DATA = Path(__file__).parents[1] / "data"
LORAS = {"loras.lora_1": ["lora", 0], "loras.lora_2": ["other", 0]}
SETTINGS = {
    "weights": "",
    "method": "average",
    "size": "exact",
    "amount": 16.0,
    "precision": "fp16",
    "weighting": "given",
    "total": 0.0,
}


def two_people() -> dict[str, Any]:
    """LORA_MODELs of two people at ["lora", 0] and ["other", 0]."""
    prompt = predicted(seed=0)
    return {
        **prompt,
        "other": {**prompt["lora"], "inputs": {**prompt["lora"]["inputs"], "seed": 1}},
    }


def merged(**settings: Any) -> dict[str, Any]:
    """The same, and their merge at ["merge", 0]."""
    return {
        **two_people(),
        "merge": node("DiffLoRA_MergeLoRAs", **LORAS, **{**SETTINGS, **settings}),
    }


def saved(host: Host, prompt: dict[str, Any], source: str, precision: str = "fp16") -> str:
    """Write the LORA_MODEL of a node; its name in the list of LoRAs."""
    save = node(
        "DiffLoRA_SaveLora",
        lora=[source, 0],
        filename_prefix="test/merged",
        folder="models/loras",
        precision=precision,
        trigger="",
    )
    path = host.run(kept({**prompt, "save": save}, path=["save", 0]))["path"]
    return str(Path(path).relative_to(host.base / "models" / "loras"))


def core_loader(source: str) -> dict[str, Any]:
    options = {"strength_model": 1.0, "bypass": False}
    return node("LoraModelLoader", model=["mini", 0], lora=[source, 0], **options)


def run_node(host: Host, name: str, **inputs: Any) -> tuple[Any, ...]:
    """A node called by itself, with values that no prompt can hold."""
    return host.nodes.NODE_CLASS_MAPPINGS[f"DiffLoRA_{name}"].execute(**inputs).args


def deltas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {layer.name: layer.delta() for layer in lora_from_state_dict(tensors)}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_average_is_the_mean_of_both(host: Host, world: Path) -> None:
    prompt = kept(merged(precision="fp32"), one=["lora", 0], two=["other", 0], lora=["merge", 0])
    values = host.run(kept(prompt, report=["merge", 1], spectrum=["merge", 2]))
    one, two, mean = (deltas(values[name]) for name in ("one", "two", "lora"))
    assert all(relative(mean[name], (one[name] + two[name]) / 2) < 1e-5 for name in one)
    assert not any(tensor.is_inference() for tensor in values["lora"].values())
    assert "average of 2 LoRAs" in values["report"] and "rank" in values["report"]
    spectrum = values["spectrum"]
    assert spectrum.ndim == 4 and spectrum.shape[-1] == 3 and spectrum.std() > 0


@pytest.mark.parametrize("size", ["exact", "rank"])
def test_preview_equals_the_saved_file(
    host: Host, world: Path, base_prompt: Any, size: str
) -> None:
    prompt = merged(size=size, amount=4.0)
    more = {**prompt, "apply": core_loader("merge")}
    preview = host.run(base_prompt(2, model=["apply", 0], more=more))["picture"]
    base = host.run(base_prompt(2))["picture"]
    file = saved(host, prompt, "merge")
    more = with_lora_file(file)
    by_file = host.run(base_prompt(2, model=["apply", 0], more=more))["picture"]
    assert torch.equal(by_file, preview) and not torch.equal(base, preview)
    ours = {"file": node("DiffLoRA_LoadLoraFile", file=file), "apply": core_loader("file")}
    again = host.run(base_prompt(2, model=["apply", 0], more=ours))["picture"]
    assert torch.equal(again, preview)


def test_header_of_a_saved_merge_names_the_inputs(host: Host, world: Path) -> None:
    folder = host.base / "models" / "loras"
    file = saved(host, merged(weights="0.7, 0.3"), "merge")
    with safe_open(folder / file, "pt") as opened:
        header = opened.metadata()
    assert header["modelspec.merged_from"].count("person") == 2
    assert "sks person" in header["modelspec.trigger_phrase"]
    assert header["ss_base_model_version"] == "difflora_mini"
    assert "0.7" in json.dumps(header) and header["modelspec.title"] == Path(file).stem.strip("_")
    assert not any(str(host.base) in value for value in header.values())


def test_inputs_stay_as_they_are(host: Host, world: Path) -> None:
    values = host.run(kept(two_people(), one=["lora", 0], two=["other", 0]))
    before = {name: {k: t.clone() for k, t in values[name].items()} for name in values}
    settings = {**SETTINGS, "precision": "fp32"}
    for loras in ({"lora_1": values["one"]}, {"lora_1": values["one"], "lora_2": values["two"]}):
        lora, *_ = run_node(host, "MergeLoRAs", loras=loras, **settings)
        small, _ = run_node(
            host, "ResizeLoRA", lora=values["one"], size="exact", amount=1.0, precision="fp32"
        )
        for result in (lora, small):
            for tensor in result.values():
                tensor += 1
    for name, tensors in before.items():
        assert all(torch.equal(values[name][key], tensor) for key, tensor in tensors.items())


def test_a_plain_dict_from_core_is_taken(host: Host, world: Path) -> None:
    values = host.run(kept(two_people(), one=["lora", 0], two=["other", 0]))
    plain = {"lora_1": dict(values["one"]), "lora_2": dict(values["two"])}
    lora, report, _ = run_node(host, "MergeLoRAs", loras=plain, **SETTINGS)
    ours, *_ = run_node(
        host, "MergeLoRAs", loras={"lora_1": values["one"], "lora_2": values["two"]}, **SETTINGS
    )
    assert all(torch.equal(lora[key], ours[key]) for key in ours)
    assert "LoRA 1" in report and "LoRA 2" in report


def flux_lora(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in range(2):
        name = f"lora_unet_double_blocks_{block}_img_attn_proj"
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 64, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(64, 4, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    return tensors


def test_flux_loras_are_merged_under_their_names(host: Host) -> None:
    one, two = flux_lora(1), flux_lora(2)
    lora, *_ = run_node(
        host,
        "MergeLoRAs",
        loras={"lora_1": one, "lora_2": two},
        **{**SETTINGS, "precision": "fp32"},
    )
    assert set(lora) == set(one)
    for name in (key.removesuffix(".alpha") for key in one if key.endswith(".alpha")):
        up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
        found = lora[f"{name}.alpha"] / down.shape[0] * (up @ down)
        ups = [source[f"{name}.lora_up.weight"] for source in (one, two)]
        downs = [source[f"{name}.lora_down.weight"] for source in (one, two)]
        assert relative(found, (ups[0] @ downs[0] + ups[1] @ downs[1]) / 2) < 1e-5


def test_other_base_models_are_refused(host: Host, world: Path) -> None:
    values = host.run(kept(two_people(), one=["lora", 0]))
    error = host.module("difflora_core.errors").DiffLoRAError
    with pytest.raises(error, match="Flux"):
        run_node(
            host, "MergeLoRAs", loras={"lora_1": values["one"], "lora_2": flux_lora(1)}, **SETTINGS
        )


def test_resize_and_compare(host: Host, world: Path) -> None:
    resize = node(
        "DiffLoRA_ResizeLoRA", lora=["lora", 0], size="rank", amount=2.0, precision="fp16"
    )
    compare = node("DiffLoRA_CompareLoRAs", **LORAS)
    prompt = {**two_people(), "small": resize, "compare": compare}
    prompt = kept(prompt, lora=["small", 0], report=["small", 1])
    values = host.run(kept(prompt, map=["compare", 0], compared=["compare", 1]))
    downs = [t for key, t in values["lora"].items() if "lora_down" in key]
    assert len(downs) == 56 and all(down.shape[0] == 2 for down in downs)
    assert values["lora"].metadata["modelspec.trigger_phrase"] == "sks person"
    assert "rank" in values["report"] and "person 1" in values["compared"]
    assert values["map"].ndim == 4 and values["map"].shape[-1] == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weights": "1, 2, 3"}, "3 weights were given for 2 LoRAs"),
        ({"weights": "much"}, "'much' is no list of numbers"),
        ({"size": "energy %", "amount": 300.0}, "energy of 300 % is impossible"),
        ({"blocks": "unet.mid_block=1"}, "for 1 of 2 LoRAs"),
    ],
)
def test_wrong_settings_are_explained(
    host: Host, world: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PromptFailed) as failure:
        host.run(kept(merged(**settings), lora=["merge", 0]))
    assert sentence in str(failure.value) and failure.value.node == "DiffLoRA_MergeLoRAs"


def test_interrupted_merge_leaves_the_next_one_right(host: Host, world: Path) -> None:
    import comfy.model_management
    from comfy_host import Interrupted

    prompt = kept(merged(size="rank", amount=3.0), lora=["merge", 0])
    expected = host.run(prompt)["lora"]
    host.run(kept(two_people(), lora=["lora", 0], other=["other", 0]))  # cached, merge forgotten
    host.on_progress = lambda _step: comfy.model_management.interrupt_current_processing()
    with pytest.raises(Interrupted):
        host.run(kept(merged(size="rank", amount=2.0), lora=["merge", 0]))
    host.on_progress = None
    again = host.run(prompt)["lora"]
    assert all(torch.equal(expected[key], again[key]) for key in expected)


@pytest.mark.parametrize("name", ["merge_two_people", "merge_explorer"])
def test_workflow_runs_on_random_weights(host: Host, world: Path, name: str) -> None:
    prompt = json.loads((DATA / f"{name}_api.json").read_text(encoding="utf-8"))
    for key, entry in prompt.items():
        if entry["class_type"] == "DiffLoRA_LoadFaceEncoder":
            prompt[key] = node("TestFaces")
        if entry["class_type"] == "DiffLoRA_ExamplePhoto":
            prompt[key] = node("TestPhoto", faces="one")
        if entry["class_type"] == "DiffLoRA_PredictLora":
            entry["inputs"]["seed"] = int(key)
        if entry["class_type"] == "KSampler":
            entry["inputs"]["steps"] = 2
    decoded = [key for key, entry in prompt.items() if entry["class_type"] == "VAEDecode"]
    pictures = host.run(kept(prompt, **{f"p{key}": [key, 0] for key in decoded})).values()
    assert len(pictures) == 4 and all(torch.isfinite(p).all() for p in pictures)
    assert len({p.mean().item() for p in pictures}) == 4


def test_help_explains_every_method(host: Host) -> None:
    page = DATA.parents[1] / "web" / "docs" / "DiffLoRA_MergeLoRAs.md"
    text = page.read_text(encoding="utf-8")
    for method in host.module("difflora_core.merging").METHODS:
        assert f"| {method} |" in text
