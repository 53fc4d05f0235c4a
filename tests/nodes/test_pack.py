"""What holds for the pack without any ComfyUI: it imports, and its workflows are sound."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
OPTIONAL = ("insightface", "onnxruntime", "open_clip", "torchvision", "peft", "diffusers")
CORE_NODES = {
    "CLIPTextEncode", "EmptyLatentImage", "KSampler", "LoraModelLoader", "MarkdownNote",
    "PreviewAny", "PreviewImage", "SaveImage", "VAEDecode",
}  # fmt: skip


def test_entry_point_needs_no_comfyui() -> None:
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py")
    assert spec and spec.loader
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert (ROOT / pack.WEB_DIRECTORY / "docs").is_dir()
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")  # it would hide the nodes of comfy_entrypoint


def test_core_imports_without_optional_packages() -> None:
    modules = [
        "difflora_core." + ".".join(path.relative_to(ROOT / "difflora_core").with_suffix("").parts)
        for path in sorted((ROOT / "difflora_core").rglob("*.py"))
        if not path.stem.startswith("__")
    ]
    code = f"""import importlib, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
for name in {modules!r}:
    importlib.import_module(name)"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def our_node_ids() -> set[str]:
    """Read from the sources, since the nodes import only inside ComfyUI."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    words = (word.split('"')[0] for source in sources for word in source.split('node_id="')[1:])
    return set(words)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_uses_core_nodes_and_ours(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    types = {node["type"] for node in workflow["nodes"]}
    assert types <= CORE_NODES | our_node_ids()
    assert "MarkdownNote" in types and all(group["title"] for group in workflow["groups"])
    seeds = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == "KSampler"]
    assert all(values[1] == "fixed" for values in seeds)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_of_a_workflow_fit_their_ends(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, slot, target, place, kind in workflow["links"]:
        output, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert link in output["links"] and taken["link"] == link
        assert output["type"] == kind and (taken["type"] == "*" or kind in taken["type"].split(","))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_equals_its_api_twin(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    twin = json.loads((ROOT / "tests/data" / f"{path.stem}_api.json").read_text(encoding="utf-8"))
    nodes = {str(n["id"]): n for n in workflow["nodes"] if n["type"] != "MarkdownNote"}
    assert {key: n["type"] for key, n in nodes.items()} == {
        key: n["class_type"] for key, n in twin.items()
    }
    sources = {link: [str(source), slot] for link, source, slot, *_ in workflow["links"]}
    for key, node in nodes.items():
        assert as_prompt(node, sources) == twin[key]["inputs"]


def as_prompt(node: dict[str, Any], sources: dict[int, list[Any]]) -> dict[str, Any]:
    """The inputs of a node in API format; the control that follows a seed is the editor's own."""
    values = [v for v in node["widgets_values"] if v not in ("fixed", "randomize")]
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    links = {e["name"]: sources[e["link"]] for e in node["inputs"] if e["link"] is not None}
    return {**dict(zip(widgets, values, strict=True)), **links}
