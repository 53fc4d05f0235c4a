"""The LoRA data set: trained side by side or alone, resumed, collected, refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from difflora_core.errors import BadWeightsFile, DiffLoRAError
from difflora_core.lora_space import LoraSpace
from difflora_core.weights_file import read_lora
from tests.training.tiny_world import write_world
from training.__main__ import open_run
from training.artifacts import artifacts_folder, read_artifact, save_artifact
from training.base.painter import Painter
from training.config import Config, load_config
from training.loop import OutOfTime
from training.loras import stage as loras_stage
from training.loras.collect import INDEX, read_set
from training.loras.collect import run as collect
from training.loras.config import LorasConfig
from training.loras.learnable import explained_by_identity
from training.loras.stage import groups, person_file
from training.loras.stage import run as train
from training.loras.teacher import initial_factors, photo_album, train_loras
from training.portraits import identities

FEW = ["loras.people=3", "loras.steps=2", "loras.pictures=3", "loras.batch=2", "run.device=cpu"]
SHORT = LorasConfig(steps=3, pictures=3, batch=2)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "tiny.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "run"}"\n')
    config = load_config(file, FEW)
    write_world(config)
    return config


def test_a_person_gets_the_same_lora_in_any_group(config: Config) -> None:
    painter, space = Painter.open(config), LoraSpace.for_mini()
    alone = [space.pack(train_loras(painter, space, SHORT, [seed])[0]) for seed in (5, 9)]
    together = [space.pack(lora) for lora in train_loras(painter, space, SHORT, [5, 9])]
    for one, other in zip(alone, together, strict=True):
        # sums of other lengths round differently, and Adam makes much of small gradients
        assert one.norm() > 0 and (one - other).norm() < 1e-3 * one.norm()
    assert torch.cosine_similarity(alone[0], alone[1], dim=0) < 0.99


def test_frozen_down_trains_only_the_ups(config: Config) -> None:
    painter, space = Painter.open(config), LoraSpace.for_mini()
    lora = train_loras(painter, space, SHORT, [1])[0]
    for layer in lora:
        assert torch.equal(layer.down, space.downs()[layer.name])
    assert space.project(lora).lost < 1e-6


@pytest.mark.parametrize("gauge", ["shared_init", "free", "svd"])
def test_other_gauges_train_both_factors(config: Config, gauge: str) -> None:
    painter, space = Painter.open(config), LoraSpace.for_mini(gauge=gauge)
    before = initial_factors(space, [1, 2], torch.device("cpu"))
    name = space.layers[0].name
    same_start = torch.equal(before[name][0][0], before[name][0][1])
    assert same_start == (gauge != "free")
    lora = train_loras(painter, space, SHORT, [1])[0]
    assert not torch.equal(lora.layers[name].down, before[name][0][0])


def test_albums_show_everybody_in_the_scenes_of_the_seed(config: Config) -> None:
    painter = Painter.open(config)
    people = identities(torch.tensor([3, 4]))
    album = photo_album(painter, people, 2, seed=7)
    again = photo_album(painter, people[1:], 2, seed=7)
    other = photo_album(painter, people[1:], 2, seed=8)
    assert album.latents.shape == (2, 2, 4, 16, 16)
    assert not torch.allclose(album.latents[0], album.latents[1], atol=1e-3)
    assert torch.equal(album.contexts[0], album.contexts[1])
    assert torch.allclose(album.latents[1], again.latents[0], atol=1e-5)
    assert not torch.equal(again.contexts, other.contexts)


def test_the_same_person_twice_gets_the_same_lora_unless_the_draws_differ(config: Config) -> None:
    painter, space = Painter.open(config), LoraSpace.for_mini()
    whose = {
        draws: space.pack(
            train_loras(painter, space, dataclasses.replace(SHORT, draws=draws), [5])[0]
        )
        for draws in (0, 1)
    }
    again = space.pack(train_loras(painter, space, SHORT, [5])[0])
    assert torch.equal(whose[0], again)
    assert not torch.allclose(whose[0], whose[1], atol=1e-5)


def test_a_restart_trains_exactly_who_is_missing(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    files = [person_file(folder, seed) for seed in range(3)]
    before = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    (folder.path / "people" / ".00000002.safetensors.tmp").write_bytes(b"half a file")
    train(config, folder)
    after = [file.stat().st_mtime_ns for file in files]
    assert before[0] == after[0] and before[2] == after[2] and files[1].exists()
    assert read_lora(files[1]).metadata["modelspec.trigger_phrase"] == "sks person"


def test_time_that_is_up_leaves_whole_people_and_the_next_run_the_rest(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    hurried = dataclasses.replace(config, run=dataclasses.replace(config.run, max_minutes=1e-6))
    for left in (2, 1):
        with pytest.raises(OutOfTime, match=f"{left} people are left"):
            train(hurried, folder)
    train(hurried, folder)
    assert all(person_file(folder, seed).exists() for seed in range(3))


def test_loras_of_another_recipe_are_refused_not_mixed_in(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    before = [person_file(folder, seed).read_bytes() for seed in range(3)]
    for changed in ({"gauge": "free"}, {"steps": 3}, {"draws": 1}):
        other = dataclasses.replace(config.loras, people=4, **changed)
        with pytest.raises(DiffLoRAError, match="trained otherwise"):
            train(dataclasses.replace(config, loras=other), folder)
    assert [person_file(folder, seed).read_bytes() for seed in range(3)] == before
    assert not person_file(folder, 3).exists()


def test_loras_of_another_renderer_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    monkeypatch.setattr(loras_stage, "renderer_digest", lambda: "of another day")
    with pytest.raises(DiffLoRAError, match=r"trained otherwise.*of another day"):
        train(config, folder)


def test_loras_of_another_base_model_are_refused(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    tensors, unet = read_artifact(config, "unet")
    save_artifact(config, "unet", {name: 1.01 * t for name, t in tensors.items()}, unet)
    with pytest.raises(DiffLoRAError, match="trained otherwise"):
        train(config, folder)
    with pytest.raises(DiffLoRAError, match=r"None of the 3 .* it was trained otherwise"):
        collect(config, open_run(config, "collect-loras"))


def test_stray_files_are_left_out(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    shutil.copy(person_file(folder, 0), folder.path / "people" / "copy of 0.safetensors")
    collect(config, open_run(config, "collect-loras"))
    assert read_set(config).seeds.tolist() == [0, 1, 2]


def test_nothing_usable_is_one_sentence_and_keeps_the_old_set(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    collect(config, open_run(config, "collect-loras"))
    for seed in range(3):
        person_file(folder, seed).write_bytes(b"not a LoRA")
    with pytest.raises(DiffLoRAError, match="None of the 3 identity LoRAs"):
        collect(config, open_run(config, "collect-loras"))
    assert len(read_set(config)) == 3


def test_collecting_again_makes_the_same_set_and_leaves_no_old_shards(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    made = set()
    for _ in range(2):
        collect(config, open_run(config, "collect-loras"))
        made.add((artifacts_folder(config) / INDEX).read_text())
    assert len(made) == 1
    assert len(list((artifacts_folder(config) / "loras").glob("*.safetensors"))) == 1
    assert len(read_set(config)) == 3


def test_collecting_keeps_what_fits_and_says_what_does_not(config: Config) -> None:
    folder = open_run(config, "train-identity-loras")
    train(config, folder)
    person_file(folder, 2).write_bytes(b"not a LoRA")
    collect(config, open_run(config, "collect-loras"))
    loras = read_set(config)
    assert loras.seeds.tolist() == [0, 1] and len(loras) == 2
    index = json.loads((artifacts_folder(config) / "loras/index.json").read_text())
    assert index["refused"] == 1 and index["count"] == 2
    packed = loras.space.pack(read_lora(person_file(folder, 0)))
    assert torch.allclose(loras.vectors[0], packed, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "breaks off"), ("[]", "no JSON object"), ("{}", "has no space")]
)
def test_a_damaged_index_is_one_sentence(config: Config, text: str, reason: str) -> None:
    index = artifacts_folder(config) / "loras" / "index.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_text(text)
    with pytest.raises(BadWeightsFile, match=rf"index\.json in .*loras is damaged: .*{reason}"):
        read_set(config)


def test_a_set_of_another_space_is_refused(config: Config) -> None:
    other = dataclasses.replace(config, loras=dataclasses.replace(config.loras, rank=8))
    with pytest.raises(DiffLoRAError, match="of space"):
        read_set(other)


def test_collecting_nothing_names_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "empty.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "none"}"\n')
    config = load_config(file)
    with pytest.raises(DiffLoRAError, match="no identity LoRAs"):
        collect(config, open_run(config, "collect-loras"))


def test_what_follows_from_the_person_is_told_from_chance() -> None:
    seeds = torch.arange(200)
    people = identities(seeds)
    chance = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    follows = people @ torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    mixed = follows + (follows - follows.mean(0)).std() * chance
    shares = [explained_by_identity(v, seeds) or 0.0 for v in (chance, mixed, follows)]
    assert shares[0] < 0.05 and 0.3 < shares[1] < 0.7 and shares[2] > 0.9
    assert explained_by_identity(follows[:3], seeds[:3]) is None


def test_groups_cover_everyone_once() -> None:
    assert list(groups([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
