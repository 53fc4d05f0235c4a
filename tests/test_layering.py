"""The borders of the three packages, read from the import statements themselves."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server"}
OURS = {"difflora_core", "training", "nodes", "benchmarks"}
CORE_MAY_IMPORT = {"torch", "numpy", "einops", "safetensors", "PIL"}
# Optional packages, each behind the one module that wraps it, imported inside functions only.
WRAPPED_IN_CORE = {
    "insightface": "difflora_core/face.py",
    "onnxruntime": "difflora_core/face.py",
    "onnx": "difflora_core/mask_aware/onnx_network.py",
    "open_clip": "difflora_core/image_encoder.py",
}


@dataclass(frozen=True)
class Import:
    path: str
    line: int
    package: str
    level: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {'.' * self.level}{self.package}"


def _imports(*folders: str) -> Iterator[Import]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            yield from _imports_below(ast.parse(file.read_text(encoding="utf-8")), path, lazy=False)


def _imports_below(node: ast.AST, path: str, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name.partition(".")[0], 0, lazy)
        elif isinstance(child, ast.ImportFrom):
            package = (child.module or "").partition(".")[0]
            yield Import(path, child.lineno, package, child.level, lazy)
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _imports_below(child, path, lazy=inside)


def _listed(imports: Iterator[Import] | list[Import]) -> list[str]:
    return [str(found) for found in imports]


def test_core_imports_only_what_it_may() -> None:
    allowed = CORE_MAY_IMPORT | set(sys.stdlib_module_names) | set(WRAPPED_IN_CORE)
    found = (i for i in _imports("difflora_core") if not i.level and i.package not in allowed)
    assert _listed(found) == []


def test_core_refers_to_itself_by_relative_imports() -> None:
    assert _listed(i for i in _imports("difflora_core") if i.package in OURS and not i.level) == []


def test_core_wraps_each_optional_package_in_one_module_and_lazily() -> None:
    wrong = [
        i
        for i in _imports("difflora_core")
        if i.package in WRAPPED_IN_CORE and (i.path != WRAPPED_IN_CORE[i.package] or not i.lazy)
    ]
    assert _listed(wrong) == []


def test_only_nodes_know_the_host() -> None:
    folders = ("difflora_core", "training", "benchmarks")
    assert _listed(i for i in _imports(*folders) if i.package in HOST and not i.level) == []


def test_training_and_nodes_do_not_know_each_other() -> None:
    assert _listed(i for i in _imports("training") if i.package == "nodes") == []
    assert _listed(i for i in _imports("nodes") if i.package in {"training", "benchmarks"}) == []


def test_nodes_import_neither_diffusers_nor_peft() -> None:
    assert _listed(i for i in _imports("nodes") if i.package in {"diffusers", "peft"}) == []


@pytest.mark.parametrize("package", ["pickle", "cPickle", "dill", "joblib", "marshal"])
def test_nobody_pickles(package: str) -> None:
    folders = ("difflora_core", "training", "nodes", "benchmarks")
    assert _listed(i for i in _imports(*folders) if i.package == package) == []


def test_weights_are_never_read_with_torch_load() -> None:
    calls = []
    for file in sorted((ROOT / "difflora_core").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {
                "torch.load",
                "torch.save",
            }:
                calls.append(f"{file.name}:{node.lineno}")
    assert calls == []
