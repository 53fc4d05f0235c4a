from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from training.evaluation.config import EvalConfig
from training.evaluation.metrics import (
    asked_log_probabilities,
    diversity,
    frechet_distance,
    nearest_distance,
    prompt_accuracy,
    reference_similarity,
    text_similarity,
)
from training.evaluation.preference import _altered, fit_logistic
from training.evaluation.protocol import draw_prompts, draw_trial, personal
from training.evaluation.sheet import draw_sheet, save_png
from training.evaluation.summary import (
    summarise,
    summarise_difference,
    summarise_ratio,
    summarise_statistic,
)
from training.evaluation.table import markdown
from training.portraits import ATTRIBUTES, is_held_out, parse_prompt, sample_scenes

CPU = torch.device("cpu")


def test_reference_similarity_is_the_mean_cosine_and_zero_without_a_face() -> None:
    features = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    references = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    found = torch.tensor([[True, False, True]])
    expected = torch.tensor([[0.5, 0.0, math.sqrt(0.5)]])
    assert torch.allclose(reference_similarity(features, references, found), expected)


def test_text_similarity_is_a_raw_cosine() -> None:
    pictures = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    texts = torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    assert torch.allclose(text_similarity(pictures, texts), torch.tensor([0.96, -1.0]))


def test_prompt_accuracy_counts_only_what_was_asked() -> None:
    logits = {"pose": torch.tensor([[0.0, 1.0], [2.0, 1.0]]), "style": torch.eye(2)}
    wanted = [{"pose": 1, "style": 1}, {"pose": 0}]
    assert prompt_accuracy(logits, wanted).tolist() == [0.5, 1.0]


def test_asked_log_probabilities_by_hand() -> None:
    logits = {"a": torch.tensor([[math.log(3.0), 0.0]]), "b": torch.tensor([[0.0, 100.0]])}
    mean, least = asked_log_probabilities(logits, [{"a": 0, "b": 0}])
    assert mean.item() == pytest.approx((math.log(0.75) - 9.2) / 2)
    assert least.item() == pytest.approx(-9.2)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    # whitened clouds have exactly the wanted moments, so the closed form holds exactly
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    cloud = cloud - cloud.mean(0)
    cloud = cloud @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(cloud.T))).T
    deviations, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -2.0, 0.5])
    other = cloud * deviations + shift
    expected = float(shift.square().sum() + (deviations - 1).square().sum())
    assert frechet_distance(cloud, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(cloud, cloud) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_correlated_gaussians_in_two_dimensions() -> None:
    # in 2-D tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), an independent closed form
    generator = torch.Generator().manual_seed(1)
    a = (
        torch.randn(400, 2, generator=generator).double()
        @ torch.tensor([[1.0, 0.4], [0, 2]]).double()
    )
    b = (
        torch.randn(300, 2, generator=generator).double()
        @ torch.tensor([[0.7, 0], [-0.9, 1]]).double()
    )
    product = torch.cov(a.T) @ torch.cov(b.T)
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    traces = torch.cov(a.T).trace() + torch.cov(b.T).trace()
    expected = float((a.mean(0) - b.mean(0)).square().sum() + traces) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_diversity_by_hand() -> None:
    same, crossed = [[1.0, 0], [2.0, 0], [3.0, 0]], [[1.0, 0], [0, 1.0], [-1.0, 0]]
    assert torch.allclose(diversity(torch.tensor([same, crossed])), torch.tensor([0.0, 4 / 3]))


def test_nearest_distance_by_hand() -> None:
    training = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    found = nearest_distance(torch.tensor([[1.0, 0.0], [0.0, 9.0]]), training)
    assert found.tolist() == pytest.approx([0.4, 0.0], abs=1e-6)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        person = torch.randn(25, 1, generator=generator)
        figure = summarise(person + torch.randn(25, 4, generator=generator), seed)
        covered += figure["ci95"][0] <= 0 <= figure["ci95"][1]
    assert figure["n"] == 100
    assert 0.87 < covered / 200 <= 0.99


def test_ratio_of_proportional_rows_has_no_spread() -> None:
    below = torch.tensor([1.0, 2.0, 5.0])
    figure = summarise_ratio(3 * below, below)
    assert figure["mean"] == pytest.approx(3.0)
    assert figure["ci95"] == pytest.approx([3.0, 3.0])


def test_a_lead_that_all_have_alike_has_no_spread() -> None:
    other = torch.tensor([[1.0, 2.0], [5.0, 7.0], [0.0, 1.0]])
    figure = summarise_difference(other + 0.25, other)
    assert figure["mean"] == pytest.approx(0.25)
    assert figure["ci95"] == pytest.approx([0.25, 0.25])


def test_statistic_interval_is_centred_on_the_statistic() -> None:
    values = torch.randn(10, 3, 2, generator=torch.Generator().manual_seed(0))
    figure = summarise_statistic(lambda v: float(v.square().sum()), values, 50)
    assert figure["ci95"][0] < figure["mean"] < figure["ci95"][1]


def test_logistic_fit_recovers_known_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 2, generator=generator)
    odds = 1.5 * x[:, 0] - 0.5 * x[:, 1] + 0.3
    labels = (torch.rand(20000, generator=generator) < torch.sigmoid(odds)).float()
    fitted = fit_logistic(x, labels, ridge=0.0)
    assert (fitted.weights / fitted.deviation).tolist() == pytest.approx([1.5, -0.5], abs=0.06)


def test_altered_scenes_differ_in_one_to_three_attributes() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(64, generator)
    before, after = scenes.attributes(), _altered(scenes, generator).attributes()
    changed = torch.stack([before[name] != after[name] for name in ATTRIBUTES]).sum(0)
    assert changed.min() >= 1 and changed.max() <= 3
    assert all(after[name].max() < len(values) for name, values in ATTRIBUTES.items())


def test_trial_follows_from_its_seed() -> None:
    settings = EvalConfig(people=2, prompts=3, references=2, fid_pictures=4, seed=5)
    first, again = draw_trial(settings, CPU), draw_trial(settings, CPU)
    other = draw_trial(EvalConfig(people=2, prompts=3, references=2, fid_pictures=4), CPU)
    assert first.prompts == again.prompts and torch.equal(first.references, again.references)
    assert torch.equal(first.noise_seeds, again.noise_seeds)
    assert not torch.equal(first.identity, other.identity) and first.prompts != other.prompts
    assert first.photos.shape == (2, 3, 128, 128) and first.references.shape[:2] == (2, 2)


def test_prompts_are_held_out_and_different() -> None:
    prompts = draw_prompts(30, 3, torch.Generator().manual_seed(3))
    assert len(set(prompts)) == 30
    whole = [parse_prompt(prompt) for prompt in prompts]
    whole = [asked for asked in whole if set(asked) >= set(ATTRIBUTES) - {"framing", "accessory"}]
    for asked in whole:
        asked = {name: torch.tensor(asked.get(name, 0)) for name in ATTRIBUTES}
        assert is_held_out(asked)


def test_personal_prompt_names_the_trigger_once() -> None:
    text = "a photo of a person, smiling, beside a person"
    assert personal(text) == "a photo of sks person, smiling, beside a person"


def test_table_leaves_out_what_no_row_has() -> None:
    figure = {"mean": 0.5, "ci95": [0.25, 0.75], "n": 4}
    text = markdown({"base": {"face_sim": figure}, "teacher": {}})  # type: ignore[typeddict-item]
    assert text.splitlines() == [
        "| row | face_sim |",
        "| --- | --- |",
        "| base | 0.5 [0.25, 0.75] |",
        "| teacher |  |",
    ]


def test_a_sheet_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_png(tmp_path / "sheets" / "sheet.png", Image.new("RGB", (8, 8), "red"))
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_png(path, Image.new("RGB", (8, 8), "blue"))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_sheet_shows_every_picture_in_its_place() -> None:
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 16, 16)
    lines = {"photo": torch.stack([red, torch.zeros(3, 16, 16)]), "base": torch.ones(2, 3, 16, 16)}
    sheet = draw_sheet(lines, ["a", "b"])
    left = sheet.width - 2 * 20
    assert sheet.height == 18 + 2 * 20
    assert sheet.getpixel((left + 8, 18 + 8)) == (255, 0, 0)
    assert sheet.getpixel((left + 28, 18 + 8)) == (0, 0, 0)
    longer = draw_sheet({"a label as long as labels get": torch.zeros(2, 3, 16, 16), **lines})
    assert longer.width > sheet.width + 50
    with pytest.raises(ValueError, match="same shape"):
        draw_sheet({"a": torch.zeros(1, 3, 8, 8), "b": torch.zeros(2, 3, 8, 8)})
