"""Mask-Aware Guidance in a real ComfyUI: what it changes, and above all what it does not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comfy_host import Host, Interrupted, PromptFailed
from prompts import (
    MIDDLE,
    guidance,
    guided,
    kept,
    node,
    saved_lora,
    text_to_image,
    unguided,
    with_lora_file,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("world")


def latents(values: dict[str, Any]) -> Tensor:
    return values["latents"]["samples"]


def steps(values: dict[str, Any]) -> list[Any]:
    (run,) = values["log"].runs
    return run.steps


def faces(values: dict[str, Any]) -> list[int]:
    return [step.faces for step in steps(values)]


def notes(values: dict[str, Any]) -> set[str]:
    return {step.note for step in steps(values)} | {run.note for run in values["log"].runs}


def mask_of(
    box: Sequence[float], width: int = 64, height: int = 64, batch: int = 1
) -> dict[str, Any]:
    shape = {"width": width, "height": height, "batch": batch}
    return {"mask": node("TestRectangle", **shape, box=str(list(box)))}


def assert_guided(host: Host, more: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Run with and without; guidance must act at some step, and the picture be a picture."""
    base = host.run(unguided(**settings))
    values = host.run(guided(more, **settings))
    assert values["picture"].isfinite().all() and latents(values).isfinite().all()
    assert not torch.equal(latents(values), latents(base))
    assert max(faces(values)) > 0 and not any("not finite" in note for note in notes(values))
    return values


def test_faces_come_to_resemble_the_person(host: Host) -> None:
    values = assert_guided(host, guidance(strength=4.0), steps=8)
    seen = [step.similarity for step in steps(values)]
    assert len(seen) == 8 and seen[-1] > seen[0] + 0.2
    assert notes(values) == {""}


def test_only_the_face_changes_in_one_step(host: Host) -> None:
    base = latents(host.run(unguided(steps=1, side=128)))
    values = host.run(guided(guidance(), steps=1, side=128))
    changed = (latents(values) != base).any(1)[0]
    # the face and its aligned crop are the middle 64 of 128 pixels: 8 of 16 latents
    assert changed[4:12, 4:12].all() and changed.sum() == 64


def test_a_mask_of_another_size_keeps_the_rest_as_it_was(host: Host) -> None:
    base = latents(host.run(unguided(steps=1, side=128)))
    left = guidance(mask=["mask", 0]) | mask_of((0, 0, 0.5, 1), width=50, height=30)
    changed = (latents(host.run(guided(left, steps=1, side=128))) != base).any(1)[0]
    assert changed[:, :8].any() and not changed[:, 8:].any()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_an_empty_mask_changes_no_bit(host: Host, sampler: str) -> None:
    base = host.run(unguided(sampler_name=sampler))
    empty = guidance(mask=["mask", 0]) | mask_of((0, 0, 0, 0))
    values = host.run(guided(empty, sampler_name=sampler))
    assert torch.equal(latents(values), latents(base))
    assert torch.equal(values["picture"], base["picture"])
    assert notes(values) == {"Nothing is guided: the mask is empty."}


def test_strength_zero_changes_no_bit(host: Host) -> None:
    base = host.run(unguided())
    values = host.run(guided(guidance(strength=0.0)))
    assert torch.equal(latents(values), latents(base))
    assert notes(values) == {"Nothing is guided: the strength is 0."}


def test_runs_without_the_node_are_what_they_were(host: Host) -> None:
    before = latents(host.run(unguided()))
    host.run(guided(guidance()))
    assert torch.equal(latents(host.run(unguided())), before)
    host.forget_outputs()
    assert torch.equal(latents(host.run(unguided())), before)


def test_the_same_seed_gives_the_same_picture_even_after_unloading(host: Host) -> None:
    import comfy.model_management

    first = latents(host.run(guided(guidance(smoothing=0.1))))
    comfy.model_management.unload_all_models()
    again = guided(guidance(smoothing=0.1))
    again["sample"]["inputs"]["seed"] = 2
    assert not torch.equal(latents(host.run(again)), first)
    again["sample"]["inputs"]["seed"] = 1
    assert torch.equal(latents(host.run(again)), first)
    host.forget_outputs()
    comfy.model_management.unload_all_models()
    assert torch.equal(latents(host.run(again)), first)


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


def test_every_picture_of_a_batch_is_guided(host: Host) -> None:
    two = guidance(mask=["mask", 0]) | mask_of((0, 0, 1, 1), batch=2)
    values = assert_guided(host, two, batch=3)
    assert faces(values) == [3] * 4
    base = host.run(unguided(batch=3))
    assert (latents(values) != latents(base)).flatten(1).any(1).all()


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


GRID = [(x / 4, y / 2, x / 4 + 0.24, y / 2 + 0.48) for y in (0, 1) for x in range(4)]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_each_of_several_faces_has_its_own_reference(host: Host, count: int) -> None:
    more = guidance(GRID[:count], features=None, reference=["photo", 0])
    more["photo"] = node("TestPhoto", faces="none")
    values = assert_guided(host, more, side=128, steps=2)
    assert faces(values) == [count] * 2
    (run,) = values["log"].runs
    assert [len(strip) for strip in run.strips] == [count] * 2


def test_a_face_across_the_border(host: Host) -> None:
    assert_guided(host, guidance([(-0.2, -0.1, 0.3, 0.5)]))
    assert_guided(host, guidance([(0.7, 0.6, 1.2, 1.2)]), side=128, steps=2)


def test_nobody_in_the_picture_changes_nothing(host: Host) -> None:
    base = host.run(unguided())
    values = host.run(guided(guidance([])))
    assert torch.equal(latents(values), latents(base))
    assert faces(values) == [0] * 4 and "no face found in picture 1" in notes(values)


def test_losing_a_face_can_be_an_error_and_leaves_no_trace(host: Host) -> None:
    base = host.run(unguided())
    with pytest.raises(PromptFailed, match="No face was found in picture 1 while it was being"):
        host.run(guided(guidance([], when_lost="error")))
    assert torch.equal(latents(host.run(unguided())), latents(base))
    assert_guided(host, guidance())


def test_interruption_leaves_the_next_run_right(host: Host) -> None:
    import comfy.model_management

    expected = latents(host.run(guided(guidance())))
    host.forget_outputs()
    host.on_progress = lambda _step: comfy.model_management.interrupt_current_processing()
    with pytest.raises(Interrupted):
        host.run(guided(guidance()))
    host.on_progress = None
    assert torch.equal(latents(host.run(guided(guidance()))), expected)


def test_features_and_a_mask_need_no_detector(host: Host) -> None:
    alone = guidance(face_encoder=None, mask=["mask", 0]) | mask_of(MIDDLE)
    values = assert_guided(host, alone)
    assert faces(values) == [1] * 4


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
    inside = [sigma for sigma in run.schedule if 0.4 <= sigma <= 5.0]
    assert len(inside) >= 4 and run.schedule[0] > 100
    assert [step.sigma for step in run.steps] == pytest.approx(inside, rel=1e-4)
    half = guidance(model=["flow", 0], start=0.25, end=0.5) | flow
    (run,) = host.run(guided(half, scheduler="simple", steps=12))["log"].runs
    share = [1 - step.sigma / (1 + step.sigma) / 1 for step in run.steps]
    assert 2 <= len(share) < 12 and share == sorted(share)


@pytest.mark.parametrize(("window", "count"), [("identity", 3), ("detail", 1), ("paper", 1)])
def test_windows_warn_when_hardly_any_step_lies_in_them(
    host: Host, window: str, count: int
) -> None:
    values = host.run(guided(guidance(window=window), steps=6))
    assert len(steps(values)) == count
    warned = any(f"Only {count} of 6 steps lie in" in note for note in notes(values))
    assert warned == (count < 3)


def test_the_report_shows_what_happened(host: Host) -> None:
    more = guidance() | {
        "report": node("DiffLoRA_GuidanceReport", guidance=["guide", 1], images=["decode", 0])
    }
    names = {name: ["report", slot] for slot, name in enumerate(["same", "curve", "crops", "text"])}
    values = host.run(kept(guided(more), **names))
    assert torch.equal(values["same"], values["picture"])
    assert values["curve"].shape == (1, 300, 520, 3)
    assert values["crops"].shape == (1, 134, 4 * 114, 3)
    assert "4 guided steps" in values["text"] and "Decoder: VAE." in values["text"]


def test_a_report_before_any_run_says_so(host: Host) -> None:
    more = guidance(strength=0.7) | {
        "photo": node("TestPhoto", faces="one"),
        "report": node("DiffLoRA_GuidanceReport", guidance=["guide", 1], images=["photo", 0]),
    }
    prompt = kept(more | {"mini": text_to_image(0)["mini"]}, text=["report", 3])
    assert host.run(prompt)["text"] == "No sampler has run with the guided model yet."
