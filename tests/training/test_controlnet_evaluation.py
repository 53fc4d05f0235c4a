"""evaluate-controlnet: what is measured of repainted pictures, intervals, and the whole stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig
from difflora_core.face import Face
from tests.training.controlnet_world import FEW, world
from tests.training.tiny_world import let_stand_ins_judge
from training.__main__ import main, open_run
from training.artifacts import artifacts_folder
from training.config import Config, load_config
from training.controlnet import evaluate_stage
from training.controlnet.base_model import open_base
from training.controlnet.config import ControlnetEvalConfig, ObjectiveConfig
from training.controlnet.intervals import gain_figure, gains, row_figure
from training.controlnet.measures import LOST, Ruler, match
from training.controlnet.tables import markdown
from training.controlnet.trial import draw_trial
from training.evaluation.judges import Judges
from training.guidance.factors import FactorReader

SMALL = [
    "controlnet.evaluation.portraits=2", "controlnet.evaluation.groups=2",
    "controlnet.evaluation.fid_pictures=4", "controlnet.evaluation.sheet=2",
    "controlnet.evaluation.factor_pictures=16",
]  # fmt: skip


# -- the measures, by the shipped judges on drawn pictures -----------------------------------------


@pytest.fixture(scope="module")
def ruler(tmp_path_factory: pytest.TempPathFactory) -> Ruler:
    file = tmp_path_factory.mktemp("shipped") / "shipped.toml"
    file.write_text(f'[run]\nroot = "{file.parent / "run"}"\ndevice = "cpu"\n')
    config = load_config(file)
    settings = ControlnetEvalConfig(portraits=8, groups=4, fid_pictures=4)
    trial = draw_trial(settings, open_base(config))
    judges = Judges.open(config)
    return Ruler.make(judges, trial, FactorReader.fit(judges, 400, 0))


def test_a_trial_shows_portraits_first_and_then_groups(ruler: Ruler) -> None:
    trial = ruler.trial
    assert trial.drawn.present.sum(1).tolist() == [1] * 8 + [2, 2, 3, 3]
    assert len(trial.wanted) == trial.portraits == 8 and len(trial) == 12
    assert len(set(trial.seeds)) == 12


@pytest.mark.parametrize(("groups", "people"), [(0, []), (1, [2]), (3, [2, 2, 3])])
def test_a_trial_has_as_many_groups_as_are_asked_for(
    tmp_path: Path, groups: int, people: list[int]
) -> None:
    settings = ControlnetEvalConfig(portraits=2, groups=groups, fid_pictures=2)
    trial = draw_trial(settings, open_base(world(tmp_path)))
    assert trial.drawn.present.sum(1).tolist() == [1, 1, *people]
    assert len(trial) == len(trial.latents) == 2 + groups and trial.portraits == 2


def test_true_pictures_are_repainted_perfectly(ruler: Ruler) -> None:
    values = ruler.repainted(ruler.trial.drawn.images)
    found = ruler.true.seen.sum() / ruler.trial.drawn.present.sum()
    assert found > 0.8, "the detector has to know drawn faces"
    known = values["face_sim"].isfinite()
    assert known.sum() >= 10
    assert values["face_sim"][known].min() > 0.999
    assert values["landmark_error"][known].max() < 1e-5
    assert values["faces_found"][known].min() == 1
    assert values["body_distance"].abs().max() < 1e-5
    assert values["expression"][:8].mean() >= 0.25 and values["expression"][8:].isnan().all()
    assert values["identity"][:8].mean() > 0.2 and values["identity"][8:].isnan().all()
    assert values["prompt_accuracy"][:8].mean() > 0.6


def test_other_peoples_pictures_are_far_from_true(ruler: Ruler) -> None:
    true = ruler.repainted(ruler.trial.drawn.images)
    swapped = torch.cat(
        [ruler.trial.drawn.images[:8].flip(0), ruler.trial.drawn.images[8:].flip(0)]
    )
    other = ruler.repainted(swapped)
    for name, better in (("face_sim", 1), ("landmark_error", -1), ("body_distance", -1),
                         ("identity", 1), ("prompt_accuracy", 1)):  # fmt: skip
        assert better * (true[name].nanmean() - other[name].nanmean()) > 0.02, name


def test_lost_faces_count_as_lost(ruler: Ruler) -> None:
    values = ruler.repainted(torch.full_like(ruler.trial.drawn.images, 0.5))
    known = values["face_sim"].isfinite()
    assert (values["face_sim"][known] == 0).all() and (values["faces_found"][known] == 0).all()
    assert (values["landmark_error"][known] == LOST).all()


def test_fresh_pictures_are_measured_by_their_prompts(ruler: Ruler) -> None:
    values = ruler.fresh(ruler.trial.drawn.images)
    assert set(values) == {"clip_t", "prompt_accuracy", "expression", "faces_found"}
    assert values["faces_found"].mean() > 0.8 and values["faces_found"].max() <= 1
    nothing = ruler.fresh(torch.zeros_like(ruler.trial.drawn.images))
    assert nothing["faces_found"].sum() == 0
    assert nothing["clip_t"].mean() < values["clip_t"].mean()


def test_faces_are_matched_by_place() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [torch.nan] * 4, [50, 0, 70, 20]])
    faces = [_face(55, 0), _face(3, 2), _face(200, 200)]
    assert sorted(match(boxes, faces)) == [(0, 1), (2, 0)]
    assert match(boxes, []) == [] and match(boxes[1:2], faces) == []
    assert match(boxes[:1], [_face(16, 0)]) == [], "three quarters of a face away is another one"


def _face(x: float, y: float) -> Face:
    box = np.array([x, y, x + 20, y + 20], np.float32)
    return Face(
        box=box,
        landmarks=np.zeros((5, 2), np.float32),
        score=0.9,
        embedding=np.ones(4, np.float32),
        sharpness=1.0,
        picture=(128, 128),
    )


# -- intervals -------------------------------------------------------------------------------------


def test_a_row_has_the_mean_of_its_trainings_without_unknown_pictures() -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan, 3.0], [3.0, 4.0, 5.0, 5.0]])
    figure = row_figure(values, 0)
    assert figure["mean"] == 3.0 and figure["by_seed"] == [2.0, 4.0]
    assert figure["ci95"][0] < 3.0 < figure["ci95"][1]


def test_gains_have_students_interval() -> None:
    ours, theirs = [0.5, 0.7, 0.9], [0.4, 0.5, 0.6]
    figure = gain_figure(ours, theirs)
    assert figure is not None and figure["n"] == 3
    differences = np.subtract(ours, theirs)
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert figure["mean"] == pytest.approx(0.2)
    assert figure["ci95"] == pytest.approx([low, high], rel=1e-3)
    assert gain_figure([1.0], [0.5]) is None


def test_gains_compare_rows_of_equal_seeds() -> None:
    def row(*means: float) -> dict:
        return {"face_sim": {"mean": 0.0, "ci95": [0, 0], "n": 1, "by_seed": list(means)}}

    rows = {"base": row(0.1), "baseline": row(0.2, 0.3), "mask_aware": row(0.4, 0.5)}
    found = gains(rows, "baseline")
    assert list(found) == ["mask_aware"]
    assert found["mask_aware"]["face_sim"]["mean"] == pytest.approx(0.2)
    assert gains({"base": row(0.1)}, "baseline") == {}
    assert "minus baseline" in markdown(rows, found)


# -- the stage -------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    config = world(tmp_path, *SMALL)
    let_stand_ins_judge(config, monkeypatch)
    return config


def test_the_table_has_every_row_and_measure(config: Config, tmp_path: Path) -> None:
    words = [
        *FEW, *SMALL, "controlnet.seeds=[0, 1]", "controlnet.optim.steps=1",
        "controlnet.variants=[baseline, last=200]", "--config",
        str(tmp_path / "tiny.toml"),
    ]  # fmt: skip
    assert main(["train-controlnet", *words]) == 0
    out = tmp_path / "figures.json"
    words.append("controlnet.objective.face=0.1")  # too late for what is trained
    assert main(["evaluate-controlnet", *words, "--json", str(out)]) == 0
    outcome = json.loads(out.read_text())
    assert list(outcome["rows"]) == ["ceiling", "base", "baseline", "last=200"]
    for name in ("base", "baseline", "last=200"):
        row = outcome["rows"][name]
        assert {"face_sim", "landmark_error", "body_distance", "expression", "identity",
                "fresh_fid", "fresh_clip_t", "fresh_prompt_accuracy"} <= set(row)  # fmt: skip
        assert all(len(f["by_seed"]) == (1 if name == "base" else 2) for f in row.values())
    assert set(outcome["gains_over_baseline"]) == {"last=200"}
    objectives = outcome["protocol"]["objectives"]
    assert len(objectives) == 4 and "objective" not in outcome["protocol"]
    assert objectives["last-200-seed1"] == to_dict(ObjectiveConfig(last=200))
    folder = artifacts_folder(config).parent / "evaluate-controlnet"
    assert "| last=200 |" in (folder / "table.md").read_text()
    assert (folder / "sheet.png").exists()


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("groups", [0, 2])
def test_missing_trainings_are_named(tmp_path: Path, groups: int) -> None:
    config = world(tmp_path, *SMALL, f"controlnet.evaluation.groups={groups}")
    evaluate_stage.run(config, folder := open_run(config, "evaluate-controlnet"))
    outcome = json.loads((folder.path / "results.json").read_text())
    assert list(outcome["rows"]) == ["ceiling", "base"]
    assert set(outcome["protocol"]["skipped"]) == {"baseline", "mask_aware"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({"data": "people"}, "drawn world"), ({"model": "somewhere"}, "drawn world"),
     ({"seeds": ()}, "seeds is empty"),
     ({"evaluation": ControlnetEvalConfig(portraits=1)}, "at least 2")],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(config: Config, changed: dict, expected: str) -> None:
    broken = replace(config, controlnet=replace(config.controlnet, **changed))
    with pytest.raises(BadConfig, match=expected):
        evaluate_stage.check(broken)
