"""Evaluation of guidance on random weights: rows, figures, windows, the hook of the painter."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from difflora_core.errors import BadConfig
from difflora_core.face_crop import TEMPLATE
from difflora_core.mask_aware.window import WINDOWS, SigmaWindow, window_below
from tests.training.tiny_world import evaluated_world, write_world
from training.__main__ import main
from training.artifacts import artifact
from training.base.painter import Estimate, Painter
from training.config import Config, load_config
from training.guidance import stage
from training.guidance.config import GuidanceConfig, read_window
from training.guidance.factors import FactorReader
from training.guidance.painting import rows
from training.guidance.stage import COLUMNS, Scales, common, comparison

SMALL = [
    "run.device=cpu", "guidance.people=2", "guidance.prompts=2", "guidance.windows=[identity]",
    "guidance.strengths=[2.0]", "guidance.factor_pictures=24", "guidance.sheet_people=2",
    "eval.references=2", "eval.paint_steps=4", "eval.fid_pictures=4",
]  # fmt: skip
NAMES = ["base", "guided/identity/2", "full/identity/2", "predicted", "predicted+guided/identity/2"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    return evaluated_world(tmp_path, SMALL, monkeypatch)


def test_stage_writes_figures_table_and_sheet(config: Config, tmp_path: Path) -> None:
    words = ["evaluate-guidance", *SMALL, "--config", str(tmp_path / "tiny.toml"), "--json"]
    assert main([*words, str(tmp_path)]) == 2
    assert main([*words, str(tmp_path / "out" / "figures.json")]) == 0
    folder = Path(config.run.root) / "evaluate-guidance"
    text = (folder / "results.json").read_text()
    assert (tmp_path / "out" / "figures.json").read_text() == text
    outcome = json.loads(text)
    assert list(outcome["rows"]) == NAMES
    for name, row in outcome["rows"].items():
        assert set(COLUMNS) <= set(row), name
        for figure in row.values():
            assert math.isfinite(figure["mean"])
            assert figure["ci95"][0] <= figure["ci95"][1]
    for name in ("base", "predicted"):
        row = outcome["rows"][name]
        assert (row["gain"]["mean"] == 0) == (name == "base")
        assert outcome["curves"][name] == []
    # of four steps of the schedule only those inside the window are on the curve
    sigmas = [step["sigma"] for step in outcome["curves"]["guided/identity/2"]]
    assert len(sigmas) == 3 and all(sigma in WINDOWS["identity"] for sigma in sigmas)
    assert (folder / "table.md").read_text().count("\n") == 2 + len(NAMES)
    assert Image.open(folder / "sheet.png").height == 4 + 6 * 132
    weights = outcome["protocol"]["weights"]
    for name in ("unet", "recogniser", "attribute_heads"):
        path = artifact(config, name)
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(weights[path.name])
    assert outcome["protocol"]["guidance"] == 3.0 and outcome["protocol"]["people"] == 2


def test_rows_follow_the_grid() -> None:
    settings = GuidanceConfig(
        windows=("detail", "T=200"), strengths=(1, 4), modes=("guided", "full")
    )
    plan = {row.name: row for row in rows(settings)}
    assert list(plan) == [
        "base", "guided/detail/1", "guided/detail/4", "guided/T=200/1", "guided/T=200/4",
        "full/detail/1", "full/detail/4",
    ]  # fmt: skip
    assert plan["full/detail/4"].through and not plan["guided/detail/4"].through
    chosen = plan["guided/T=200/4"].settings
    assert chosen is not None and chosen.strength == 4 and chosen.window == window_below(200)
    with pytest.raises(BadConfig):
        list(rows(GuidanceConfig(strengths=())))


def test_one_reference_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "open_bench", lambda *args: pytest.fail("work began"))
    (tmp_path / "tiny.toml").write_text(f'[run]\nroot = "{tmp_path / "run"}"\n')
    words = [*SMALL, "eval.references=1", "--config", str(tmp_path / "tiny.toml")]
    assert main(["evaluate-guidance", *words]) == 2
    assert "eval.references is 1" in caplog.text


def test_windows_are_read() -> None:
    assert read_window("paper") == WINDOWS["paper"]
    assert read_window("T=100") == WINDOWS["paper"]
    assert read_window("6..0.5") == SigmaWindow(6.0, 0.5)
    assert read_window("0.7") == SigmaWindow(0.7)
    for wrong in ("earlier", "0.5..6", "T=x", ""):
        with pytest.raises(BadConfig, match=r"guidance\.windows"):
            read_window(wrong)


def test_gap_counts_in_what_two_real_pictures_share() -> None:
    before = {name: torch.zeros(1, 1) for name in ("face_sim", "guide_sim", "prompt_accuracy")}
    before["factor_sim"] = torch.tensor([[0.1]])
    after = {
        "face_sim": torch.tensor([[0.2]]),
        "guide_sim": torch.tensor([[0.4]]),
        "factor_sim": torch.tensor([[0.35]]),
        "prompt_accuracy": torch.tensor([[-0.03]]),
    }
    changed = comparison(after, before, Scales(metric=0.5, guide=0.8))
    assert float(changed["gap"]) == pytest.approx(0.4 / 0.8 - 0.2 / 0.5)
    assert float(changed["gain"]) == pytest.approx(0.2)
    assert float(changed["factor_gain"]) == pytest.approx(0.25)
    assert float(changed["accuracy_change"]) == pytest.approx(-0.03)
    same = torch.nn.functional.normalize(torch.randn(3, 1, 5), dim=-1).expand(3, 4, 5)
    assert common(same) == pytest.approx(1.0)
    assert common(torch.eye(4)[None]) == 0.0


class Mirror:
    """Stands for the judges: what they see is the factors themselves, mixed and noisy."""

    device = torch.device("cpu")

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def find_faces(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In the middle, but for black pictures."""
        points = (torch.tensor(TEMPLATE) - 56) / 2 + 56
        return points.expand(len(pictures), 5, 2), pictures.flatten(1).amax(1) > 0

    def look_past_faces(self, pictures: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            attributes=pictures.mean((2, 3)).repeat(1, 2) + self.noise,
            self_supervised=pictures[:, :, ::16, ::16].flatten(1),
            clip=pictures[:, :, 8::16, 8::16].flatten(1),
        )


def test_factors_are_read_off_portraits() -> None:
    """From raw pixels much can be read linearly: a person is nearer to itself than to others."""
    from training.evaluation.protocol import draw_references
    from training.portraits import identities

    reader = FactorReader.fit(Mirror(0.0), 400, seed=0)  # type: ignore[arg-type]
    assert 0 < float(reader.trust.mean()) < 1
    who = identities(torch.arange(6), split="test")
    pictures, _ = draw_references(who, 3, torch.Generator().manual_seed(1), torch.device("cpu"))
    own = reader.likeness(pictures, who).mean()
    others = reader.likeness(pictures, who.roll(1, 0)).mean()
    assert float(own) > float(others) + 0.2
    assert reader.read(torch.zeros(1, 3, 128, 128)).isfinite().all()  # nobody on it


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    root = tmp_path_factory.mktemp("hook")
    (root / "tiny.toml").write_text(f'[run]\nroot = "{root / "run"}"\n')
    config = load_config(root / "tiny.toml", ["run.device=cpu"])
    write_world(config)
    return Painter.open(config)


def test_a_hook_that_changes_nothing_changes_nothing(painter: Painter) -> None:
    seen: list[Estimate] = []

    def watch(estimate: Estimate) -> torch.Tensor:
        seen.append(estimate)
        return estimate.x0

    plain = painter.sample(["a person"], [1], {}, 3, 3.0)
    assert torch.equal(painter.sample(["a person"], [1], {}, 3, 3.0, watch), plain)
    assert [round(e.sigma, 2) for e in seen] == sorted(round(e.sigma, 2) for e in seen)[::-1]
    for estimate in seen:
        assert torch.allclose(estimate.denoise(estimate.noisy), estimate.x0, atol=1e-4)
    # at the last step the sampler takes the estimate as it is
    assert torch.allclose(plain, seen[-1].x0, atol=1e-4)


def test_direction_is_what_the_words_add(painter: Painter) -> None:
    estimates: dict[float, list[Estimate]] = {}
    for scale in (1.0, 2.0):
        estimates[scale] = []
        painter.sample(
            ["a person"], [1], {}, 1, scale, lambda e, s=scale: estimates[s].append(e) or e.x0
        )
    one, two = (estimates[scale][0] for scale in (1.0, 2.0))
    assert torch.allclose(two.x0 - one.x0, one.direction, atol=1e-3 * one.sigma)


def test_the_hooks_estimate_is_what_comes_out(painter: Painter) -> None:
    wanted = torch.full((1, 4, 16, 16), 0.25)
    found = painter.sample(["a person"], [1], {}, 4, 3.0, lambda estimate: wanted)
    assert torch.allclose(found, wanted, atol=1e-4)
