"""What guidance promises: where it changes pictures, how far, for whom, and when it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from difflora_core.errors import DiffLoRAError
from difflora_core.mask_aware.crops import Windows
from difflora_core.mask_aware.decoders import FastDecoder, Part
from difflora_core.mask_aware.full_guidance import guide_through
from difflora_core.mask_aware.guidance import LASTING, GuidanceSettings, Guide
from difflora_core.mask_aware.steps import Plan, smoothed
from difflora_core.mask_aware.tracking import FaceRows
from difflora_core.mask_aware.window import SigmaWindow
from tests.core.guidance_parts import (
    ALWAYS,
    FACE,
    TinyFaceNetwork,
    always,
    direction_like,
    face_at,
    guide_of,
    latents,
    references,
    similarity,
    square_mask,
    tiny_decoder,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def run_of(steer: Callable[[Tensor, float], Tensor]) -> Tensor:
    """An ancestral Euler sampler on a linear denoiser; its noise comes from the global stream."""
    torch.manual_seed(11)
    x = 10 * torch.randn(1, 4, 24, 24)
    for sigma, then in ((10.0, 5.0), (5.0, 2.0), (2.0, 0.5), (0.5, 0.0)):
        x0 = steer(0.7 * x / (1 + sigma), sigma)
        x = x0 + (x - x0) * (then / sigma) + 0.1 * then * torch.randn_like(x)
    return x


def test_likeness_rises() -> None:
    x0, guide = latents(), guide_of()
    guided = x0
    for _ in range(10):
        guided = guide.guide(guided, direction_like(x0), 6.0, 1.0)
    assert float(similarity(guided)) > float(similarity(x0)) + 0.2
    assert [step.faces for step in guide.log] == [1] * 10
    assert guide.log[0].similarity == pytest.approx(float(similarity(x0)), abs=1e-4)
    assert guide.log[-1].loss < guide.log[0].loss
    assert guide.strips[0].shape == (1, 112, 112, 3) and len(guide.strips) == 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("finder", [always(FACE), None])
def test_nothing_outside_the_mask_changes(dtype: torch.dtype, finder: object) -> None:
    x0 = latents(2).to(dtype)
    x0[:, :, 0, 0] = -0.0  # a sum with zero would lose the sign
    mask = square_mask()
    guided = guide_of(finder=finder, mask=mask).guide(x0, direction_like(x0, 0.5), 4.0, 1.0)
    assert guided.dtype == dtype
    touched = torch.nn.functional.max_pool2d(mask[:, None], 8)[0, 0] > 0
    changed = bits(guided) != bits(x0)
    assert changed.any() and not changed[:, :, ~touched].any()


def test_without_a_mask_only_the_face_changes() -> None:
    x0 = latents()
    changed = guide_of().guide(x0, direction_like(x0), 4.0, 1.0) != x0
    assert changed[:, :, 9:15, 8:14].any() and not changed[:, :, :9].any()
    assert not changed[:, :, 15:].any() and not changed[:, :, :, :8].any()


@pytest.mark.parametrize("finder", [always(FACE), None])
def test_an_empty_mask_is_the_unguided_run(finder: object) -> None:
    guide = guide_of(finder=finder, mask=torch.zeros(1, 192, 192))
    x0 = latents()
    assert guide.guide(x0, direction_like(x0), 4.0, 1.0) is x0
    plain = run_of(lambda x, sigma: x)
    guided = run_of(lambda x, sigma: guide.guide(x, 0.1 * x, 4.0, sigma))
    assert torch.equal(bits(plain), bits(guided))


def test_the_samplers_noise_is_left_alone() -> None:
    guide = guide_of(mask=square_mask())
    plain = run_of(lambda x, sigma: x)
    guided = run_of(lambda x, sigma: guide.guide(x, 0.1 * x, 4.0, sigma))
    outside = torch.nn.functional.max_pool2d(square_mask()[:, None], 8)[0, 0] == 0
    assert torch.equal(plain[:, :, outside], guided[:, :, outside])
    assert not torch.equal(plain, guided)


def test_gradient_stops_at_the_estimate() -> None:
    denoiser = torch.nn.Conv2d(4, 4, 3, padding=1)
    x0 = denoiser(latents())
    guided = guide_of().guide(x0, direction_like(x0), 3.0, 1.0)
    assert not guided.requires_grad
    assert all(p.grad is None for p in denoiser.parameters())


@pytest.mark.parametrize("strength, cfg, size", [(1.0, 3.0, 0.05), (0.25, 8.0, 0.2)])
def test_a_step_is_as_long_as_guidance_by_words(strength: float, cfg: float, size: float) -> None:
    x0 = latents()
    direction = direction_like(x0, size)
    guide = guide_of(GuidanceSettings(strength, ALWAYS, iterations=1))
    step = guide.guide(x0, direction, cfg, 1.0) - x0
    inside = (step != 0).any(1, keepdim=True).expand_as(step)
    wanted = strength * cfg * direction[inside].square().mean().sqrt()
    assert float(step[inside].square().mean().sqrt()) == pytest.approx(float(wanted), rel=1e-4)


def test_length_does_not_depend_on_the_size_of_the_loss() -> None:
    class Louder(TinyFaceNetwork):
        def forward(self, crops: Tensor):
            seen = super().forward(crops)
            return seen._replace(embedding=1000 * seen.embedding)

    x0, settings = latents(), GuidanceSettings(window=ALWAYS)
    plain = guide_of(settings).guide(x0, direction_like(x0), 3.0, 1.0)
    guide = Guide(tiny_decoder(), Louder(), references(1), settings, always(FACE))
    assert torch.allclose(guide.guide(x0, direction_like(x0), 3.0, 1.0), plain, atol=1e-5)


@pytest.mark.parametrize(
    "direction, cfg", [(None, 7.0), ("some", 1.0), ("some", 0.0), ("none", 7.0)]
)
def test_without_words_the_estimate_sets_the_length(direction: str | None, cfg: float) -> None:
    x0 = latents()
    pull = {None: None, "some": direction_like(x0), "none": torch.zeros_like(x0)}[direction]
    once = GuidanceSettings(1.0, ALWAYS, iterations=1)
    steps = [guide_of(once).guide(x0, pull, cfg, sigma) - x0 for sigma in (1.0, 0.5)]
    assert all(0 < float(step.abs().max()) < 2 for step in steps)
    assert torch.allclose(steps[0], 2**0.75 * steps[1], atol=1e-5)


def test_more_noise_than_a_bound_makes_no_longer_step_without_words() -> None:
    x0, once = latents(), GuidanceSettings(1.0, ALWAYS, iterations=1)
    at_bound, above = (guide_of(once).guide(x0, None, 1.0, s) - x0 for s in (10.0, 4000.0))
    assert torch.allclose(above, at_bound, atol=1e-5) and above.any()


def test_a_grey_mask_makes_a_shorter_step() -> None:
    x0, once = latents(), GuidanceSettings(1.0, ALWAYS, iterations=1)
    whole, faint = (
        guide_of(once, mask=share * square_mask()).guide(x0, direction_like(x0), 3.0, 1.0) - x0
        for share in (1.0, 0.25)
    )
    assert torch.allclose(faint, 0.25 * whole, atol=1e-5) and whole.any()


@pytest.mark.parametrize("broken", ["network", "decoder", "estimate", "direction"])
def test_what_is_not_finite_leaves_the_picture_alone(broken: str) -> None:
    decoder, network, x0 = tiny_decoder(), TinyFaceNetwork(), latents(2)
    direction = direction_like(x0)
    spoilt = {"network": network.linear.weight, "decoder": decoder.layers[1].weight,
              "estimate": x0[0], "direction": direction[0]}[broken]  # fmt: skip
    spoilt.data.view(-1)[0:40000:50] = torch.nan
    settings = GuidanceSettings(window=ALWAYS)
    guide = Guide(decoder, network, references(1), settings, always(FACE), None)
    guided = guide.guide(x0, direction, 3.0, 1.0)
    assert torch.equal(bits(guided[0]), bits(x0[0]))
    assert "not finite" in guide.log[0].note
    # a broken picture of a batch does not spoil the others
    assert torch.equal(guided[1], x0[1]) == (broken in ("network", "decoder"))


def test_iterations_share_one_steps_length() -> None:
    x0 = latents()
    once, thrice = (
        guide_of(GuidanceSettings(10.0, ALWAYS, iterations=n, smoothing=0.0)).guide(
            x0, direction_like(x0), 6.0, 1.0
        )
        for n in (1, 3)
    )
    assert float((thrice - x0).norm()) <= float((once - x0).norm()) * 1.001
    # it is at the part of the way that lasts that they serve better
    reached = [similarity(x0 + LASTING * (guided - x0)) for guided in (once, thrice)]
    assert float(reached[1]) > float(reached[0]) + 0.01


def test_what_lasts_is_told_by_the_schedule() -> None:
    x0, pull = latents(), direction_like(latents(), 0.5)
    settings = GuidanceSettings(window=ALWAYS, iterations=2, jitter=0)
    slow, fast = guide_of(settings), guide_of(settings)
    slow.guide(x0, pull, 3.0, 1.001)
    fast.guide(x0, pull, 3.0, 100.0)
    # gradients are taken elsewhere, steps stay as long
    steps = [guide.guide(x0, pull, 3.0, 1.0) - x0 for guide in (slow, fast)]
    assert not torch.allclose(steps[0], steps[1], atol=1e-4)
    # where next to nothing lasts, two gradients at one place are one
    once = guide_of(replace(settings, iterations=1)).guide(x0, pull, 3.0, 1.0) - x0
    assert float((steps[0] - once).norm()) < 0.1 * float((steps[1] - once).norm())


def test_smoothing_leaves_less_detail() -> None:
    x0, pull = latents(), direction_like(latents())
    rough, smooth = (
        guide_of(GuidanceSettings(1.0, ALWAYS, 1, share)).guide(x0, pull, 3.0, 1.0) - x0
        for share in (0.0, 1.0)
    )

    def detail(step: Tensor) -> float:
        face = step[:, :, 9:15, 8:14]
        return float(face.diff(dim=-1).square().mean() / face.square().mean())

    assert detail(smooth) < 0.5 * detail(rough)
    # still downhill, as convolution with a Gaussian is a positive map
    assert float(similarity(x0 + 0.3 * smooth)) > float(similarity(x0))


def test_a_smoothed_point_is_a_gaussian_as_wide_as_the_face_asks() -> None:
    """Against scipy's filter, for a single bright latent in the middle of a face."""
    gradient = torch.zeros(1, 1, 21, 21)
    gradient[0, 0, 10, 10] = 1
    faces = FaceRows(torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1, 5, 2))
    windows = Windows(torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1).long(), 21, 21)
    part, ones = Part(0, 21, 0, 21), torch.ones(1, 1, 21, 21)
    plan = Plan(torch.zeros(1).long(), faces, windows, part, ones, torch.ones(1))
    wanted = gaussian_filter(gradient[0, 0].numpy(), 21 / 7, mode="constant", truncate=9)
    found = smoothed(gradient, plan, 1.0)[0, 0].numpy()
    middle = slice(6, 15)  # the rows of the filter end at the mask, at their proper weight
    assert np.allclose(found / found.max(), wanted / wanted.max(), atol=0.02)
    assert np.allclose(
        (found / found.max())[middle, middle], (wanted / wanted.max())[middle, middle], atol=0.01
    )


def test_a_small_face_beside_a_large_one_is_guided_as_if_alone() -> None:
    """Each in a window of its own size, and seen in its own row of the strips."""
    x0, small, large = latents(), face_at(4, 140, 40), face_at(60, 4, 128)
    settings, wanted = GuidanceSettings(window=ALWAYS, margin=8), references(2)
    both = guide_of(settings, wanted=wanted, finder=always(small, large))
    guided = both.guide(x0, None, 1.0, 1.0)
    first, second = both.plans(x0, None, 1.0, 1.0)
    assert len(first.faces) == len(second.faces) == 1
    assert first.windows.height > 1.5 * second.windows.height
    own = wanted[second.faces.reference]
    alone = guide_of(settings, wanted=own, finder=always(small))
    only = alone.guide(x0, None, 1.0, 1.0)
    here = (..., slice(18, 23), slice(0, 6))  # what belongs to the small face
    assert not torch.equal(only[here], x0[here])
    assert torch.allclose(guided[here], only[here], atol=1e-5)
    (row,) = second.rows.tolist()
    seen = both.strips[0][row].astype(int) - alone.strips[0][0]
    assert both.log[0].faces == 2 and np.abs(seen).max() <= 1


def test_window_and_zero_strength() -> None:
    x0 = latents()
    guide = guide_of(GuidanceSettings(window=SigmaWindow(2.0, 0.5)))
    assert guide.guide(x0, None, 1.0, 2.1) is x0 and guide.guide(x0, None, 1.0, 0.4) is x0
    assert guide.guide(x0, None, 1.0, 2.0) is not x0
    assert guide_of(GuidanceSettings(0.0, ALWAYS)).guide(x0, None, 1.0, 2.0) is x0


def test_works_inside_inference_mode() -> None:
    settings = GuidanceSettings(window=ALWAYS)
    with torch.inference_mode():
        decoder = FastDecoder.from_tensors(tiny_decoder().layers.state_dict())
        x0, mask = latents(), square_mask()
        guide = Guide(decoder, TinyFaceNetwork(), references(1), settings, always(FACE), mask)
        inside = guide.guide(x0, direction_like(x0), 3.0, 1.0)
    x0 = latents()
    outside = guide_of(settings, mask=square_mask()).guide(x0, direction_like(x0), 3.0, 1.0)
    assert torch.allclose(inside, outside, atol=1e-6) and not torch.equal(inside, x0)


def test_two_guides_agree() -> None:
    x0, settings = latents(2), GuidanceSettings(window=ALWAYS)
    first, second = (guide_of(settings).guide(x0, None, 1.0, 1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_nowhere_to_look_is_refused() -> None:
    with pytest.raises(DiffLoRAError, match="where the face is"):
        guide_of(finder=None)
    with pytest.raises(DiffLoRAError, match="not embeddings"):
        guide_of(wanted=torch.full((1, 8), torch.nan))


def test_through_an_identity_it_is_the_same_step() -> None:
    x0 = latents()
    plain = GuidanceSettings(window=ALWAYS, iterations=1, smoothing=0.0, margin=8, jitter=0)
    direct = guide_of(plain).guide(x0, direction_like(x0), 3.0, 1.0)
    through = guide_through(guide_of(), lambda x: 0.5 * x, 2 * x0, x0, direction_like(x0), 3.0, 1.0)
    assert torch.allclose(through, direct, atol=1e-5)


def test_through_a_denoiser_is_its_own_gradient() -> None:
    """A denoiser that hears one channel only, twice, against the chain rule by hand."""
    x0 = latents()
    guide = guide_of()

    def denoise(x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 4, -1, -1) * torch.tensor([1.0, 2, 0, 0]).view(1, 4, 1, 1)

    noisy = latents(seed=6)
    step = guide_through(guide, denoise, noisy, x0, direction_like(x0), 3.0, 1.0) - x0
    assert step[:, 0].abs().max() > 0 and step[:, 1:].abs().max() == 0

    leaf = denoise(noisy).requires_grad_(True)
    loss = 1 - similarity(leaf)[0, 0]
    (gradient,) = torch.autograd.grad(loss, leaf)
    wanted = gradient[:, 0] + 2 * gradient[:, 1]
    inside = step[:, 0] != 0
    cosine = torch.nn.functional.cosine_similarity(-wanted[inside], step[:, 0][inside], dim=0)
    assert float(cosine) > 0.9999


def test_through_a_denoiser_keeps_to_mask_and_window() -> None:
    x0, mask = latents(), square_mask()
    settings = GuidanceSettings(window=SigmaWindow(2.0))
    steps = []
    for sigma in (1.0, 3.0):
        guide = guide_of(settings, mask=mask)
        steps.append(guide_through(guide, lambda x: x, x0, x0, direction_like(x0), 3.0, sigma))
    touched = torch.nn.functional.max_pool2d(mask[:, None], 8)[0, 0] > 0
    assert torch.equal(bits(steps[0])[:, :, ~touched], bits(x0)[:, :, ~touched])
    assert not torch.equal(steps[0], x0) and steps[1] is x0
