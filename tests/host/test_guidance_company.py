"""Guidance beside everything else that takes part in sampling: solvers, LoRAs, detailers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comfy_host import Host
from guided_runs import assert_guided, faces, latents, mask_of, notes
from prompts import guidance, guided, node, saved_lora, unguided, with_lora_file

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("euler_ancestral", "normal"),
        ("dpmpp_2m", "karras"),
        ("dpmpp_2m_sde", "exponential"),
        ("dpmpp_sde", "beta"),
        ("lcm", "sgm_uniform"),
        ("uni_pc", "simple"),
        ("ddim", "ddim_uniform"),
        ("euler_cfg_pp", "normal"),
        ("heun", "kl_optimal"),
    ],
)
def test_every_sampler_and_scheduler(host: Host, sampler: str, scheduler: str) -> None:
    assert_guided(host, guidance(), sampler_name=sampler, scheduler=scheduler, steps=3)


def test_without_classifier_free_guidance(host: Host) -> None:
    assert_guided(host, guidance(), cfg=1.0)


def test_regional_prompts(host: Host) -> None:
    def regional(prompt: dict[str, Any]) -> dict[str, Any]:
        region = {"strength": 1.0, "set_cond_area": "default"}
        prompt |= {
            "area": node("TestRectangle", width=64, height=64, batch=1, box="[0, 0, 0.5, 1]"),
            "there": node(
                "ConditioningSetMask", conditioning=["no", 0], mask=["area", 0], **region
            ),
            "both": node(
                "ConditioningCombine", conditioning_1=["yes", 0], conditioning_2=["there", 0]
            ),
        }
        prompt["sample"]["inputs"]["positive"] = ["both", 0]
        return prompt

    base = host.run(regional(unguided()))
    values = host.run(regional(guided(guidance())))
    assert faces(values) == [1] * 4 and notes(values) == {""}
    assert not torch.equal(latents(values), latents(base))


def test_over_and_under_a_lora_it_is_the_same(host: Host) -> None:
    file = saved_lora(host)
    below = host.run(guided(guidance(model=["apply", 0]) | with_lora_file(file)))
    above = with_lora_file(file)
    above["apply"]["inputs"]["model"] = ["guide", 0]
    prompt = guided(guidance() | above)
    prompt["sample"]["inputs"]["model"] = ["apply", 0]
    assert torch.equal(latents(host.run(prompt)), latents(below))
    assert faces(below) == [1] * 4
    assert not torch.equal(latents(host.run(guided(guidance()))), latents(below))


def test_with_personalize(host: Host) -> None:
    personal = {
        "photo": node("TestPhoto", faces="one"),
        "red": node("TestFaces"),
        "apply": node(
            "DiffLoRA_Personalize",
            model=["mini", 0],
            clip=["mini", 1],
            photos=["photo", 0],
            predictor="mini (ships with DiffLoRA)",
            strength=1.0,
            seed=0,
            face="largest",
            face_number=1,
            face_encoder=["red", 0],
        ),
    }
    values = host.run(guided(guidance(model=["apply", 0]) | personal))
    assert faces(values) == [1] * 4
    assert not torch.equal(latents(values), latents(host.run(guided(guidance()))))


def test_detailers_sample_again_with_the_same_model(host: Host) -> None:
    """As Impact's detailers do: another run, on a crop, from the picture of the first."""
    more = guidance() | {
        "crop": node("LatentCrop", samples=["sample", 0], width=80, height=64, x=8, y=8),
        "detail": node("TestCapture", value=["again", 0], name="detail"),
    }
    prompt = guided(more, side=96)
    prompt["again"] = node("KSampler", **prompt["sample"]["inputs"])
    prompt["again"]["inputs"] |= {"latent_image": ["crop", 0], "denoise": 0.6, "steps": 5}
    values = host.run(copy.deepcopy(prompt))
    assert [len(run.steps) for run in values["log"].runs] == [4, 5]
    assert values["detail"]["samples"].shape == (1, 4, 8, 10)
    prompt["sample"]["inputs"]["seed"] += 1
    assert len(host.run(prompt)["log"].runs) == 2  # those before belong to another job


def with_guider(prompt: dict[str, Any], model: str, steps: int, kind: str, **inputs: Any) -> dict:
    """The prompt with custom sampling in place of its KSampler."""
    schedule = {"scheduler": "normal", "steps": steps, "denoise": 1.0}
    prompt |= {
        "guider": node(kind, model=[model, 0], **inputs),
        "solver": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=[model, 0], **schedule),
        "noise": node("RandomNoise", noise_seed=1),
    }
    names = ("noise", "guider", "sigmas")
    links = {name: [name, 0] for name in names} | {"sampler": ["solver", 0]}
    prompt["sample"] = node("SamplerCustomAdvanced", **links, latent_image=["empty", 0])
    return prompt


def test_guiders_of_custom_sampling(host: Host) -> None:
    """The same picture as from a KSampler."""
    conditions = {"positive": ["yes", 0], "negative": ["no", 0]}
    prompt = with_guider(guided(guidance()), "guide", 4, "CFGGuider", **conditions, cfg=4.0)
    values = host.run(prompt)
    assert faces(values) == [1] * 4
    assert torch.equal(latents(values), latents(host.run(guided(guidance()))))


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_a_step_is_as_long_whatever_the_guider_scales(host: Host, style: str) -> None:
    """Dual CFG multiplies what comes from classifier-free guidance by its second scale."""

    def step(outer: float) -> float:
        conditions = {"cond1": ["yes", 0], "cond2": ["other", 0], "negative": ["no", 0]}
        scales = {"cfg_conds": 4.0, "cfg_cond2_negative": outer, "style": style}
        pictures = []
        for prompt, model in ((unguided(), "mini"), (guided(guidance()), "guide")):
            prompt["other"] = node("CLIPTextEncode", clip=["mini", 1], text="a person in a hat")
            dual = with_guider(prompt, model, 1, "DualCFGGuider", **conditions, **scales)
            pictures.append(latents(host.run(dual)))
        change = pictures[1] - pictures[0]
        # in a regular one the second scale is that of the pull which a step is as long as
        return float(change.square().mean().sqrt()) / (outer if style == "regular" else 1.0)

    assert step(8.0) == pytest.approx(step(2.0), rel=0.05)
    assert step(8.0) > 0


def test_perp_neg_without_its_negative_prompt(host: Host) -> None:
    """Then classifier-free guidance is the distance to an empty prompt alone."""
    conditions = {"positive": ["yes", 0], "negative": ["no", 0], "empty_conditioning": ["none", 0]}
    changes = []
    for neg_scale in (0.0, 1e-6):
        pictures = []
        for prompt, model in ((unguided(), "mini"), (guided(guidance()), "guide")):
            prompt["none"] = node("CLIPTextEncode", clip=["mini", 1], text="")
            scales = {"cfg": 4.0, "neg_scale": neg_scale}
            perp = with_guider(prompt, model, 1, "PerpNegGuider", **conditions, **scales)
            pictures.append(latents(host.run(perp)))
        changes.append(pictures[1] - pictures[0])
    assert changes[0].abs().max() > 0
    assert torch.allclose(changes[0], changes[1], atol=1e-3)


def test_inpainting_keeps_what_is_not_masked(host: Host) -> None:
    more = guidance() | mask_of((0, 0, 0.5, 1))
    more["area"] = node("SetLatentNoiseMask", samples=["empty", 0], mask=["mask", 0])
    prompt = guided(more)
    prompt["sample"]["inputs"]["latent_image"] = ["area", 0]
    assert latents(host.run(prompt))[..., 4:].abs().max() < 1e-3


def test_flow_models_are_guided_at_the_same_noise(host: Host) -> None:
    """At time t the ratio of noise to signal is t / (1 - t)."""
    flow = {"flow": node("ModelSamplingSD3", model=["mini", 0], shift=3.0)}
    named = guidance(model=["flow", 0], window="identity") | flow
    values = host.run(guided(named, scheduler="simple", steps=12))
    (run,) = values["log"].runs
    inside = [sigma for sigma in run.schedule if 0.4 <= sigma <= 10.0]
    assert len(inside) >= 4 and run.schedule[0] > 100
    assert [step.sigma for step in run.steps] == pytest.approx(inside, rel=1e-4)
    half = guidance(model=["flow", 0], start=0.25, end=0.5) | flow
    (run,) = host.run(guided(half, scheduler="simple", steps=12))["log"].runs
    share = [1 - step.sigma / (1 + step.sigma) / 1 for step in run.steps]
    assert 2 <= len(share) < 12 and share == sorted(share)


def test_two_nodes_in_a_row_guide_two_places(host: Host) -> None:
    first = guidance(face_encoder=None, mask=["mask", 0]) | mask_of((0, 0, 0.4, 1))
    second = guidance(face_encoder=None, model=["guide", 0], mask=["other", 0])["guide"]
    more = {
        **first,
        "other": mask_of((0.6, 0, 1, 1))["mask"],
        "second": second,
        "log": node("TestCapture", value=["second", 1], name="second"),
    }
    prompt = guided(more, side=128, steps=1)
    prompt["sample"]["inputs"]["model"] = ["second", 0]
    values = host.run(prompt)
    base = host.run(unguided(side=128, steps=1))
    changed = (latents(values) != latents(base)).any(1)[0]
    assert changed[:, :7].any() and changed[:, 9:].any() and not changed[:, 7:9].any()
    assert len(values["log"].runs) == len(values["second"].runs) == 1
