"""Tokens, side path, noise and painter of the mini model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from difflora_core.errors import BadConfig
from difflora_core.lora_space import LoraSpace
from difflora_core.mini_world import open_part
from tests.training.tiny_world import write_world
from training import parallel
from training.__main__ import open_run
from training.artifacts import artifacts_folder, read_artifact, read_manifest, save_artifact
from training.base import pool
from training.base.config import UnetConfig
from training.base.models import NOISE_SCHEDULE, alphas, open_vae
from training.base.noise import NoiseSchedule
from training.base.painter import Painter
from training.base.pool import _draw_scenes, build_pool, open_pool
from training.base.side_path import SidePath, stack_loras
from training.base.stage import run as train_base
from training.base.tokens import CONTEXT, END, UNKNOWN, encode, rows, token_index
from training.base.unet_training import unet_losses
from training.config import Config, load_config
from training.loop import Interrupted
from training.portraits import render, sample_scenes
from training.portraits.scene import is_held_out

CPU = torch.device("cpu")
PROMPTS = [
    "a photo of sks person, smiling, wearing a red t-shirt, at the beach",
    "a black and white photo of a person with long blonde hair and a beard",
    "an astronaut's 35 cats in a café; we'll see a really unusual prompt!",
    "",
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "tiny.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "run"}"\ndevice = "cpu"\n')
    return load_config(file)


def test_tokens_are_clips_own() -> None:
    ids, reference = encode(PROMPTS), SimpleTokenizer()(PROMPTS, context_length=CONTEXT)
    for own, theirs in zip(ids, reference, strict=True):
        length = int((theirs == END).nonzero()[0, 0]) + 1
        assert torch.equal(own[:length], theirs[:length])
        assert (own[length:] == END).all(), "CLIP-L pads with its end token"


def test_known_words_have_rows_of_their_own() -> None:
    known, unknown = rows(PROMPTS[:1])[0], rows(["astronaut"])[0]
    assert (known != UNKNOWN).all() and unknown[1] == UNKNOWN
    assert len(token_index()) == 49408


def test_long_prompts_are_cut_with_their_end() -> None:
    ids = encode(["red " * 200])
    assert ids.shape == (1, CONTEXT) and ids[0, -1] == END


def test_schedule_is_that_of_diffusers() -> None:
    theirs = DDPMScheduler(**NOISE_SCHEDULE)
    assert torch.allclose(alphas(CPU), theirs.alphas_cumprod, atol=1e-6)
    schedule, t = NoiseSchedule(CPU), torch.tensor([10, 500, 990])
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    noisy = schedule.add_noise(clean, noise, t)
    assert torch.allclose(noisy, theirs.add_noise(clean, noise, t), atol=1e-5)


def test_timesteps_are_spread_over_the_whole_schedule() -> None:
    schedule = NoiseSchedule(CPU)
    torch.manual_seed(0)
    draws = torch.stack([schedule.spread(8) for _ in range(2000)])
    assert (draws // 125 == torch.arange(8)).all(), "one from each eighth"
    assert draws.min() == 0 and draws.max() == 999
    assert abs(draws.float().mean().item() - 499.5) < 2


def test_faces_weigh_more_in_the_loss_and_the_parts_are_logged() -> None:
    faces = torch.zeros(2, 4, 4)
    faces[0, :2] = 1  # eight of 32 places
    error = torch.where(faces > 0, 3.0, 1.0)
    losses = unet_losses(error, faces, torch.ones(2), UnetConfig(face_weight=3.0))
    assert losses["loss"].item() == pytest.approx((8 * 4 * 3 + 24) / (8 * 4 + 24))
    assert losses["epsilon"].item() == pytest.approx((8 * 3 + 24) / 32)
    assert losses["epsilon_faces"].item() == pytest.approx(3)
    plain = unet_losses(error, faces, torch.ones(2), UnetConfig(face_weight=0.0))
    assert torch.equal(plain["loss"], plain["epsilon"])
    late = unet_losses(error, faces, torch.tensor([0.0, 1.0]), UnetConfig(face_weight=0.0))
    assert late["loss"].item() == pytest.approx(0.5)


def test_the_pool_knows_where_faces_are(config: Config) -> None:
    write_world(config)
    pool = build_pool(open_vae(config), replace(config.base.unet, pool=6), seed=3, device=CPU)
    scenes = sample_scenes(6, torch.Generator().manual_seed(3), people="mixed")
    drawn = render(scenes)
    assert pool.faces.shape == (6, 16, 16)
    area = (drawn.face_pixels().mean((1, 2)), pool.faces.float().mean((1, 2)))
    assert torch.allclose(*area, atol=1e-3) and area[0].min() > 0


def test_processes_that_draw_together_draw_what_one_does(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(config)
    monkeypatch.setattr(pool, "CHUNK", 2)
    vae, settings = open_vae(config), replace(config.base.unet, pool=5)
    alone = build_pool(vae, settings, seed=3, device=CPU)
    shares: list[list[tuple[Tensor, ...]]] = []
    monkeypatch.setattr(parallel, "exchange", lambda own, number: shares.append(own) or own)
    for rank in range(2):
        monkeypatch.setattr(parallel, "share", lambda rank=rank: slice(rank, None, 2))
        build_pool(vae, settings, seed=3, device=CPU, together=True)
    assert [len(share) for share in shares] == [2, 1]
    in_order = (shares[0][0], shares[1][0], shares[0][1])
    for name, parts in zip(vars(alone), zip(*in_order, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), vars(alone)[name])


def test_the_pool_draws_styles_as_often_as_it_is_told(config: Config) -> None:
    generator = torch.Generator().manual_seed(0)
    told = replace(config.base.unet, styles=(0.0, 0.0, 1.0, 0.0, 2.0))  # alike in the world
    scenes = _draw_scenes(3000, told, generator, "train")
    shares = torch.bincount(scenes.style, minlength=5) / 3000
    assert torch.allclose(shares, torch.tensor([0, 0, 1 / 3, 0, 2 / 3]), atol=0.03)
    assert not is_held_out(scenes.attributes()).any()


def test_a_resumed_run_finds_its_pool(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(config)
    few = replace(config, base=replace(config.base, unet=replace(config.base.unet, pool=4)))
    path = tmp_path / "pool.safetensors"
    first = open_pool(few, path, CPU)
    written = path.stat().st_mtime_ns
    again = open_pool(few, path, CPU)
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(value, vars(again)[name]) for name, value in vars(first).items())
    with monkeypatch.context() as patch:
        patch.setattr(pool, "renderer_digest", lambda: "of another day")
        open_pool(few, path, CPU)
        assert path.stat().st_mtime_ns > written
    other = replace(few, run=replace(few.run, seed=5))
    assert not torch.equal(open_pool(other, path, CPU).latents, first.latents)


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=128,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_side_path_equals_merged_weights_sample_by_sample() -> None:
    unet, space = tiny_unet(), LoraSpace.for_mini()
    loras = [space.unpack(torch.randn(space.size) * 0.05) for _ in range(2)]
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor(400), torch.randn(2, 77, 128)
    plain = unet(x, t, context).sample
    path = SidePath(unet)
    with path.using(stack_loras(loras, CPU)):
        beside = unet(x, t, context).sample
    assert torch.equal(unet(x, t, context).sample, plain), "nothing stays behind"
    for i, lora in enumerate(loras):
        merged = tiny_unet()
        for layer in lora:
            weight = merged.get_submodule(layer.name.removeprefix("unet.")).weight
            weight += layer.delta()
        expected = merged(x[i : i + 1], t, context[i : i + 1]).sample
        assert torch.allclose(beside[i : i + 1], expected, atol=2e-5)
        assert (expected - plain[i : i + 1]).abs().max() > 1e-3


def test_painter_is_seeded_and_independent_of_the_batch(config: Config) -> None:
    write_world(config)
    painter = Painter.open(config)
    together = painter.paint(PROMPTS, [1, 2, 3, 4], steps=2, batch=4)
    alone = painter.paint(PROMPTS, [1, 2, 3, 4], steps=2, batch=1)
    assert together.shape == (4, 3, 128, 128)
    assert torch.allclose(together, alone, atol=1e-3)
    other = painter.paint(PROMPTS[:1], [5], steps=2)
    assert not torch.allclose(other, together[:1], atol=1e-3)


def test_training_writes_what_the_world_opens(config: Config, tmp_path: Path) -> None:
    few = [
        "base.vae.optim.steps=2", "base.vae.batch=4", "base.vae.chunk=8", "base.vae.pool=8",
        "base.unet.optim.steps=2", "base.unet.batch=2", "base.unet.pool=4", "run.log_every=1",
        "base.vae.measured=4", "base.unet.measured=4",
    ]  # fmt: skip
    config = load_config(tmp_path / "tiny.toml", few)
    train_base(config, open_run(config, "train-base"))
    folder = artifacts_folder(config)
    vae, text = open_part("vae.safetensors", folder), open_part("text_encoder.safetensors", folder)
    assert vae.config["scaling_factor"] > 0
    figures = read_manifest(folder)["unet.safetensors"]["figures"]
    assert 0 < figures["epsilon"] < 3 and 0 < figures["epsilon_faces"] < 3
    assert text.tensors["embeddings.token_embedding.weight"].shape == (49408, 128)
    assert Painter.open(config).paint(["a person"], [0], steps=1).isfinite().all()


def test_what_was_interrupted_becomes_the_same_and_no_result_before(
    config: Config, tmp_path: Path
) -> None:
    few = [
        "base.vae.optim.steps=6", "base.vae.batch=4", "base.vae.chunk=4", "base.vae.pool=8",
        "base.vae.reuse=1", "base.vae.measured=2", "base.only=[vae]",
    ]  # fmt: skip
    file = tmp_path / "tiny.toml"
    whole = load_config(file, [*few, f"run.root={tmp_path / 'whole'}"])
    train_base(whole, open_run(whole, "train-base"))
    parts = load_config(file, [*few, f"run.root={tmp_path / 'parts'}"])
    short = replace(parts, run=replace(parts.run, max_minutes=1e-9))
    for _ in range(5):
        with pytest.raises(Interrupted, match="vae stopped at step"):
            train_base(short, open_run(short, "train-base"))
        assert not (artifacts_folder(parts) / "vae.safetensors").exists()
    train_base(parts, open_run(parts, "train-base"))
    one, other = (open_part("vae.safetensors", artifacts_folder(c)) for c in (whole, parts))
    assert all(torch.equal(other.tensors[name], tensor) for name, tensor in one.tensors.items())


def test_training_can_go_on_from_an_artifact(config: Config, tmp_path: Path) -> None:
    still = [
        "base.vae.optim.steps=1", "base.vae.optim.lr=0.0", "base.vae.batch=4", "base.vae.chunk=4",
        "base.vae.pool=4", "base.vae.measured=2", "base.vae.optim.ema=0.0", "base.only=[vae]",
    ]  # fmt: skip
    file = tmp_path / "tiny.toml"
    first = load_config(file, still)
    train_base(first, open_run(first, "train-base"))
    before = open_part("vae.safetensors", artifacts_folder(config)).tensors
    again = load_config(file, [*still, "base.vae.start=artifact"])
    train_base(again, open_run(again, "other"))
    after = open_part("vae.safetensors", artifacts_folder(config)).tensors
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.abs().sum() > 0 for tensor in before.values())


def test_a_finished_part_is_no_result_of_other_settings(config: Config, tmp_path: Path) -> None:
    few = [
        "base.unet.optim.steps=1", "base.unet.batch=2", "base.unet.pool=4", "base.unet.measured=4",
        "base.only=[unet]",
    ]  # fmt: skip
    file = tmp_path / "tiny.toml"
    for start in ([], ["base.unet.start=artifact", f"run.root={tmp_path / 'again'}"]):
        first = load_config(file, [*few, *start])
        if start:
            save_vae(first, 0.5)
        train_base(first, open_run(first, "train-base"))
        train_base(first, open_run(first, "train-base"))  # its own result is no other start
        for words in (["run.seed=3"], ["base.unet.styles=[1.0,2.0,1.0,1.0,1.0]"]):
            other = load_config(file, [*few, *start, *words])
            with pytest.raises(BadConfig, match=r"unet was trained with .*, now it is .*run\.root"):
                train_base(other, open_run(other, "train-base"))
        save_vae(first, 0.6)
        with pytest.raises(BadConfig, match=r"scaling_factor = 0\.\d+, now it is 0\.6"):
            train_base(first, open_run(first, "train-base"))


def save_vae(config: Config, scale: float) -> None:
    tensors, header = read_artifact(config, "vae")
    save_artifact(config, "vae", tensors, header | {"scaling_factor": scale})


def test_an_artifact_of_other_sizes_is_refused_before_any_work(
    config: Config, tmp_path: Path
) -> None:
    vae = ["base.only=[vae]", "base.vae.start=artifact", "base.vae.channels=[16,32,64,96]"]
    unet = ["base.only=[unet]", "base.unet.start=artifact", "base.unet.channels=[96,128]"]
    file = tmp_path / "tiny.toml"
    for words in (vae, unet):
        other = load_config(file, words)
        with pytest.raises(BadConfig, match=r"built otherwise: block_out_channels \[.* there and"):
            train_base(other, open_run(other, "train-base"))
