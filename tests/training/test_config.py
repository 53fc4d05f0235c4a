from __future__ import annotations

from pathlib import Path

import pytest
import torch

from difflora_core.errors import BadConfig
from training import __main__
from training.__main__ import STAGES, find_stage, main, open_run
from training.config import Config, differences, field_docs, load_config, to_toml
from training.run_config import OptimConfig, RunConfig
from training.run_folder import RunFolder


def _file(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(_file(tmp_path)) == Config()


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    path = _file(tmp_path, "[run]\nseed = 3\n[eval]\npeople = 7\n")
    words = ["eval.people=2", "eval.rows=[base,teacher]", "run.root=12", "run.max_minutes=2"]
    config = load_config(path, words)
    assert config.run == RunConfig(seed=3, root="12", max_minutes=2.0)
    assert config.eval.people == 2
    assert config.eval.rows == ("base", "teacher")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval.peple=2"], "eval.people"),
        (["evl.people=2"], "eval"),
        (["eval.people=many"], "eval.people must be int"),
        (["eval.people"], "section.key=value"),
        (["people=2"], "section.key=value"),
        (["run.log_every=0"], "run: log_every must be 1 or more, found 0"),
        (["run.checkpoint_every=0"], "checkpoint_every must be 1 or more"),
        (["run.device=foo"], "run: device must be auto, cpu, cuda or cuda:N, found 'foo'"),
        (["run.seed=-1"], "run: seed must be 0 or more"),
        (["run.seed=10000000000"], "run: seed must be 4294967295 or less"),
        (["run.root=caf\udce9"], "root is no valid text"),
        (["run.max_minutes=-1"], "max_minutes must be 0 or more"),
        (["base.vae.reuse=0"], "base.vae: reuse must be 1 or more"),
        (["base.vae.batch=0"], "base.vae: batch must be 1 or more"),
        (["base.vae.crop=200"], "crop must be a multiple of 8 up to 128, or 0, found 200"),
        (["base.vae.crop=50"], "crop must be a multiple of 8 up to 128, or 0, found 50"),
        (["base.vae.channels=[16, 32]"], "channels must be four multiples of groups"),
        (["base.vae.groups=7"], "channels must be four multiples of groups"),
        (["base.unet.channels=[]"], "channels must be multiples of 32, at least one"),
        (["base.unet.channels=[48, 96]"], "channels must be multiples of 32, at least one"),
        (["base.text.heads=3"], r"base.text: width \(128\) must be a multiple of heads \(3\)"),
        (["base.vae.optim.steps=-5"], "base.vae.optim: steps must be 1 or more"),
        (["base.unet.pool=0"], "base.unet: pool must be 1 or more"),
        (["base.unet.optim.betas=[0.9, 1.0]"], "betas and ema must lie from 0 to below 1"),
        (["base.unet.optim.ema=1"], "betas and ema must lie from 0 to below 1"),
        (["encoders.chunk=0"], "encoders: chunk must be 1 or more"),
        (["encoders.recogniser.batch=0"], "encoders.recogniser: batch must be 1 or more"),
        (["controlnet.seeds=[0, -1]"], "controlnet: seeds must be 0 or more"),
        (["people.count=-1"], "people: count must be 0 or more"),
        (["guidance.seed=-1"], "guidance: seed must be 0 or more"),
        (["eval.seed=100000000000000000000"], "eval: seed must be"),
        (["loras.rank=0"], "loras: rank must be 1 to 64 for these layers, found 0"),
        (["loras.rank=4000"], "rank must be 1 to 64"),
        (["base.unet.styles=[1.0]"], "base.unet: styles must be empty or 5 weights"),
        (["base.unet.styles=[0,0,0,0,0]"], "base.unet: styles must be empty or 5 weights, not all"),
        (["base.unet.styles=[1,1,-1,1,1]"], "base.unet: styles must be 0 or more"),
        (["eval.paint_steps=0"], "eval: paint_steps must be 1 or more, found 0"),
        (["eval.references=0"], "references must be 1 or more"),
        (["eval.candidates=0"], "candidates must be 1 or more"),
        (["eval.steps=-1"], "steps must be 0 or more"),
        (["eval.steps=51"], "eval: steps must be 50 or less, found 51"),
        (["eval.candidates=65"], "candidates must be 64 or less"),
        (["eval.people=0"], "people must be 1 or more"),
        (["loras.group=-1"], "loras: group must be 0 or more"),
        (["loras.steps=0"], "steps must be 1 or more"),
        (["loras.people=-3"], "people must be 1 or more"),
        (["loras.shard=0"], "shard must be 1 or more"),
        (["loras.lr=-1"], "lr must be 0 or more"),
        (["loras.first=-5"], "first must be 0 or more"),
        (["loras.first=1099511627776"], "loras: first must be 10995116.* or less"),
        (["loras.draws=18446744073709551616"], "draws must be 4294967295 or less"),
        (["predictor.finetune.first=1099511627776"], "finetune: first must be .* or less"),
        (["predictor.calibration.first=1099511627776"], "first must be .* or less"),
        (["eval.guidance=nan"], "guidance must be 0 or more"),
        (["eval.strength=inf"], "strength must be 0 or more"),
        (["loras.batch=5", "loras.pictures=3"], r"batch must be at most pictures \(3\), found 5"),
        (["predictor.name=../x"], "predictor: name must be a plain file name, found '../x'"),
        (["predictor.name="], "name must be a plain file name"),
        (["predictor.autoencoder.mix=2"], "predictor.autoencoder: mix must be 1 or less"),
        (["predictor.dit.photos=0"], "photos must be 1 or more"),
        (["predictor.dit.drop=nan"], "drop must be 0 or more"),
        (["predictor.finetune.rollout=64"], "rollout must be 50 or less"),
        (["predictor.finetune.rollout=0"], "rollout must be 1 or more"),
        (["predictor.calibration.strengths=[]"], "strengths must name at least one"),
        (["eval.fid_pictures=1"], "fid_pictures must be 2 or more"),
        (["guidance.people=1"], "people must be 2 or more"),
        (["guidance.prompts=0"], "prompts must be 1 or more"),
        (["guidance.smoothing=5"], "smoothing must be 1 or less"),
        (["guidance.jitter=3"], "jitter must be 0.5 or less"),
        (["guidance.iterations=0"], "iterations must be 1 or more"),
        (["guidance.factor_pictures=1"], "factor_pictures must be 4 or more"),
        (["guidance.strengths=[1, -1]"], "guidance: strengths must be 0 or more"),
        (["guidance.strengths=[nan]"], "strengths must be 0 or more"),
        (["controlnet.from_step=10"], "from_step 10 leaves no step to paint"),
        (["controlnet.paint_steps=1"], "the last of 1 paint_steps lies at timestep 999"),
        (["controlnet.paint_steps=0"], "paint_steps must be 1 or more"),
        (["controlnet.sample_every=-1"], "sample_every must be 0 or more"),
        (["controlnet.check=0"], "controlnet: check must be 1 or more"),
        (["controlnet.pool=0"], "pool must be 1 or more"),
        (["controlnet.batch=0"], "batch must be 1 or more"),
        (["controlnet.objective.embedding_weight=-5"], "embedding_weight must be 0 or more"),
        (["controlnet.objective.tap_weights=[1, -1]"], "objective: tap_weights must be 0 or more"),
        (
            ["controlnet.objective.tap_weights=[0, 0]", "controlnet.objective.embedding_weight=0"],
            "no face term is left",
        ),
        (["controlnet.evaluation.groups=-1"], "groups must be 0 or more"),
        (["controlnet.evaluation.fid_pictures=1"], "fid_pictures must be 2 or more"),
        (["controlnet.evaluation.factor_pictures=1"], "factor_pictures must be 4 or more"),
    ],
)
def test_wrong_settings_are_explained(tmp_path: Path, words: list[str], expected: str) -> None:
    with pytest.raises(BadConfig, match=expected):
        load_config(_file(tmp_path), words)


def test_broken_and_missing_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="not valid TOML"):
        load_config(_file(tmp_path, "[run\n"))
    with pytest.raises(BadConfig, match="Cannot read"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes("# café".encode("latin-1"))
    with pytest.raises(BadConfig, match=r"latin\.toml is not valid TOML: 'utf-8' codec"):
        load_config(tmp_path / "latin.toml")


@pytest.mark.parametrize("device", ["cuda", "cuda:999"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = load_config(_file(tmp_path), [f"run.device={device}", f"run.root={tmp_path / 'run'}"])
    with pytest.raises(BadConfig, match=f"run.device is {device}, but torch finds 0 CUDA devices"):
        open_run(config, "demo")
    assert not (tmp_path / "run").exists()


def test_toml_round_trip_with_a_comment_for_every_key(tmp_path: Path) -> None:
    config = load_config(_file(tmp_path), ["eval.rows=[base]", 'run.root=a "b" \\c', "run.seed=5"])
    text = to_toml(config)
    assert load_config(_file(tmp_path, text)) == config
    lines = text.splitlines()
    keys = [i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    assert all(lines[i - 1].startswith("#") for i in keys)


def test_field_docs_are_read_from_the_source() -> None:
    assert field_docs(OptimConfig)["steps"] == "Optimiser steps."


def test_differences_name_the_changed_keys() -> None:
    assert differences("[a]\nx=1\ny=2\n", "[a]\nx=1\ny=3\n[b]\nz=1\n") == ["a.y", "b.z"]


def test_unknown_stage_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="Did you mean train-dit"):
        find_stage("train_dit")
    assert main(["train_dit", "--config", str(_file(tmp_path))]) == 2


def test_stopping_a_stage_without_checkpoints_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stage(config: Config, folder: RunFolder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "find_stage", lambda name: stage)
    assert main(["demo", "--config", str(_file(tmp_path)), f"run.root={tmp_path}"]) == 130
    assert [record.getMessage() for record in caplog.records] == [
        "stopped; the same command goes on, or starts over where nothing is kept"
    ]


def test_config_stage_prints_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--config", str(_file(tmp_path)), "run.seed=9"]) == 0
    assert "seed = 9" in capsys.readouterr().out


def test_every_stage_is_a_module_and_a_function() -> None:
    assert all(len(target.split(":")) == 2 for target in STAGES.values())
