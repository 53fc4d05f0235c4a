from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from difflora_core.errors import BadWeightsFile, DiffLoRAError
from training import artifacts
from training.artifacts import (
    MissingArtifact,
    artifact,
    artifacts_folder,
    command_line,
    read_artifact,
    read_manifest,
    record_artifact,
    save_artifact,
    sha256,
    ship,
)
from training.base.models import open_text, open_unet, open_vae
from training.config import Config
from training.run_config import RunConfig
from training.run_folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(root=str(tmp_path / "run"), seed=4, device="cpu"))


def _save(config: Config, name: str = "unet") -> Path:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "index": torch.arange(3)}
    return save_artifact(config, name, tensors, {"width": 8}, {"loss": 0.5})


def test_saved_artifact_reads_back(config: Config) -> None:
    path = _save(config)
    tensors, settings = read_artifact(config, "unet")
    assert artifact(config, "unet.safetensors") == path
    assert settings == {"width": 8}
    assert tensors["a"].dtype == torch.float16 and tensors["index"].dtype == torch.int64
    assert torch.equal(tensors["a"].float(), torch.arange(6.0).reshape(2, 3).T)


def test_manifest_says_how_a_file_was_made(config: Config) -> None:
    path = _save(config)
    entry = read_manifest(artifacts_folder(config))["unet.safetensors"]
    assert entry["seed"] == 4 and entry["figures"] == {"loss": 0.5}
    assert entry["sha256"] == sha256(path)
    assert entry["command"].startswith("python -m training")


def test_missing_artifact_names_the_stage(config: Config, tmp_path: Path) -> None:
    with pytest.raises(DiffLoRAError, match="train-base"):
        artifact(config, "unet", shipped=tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "stage"),
    [("predictor_dit", "train-dit"), ("predictor_autoencoder", "train-autoencoder"),
     ("detector", "train-encoders")],
)  # fmt: skip
def test_what_lies_between_two_stages_names_the_first(
    config: Config, tmp_path: Path, name: str, stage: str
) -> None:
    with pytest.raises(MissingArtifact) as error:
        artifact(config, name, shipped=tmp_path)
    assert f"training {stage} " in error.value.hint


def test_own_artifact_goes_before_the_shipped_one(config: Config, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "vae.safetensors").write_bytes(b"")
    assert artifact(config, "vae", shipped).parent == shipped
    own = _save(config, "vae")
    assert artifact(config, "vae", shipped) == own


def test_ship_copies_weights_and_merges_the_manifest(config: Config, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    (shipped / "old").mkdir(parents=True)
    (shipped / "manifest.json").write_text(json.dumps({"vae.safetensors": {"seed": 1}}))
    _save(config)
    material = ("loras/shard_000", "detector", "predictor_dit", "predictor_paper_autoencoder")
    for name in material:
        _save(config, name)
    onnx = artifacts_folder(config) / "insightface/models/mini/det_mini.onnx"
    onnx.parent.mkdir(parents=True)
    onnx.write_bytes(b"onnx")
    record_artifact(config, "insightface/models/mini/det_mini.onnx")
    ship(config, RunFolder.create(config.run.root, "ship"), shipped)
    assert (shipped / "insightface/models/mini/det_mini.onnx").read_bytes() == b"onnx"
    assert not (shipped / "loras").exists()
    assert set(read_manifest(shipped)) == {
        "vae.safetensors",
        "unet.safetensors",
        "insightface/models/mini/det_mini.onnx",
    }


def test_ship_refuses_more_than_the_limit(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "SHIPPED_LIMIT", 10)
    _save(config)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    with pytest.raises(DiffLoRAError, match=r"limit.*unet.safetensors"):
        ship(config, RunFolder.create(config.run.root, "ship"), shipped)
    assert not list(shipped.iterdir())


def test_ship_copies_all_files_or_none(config: Config, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "unet.safetensors").write_bytes(b"before")
    _save(config, "unet")
    unreadable = _save(config, "vae")
    unreadable.unlink()
    unreadable.mkdir()
    with pytest.raises(OSError, match=r"vae\.safetensors"):
        ship(config, RunFolder.create(config.run.root, "ship"), shipped)
    assert [p.name for p in shipped.iterdir()] == ["unet.safetensors"]
    assert (shipped / "unet.safetensors").read_bytes() == b"before"


def test_ship_refuses_a_file_that_the_manifest_does_not_tell_of(
    config: Config, tmp_path: Path
) -> None:
    shipped = tmp_path / "shipped"
    _save(config, "unet")
    with _save(config, "vae").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DiffLoRAError, match=r"vae\.safetensors is another file than"):
        ship(config, RunFolder.create(config.run.root, "ship"), shipped)
    assert not list(shipped.iterdir())


def test_commands_are_recorded_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "train.py",
        "ship",
        "--config",
        "/home/me/mini.toml",
        "run.root=/home/me/runs",
        "a=[1]",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == "python -m training ship --config mini.toml run.root=runs a=[1]"


def test_a_name_with_a_dot_is_found_again(config: Config) -> None:
    save_artifact(config, "v1.5_dit", {"w": torch.ones(2)}, {})
    assert artifact(config, "v1.5_dit").name == "v1.5_dit.safetensors"


def test_a_run_without_artifacts_ships_nothing(tmp_path: Path) -> None:
    config = Config(run=RunConfig(root=str(tmp_path / "typo")))
    with pytest.raises(DiffLoRAError, match="nothing to ship"):
        ship(config, RunFolder.create(config.run.root, "ship"), tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_config_of_another_network_is_refused_in_words(config: Config, part: str) -> None:
    openers = {"unet": open_unet, "vae": open_vae, "text_encoder": open_text}
    _save(config, part)
    with pytest.raises(BadWeightsFile, match=rf"^{part}.safetensors is not a {part} of ours"):
        openers[part](config)


def test_a_config_with_the_weights_of_another_is_refused_in_words(config: Config) -> None:
    tensors, _ = read_artifact(config, "vae")
    _, built_from = read_artifact(config, "unet")
    save_artifact(config, "unet", tensors, built_from)
    with pytest.raises(BadWeightsFile, match=r"^unet.safetensors is not a unet of ours"):
        open_unet(config)
