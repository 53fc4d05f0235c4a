from pathlib import Path

import pytest
import torch

from difflora_core.errors import BadConfig, DiffLoRAError
from training import trained_for
from training.artifacts import save_artifact
from training.base import vae_training
from training.config import Config, load_config
from training.run_folder import RunFolder


def config_with(tmp_path: Path, *words: str) -> Config:
    file = tmp_path / "tiny.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "run"}"\n')
    return load_config(file, words)


def begun(tmp_path: Path, values: dict) -> RunFolder:
    folder = RunFolder.create(tmp_path, "unet")
    trained_for.begin(folder, values)
    folder.save(1, {}, {}, keep_last=1)
    return folder


def of_unet(tmp_path: Path, *words: str) -> dict:
    return trained_for.settings(config_with(tmp_path, *words), "base.unet", "base.text")


def test_length_and_speed_of_a_training_may_change(tmp_path: Path) -> None:
    folder = begun(tmp_path, of_unet(tmp_path, "base.unet.styles=[1.0,2.0,1.0,1.0,1.0]"))
    longer = [
        "base.unet.styles=[1.0,2.0,1.0,1.0,1.0]", "base.unet.optim.steps=7", "base.unet.minutes=3",
        "base.unet.compile=true", "base.unet.measured=4", "base.vae.batch=4",
    ]  # fmt: skip
    trained_for.begin(folder, of_unet(tmp_path, *longer))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("run.seed=5", "unet was trained with run.seed = 0, now it is 5"),
        ("base.unet.pool=9", "base.unet.pool = 200000, now it is 9"),
        ("base.unet.start=artifact", "base.unet.start = 'fresh', now it is 'artifact'"),
        ("base.text.width=64", "base.text.width = 128, now it is 64"),
    ],
)
def test_another_training_is_refused_and_the_record_stays(
    tmp_path: Path, word: str, says: str
) -> None:
    folder = begun(tmp_path, of_unet(tmp_path))
    before = (folder.path / trained_for.FILE).read_text()
    with pytest.raises(BadConfig, match=says):
        trained_for.begin(folder, of_unet(tmp_path, word))
    assert (folder.path / trained_for.FILE).read_text() == before


def test_a_refused_run_leaves_the_record_of_the_one_before(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "unet")
    folder.write_text("config.toml", "of the first")
    with pytest.raises(BadConfig), folder.kept_if_refused("config.toml", "environment.json"):
        folder.write_text("config.toml", "of the refused")
        raise BadConfig("other settings")
    assert (folder.path / "config.toml").read_text() == "of the first"
    with pytest.raises(DiffLoRAError), folder.kept_if_refused("config.toml"):
        folder.write_text("config.toml", "of the second")
        folder.part("unet").save(1, {}, {}, keep_last=1)
        raise DiffLoRAError("after it has trained")
    assert (folder.path / "config.toml").read_text() == "of the second"


def test_a_folder_without_checkpoints_takes_any_training(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "unet")
    trained_for.begin(folder, {"run.seed": 1})
    trained_for.begin(folder, {"run.seed": 2})
    folder.save(1, {}, {}, keep_last=1)
    with pytest.raises(BadConfig, match=r"run\.seed = 2, now it is 1"):
        trained_for.begin(folder, {"run.seed": 1})


def test_checkpoints_without_a_record_get_none(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "unet")
    folder.save(1, {}, {}, keep_last=1)
    trained_for.begin(folder, {"run.seed": 1})
    assert not (folder.path / trained_for.FILE).exists()


def test_notes_in_a_header_decide_nothing(tmp_path: Path) -> None:
    config, weights = config_with(tmp_path), {"x": torch.ones(2)}
    save_artifact(config, "vae", weights, {"note": "first"})
    first = trained_for.inputs(config, "vae")
    save_artifact(config, "vae", weights, {"note": "second"})
    assert trained_for.inputs(config, "vae") == first
    save_artifact(config, "vae", {"x": torch.zeros(2)}, {"note": "second"})
    assert trained_for.inputs(config, "vae") != first


def test_what_is_read_counts_by_content_and_a_result_is_no_other_start(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    shipped = trained_for.inputs(config, "vae")
    assert trained_for.start(config, "vae") == shipped
    save_artifact(config, "vae", {"x": torch.ones(2)}, {})
    assert trained_for.inputs(config, "vae").keys() == shipped.keys()
    assert trained_for.inputs(config, "vae") != shipped
    assert trained_for.start(config, "vae") == {}


def test_another_renderer_is_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(tmp_path, "base.vae.pool=8")
    folder = begun(tmp_path, vae_training.decisive(config))
    trained_for.begin(folder, vae_training.decisive(config))
    monkeypatch.setattr(trained_for, "renderer_digest", lambda: "another")
    with pytest.raises(BadConfig, match=r"the renderer = .*, now it is 'another'"):
        trained_for.begin(folder, vae_training.decisive(config))
