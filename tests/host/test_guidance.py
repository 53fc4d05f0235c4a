"""Mask-Aware Guidance in a real ComfyUI: what it changes, and above all what it does not."""

from __future__ import annotations

import pytest
import torch
from comfy_host import Host, Interrupted, PromptFailed
from guided_runs import assert_guided, faces, latents, mask_of, notes, steps
from prompts import MIDDLE, guidance, guided, kept, node, text_to_image, unguided

pytestmark = pytest.mark.usefixtures("world")


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


def test_every_picture_of_a_batch_is_guided(host: Host) -> None:
    two = guidance(mask=["mask", 0]) | mask_of((0, 0, 1, 1), batch=2)
    values = assert_guided(host, two, batch=3)
    assert faces(values) == [3] * 4
    base = host.run(unguided(batch=3))
    assert (latents(values) != latents(base)).flatten(1).any(1).all()


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
    assert faces(values) == [0] * 4 and "no face was found in picture 1" in notes(values)


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


@pytest.mark.parametrize(("window", "count"), [("identity", 4), ("detail", 1), ("paper", 1)])
def test_windows_warn_when_hardly_any_step_lies_in_them(
    host: Host, window: str, count: int
) -> None:
    values = host.run(guided(guidance(window=window), steps=6))
    assert len(steps(values)) == count
    warned = any(f"Only {count} of 6 steps lie in" in note for note in notes(values))
    assert warned == (count < 3)


@pytest.mark.parametrize(
    ("same", "window", "start", "end"),
    [("identity", "sigma", 10.0, 0.4), ("paper", "timestep", 100.0, 0.0)],
)
def test_windows_can_be_said_in_sigmas_and_timesteps(
    host: Host, same: str, window: str, start: float, end: float
) -> None:
    named = host.run(guided(guidance(window=same), steps=6))
    values = host.run(guided(guidance(window=window, start=start, end=end), steps=6))
    assert torch.equal(latents(values), latents(named))


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
