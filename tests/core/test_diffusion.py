from __future__ import annotations

import math

import pytest
import torch

from difflora_core.diffusion import Diffusion, DiffusionConfig
from difflora_core.sampler import guided, sample, seeded_noise

SHAPE = (5, 3)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_variance_is_preserved_and_noise_grows(schedule):
    alpha, sigma = Diffusion(DiffusionConfig(schedule)).alpha_sigma(torch.linspace(0, 1, 20))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    assert bool((sigma.flatten().diff() > 0).all())
    assert float(sigma[0]) < 1e-3 and float(sigma[-1]) > 0.999


@pytest.mark.parametrize("target", ["x0", "v"])
def test_a_perfect_output_gives_z0_back(target):
    diffusion = Diffusion(DiffusionConfig(target=target))
    z0, noise = torch.randn(2, 4, *SHAPE)
    t = torch.tensor([0.1, 0.4, 0.8, 1.0])
    z_t = diffusion.add_noise(z0, noise, t)
    alpha, sigma = diffusion.alpha_sigma(t)
    output = z0 if target == "x0" else alpha * noise - sigma * z0
    torch.testing.assert_close(diffusion.to_x0(output, z_t, t), z0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(diffusion.to_noise(z0, z_t, t), noise, rtol=1e-4, atol=1e-4)


def test_v_weight_makes_the_x0_error_the_v_error():
    diffusion = Diffusion(DiffusionConfig())
    t = torch.tensor([0.9])
    _, sigma = diffusion.alpha_sigma(t)
    assert float(diffusion.weight(t)) == pytest.approx(float(sigma) ** -2)
    assert float(diffusion.weight(torch.tensor([0.01]))) == 5.0


def test_training_times_stay_inside_and_favour_noise():
    generator = torch.Generator().manual_seed(0)
    t = Diffusion(DiffusionConfig()).sample_times(4000, generator)
    assert float(t.min()) > 0 and float(t.max()) <= 1
    assert float((t > 0.8).float().mean()) == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_known_point_is_reached_in_any_number_of_steps(steps):
    diffusion = Diffusion(DiffusionConfig())
    z0 = torch.randn(2, *SHAPE)
    found = sample(lambda z, t: z0, torch.randn(2, *SHAPE), diffusion, steps=steps)
    torch.testing.assert_close(found, z0)


def test_normal_data_stay_normal():
    """The exact denoiser of N(m, s^2) data; DDIM then maps N(0, 1) to N(m, s^2)."""
    diffusion, m, s = Diffusion(DiffusionConfig()), 0.7, 0.4

    def denoise(z, t):
        alpha, sigma = diffusion.alpha_sigma(t)
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z - alpha * m)

    noise = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0))
    found = sample(denoise, noise, diffusion, steps=50)
    assert float(found.mean()) == pytest.approx(m, abs=0.02)
    assert float(found.std()) == pytest.approx(s, abs=0.03)


def test_noise_depends_on_seed_and_candidate_number_only():
    many, one = seeded_noise(SHAPE, 7, range(4)), seeded_noise(SHAPE, 7, [2])
    assert torch.equal(many[2], one[0])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many[0], seeded_noise(SHAPE, 8, [0])[0])
    assert math.isclose(float(seeded_noise((200, 50), 0, [0]).std()), 1, abs_tol=0.02)


def test_progress_counts_and_interruption_passes_through():
    diffusion, seen = Diffusion(DiffusionConfig()), []
    noise = torch.randn(1, *SHAPE)
    sample(lambda z, t: z, noise, diffusion, steps=3, progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(lambda z, t: z, noise, diffusion, steps=3, progress=stop)
    with pytest.raises(ValueError, match="1 to 50, found 51"):
        sample(lambda z, t: z, noise, diffusion, steps=51)


def test_guidance_of_one_is_the_condition_and_zero_its_absence():
    a, b = torch.randn(2, 3, *SHAPE)
    assert torch.allclose(guided(a, b, 1.0), a, atol=1e-6) and torch.equal(guided(a, b, 0.0), b)
    torch.testing.assert_close(guided(a, b, 3.0), a + 2 * (a - b))
