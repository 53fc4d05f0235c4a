"""What guidance is made of in a real ComfyUI: dtypes, decoders, recognisers, and wrong inputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host, PromptFailed, blocked
from guided_runs import latents
from mini_files import FACE_WIDTH, write_random_world
from prompts import MIDDLE, guidance, guided, kept, node, unguided

from difflora_core.mask_aware.decoders import FastDecoder
from difflora_core.mini_world import MINI_FOLDER

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASK = {"mask": node("TestRectangle", width=64, height=64, batch=1, box=str(list(MIDDLE)))}


def the_run(values: dict[str, Any]) -> Any:
    (run,) = values["log"].runs
    return run


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


def refused(host: Host, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PromptFailed, match=sentence):
        host.run(guided(more))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"features": None}, "nobody to lead towards.*Connect features from"),
        ({"features": ["blind", 0]}, "features hold no face.*a reference picture"),
        ({"features": ["foreign", 0]}, "face encoder antelopev2; the one that guides is mini"),
        ({"features": None, "reference": ["nobody", 0]}, "No face was found in reference picture"),
        (
            {"features": None, "reference": ["nobody", 0], "face_encoder": None},
            "does not know which recogniser to follow.*Connect a face encoder",
        ),
        (
            {"features": ["foreign", 0], "face_encoder": None, "mask": ["mask", 0]},
            "The face pack 'antelopev2' is not in",
        ),
        ({"start": 0.8, "end": 0.2}, "cannot run from 80% to 20% of the steps"),
        ({"face_encoder": ["nothing", 0]}, "is not an InsightFace analysis"),
    ],
)
def test_wrong_inputs_are_explained(host: Host, changes: dict[str, Any], sentence: str) -> None:
    boxes = [] if "reference" in changes else [MIDDLE]
    more = MASK | {
        "blind": node("TestPerson", encoder="image only", seed=0),
        "foreign": node("TestPerson", encoder="antelopev2", seed=0),
        "nobody": node("TestPhoto", faces="none"),
        "nothing": node("TestNoFaces"),
    }
    refused(host, guidance(boxes, **changes) | more, sentence)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("nan", "makes pictures of numbers that are not finite"),
        ("empty", "The connected VAE is empty"),
        ("channels", "latents of this model have 4 channels; the connected VAE decodes 16"),
        ("video", "have 2 dimensions; those of this model have 2, those of the VAE 3"),
    ],
)
def test_wrong_autoencoders_are_explained(host: Host, how: str, sentence: str) -> None:
    wrong = {"wrong": node("TestWrongVae", vae=["mini", 2], how=how)}
    base = host.run(unguided())
    refused(host, guidance(vae=["wrong", 0]) | wrong, sentence)
    after = host.run(unguided())
    assert torch.equal(latents(after), latents(base))
    assert torch.equal(after["picture"], base["picture"])


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
    assert the_run(host.run(guided(guidance(**FAST, strength=2.1)))).decoder == "VAE"
    torch.manual_seed(0)
    tensors = FastDecoder(4, 8, (1, 1, 1, 1)).layers.state_dict()
    save_file(tensors, approximations / "tiny_decoder.safetensors")
    host.forget_outputs()
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


@pytest.mark.usefixtures("world")
def test_features_and_a_mask_do_without_insightface(host: Host) -> None:
    with blocked("insightface", "onnxruntime"):
        values = host.run(guided(guidance(face_encoder=None, mask=["mask", 0]) | MASK))
        assert [step.faces for step in the_run(values).steps] == [1] * 4


@pytest.fixture
def pack(host: Host, shipped_world: Path) -> str:
    """A face pack of the user's own, unpacked into a folder in itself as antelopev2 is."""
    name = "renamed"
    folder = host.base / "models" / "insightface" / "models" / name / name
    if not folder.is_dir():
        shutil.copytree(MINI_FOLDER / "insightface" / "models" / "mini", folder)
    return name


def person(host: Host, pack: str, **changes: Any) -> dict[str, Any]:
    """Guidance by a pack towards the person of an example photo."""
    encode = {"face": "largest", "face_number": 1, "weights": ""}
    return (
        guidance(**changes)
        | MASK
        | {
            "photo": node("DiffLoRA_ExamplePhoto", person="person_1"),
            "pack": node("DiffLoRA_LoadFaceEncoder", pack=pack, provider="CPU"),
            "person": node(
                "DiffLoRA_EncodeFaceFeatures",
                photos=["photo", 0],
                face_encoder=["pack", 0],
                **encode,
            ),
        }
    )


def test_the_recogniser_of_any_pack_guides(host: Host, pack: str) -> None:
    """The same weights: once as the ONNX file of a pack, once as the network that ships."""
    settings: dict[str, Any] = {"face_encoder": None, "mask": ["mask", 0]}
    ours = host.run(guided(person(host, "mini", **settings), steps=2))
    theirs = host.run(guided(person(host, pack, **settings), steps=2))
    assert the_run(theirs).steps[0].similarity == pytest.approx(
        the_run(ours).steps[0].similarity, abs=2e-3
    )
    assert (latents(theirs) - latents(ours)).abs().max() < 0.02


def test_a_reference_picture_is_as_good_as_its_features(host: Host, pack: str) -> None:
    """Within the rounding of the ONNX file and of crops to 8 bits."""
    settings: dict[str, Any] = {"face_encoder": ["pack", 0]}
    one = host.run(guided(person(host, pack, **settings), steps=8, side=128))
    settings |= {"features": None, "reference": ["photo", 0]}
    other = host.run(guided(person(host, pack, **settings), steps=8, side=128))
    pairs = zip(the_run(one).steps, the_run(other).steps, strict=True)
    known = [(a.similarity, b.similarity) for a, b in pairs if a.faces]
    assert len(known) > 2
    assert all(a == pytest.approx(b, abs=0.03) for a, b in known)


def test_a_pack_without_a_recogniser_is_explained(host: Host, shipped_world: Path) -> None:
    folder = host.base / "models" / "insightface" / "models" / "antelopev2"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MINI_FOLDER / "insightface" / "models" / "mini" / "det_mini.onnx", folder)
    more = guidance(face_encoder=None, mask=["mask", 0]) | MASK
    more["person"] = node("TestPerson", encoder="antelopev2", seed=0)
    try:
        refused(host, more, "None of the ONNX files in .* is a face recogniser")
    finally:
        shutil.rmtree(folder)


def test_width_of_features_is_checked(host: Host, shipped_world: Path) -> None:
    """The stand-in's features are as long as the random world's recogniser, not as this one's."""
    refused(host, guidance(), f"have {FACE_WIDTH} numbers per face; the network that guides gives")
