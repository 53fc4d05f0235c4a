"""Stage train-controlnet: files, resuming, and the same code on Stable Diffusion's layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig, DiffLoRAError, LayoutMismatch
from tests.training.coco_files import overrides, write_split
from tests.training.controlnet_world import FEW, inputs, randomised, world
from tests.training.tiny_sd import WIDTH, write_tiny_sd
from tests.training.tiny_world import write_world
from training import trained_for
from training.__main__ import main, open_run
from training.artifacts import (
    MissingArtifact,
    artifacts_folder,
    read_artifact,
    read_manifest,
    save_artifact,
)
from training.config import Config, load_config
from training.controlnet import people_stage, record, stage
from training.controlnet.base_model import open_base
from training.controlnet.config import ObjectiveConfig
from training.controlnet.control import new_control, predict_noise
from training.controlnet.export import open_control
from training.controlnet.objective import objective_of
from training.loop import Interrupted
from training.run_folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return world(tmp_path)


def trained(config: Config) -> dict[str, Tensor]:
    """Run the stage; the weights of its mask-aware variant."""
    stage.run(config, open_run(config, "train-controlnet"))
    return open_control(config, "mask_aware-seed0").state_dict()


def test_run_names_are_file_names() -> None:
    assert stage.run_name("last=200 face=0.7", 3) == "last-200_face-0.7-seed3"


def test_the_stage_writes_both_forms_and_figures(config: Config) -> None:
    stage.run(config, folder := open_run(config, "train-controlnet"))
    entries = read_manifest(artifacts_folder(config))
    for name in ("baseline-seed0", "mask_aware-seed0"):
        place = artifacts_folder(config) / "controlnet" / name
        figures = entries[f"controlnet/{name}/{name}_comfyui.safetensors"]["figures"]
        objective = objective_of(name.removesuffix("-seed0"), ObjectiveConfig())
        assert figures["steps"] == 4 and figures["objective"] == to_dict(objective)
        assert figures["base"].keys() == figures["control"].keys()
        single = load_file(place / f"{name}_comfyui.safetensors")
        loaded = ControlNetModel.from_pretrained(place)
        assert torch.equal(
            single["control_model.zero_convs.1.0.weight"].float(),
            loaded.controlnet_down_blocks[1].weight,
        )
        assert loaded.controlnet_down_blocks[1].weight.abs().max() > 0
        assert list((folder.path / name / "samples").glob("step_*.png"))
        assert json.loads((place / "config.json").read_text())["_class_name"] == "ControlNetModel"
    with pytest.raises(MissingArtifact, match="no ControlNet paper-seed0"):
        open_control(config, "paper-seed0")


def test_variants_of_a_seed_differ_by_their_loss_alone(tmp_path: Path) -> None:
    config = world(tmp_path, "controlnet.variants=[baseline, mask_aware, body=0.0 face=0.0]")
    stage.run(config, open_run(config, "train-controlnet"))
    names = ("baseline-seed0", "mask_aware-seed0", "body-0.0_face-0.0-seed0")
    baseline, aware, nothing = (open_control(config, name).state_dict() for name in names)
    assert all(torch.equal(baseline[key], nothing[key]) for key in baseline)
    assert any(not torch.equal(baseline[key], aware[key]) for key in baseline)


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = world(tmp_path, "controlnet.variants=[mask_aware]")
    whole = trained(config)
    run = Path(config.run.root) / "train-controlnet" / "mask_aware-seed0" / "checkpoints"
    newest = sorted(run.glob("step_*"))[-1]
    assert newest.name == "step_00000004"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = trained(config)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_training_whose_time_is_up_is_no_result(tmp_path: Path) -> None:
    config = world(tmp_path, "controlnet.variants=[mask_aware]")
    short = replace(config, run=replace(config.run, max_minutes=1e-9))
    with pytest.raises(Interrupted, match="mask_aware-seed0 stopped at step 1: its time was up"):
        trained(short)
    with pytest.raises(MissingArtifact):
        open_control(config, "mask_aware-seed0")
    assert trained(config)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("controlnet.objective.face=0", "objective.face = 0.5, now it is 0.0"),
        ("controlnet.objective.last=900", "objective.last = 100, now it is 900"),
        ("controlnet.pool=16", "controlnet.pool = 8, now it is 16"),
        ("controlnet.face_network=other/rec.onnx", "face_network = '', now it is 'rec.onnx'"),
        ("run.seed=3", "run.seed = 0, now it is 3"),
    ],
)
def test_a_training_goes_on_with_the_settings_that_it_began_with(
    half_trained: Path, word: str, sentence: str
) -> None:
    other = world(half_trained, "controlnet.variants=[baseline, mask_aware]", word)
    with pytest.raises(BadConfig, match=f"mask_aware-seed0 was trained with .*{sentence}.*delete"):
        trained(other)
    assert not (half_trained / "run/train-controlnet/baseline-seed0").exists()


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a mask-aware training that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(Interrupted):
        trained(world(folder, "controlnet.variants=[mask_aware]", "run.max_minutes=1e-9"))
    return folder


def test_steps_networks_not_looked_through_and_folders_may_change(tmp_path: Path) -> None:
    first = world(tmp_path, "controlnet.model=here/sd")
    then = world(
        tmp_path, "controlnet.model=there/sd", "controlnet.face_network=rec.onnx",
        "controlnet.vgg=[vgg.safetensors]", "controlnet.optim.steps=9",
    )  # fmt: skip
    baseline = objective_of("baseline", ObjectiveConfig())
    assert record.decisive(first, baseline) == record.decisive(then, baseline)


def test_empty_lists_are_refused(config: Config) -> None:
    for changed in ({"variants": ()}, {"seeds": ()}):
        broken = replace(config, controlnet=replace(config.controlnet, **changed))
        with pytest.raises(BadConfig, match="must not be empty"):
            stage.run(broken, open_run(broken, "train-controlnet"))


@pytest.mark.parametrize("weights", ["[1]", "[1, 1, 1, 1, 1]"])
def test_weights_that_are_not_one_per_stage_are_refused_before_training(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "held_out", lambda *args: pytest.fail("work began"))
    config = world(tmp_path, f"controlnet.objective.tap_weights={weights}")
    with pytest.raises(BadConfig, match=r"tap_weights has . entries, but .* has \d stages"):
        stage.Workshop.open(config)


def test_no_sample_sheets_on_the_way_leave_the_one_at_the_end(tmp_path: Path) -> None:
    config = world(tmp_path, "controlnet.variants=[baseline]", "controlnet.sample_every=0")
    stage.run(config, folder := open_run(config, "train-controlnet"))
    sheets = (folder.path / "baseline-seed0" / "samples").iterdir()
    assert [path.name for path in sheets] == ["step_00000004.png"]


def sd_words(tmp_path: Path) -> list[str]:
    """SD 1.5's own config file, brought down to tiny models and eight pictures."""
    split = write_split(tmp_path / "coco", 8, seed=0)
    return [
        *FEW, *overrides("train", split.files), *overrides("validation", split.files),
        "people.count=6", f"controlnet.model={write_tiny_sd(tmp_path / 'sd')}",
        "controlnet.resolution=128", "controlnet.smallest_face=0.1", "controlnet.batch=2",
        "controlnet.variants=[baseline, mask_aware, paper]", f"run.root={tmp_path / 'run'}",
    ]  # fmt: skip


def test_stable_diffusion_goes_the_same_way(tmp_path: Path) -> None:
    file = Path("training/configs/sd15_controlnet.toml")
    words = sd_words(tmp_path)
    write_world(world_config := load_config(file, words))
    recogniser = artifacts_folder(world_config) / "recogniser.safetensors"
    words.append(f"controlnet.face_network={recogniser}")
    assert main(["build-people-dataset", "--config", str(file), *words]) == 0
    assert main(["train-controlnet", "--config", str(file), *words]) == 0
    config = load_config(file, words)
    for variant in ("baseline", "mask_aware", "paper"):
        assert len(open_control(config, f"{variant}-seed0").state_dict()) > 100
    place = artifacts_folder(config) / "controlnet" / "paper-seed0"
    keys = load_file(place / "paper-seed0_comfyui.safetensors").keys()
    assert "control_model.input_blocks.11.0.in_layers.2.weight" in keys


def test_networks_of_drawings_are_not_used_on_photos(tmp_path: Path) -> None:
    file = Path("training/configs/sd15_controlnet.toml")
    words = [*sd_words(tmp_path), "controlnet.face_network=", "controlnet.landmark_network="]
    for more, key in (([], "face_network"), (["controlnet.variants=[landmark=0.1 face=0]"],
                                             "landmark_network")):  # fmt: skip
        config = load_config(file, [*words, *more])
        with pytest.raises(BadConfig, match=rf"controlnet\.{key} is empty"):
            stage.run(config, open_run(config, "train-controlnet"))
    words.append("controlnet.variants=[baseline]")
    write_world(config := load_config(file, words))
    stage.check_networks(config.controlnet, [objective_of("baseline", ObjectiveConfig())])
    people_stage.run(config, open_run(config, "build-people-dataset"))
    figures = stage.Workshop.open(config).checker.figures(None)
    assert {name.rpartition("_")[0] for name in figures} == {"epsilon", "body"}


def test_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    config = load_config(Path("training/configs/sd15_controlnet.toml"), sd_words(tmp_path))
    base = open_base(config)
    gradients = []
    for checkpointing in (False, True):
        control = randomised(new_control(base.unet, checkpointing=checkpointing))
        noisy, t, _ = inputs(base)
        predict_noise(base, control, noisy, t, base.encode(["a", "b"])).sum().backward()
        gradients.append([p.grad for p in control.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-6


def test_what_is_no_stable_diffusion_is_explained(tmp_path: Path) -> None:
    config = world(tmp_path, f"controlnet.model={tmp_path}")
    with pytest.raises(DiffLoRAError, match="it has no unet, vae"):
        open_base(config)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prediction_type": "v_prediction"}, "v_prediction.*predict epsilon"),
        ({"beta_start": None, "beta_end": None}, "'beta_end': 0.02, 'beta_start': 0.0001"),
        ({"beta_schedule": None}, "'beta_schedule': 'linear'"),
        ({"trained_betas": [0.1] * 1000}, r"'trained_betas': \[0.1, .*\.\.\.\]"),
        ({"rescale_betas_zero_snr": True}, "'rescale_betas_zero_snr': True"),
    ],
)
def test_other_schedules_are_refused(
    tmp_path: Path, changed: dict[str, Any], sentence: str
) -> None:
    """None leaves a key out."""
    folder = write_tiny_sd(tmp_path / "sd")
    _reschedule(folder, {"num_train_timesteps": None, "prediction_type": None})
    open_base(config := world(tmp_path, f"controlnet.model={folder}"))
    _reschedule(folder, changed)
    with pytest.raises(DiffLoRAError, match=sentence):
        open_base(config)


def _reschedule(folder: Path, changed: dict[str, Any]) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"in_channels": 9}, DiffLoRAError, "wants 9 channels of input"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
          "projection_class_embeddings_input_dim": 64}, DiffLoRAError, "condition 'text_time'"),
        ({"use_linear_projection": True, "attention_head_dim": (2, 4, 6, 6)}, DiffLoRAError,
         "projects by linear layers"),
        ({"block_out_channels": (16, 16), "down_block_types": ("DownBlock2D",) * 2,
          "up_block_types": ("UpBlock2D",) * 2}, LayoutMismatch, "ComfyUI has no names"),
    ],
)  # fmt: skip
def test_other_unets_are_refused_before_anything_is_trained(
    tmp_path: Path, change: dict[str, Any], error: type[DiffLoRAError], sentence: str
) -> None:
    folder = write_tiny_sd(tmp_path / "sd")
    widths = {"block_out_channels": (16, 32, 48, 48), "attention_head_dim": 4}
    unet = UNet2DConditionModel(
        **{**widths, "norm_num_groups": 8, "cross_attention_dim": WIDTH, **change}
    )
    unet.save_pretrained(folder / "unet")
    with pytest.raises(error, match=sentence):
        stage.Workshop.open(world(tmp_path, f"controlnet.model={folder}"))


def test_a_data_set_without_faces_is_refused_where_faces_are_compared(tmp_path: Path) -> None:
    split = write_split(tmp_path / "coco", 8, seed=0)
    files = [*overrides("train", split.files), *overrides("validation", split.files)]
    config = world(
        tmp_path, *files, "people.count=6", "people.train.wholebody=", "controlnet.data=people"
    )
    people_stage.run(config, open_run(config, "build-people-dataset"))
    with pytest.raises(BadConfig, match="no faces with landmarks"):
        stage.open_people(config, open_base(config))
    plain = replace(config, controlnet=replace(config.controlnet, variants=("baseline",)))
    assert len(stage.open_people(plain, open_base(plain))) == 6


def test_other_people_and_other_base_models_are_another_training(tmp_path: Path) -> None:
    config = world(tmp_path, "controlnet.data=people")
    index = people_stage.index_path(config, "train")
    index.parent.mkdir(parents=True)
    index.write_text("first", encoding="utf-8")
    folder, before = RunFolder.create(tmp_path, "x"), record.decisive(config, ObjectiveConfig())
    trained_for.begin(folder, before)
    folder.save(1, {}, {}, keep_last=1)
    trained_for.check(folder, record.decisive(config, ObjectiveConfig()))
    index.write_text("second", encoding="utf-8")
    with pytest.raises(BadConfig, match="was trained with people = "):
        trained_for.check(folder, record.decisive(config, ObjectiveConfig()))
    index.write_text("first", encoding="utf-8")
    tensors, header = read_artifact(config, "vae")
    save_artifact(config, "vae", {k: t + 1 for k, t in tensors.items()}, header)
    with pytest.raises(BadConfig, match="was trained with the artifact vae = "):
        trained_for.check(folder, record.decisive(config, ObjectiveConfig()))


@pytest.mark.parametrize(("data", "refused"), [("drawn", True), ("people", False)])
def test_another_renderer_matters_where_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, refused: bool
) -> None:
    config = world(tmp_path, f"controlnet.data={data}")
    before = record.decisive(config, ObjectiveConfig())
    monkeypatch.setattr(trained_for, "renderer_digest", lambda: "another")
    assert (record.decisive(config, ObjectiveConfig()) != before) == refused


def test_the_data_set_has_to_be_built_first(tmp_path: Path) -> None:
    config = world(tmp_path, "controlnet.data=people")
    with pytest.raises(MissingArtifact, match="build-people-dataset"):
        stage.run(config, open_run(config, "train-controlnet"))
