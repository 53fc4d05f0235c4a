"""The ControlNet without a hint: timesteps, variants, the network itself, and its loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor

from difflora_core.errors import BadConfig, LayoutMismatch
from difflora_core.mask_aware.perceptual import STAGES
from difflora_core.weights_file import write_safetensors
from tests.training.controlnet_world import inputs, randomised, world
from training.base.models import NOISE_SCHEDULE
from training.controlnet import export as exporting
from training.controlnet import stage
from training.controlnet.base_model import BaseModel, open_base
from training.controlnet.batches import PeopleBatch
from training.controlnet.config import ObjectiveConfig
from training.controlnet.control import control_names, new_control, predict_noise, with_hint
from training.controlnet.export import comfyui_tensors
from training.controlnet.objective import draw_steps, objective_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return open_base(world(tmp_path_factory.mktemp("world")))


@pytest.mark.parametrize(("share", "last"), [(0.4, 100), (0.5, 400), (0.7, 250), (0.0, 100)])
def test_weighted_timesteps_have_the_mean_of_uniform_ones(share: float, last: int) -> None:
    torch.manual_seed(0)
    count = 400_000
    t, weight = draw_steps(count, ObjectiveConfig(share=share, last=last), torch.device("cpu"))
    expected_share = share or last / 1000
    assert abs((t < last).double().mean() - expected_share) < 0.005
    assert t.min() == 0 and t.max() == 999
    for power in (0, 1, 2):
        values = (t.double() / 999) ** power
        uniform = (torch.arange(1000).double() / 999).pow(power).mean()
        assert abs((weight.double() * values).mean() - uniform) < 0.006
    below = torch.bincount(t[t < last], minlength=last).double()
    assert (below / below.mean() - 1).abs().max() < 0.25  # even below T


@pytest.mark.parametrize("last", [400, 800, 1000])
def test_a_share_below_the_natural_one_leaves_timesteps_uniform(last: int) -> None:
    t, weight = draw_steps(100_000, ObjectiveConfig(share=0.4, last=last), torch.device("cpu"))
    assert (weight == 1).all() and abs((t < last).double().mean() - last / 1000) < 0.01


def test_variants_are_names_or_changes() -> None:
    own = ObjectiveConfig(last=120)
    assert objective_of("mask_aware", own) == own
    assert objective_of("baseline", own) == replace(own, face=0.0, body=0.0)
    plain = replace(own, share=0.0, min_snr=0.0, per_person=False, embedding_weight=0.0)
    paper = replace(plain, body=0.2, face=0.5, last=100)
    assert objective_of("paper", own) == paper
    assert objective_of("second", own) == replace(paper, last=400)
    assert objective_of("last=200 face=0.7", own) == replace(own, last=200, face=0.7)


@pytest.mark.parametrize("variant", ["maskaware", "last=many", "lst=3", "share=1.0", "last=0",
                                     "face=0.9", "body=-1", "body=nan", "min_snr=-5",
                                     "min_snr=inf", "", " "])  # fmt: skip
def test_impossible_variants_are_explained(variant: str) -> None:
    with pytest.raises(BadConfig):
        objective_of(variant, ObjectiveConfig())


def test_an_export_that_fails_leaves_the_one_before(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, control = world(tmp_path), new_control(base.unet)
    folder = exporting.export(config, "face", control, {})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 3
    torch.nn.init.ones_(control.conv_in.bias)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(exporting, "write_safetensors", full)
        exporting.export(config, "face", control, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["face"]

    rename = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError("No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "rename", stuck)
        exporting.export(config, "face", control, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    exporting.export(config, "face", control, {})
    assert (folder / exporting.WEIGHTS).read_bytes() != before[exporting.WEIGHTS]


def test_a_new_control_changes_nothing_and_copies_the_encoder(base: BaseModel) -> None:
    control, (noisy, t, context) = new_control(base.unet), inputs(base)
    with torch.no_grad():
        plain = predict_noise(base, None, noisy, t, context)
        assert torch.equal(plain, predict_noise(base, control, noisy, t, context))
    unet, copy = base.unet.state_dict(), control.state_dict()
    shared = [key for key in copy if not key.startswith("controlnet_")]
    assert len(shared) > 50 and all(torch.equal(copy[key], unet[key]) for key in shared)


def test_a_control_has_names_before_it_is_built(base: BaseModel) -> None:
    whole = with_hint(new_control(base.unet)).state_dict()
    torch.manual_seed(0)
    assert control_names(base.unet) == list(whole)
    drawn, _ = torch.rand(1), torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1)), "nothing was drawn for weights"


def test_a_whole_hint_block_adds_nothing_whatever_the_hint(base: BaseModel) -> None:
    control, (noisy, t, context) = randomised(new_control(base.unet)), inputs(base)
    whole = with_hint(control)
    torch.manual_seed(3)
    bare = control(noisy, t, context, controlnet_cond=noisy, return_dict=False)
    made = []
    for hint in (torch.zeros(2, 3, 128, 128), torch.rand(2, 3, 128, 128)):
        down, middle = whole(noisy, t, context, controlnet_cond=hint, return_dict=False)
        made.append((*down, middle))
        for ours, theirs in zip(made[-1], (*bare[0], bare[1]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    again = with_hint(control).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.state_dict().items())


def test_an_unknown_layout_has_no_names_in_comfyui() -> None:
    control = ControlNetModel(
        block_out_channels=(16, 16, 16), norm_num_groups=8, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    )  # fmt: skip
    with pytest.raises(LayoutMismatch, match="no names for this ControlNet"):
        comfyui_tensors(control.state_dict())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> stage.Workshop:
    return stage.Workshop.open(world(tmp_path_factory.mktemp("world")))


def losses(
    shop: stage.Workshop, objective: ObjectiveConfig, batch: PeopleBatch, t: list[int]
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The loss of a prediction that is off by some noise; prediction, noise and schedule too."""
    loss = replace(shop.loss, objective=objective)
    torch.manual_seed(0)
    noise = torch.randn_like(batch.latents)
    predicted = (noise + 0.3 * torch.randn_like(noise)).requires_grad_()
    times = torch.tensor(t)
    noisy = loss.schedule.add_noise(batch.latents, noise, times)
    found = loss.losses(batch, noisy, predicted, noise, times, torch.ones(len(t)))
    return found, predicted, noise, times


def batch_of(shop: stage.Workshop) -> PeopleBatch:
    return shop.people.draw(0, 4, 0)


def test_without_terms_the_loss_is_the_diffusion_loss(shop: stage.Workshop) -> None:
    batch, plain = batch_of(shop), ObjectiveConfig(min_snr=0.0)
    for objective, t in ((objective_of("baseline", plain), [5, 60, 300, 900]),
                         (plain, [100, 200, 500, 999])):  # fmt: skip
        found, predicted, noise, _ = losses(shop, objective, batch, t)
        assert found["loss"].item() == pytest.approx(
            (predicted - noise).square().mean().item(), rel=1e-5
        )
        assert set(found) == {"loss", "epsilon"}


def test_the_loss_is_the_weighted_sum_of_its_terms(shop: stage.Workshop) -> None:
    batch = batch_of(shop)
    objective = ObjectiveConfig(min_snr=5.0)
    found, predicted, noise, t = losses(shop, objective, batch, [50, 20, 99, 300])
    alpha = _alphas()[t]
    error = (predicted.double() - noise).square().mean((1, 2, 3))
    ldm = error * (5 * (1 - alpha) / alpha).clamp(max=1)
    loss = replace(shop.loss, objective=objective)
    noisy = loss.schedule.add_noise(batch.latents, noise, t)
    terms = loss.terms(batch, noisy, predicted, t)
    body, face = terms["body"], terms["face"]
    assert body.present.tolist() == [True, True, True, False] == face.present.tolist()
    whole = 0.2 * body.value.double() + 0.5 * face.value.double() + 0.3 * ldm
    expected = torch.where(body.present, whole, ldm).mean()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found["face"].item() == pytest.approx(face.value[:3].mean().item(), rel=1e-4)


def _alphas() -> Tensor:
    start, end = NOISE_SCHEDULE["beta_start"] ** 0.5, NOISE_SCHEDULE["beta_end"] ** 0.5
    return (1 - torch.linspace(start, end, 1000, dtype=torch.float64) ** 2).cumprod(0)


def test_the_landmark_term_compares_points_in_face_widths(tmp_path: Path) -> None:
    shop = stage.Workshop.open(world(tmp_path, "controlnet.variants=[landmark=0.3]"))
    batch = batch_of(shop)
    objective = ObjectiveConfig(body=0.0, face=0.0, landmark=0.3, min_snr=0.0)
    found, predicted, noise, t = losses(shop, objective, batch, [50, 20, 99, 300])
    loss = replace(shop.loss, objective=objective)
    noisy = loss.schedule.add_noise(batch.latents, noise, t)
    term = loss.terms(batch, noisy, predicted, t)["landmark"]
    assert term.present.tolist() == [True, True, True, False]
    ldm = (predicted - noise).square().mean((1, 2, 3))
    expected = torch.where(term.present, 0.3 * term.value + 0.7 * ldm, ldm).mean()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    (slope,) = torch.autograd.grad(term.value[:3].sum(), predicted)
    assert slope[:3].abs().amax((1, 2, 3)).min() > 0 and not slope[3].any()
    same = loss.compare(batch, batch.latents)["landmark"]
    assert same.value.abs().max() < 1e-5, "the true picture has its points where they are"


def test_a_picture_without_faces_gives_their_weight_to_the_rest(shop: stage.Workshop) -> None:
    batch = batch_of(shop)
    nobody = replace(batch, landmarks=torch.full_like(batch.landmarks, torch.nan))
    objective = ObjectiveConfig(min_snr=0.0)
    found, predicted, noise, t = losses(shop, objective, nobody, [50] * 4)
    loss = replace(shop.loss, objective=objective)
    noisy = loss.schedule.add_noise(batch.latents, noise, t)
    body = loss.terms(nobody, noisy, predicted, t)["body"].value
    ldm = (predicted - noise).square().mean((1, 2, 3))
    assert found["loss"].item() == pytest.approx((0.4 * body + 0.6 * ldm).mean().item(), rel=1e-4)


def test_figures_of_pictures_without_faces_leave_the_face_out(shop: stage.Workshop) -> None:
    batch = shop.checker.batch
    nobody = replace(batch, landmarks=torch.full_like(batch.landmarks, torch.nan))
    figures = replace(shop.checker, batch=nobody).figures(None)
    assert figures.keys() < shop.checker.figures(None).keys()
    assert all(math.isfinite(value) for value in figures.values())


def test_empty_masks_and_no_faces_leave_the_diffusion_loss(shop: stage.Workshop) -> None:
    batch = batch_of(shop)
    empty = replace(
        batch,
        masks=torch.zeros_like(batch.masks),
        landmarks=torch.full_like(batch.landmarks, torch.nan),
    )
    for body in (0.2, 0.0):
        objective = ObjectiveConfig(min_snr=0.0, body=body)
        found, predicted, noise, _ = losses(shop, objective, empty, [50] * 4)
        assert found["loss"].item() == pytest.approx(
            (predicted - noise).square().mean().item(), rel=1e-5
        )
        found["loss"].backward()
        assert predicted.grad is not None and bool(predicted.grad.isfinite().all())


def test_faces_alone_decode_windows_and_agree_with_whole_pictures(shop: stage.Workshop) -> None:
    """But for the norms of the decoder, which in a window see the face and its margin only: they
    move single pictures as much as a window out of place, so eight batches are summed."""
    whole, windows = (
        sum(
            losses(shop, ObjectiveConfig(body=body), shop.people.draw(0, 4, k), [50] * 4)[0]["face"]
            for k in range(8)
        )
        for body in (0.2, 0.0)
    )
    assert float(whole) == pytest.approx(float(windows), rel=0.1) and float(whole) > 1e-3


def test_terms_vanish_where_the_prediction_is_right(shop: stage.Workshop) -> None:
    batch = batch_of(shop)
    terms = shop.checker.loss.compare(batch, batch.latents)
    assert all(term.value.abs().max() < 1e-5 for term in terms.values())


def test_gradients_reach_the_control_and_nothing_else(shop: stage.Workshop) -> None:
    base, batch = shop.base, batch_of(shop)
    control = randomised(new_control(base.unet))
    loss = replace(shop.loss, objective=ObjectiveConfig(body=0.4, face=0.6))
    noise, t = torch.randn_like(batch.latents), torch.tensor([50] * 4)
    noisy = loss.schedule.add_noise(batch.latents, noise, t)
    predicted = predict_noise(base, control, noisy, t, base.encode(batch.prompts))
    loss.losses(batch, noisy, predicted, noise, t, torch.ones(4))["loss"].backward()
    learned = [p for p in control.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(learned) > 0.95 * len(list(control.parameters()))
    frozen = (base.unet, base.vae, shop.loss.network)
    assert all(p.grad is None for module in frozen for p in module.parameters())


def test_bodies_can_be_compared_by_lpips(shop: stage.Workshop, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {}
    for number in (n for stage_of in STAGES for n in stage_of):
        weights[f"features.{number}.weight"] = torch.randn(6, 6 if number else 3, 3, 3) / 4
        weights[f"features.{number}.bias"] = torch.randn(6) / 10
    write_safetensors(tmp_path / "vgg.safetensors", weights, {})
    config = replace(shop.config.controlnet, vgg=(str(tmp_path / "vgg.safetensors"),))
    loss = stage.open_loss(replace(shop.config, controlnet=config), shop.base)
    batch = batch_of(shop)
    x0 = (batch.latents + 0.1 * torch.randn_like(batch.latents)).requires_grad_()
    body = loss.compare(batch, x0)["body"].value
    assert loss.lpips is not None
    with torch.no_grad():
        pictures = [loss.decoder(latents).pictures for latents in (x0, batch.latents)]
        maps = loss.lpips(*pictures)
        whole = torch.ones(len(batch), 1, 64, 64)
        everywhere = torch.stack([level.mean((1, 2)) for level in maps]).mean(0)
    unmasked = loss.compare(replace(batch, masks=whole), x0)["body"].value
    assert unmasked.tolist() == pytest.approx(everywhere.tolist(), rel=1e-4)
    assert (body - shop.loss.compare(batch, x0)["body"].value).abs().min() > 1e-5
    body.sum().backward()
    assert x0.grad is not None and x0.grad.abs().sum() > 0
