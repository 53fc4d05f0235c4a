"""Tests in a real ComfyUI: `COMFYUI_PATH=... python -m pytest tests/host`, a process of their own.

Without COMFYUI_PATH they are skipped: ComfyUI is no package that a test environment could install.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from difflora_core.mini_world import MINI_FOLDER

HERE = Path(__file__).parent


def _load(name: str) -> Any:
    """Import a helper of this folder; with importlib mode it is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# More threads than free cores cost far more than they give on models this small.
torch.set_num_threads(1)
mini_files = _load("mini_files")
_load("stand_ins")
comfy_host = _load("comfy_host")
prompts = _load("prompts")
_load("guided_runs")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """ComfyUI with the pack loaded."""
    comfyui = comfy_host.find_comfyui()
    if comfyui is None:
        pytest.skip("needs a ComfyUI: set COMFYUI_PATH to a checkout")
    yield comfy_host.Host(comfyui, tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def random_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mini world of random weights."""
    folder = tmp_path_factory.mktemp("mini")
    mini_files.write_random_world(folder)
    return folder


@pytest.fixture
def world(host: Any, random_world: Path) -> Path:
    """The pack takes its files from random weights; faces come from the stand-in encoder."""
    return enter(host, random_world)


@pytest.fixture
def shipped_world(host: Any) -> Path:
    """The pack takes its files from where they are shipped."""
    if not (MINI_FOLDER / "predictor.safetensors").is_file():
        pytest.skip("no weights are shipped")
    return enter(host, MINI_FOLDER)


def enter(host: Any, folder: Path) -> Path:
    """Change the folder of the mini world; what ComfyUI has cached from another one is dropped."""
    module = host.module("nodes.host")
    if folder != module.MINI_FOLDER:
        module.MINI_FOLDER = folder
        host.forget_outputs()
    return folder


@pytest.fixture
def base_prompt(host: Any, world: Path) -> Any:
    """A function seed -> the stock text-to-image prompt on the mini model."""
    return prompts.text_to_image
