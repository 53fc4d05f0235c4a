"""The predictor's stages on a world of random weights: they run, hand over, and learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from difflora_core.errors import LayoutMismatch
from difflora_core.image_encoder import ImageEncoder
from difflora_core.predictor import Predictor
from tests.training.tiny_world import write_world
from training import parallel
from training.__main__ import open_run
from training.artifacts import artifact, artifacts_folder, read_manifest
from training.base.painter import Painter
from training.config import Config, load_config
from training.encoders.face_pack import face_encoder_name
from training.loras.collect import LoraSet, write_set
from training.loras.stage import lora_space
from training.portraits import identities
from training.predictor import (
    autoencoder_stage,
    calibrate,
    conditions,
    dit_stage,
    finetune_stage,
    people_pool,
)
from training.predictor.bundle import save_bundle
from training.predictor.conditions import PhotoEncoders, sample_photos
from training.predictor.people_pool import build_people_pool

FEW = [
    "run.device=cpu", "run.log_every=1", "predictor.autoencoder.optim.steps=2",
    "predictor.autoencoder.batch=4", "predictor.dit.optim.steps=2", "predictor.dit.batch=4",
    "predictor.dit.photos=2", "predictor.finetune.optim.steps=3", "predictor.finetune.people=4",
    "predictor.finetune.pictures=2", "predictor.finetune.photos=2", "predictor.finetune.batch=2",
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    # painting hundreds of pictures to choose a strength is not what these tests are about
    monkeypatch.setattr(dit_stage, "calibrate", lambda config, predictor: {"strength": 1.0})
    return world(tmp_path, [])


def world(tmp_path: Path, overrides: list[str]) -> Config:
    file = tmp_path / "tiny.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "run"}"\n')
    config = load_config(file, FEW + overrides)
    write_world(config)
    for name in ("predictor", "predictor_paper"):
        (artifacts_folder(config) / f"{name}.safetensors").unlink()
    space = lora_space(config.loras)
    loras = LoraSet(space, 0.03 * torch.randn(20, space.size), torch.arange(20))
    write_set(artifacts_folder(config), loras, config.loras)
    return config


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_stages_hand_over(tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit_stage, "calibrate", lambda config, predictor: {"strength": 1.0})
    name = "predictor" if preset == "default" else "predictor_paper"
    ends = str(preset == "default").lower()
    config = world(
        tmp_path,
        [f"predictor.preset={preset}", f"predictor.name={name}", f"predictor.end_to_end={ends}"],
    )
    autoencoder_stage.run(config, open_run(config, "train-autoencoder"))
    dit_stage.run(config, open_run(config, "train-dit"))
    if preset == "default":
        assert not (artifacts_folder(config) / "predictor.safetensors").exists()
        finetune_stage.run(config, open_run(config, "finetune-predictor"))
    predictor = Predictor.open(artifact(config, name))
    assert predictor.config.name == name and predictor.config.trigger == "sks person"
    assert predictor.config.face_encoder.name == face_encoder_name(config)
    assert predictor.config.image_encoder.name == "tiny"
    figures = read_manifest(artifacts_folder(config))[f"{name}.safetensors"]["figures"]
    assert figures["strength"] == 1.0 and figures["steps"] > 0


def test_end_to_end_can_start_from_nothing(config: Config, tmp_path: Path) -> None:
    config = load_config(tmp_path / "tiny.toml", [*FEW, "predictor.finetune.start=fresh"])
    finetune_stage.run(config, open_run(config, "finetune-predictor"))
    predictor = Predictor.open(artifact(config, "predictor"))
    assert (predictor.value_statistics.std == config.predictor.finetune.fresh_scale).all()


def test_end_to_end_is_used_with_the_steps_it_was_trained_to_take(
    config: Config, tmp_path: Path
) -> None:
    words = [*FEW, "predictor.finetune.start=fresh", "predictor.finetune.rollout=3"]
    config = load_config(tmp_path / "tiny.toml", words)
    finetune_stage.run(config, open_run(config, "finetune-predictor"))
    assert Predictor.open(artifact(config, "predictor")).config.sampling.steps == 3


def test_end_to_end_goes_on_from_a_finished_predictor(config: Config, tmp_path: Path) -> None:
    finetune = ["predictor.finetune.start=fresh", "predictor.finetune.fresh_scale=0.07"]
    first = load_config(tmp_path / "tiny.toml", [*FEW, *finetune])
    finetune_stage.run(first, open_run(first, "finetune-predictor"))
    before = Predictor.open(artifact(first, "predictor"))
    again = load_config(tmp_path / "tiny.toml", [*FEW, "predictor.finetune.start=artifact"])
    pool = build_people_pool(Painter.open(again), PhotoEncoders(again), again.predictor.finetune, 0)
    after = finetune_stage.starting_predictor(again, pool)
    for name, tensor in before.state_dict().items():
        if "mixer" not in name:
            torch.testing.assert_close(after.state_dict()[name], tensor, msg=name)


def test_end_to_end_refuses_a_start_from_another_image_encoder(config: Config) -> None:
    predictor = finetune_stage.untrained(config)
    save_bundle(config, predictor, "predictor_dit")
    pool = build_people_pool(
        Painter.open(config), PhotoEncoders(config), config.predictor.finetune, 0
    )
    assert finetune_stage.starting_predictor(config, pool)
    path = artifact(config, "image_encoder")
    encoder = ImageEncoder.open(path)
    encoder.config = dataclasses.replace(encoder.config, name="tiny, trained again")
    encoder.save(path, overwrite=True)
    with pytest.raises(LayoutMismatch, match=r"learnt to read the tiny; .* tiny, trained again"):
        finetune_stage.starting_predictor(config, pool)


def test_a_start_for_other_embeddings_is_refused_before_people_are_drawn(config: Config) -> None:
    fitting = finetune_stage.untrained(config)
    mixer = dataclasses.replace(fitting.config.mixer, image_width=8)
    save_bundle(
        config, Predictor(dataclasses.replace(fitting.config, mixer=mixer)), "predictor_dit"
    )
    with pytest.raises(LayoutMismatch, match=r"of 16 and 8 numbers; .* give 16 and 16"):
        finetune_stage.run(config, open_run(config, "finetune-predictor"))


def test_an_autoencoder_learns_from_batches_of_one(tmp_path: Path) -> None:
    config = world(tmp_path, ["predictor.autoencoder.batch=1"])
    autoencoder_stage.run(config, open_run(config, "train-autoencoder"))
    assert (
        "explained_test"
        in read_manifest(artifacts_folder(config))["predictor_autoencoder.safetensors"]["figures"]
    )


def test_processes_make_parts_of_what_one_makes_of_its_people(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people_pool, "_CHUNK", 2)  # of five people: three parts
    monkeypatch.setattr(conditions, "_CHUNK", 4)  # of ten photos: three parts
    painter, encoders = Painter.open(config), PhotoEncoders(config)
    settings = dataclasses.replace(config.predictor.finetune, people=5)
    whole: list[list[tuple[torch.Tensor, ...]]] = []
    monkeypatch.setattr(parallel, "exchange", lambda own, number: whole.append(own) or own)
    build_people_pool(painter, encoders, settings, 0)
    assert [len(parts) for parts in whole] == [3, 3]  # pictures and photos
    for rank in range(2):
        share, remaining = slice(rank, None, 2), list(whole)

        def compared(own, number, share=share, remaining=remaining):
            parts = remaining.pop(0)
            assert number == 3 and len(own) == len(parts[share])
            for mine, expected in zip(own, parts[share], strict=True):
                assert all(map(torch.equal, mine, expected))
            return parts

        monkeypatch.setattr(parallel, "share", lambda share=share: share)
        monkeypatch.setattr(parallel, "exchange", compared)
        build_people_pool(painter, encoders, settings, 0)
        assert not remaining


def test_end_to_end_gradients_reach_every_part(config: Config) -> None:
    settings = config.predictor.finetune
    painter = Painter.open(config)
    pool = build_people_pool(painter, PhotoEncoders(config), settings, 0)
    predictor = finetune_stage.untrained(config)
    with torch.no_grad():  # zero output layers would stop the gradient of a fresh network
        for parameter in predictor.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    faces = finetune_stage.open_face_term(config, painter)
    stage = finetune_stage.EndToEnd(predictor, painter, pool, faces, settings)
    stage.step(1)["loss"].backward()
    for part in finetune_stage.PARTS:
        learned = [p for n, p in getattr(predictor, part).named_parameters() if "encoder" not in n]
        reached = [p for p in learned if p.grad is not None and p.grad.abs().sum() > 0]
        assert len(reached) > 0.6 * len(learned), part
    assert all(p.grad is None for p in painter.unet.parameters())


def test_the_face_term_sees_faces_and_stops_where_noise_hides_them(config: Config) -> None:
    settings, painter = config.predictor.finetune, Painter.open(config)
    pool = build_people_pool(painter, PhotoEncoders(config), settings, 0)
    faces = finetune_stage.open_face_term(config, painter)
    stage = finetune_stage.EndToEnd(
        finetune_stage.untrained(config), painter, pool, faces, settings
    )
    people, which = torch.arange(4), torch.tensor([[0], [1], [0], [1]])
    truth = pool.latents[people[:, None], which].flatten(0, 1).float()
    others = truth.roll(1, 0).requires_grad_()
    t = torch.tensor([10, 500, settings.face_last - 1, settings.face_last])
    same, other = (stage.face_term(x, truth, people, which, t) for x in (truth, others))
    assert same.present.tolist() == other.present.tolist() == [True, True, True, False]
    torch.testing.assert_close(same.value, torch.zeros(4), atol=1e-5, rtol=0)
    assert (other.value[:3] > 1e-3).all() and other.value[3] == 0
    other.value.sum().backward()
    assert others.grad is not None
    assert (others.grad.abs().amax((1, 2, 3)) > 0).tolist() == [True, True, True, False]
    off = dataclasses.replace(settings, face=0.0)
    blind = finetune_stage.EndToEnd(stage.predictor, painter, pool, faces, off)
    assert not blind.face_term(others, truth, people, which, t).present.any()


def test_pools_and_photos_show_the_people_asked_for(config: Config) -> None:
    settings, painter = config.predictor.finetune, Painter.open(config)
    pool = build_people_pool(painter, PhotoEncoders(config), settings, 0)
    assert pool.latents.shape == (4, 2, 4, 16, 16) and pool.prompts.shape == (4, 2, 77)
    assert pool.photos.face.shape[:2] == (4, 2)
    scene = sample_photos(identities(torch.arange(200)), torch.Generator().manual_seed(0))
    assert torch.equal(scene.identity[:, 0], identities(torch.arange(200)))
    assert (scene.accessory != 2).all(), "sunglasses hide who somebody is"


def test_calibration_takes_the_best_strength_that_keeps_the_prompt(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0.8: (0.3, 0.9), 1.0: (0.4, 0.9), 1.25: (0.5, 0.885), 1.5: (0.6, 0.7)}

    class Trial:
        def __init__(self, config: Config, predictor: Predictor) -> None: ...

        def base_accuracy(self) -> float:
            return 0.9

        def score(self, strength: float) -> tuple[float, float]:
            return scores.get(strength, (0.9, 0.1))

    monkeypatch.setattr(calibrate, "_Trial", Trial)
    pool_free = Predictor(autoencoder_stage.new_predictor(config, lora_space(config.loras)).config)
    figures = calibrate.calibrate(config, pool_free)
    assert figures["strength"] == pool_free.config.sampling.strength == 1.25


def test_blends_look_like_people() -> None:
    values = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    settings = autoencoder_stage.AutoencoderTraining(batch=4000, mix=1.0)
    drawn = autoencoder_stage.draw_values(values, settings, torch.Generator().manual_seed(1))
    assert abs(drawn.std() - 1) < 0.02 and abs(drawn.mean()) < 0.02


def in_free_gauge(config: Config) -> Config:
    return dataclasses.replace(config, loras=dataclasses.replace(config.loras, gauge="free"))


def test_a_set_of_another_gauge_is_refused(config: Config) -> None:
    autoencoder_stage.run(config, open_run(config, "train-autoencoder"))
    other = in_free_gauge(config)
    space = lora_space(other.loras)
    loras = LoraSet(space, 0.03 * torch.randn(20, space.size), torch.arange(20))
    write_set(artifacts_folder(other), loras, other.loras)
    with pytest.raises(LayoutMismatch, match="predictor_autoencoder belongs to another LoRA space"):
        dit_stage.run(other, open_run(other, "train-dit"))


def test_a_denoiser_of_another_gauge_is_refused(config: Config) -> None:
    autoencoder_stage.run(config, open_run(config, "train-autoencoder"))
    dit_stage.run(config, open_run(config, "train-dit"))
    pool = build_people_pool(
        Painter.open(config), PhotoEncoders(config), config.predictor.finetune, 0
    )
    with pytest.raises(LayoutMismatch, match="predictor_dit belongs to another LoRA space"):
        finetune_stage.starting_predictor(in_free_gauge(config), pool)


def test_the_paper_s_recipe_is_the_paper_s() -> None:
    settings = load_config(Path("training/configs/mini_paper.toml")).predictor
    assert settings.preset == "paper" and not settings.end_to_end
    assert settings.autoencoder.mix == settings.autoencoder.delta == 0
    assert settings.name == "predictor_paper"
