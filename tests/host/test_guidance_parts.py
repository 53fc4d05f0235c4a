"""What guidance sees through in a real ComfyUI: dtypes, latents of other models, decoders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from guided_runs import latents, refused, the_run
from mini_files import write_random_world
from prompts import guidance, guided, kept, node, unguided

from difflora_core.mask_aware.decoders import FastDecoder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def fresh(host: Host, world: Path) -> Iterator[Any]:
    """The module of the mini model, to be changed; nothing made by it is left behind."""
    host.forget_outputs()
    yield host.module("nodes.mini_model")
    host.forget_outputs()


@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_every_pair_of_weight_and_compute_dtype(
    host: Host, fresh: Any, monkeypatch: pytest.MonkeyPatch, weights: Any, compute: Any
) -> None:
    """ComfyUI loads weights in inference mode, where autograd refuses those that are not cast."""
    monkeypatch.setattr(fresh, "DTYPE", weights)
    set_dtypes = fresh.MiniSD15.set_inference_dtype
    cast = None if compute == weights else compute
    monkeypatch.setattr(
        fresh.MiniSD15, "set_inference_dtype", lambda self, *_given: set_dtypes(self, weights, cast)
    )
    base = host.run(unguided(steps=2))
    prompt = kept(guided(guidance(), steps=2), model=["mini", 0], vae=["mini", 2])
    values = host.run(prompt)
    loaded = [values["model"].model.diffusion_model, values["vae"].first_stage_model]
    for module in loaded:
        assert all(p.dtype == weights and p.is_inference() for p in module.parameters())
    assert (values["model"].model.manual_cast_dtype or weights) == compute
    run = the_run(values)
    assert [(step.faces, step.note) for step in run.steps] == [(1, "")] * 2
    assert latents(values).isfinite().all() and not torch.equal(latents(values), latents(base))
    assert values["picture"].isfinite().all() and values["picture"].std() > 0.01


@pytest.mark.parametrize(
    ("kind", "channels"), [("SDXL", 4), ("SDXL_Playground_2_5", 4), ("SD3", 16), ("Flux", 16)]
)
def test_latents_of_other_models(
    host: Host,
    fresh: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    channels: int,
) -> None:
    """The same nodes, and each model's own way from latents to the VAE."""
    import comfy.latent_formats

    write_random_world(tmp_path, channels=channels)
    monkeypatch.setattr(host.module("nodes.host"), "MINI_FOLDER", tmp_path)
    init, load_vae = fresh.MiniSD15.__init__, fresh.load_vae

    def other(self: Any, *args: Any) -> None:
        init(self, *args)
        self.latent_format = getattr(comfy.latent_formats, kind)()

    def wide_vae(folder: Path) -> Any:
        vae = load_vae(folder)
        vae.latent_channels = channels  # ComfyUI reads it off real files, not off a config
        return vae

    monkeypatch.setattr(fresh.MiniSD15, "__init__", other)
    monkeypatch.setattr(fresh, "load_vae", wide_vae)
    # ComfyUI takes more than 4 channels of such a model for a picture to inpaint
    monkeypatch.setattr(fresh.MiniSD15, "inpaint_model", lambda self: False)
    prompt = guided(guidance())
    if channels == 16:
        prompt["empty"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    values = host.run(prompt)
    assert latents(values).shape == (1, channels, 8, 8)
    run = the_run(values)
    assert [step.faces for step in run.steps] == [1] * 4
    assert run.steps[-1].similarity > run.steps[0].similarity


@pytest.mark.usefixtures("world")
def test_room_is_asked_for_as_comfyui_does(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI may move weights of its own then, which outside inference mode would fail."""
    import comfy.model_management as management

    asked, free_memory = [], management.free_memory

    def record(memory: int, *args: Any, **kwargs: Any) -> Any:
        asked.append((int(memory), torch.is_inference_mode_enabled()))
        return free_memory(memory, *args, **kwargs)

    monkeypatch.setattr(management, "free_memory", record)
    prompt = kept(guided(guidance(strength=1.9)), vae=["mini", 2])
    values = host.run(prompt)
    vae = values["vae"].first_stage_model
    decoder = [p for part in (vae.decoder, vae.post_quant_conv) for p in part.parameters()]
    least = 4 * sum(p.numel() for p in decoder)
    assert any(least < memory < 2 * least for memory, _mode in asked)
    assert all(mode for _memory, mode in asked)


@pytest.fixture
def approximations(host: Host, fresh: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """models/vae_approx, with a mini model that has a name for its fast decoder."""
    folder = host.base / "models" / "vae_approx"
    folder.mkdir(parents=True, exist_ok=True)
    init = fresh.MiniSD15.__init__

    def named(self: Any, *args: Any) -> None:
        init(self, *args)
        self.latent_format.taesd_decoder_name = "tiny_decoder"

    monkeypatch.setattr(fresh.MiniSD15, "__init__", named)
    yield folder
    for file in folder.glob("tiny_decoder.*"):
        file.unlink()


FAST = {"decoder": "fast, if there is one"}


def test_fast_decoder_is_taken_where_there_is_one(host: Host, approximations: Path) -> None:
    from safetensors.torch import save_file

    without = host.run(guided(guidance(**FAST)))
    assert the_run(without).decoder == "VAE"
    (approximations / "tiny_decoder.pth").write_bytes(b"not to be unpickled")
    label = the_run(host.run(guided(guidance(**FAST, strength=2.1)))).decoder
    assert label.startswith("VAE (tiny_decoder.pth is a pickle")
    torch.manual_seed(0)
    tensors = FastDecoder(4, 8, (1, 1, 1, 1)).layers.state_dict()
    save_file(tensors, approximations / "tiny_decoder.safetensors")
    values = host.run(guided(guidance(**FAST)))
    run = the_run(values)
    assert run.decoder == "fast" and [step.faces for step in run.steps] == [1] * 4
    assert not torch.equal(latents(values), latents(without))
    assert the_run(host.run(guided(guidance(decoder="VAE")))).decoder == "VAE"


def test_a_broken_fast_decoder_is_explained(host: Host, approximations: Path) -> None:
    from safetensors.torch import save_file

    file = approximations / "tiny_decoder.safetensors"
    save_file({"1.weight": torch.zeros(8, 4, 3, 3)}, file)
    refused(host, guidance(**FAST), "is not a decoder of TAESD's shape")
    torch.manual_seed(0)
    tensors = FastDecoder(16, 8, (1, 1, 1, 1)).layers.state_dict()
    save_file(tensors, file)
    refused(host, guidance(**FAST), "safetensors takes latents of 16 channels; this model's have 4")
