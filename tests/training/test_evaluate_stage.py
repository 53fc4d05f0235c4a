"""The whole stage on a world of random weights: it must run, and its figures must be consistent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difflora_core.errors import BadConfig, BadWeightsFile, DiffLoRAError, LayoutMismatch
from difflora_core.predictor import Predictor
from tests.training.tiny_world import evaluated_world
from training.__main__ import main, open_run
from training.artifacts import artifact, artifacts_folder
from training.base.painter import Painter
from training.config import Config, load_config
from training.evaluation import audition, stage
from training.evaluation.config import ROWS, EvalConfig
from training.evaluation.figures_file import check_place
from training.evaluation.portraits_sheet import drawings_of
from training.evaluation.protocol import draw_trial
from training.evaluation.rows import ROWS as METHODS
from training.evaluation.sheet import to_image
from training.evaluation.stage import check_inputs, check_rows, run
from training.portraits import parse_prompt

SMALL = [
    "run.device=cpu", "eval.people=2", "eval.prompts=2", "eval.references=2", "eval.paint_steps=2",
    "eval.fid_pictures=4", "eval.refine_steps=1", "eval.inversion_steps=1", "eval.sheet_people=2",
    "loras.steps=1", "loras.pictures=2", "loras.batch=1",
]  # fmt: skip
MEASURES = {
    "face_sim", "dino", "clip_i", "clip_t", "preference", "prompt_accuracy", "fid", "diversity",
    "seconds",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(audition, "STEPS", 2)
    return evaluated_world(tmp_path, SMALL, monkeypatch)


def test_methods_are_the_rows_of_the_table() -> None:
    assert tuple(METHODS) == ROWS


def test_a_place_that_takes_no_figures_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "open_bench", lambda config: pytest.fail("work began"))
    (tmp_path / "tiny.toml").write_text(f'[run]\nroot = "{tmp_path / "run"}"\n')
    words = [*SMALL, "--config", str(tmp_path / "tiny.toml"), "--json", str(tmp_path)]
    assert main(["evaluate", *words]) == 2
    assert "is a folder" in caplog.text
    os.mkfifo(tmp_path / "pipe")
    words[-1] = str(tmp_path / "pipe")
    assert main(["evaluate", *words]) == 2
    assert "pipe is no file" in caplog.text
    words[-1] = str(tmp_path / "tiny.toml" / "figures.json")  # a file cannot hold files
    assert main(["evaluate", *words]) == 2
    assert "you may write there" in caplog.text


def test_looking_at_the_place_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("of yesterday")
    check_place(Config(eval=EvalConfig(json=str(tmp_path / "figures.json"))))
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]
    assert (tmp_path / "figures.json").read_text() == "of yesterday"


def test_all_rows_have_all_measures(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "out" / "figures.json"
    words = [*SMALL, "--config", str(tmp_path / "tiny.toml"), "--json", str(out)]
    assert main(["evaluate", *words]) == 0
    outcome = json.loads(out.read_text())
    assert tuple(outcome["rows"]) == ROWS and outcome["protocol"]["skipped"] == {}
    weights = outcome["protocol"]["weights"]
    for name in ("unet", "attribute_heads", "predictor"):
        path = artifact(config, name)
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(weights[path.name])
    for name, row in outcome["rows"].items():
        assert set(row) - {"nearest_distance"} == MEASURES | {"recovery", "above_average"}, name
        for figure in row.values():
            assert figure["ci95"][0] <= figure["ci95"][1] and figure["n"] >= 2
            assert math.isfinite(figure["mean"])
    assert outcome["rows"]["nearest_lora"]["nearest_distance"]["mean"] < 1e-3
    assert outcome["rows"]["teacher"]["recovery"]["mean"] == 1.0
    sims = {name: row["face_sim"]["mean"] for name, row in outcome["rows"].items()}
    lead = outcome["rows"]["predicted"]["above_average"]["mean"]
    assert lead == pytest.approx(sims["predicted"] - sims["average_lora"], abs=1e-6)
    folder = Path(config.run.root) / "evaluate"
    assert (folder / "table.md").read_text().count("\n") == 2 + len(ROWS)
    assert Image.open(folder / "sheet.png").height == 4 + 10 * 132


def test_portraits_of_the_held_out_prompts_are_painted_without_loras(
    config: Config, tmp_path: Path
) -> None:
    many = ["eval.prompts=9", "eval.paint_steps=2"]  # one more than a line of the sheet
    words = [*SMALL, *many, "--config", str(tmp_path / "tiny.toml")]
    assert main(["paint-portraits", *words]) == 0
    folder = Path(config.run.root) / "paint-portraits"
    sheet = Image.open(folder / "portraits.png")
    assert sheet.size == (8 * 196, 2 * (192 + 3 * 11 + 4))
    shown = load_config(tmp_path / "tiny.toml", [*SMALL, *many])
    trial = draw_trial(shown.eval, torch.device("cpu"))
    alone = Painter.open(shown).paint(
        [trial.prompts[8]], [int(trial.noise_seeds[0, 8])], steps=2, guidance=shown.eval.guidance
    )
    last = sheet.crop((0, 229, 192, 229 + 192))
    wanted = to_image(alone[0]).resize((192, 192), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(last, int) - np.asarray(wanted, int)).max() <= 1
    assert Image.open(folder / "drawn.png").size == sheet.size


def test_drawings_beside_the_portraits_follow_their_prompts() -> None:
    ending = "of a person facing the camera, on a red background"
    prompts = [f"a black and white photo {ending}", f"a photo {ending}"]
    grey, coloured = drawings_of([parse_prompt(prompt) for prompt in prompts], 3)
    assert torch.equal(grey[0], grey[2])
    red, green, blue = coloured[:, 4, 4]  # a corner: background
    assert red > 1.5 * max(green, blue)


def test_same_seed_gives_the_same_figures(config: Config, tmp_path: Path) -> None:
    rows = ["eval.rows=[base,predicted]", "eval.sheet_people=0"]
    outcomes = []
    for _ in range(2):
        again = load_config(tmp_path / "tiny.toml", [*SMALL, *rows])
        folder = open_run(again, "evaluate")
        run(again, folder)
        figures = json.loads((folder.path / "results.json").read_text())["rows"]
        outcomes.append(
            {n: {m: f for m, f in r.items() if m != "seconds"} for n, r in figures.items()}
        )
    assert outcomes[0] == outcomes[1]


def test_rows_without_weights_are_left_out_and_named(config: Config, tmp_path: Path) -> None:
    (artifacts_folder(config) / "predictor_paper.safetensors").unlink()
    few = load_config(tmp_path / "tiny.toml", [*SMALL, "eval.rows=[base,predicted_paper]"])
    folder = open_run(few, "evaluate")
    run(few, folder)
    outcome = json.loads((folder.path / "results.json").read_text())
    assert list(outcome["rows"]) == ["base"]
    assert "predictor_paper.safetensors" in outcome["protocol"]["skipped"]["predicted_paper"]


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.toml"
    file.write_text("")
    for words in (["eval.rows=[bse]"], ["eval.people=1"]):
        with pytest.raises(BadConfig):
            check_rows(load_config(file, words).eval)
    for name in ("refine_steps", "inversion_steps"):
        with pytest.raises(BadConfig, match=f"{name} must be"):
            load_config(file, [f"eval.{name}=0"])


@pytest.mark.parametrize("row", ["predicted", "best_of_4", "refined"])
def test_a_predictor_that_cannot_be_opened_is_refused_before_any_work(
    config: Config, tmp_path: Path, row: str
) -> None:
    damaged = tmp_path / "predictor.safetensors"

    def check(row: str) -> None:
        settings = EvalConfig(rows=("base", row), predictor=str(damaged))
        check_inputs(dataclasses.replace(config, eval=settings))

    for sentence in ("does not exist", "no safetensors file"):
        with pytest.raises(BadWeightsFile, match=sentence):
            check(row)
        damaged.write_bytes(b"half")
    check("teacher")
    (artifacts_folder(config) / "predictor_paper.safetensors").write_bytes(b"half")
    with pytest.raises(BadWeightsFile, match="no safetensors file"):
        check("predicted_paper")


def test_a_predictor_of_other_encoders_is_refused_before_any_work(config: Config) -> None:
    path = artifact(config, "predictor")
    predictor = Predictor.open(path)
    other = dataclasses.replace(predictor.config.face_encoder, name="antelopev2")
    predictor.config = dataclasses.replace(predictor.config, face_encoder=other)
    predictor.save(path, overwrite=True)
    with pytest.raises(LayoutMismatch, match="antelopev2"):
        check_inputs(config)


def test_a_set_of_another_space_is_refused_before_any_work(config: Config) -> None:
    other = dataclasses.replace(config, loras=dataclasses.replace(config.loras, gauge="free"))
    with pytest.raises(DiffLoRAError, match="of space"):
        check_inputs(other)


def test_missing_judges_name_the_stage(config: Config) -> None:
    (artifacts_folder(config) / "metric_recogniser.safetensors").unlink()
    with pytest.raises(DiffLoRAError, match="train-encoders"):
        run(config, open_run(config, "evaluate"))


def test_without_the_set_the_average_is_that_of_the_predictor(
    config: Config, tmp_path: Path
) -> None:
    shutil.rmtree(artifacts_folder(config) / "loras")
    few = load_config(tmp_path / "tiny.toml", [*SMALL, "eval.rows=[base,average_lora]"])
    folder = open_run(few, "evaluate")
    run(few, folder)
    outcome = json.loads((folder.path / "results.json").read_text())
    assert list(outcome["rows"]) == ["base", "average_lora"]
