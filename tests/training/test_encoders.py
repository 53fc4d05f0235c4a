"""Training of the encoders: data, losses, a few steps of each, and what comes out."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflora_core.config import from_dict
from difflora_core.errors import BadConfig, BadWeightsFile
from difflora_core.image_encoder import ImageEncoder
from difflora_core.mask_aware import open_landmark_network
from difflora_core.mini_world import MINI_FOLDER
from difflora_core.recogniser import Recogniser
from difflora_core.weights_file import read_safetensors, write_safetensors
from training import budget, trained_for
from training.artifacts import artifacts_folder, read_manifest
from training.config import Config
from training.drawing import generator_for
from training.encoders import (
    attributes,
    damage,
    detector,
    image_encoder,
    landmarks,
    recogniser,
    stage,
)
from training.encoders.attributes_net import (
    PortraitNet,
    PortraitNetConfig,
    checker_outputs,
    prompt_accuracy,
)
from training.encoders.config import NAMES, RecogniserTraining
from training.encoders.detector_loss import assign, diou_loss, focal
from training.encoders.image_encoder import own_name
from training.encoders.stage import decisive, run, run_together
from training.example_pool import Pool
from training.portraits import ATTRIBUTES
from training.run_config import MAX_SEED, RunConfig
from training.run_folder import RunFolder

CPU = torch.device("cpu")


def test_a_recogniser_is_measured_whatever_the_seed_of_its_run() -> None:
    network = Recogniser.open(MINI_FOLDER / "recogniser.safetensors")
    for seed in (20261130, MAX_SEED):
        assert recogniser.embed_people(network, 2, 2, seed).shape[:2] == (2, 2)


def test_pool_draws_again_as_often_as_told_and_forgets_the_oldest() -> None:
    made: list[int] = []

    def make(k: int) -> dict[str, torch.Tensor]:
        made.append(k)
        return {"number": torch.full((4,), k), "images": torch.full((4, 1), 255, dtype=torch.uint8)}

    pool = Pool(make, capacity=8, reuse=2)
    seen = [pool.draw(4) for _ in range(8)]
    assert made == [0, 1, 2, 3]  # 32 draws, each picture used twice
    assert set(seen[-1]["number"].tolist()) <= {2, 3}
    assert seen[0]["images"].unique().tolist() == [1.0]


def test_encoders_that_train_at_once_end_with_their_parent() -> None:
    def ours(number: int, frame: object) -> None:
        pytest.fail("the signal was not passed on")

    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=time.sleep, args=(20,), daemon=True) for _ in range(2)]
    before = signal.signal(signal.SIGTERM, ours)
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        run_together(workers)
        assert [worker.exitcode for worker in workers] == [-signal.SIGTERM] * 2
        assert signal.getsignal(signal.SIGTERM) == ours
    finally:
        signal.signal(signal.SIGTERM, before)


DRAWN = {
    "recogniser": lambda g: recogniser.draw_examples(8, 0, g, CPU, 100),
    "detector": lambda g: detector.draw_examples(8, g, CPU),
    "landmarks": lambda g: landmarks.draw_examples(8, g, CPU),
    "attributes": lambda g: attributes.draw_examples(8, g, CPU),
    "image_encoder": lambda g: image_encoder.draw_examples(8, g, CPU),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_chunk_depends_on_its_number_only(name: str) -> None:
    """Else a resumed run would draw another one again."""
    torch.manual_seed(1)
    one = DRAWN[name](generator_for(0, 5))
    torch.manual_seed(2)
    other = DRAWN[name](generator_for(0, 5))
    assert all(torch.equal(other[key], tensor) for key, tensor in one.items())


def test_damage_keeps_shape_and_range_and_some_pictures_nearly_clean() -> None:
    torch.manual_seed(0)
    images = detector.draw_examples(6, generator_for(0, 0), CPU)["images"].float() / 255
    damaged = damage.damage(images.repeat(4, 1, 1, 1))
    assert damaged.shape == (24, *images.shape[1:])
    assert damaged.min() >= 0 and damaged.max() <= 1
    error = (damaged - images.repeat(4, 1, 1, 1)).abs().mean((1, 2, 3))
    assert 0.001 < error.min() < 0.03 < error.max() < 0.3


def test_jpeg_without_rounding_is_the_identity() -> None:
    images = torch.rand(2, 3, 20, 28)
    assert torch.allclose(damage.jpeg(images, 1e-6), images, atol=1e-5)


def test_placed_landmarks_stay_on_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark the nose of each face in the picture; it must lie where the landmarks say."""
    torch.manual_seed(1)
    examples = detector.draw_examples(9, generator_for(3, 0), CPU)
    images = torch.zeros_like(examples["images"]).float()
    for i in range(9):
        for person in torch.nonzero(examples["present"][i])[:, 0]:
            x, y = examples["landmarks"][i, person, 2].round().long().tolist()
            images[i, 0, y - 3 : y + 3, x - 3 : x + 3] = 1
    monkeypatch.setattr(detector, "damage", lambda x: x)
    monkeypatch.setattr(detector, "_tiles_shuffled", lambda x, *_: x)
    placed, boxes, points, present = detector.place(examples | {"images": images}, 256)
    checked = 0
    for i in range(9):
        for person in torch.nonzero(present[i])[:, 0]:
            x, y = points[i, person, 2].floor().long().tolist()
            if 3 < x < 252 and 3 < y < 252:
                checked += 1
                assert placed[i, 0, y - 1 : y + 2, x - 1 : x + 2].mean() > 0.3
                x1, y1, x2, y2 = boxes[i, person].tolist()
                assert x1 < x < x2 and y1 < y < y2
    assert checked >= 5


def test_every_face_has_anchors_that_answer_for_it() -> None:
    sizes = torch.tensor([10.0, 18, 30, 50, 90, 160, 240, 300])
    for size in sizes.tolist():
        corner = torch.tensor([20.3, 11.7])
        box = torch.cat([corner, corner + size])[None, None]
        points = torch.full((1, 1, 5, 2), float(corner[0]) + size / 2)
        targets = {s: assign(s, 320, box, points, torch.ones(1, 1).bool()) for s in (8, 16, 32)}
        count = sum(int(t.positive.sum()) for t in targets.values())
        assert 1 <= count <= 60, size
        for stride, target in targets.items():
            sides = target.boxes[target.positive] * stride
            width = sides[:, 0] + sides[:, 2]
            assert torch.allclose(width, torch.full_like(width, size), atol=1e-3)
            assert not (target.positive & target.ignored).any()


def test_absent_people_leave_no_trace() -> None:
    boxes, points = torch.full((1, 1, 4), torch.nan), torch.full((1, 1, 5, 2), torch.nan)
    target = assign(8, 64, boxes, points, torch.zeros(1, 1).bool())
    assert not target.positive.any() and not target.ignored.any()
    assert target.boxes.isfinite().all()


def test_detector_losses_against_hand_computed_values() -> None:
    unit = torch.tensor([[1.0, 1, 1, 1]])
    assert diou_loss(unit, unit).item() == pytest.approx(0)
    # boxes of side 2, one shifted by 1: IoU = 2 / 6, centres 1 apart, enclosing 3 x 2
    shifted = torch.tensor([[0.0, 1, 2, 1]])
    assert diou_loss(unit, shifted).item() == pytest.approx(1 - 1 / 3 + 1 / 13)
    half = focal(torch.zeros(1), torch.ones(1)).item()
    assert half == pytest.approx(0.25 * math.log(2))


def test_margin_makes_the_own_person_harder() -> None:
    torch.manual_seed(0)
    factors, person = torch.rand(3, 20), torch.tensor([0, 1, 2])
    embedding = torch.randn(3, 8)
    losses = []
    for margin in (0.0, 0.3):
        torch.manual_seed(1)
        head = recogniser.MarginHead(5, RecogniserTraining(margin=margin), 8)
        losses.append(head(embedding, person, factors)["loss"].item())
    assert losses[1] > losses[0] > 0


def test_misalign_by_nothing_is_the_plain_crop() -> None:
    roomy = torch.rand(2, 3, 136, 136)
    plain = roomy[..., recogniser.ROOM : -recogniser.ROOM, recogniser.ROOM : -recogniser.ROOM]
    assert torch.allclose(recogniser.misalign(roomy, 0.0), plain, atol=1e-4)


def test_verification_pairs_by_counting() -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(4, 3, 6), dim=-1)
    same, different = recogniser.verification_pairs(embeddings)
    assert len(same) == 4 * 3 and len(different) == 4 * 3 * 3
    assert same[0].item() == pytest.approx(float(embeddings[0, 0] @ embeddings[0, 1]), abs=1e-6)


def test_two_view_loss_is_least_when_views_agree() -> None:
    codes = torch.eye(4)
    agreeing = attributes.two_view_loss(torch.cat([codes, codes]), 0.1)
    mixed = attributes.two_view_loss(torch.cat([codes, codes.flip(0)]), 0.1)
    assert agreeing < 0.01 < mixed


def test_prompt_accuracy_counts_only_what_was_asked() -> None:
    torch.manual_seed(0)
    net = PortraitNet(PortraitNetConfig((4, 4, 4, 8), checker_outputs())).eval()
    images = torch.rand(3, 3, 128, 128)
    style = ATTRIBUTES["style"][int(net(images[:1])["style"].argmax())]
    asked = {"photo": "a photo of a person", "sketch": "a pencil sketch of a person",
             "painting": "an oil painting of a person", "cartoon": "a cartoon of a person",
             "black and white": "a black and white photo of a person"}  # fmt: skip
    found = prompt_accuracy(net, images[:1].expand(5, -1, -1, -1), list(asked.values()))
    assert found.tolist() == [float(name == style) for name in asked]
    assert prompt_accuracy(net, images[:1], ["a person"]).isnan().all()


def tiny_config(root: Path, *only: str) -> Config:
    optim = {"steps": 3, "warmup": 1}
    small = {"batch": 4, "optim": optim}
    return from_dict(
        Config,
        {
            "run": {"root": str(root), "log_every": 1, "device": "cpu"},
            "encoders": {
                "only": list(only), "pool": 24, "chunk": 12, "check_people": 3,
                "detector": small | {"widths": [4, 8, 8, 8, 8], "canvases": [64, 96]},
                "recogniser": small | {"people": 8, "factor_weight": 1.0},
                "metric_recogniser": small | {"people": 8, "damage": 0.5},
                "image_encoder": small | {"width": 32, "layers": 1, "text_width": 32,
                                          "text_layers": 1, "embedding": 16},
                "attribute_heads": small | {"widths": [4, 4, 4, 8]},
                "self_supervised": small | {"widths": [4, 4, 4, 8]},
                "landmarks": small,
            },
        },
    )  # fmt: skip


def test_stage_trains_every_encoder(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *NAMES)
    run(config, RunFolder.create(tmp_path, "train-encoders"))
    place = artifacts_folder(config)
    manifest = read_manifest(place)
    assert set(manifest) == {f"{name}.safetensors" for name in NAMES}
    assert {"recall", "precision"} <= set(manifest["detector.safetensors"]["figures"])
    for name in ("recogniser", "metric_recogniser"):
        model = Recogniser.open(place / f"{name}.safetensors")
        assert model.config.calibration is not None
        assert 0 <= model.percent(0.3) <= 100
        assert model(torch.rand(1, 3, 112, 112)).shape == (1, 128)
    first, second = (
        Recogniser.open(place / f"{n}.safetensors").config.network.kind
        for n in ("recogniser", "metric_recogniser")
    )
    assert first != second
    encoder = ImageEncoder.open(place / "image_encoder.safetensors")
    assert encoder.encode(torch.rand(1, 3, 128, 128))[0].shape == (1, 16)
    assert encoder.config.name == own_name(encoder)
    next(encoder.visual.parameters()).data.add_(0.1)
    assert encoder.config.name != own_name(encoder)
    checker = PortraitNet.open(place / "attribute_heads.safetensors")
    assert set(checker(torch.rand(1, 3, 128, 128))) == {*ATTRIBUTES, "identity"}
    features = PortraitNet.open(place / "self_supervised.safetensors")
    assert features.features(torch.rand(2, 3, 64, 64)).shape == (2, 24)
    assert open_landmark_network(place / "landmarks.safetensors").points == 5
    assert manifest["landmarks.safetensors"]["figures"]["error_of_width"] > 0


@pytest.mark.parametrize("other", ["recogniser", "self_supervised"])
def test_another_file_than_a_checkers_is_named(tmp_path: Path, other: str) -> None:
    tensors, header = read_safetensors(MINI_FOLDER / f"{other}.safetensors")
    tensors.pop("places.weight", None)
    write_safetensors(tmp_path / "x.safetensors", tensors, header)
    with pytest.raises(BadWeightsFile, match=r"x\.safetensors is not a checker of ours: "):
        PortraitNet.open(tmp_path / "x.safetensors")


def test_the_shipped_network_reads_points_of_strangers() -> None:
    network = Recogniser.open(MINI_FOLDER / "landmarks.safetensors")
    run_config = RunConfig(seed=5, device="cpu")
    assert landmarks.measure_landmarks(network, 40, run_config)["error_of_width"] < 0.05


def test_squares_of_training_keep_points_on_their_faces() -> None:
    """White dots at the points of black pictures are where the square says they are."""
    torch.manual_seed(0)
    batch = landmarks.draw_examples(40, generator_for(0, 0), torch.device("cpu"))
    pictures = torch.zeros(40, 1, 128, 128)
    spots = batch["points"].round().long().clamp(0, 127)
    rows = torch.arange(40)[:, None]
    pictures[rows, 0, spots[..., 1], spots[..., 0]] = 1
    batch |= {"images": pictures.expand(-1, 3, -1, -1), "points": spots.float()}
    squares, points = landmarks.jittered(batch)
    places = ((points + 1) * 56).round().long()
    inside = ((places > 1) & (places < 110)).all(-1)
    assert inside.float().mean() > 0.9
    near = F.max_pool2d(squares[:, 0], 3, 1, 1)
    places = places.clamp(0, 111)
    assert (near[rows, places[..., 1], places[..., 0]][inside] > 0.05).all()


def test_time_budget_is_measured_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "attribute_heads")
    config = from_dict(Config, _merged(config, {"encoders": {"minutes": 0.5}}))
    folder = RunFolder.create(tmp_path, "train-encoders")
    run(config, folder)
    plan = folder.path / "attribute_heads" / "plan.json"
    before = plan.read_text()
    assert json.loads(before)["seconds_per_step"] > 0
    run(config, folder)
    assert plan.read_text() == before


def test_more_minutes_plan_more_steps_of_the_same_length(tmp_path: Path) -> None:
    folder, module = RunFolder.create(tmp_path, "x"), nn.Linear(1, 1)
    folder.write_text("plan.json", json.dumps({"seconds_per_step": 0.5}))
    folder.save(1, {}, {}, keep_last=1)

    def never(i: int) -> dict[str, Tensor]:
        raise AssertionError

    planned = [budget._planned_steps({"x": module}, folder, never, m) for m in (1.0, 3.0)]
    assert planned == [102, 306]


def _merged(config: Config, data: dict) -> dict:
    from difflora_core.config import to_dict

    merged = to_dict(config)
    merged["encoders"] |= data["encoders"]
    return merged


@pytest.mark.parametrize("parallel", [False, True])
def test_another_training_of_any_encoder_is_refused_before_one_trains(
    tmp_path: Path, parallel: bool
) -> None:
    config = tiny_config(tmp_path, "landmarks", "attribute_heads")
    folder = RunFolder.create(tmp_path, "train-encoders")
    other = replace(config, run=replace(config.run, seed=5))
    trained_for.begin(part := folder.part("attribute_heads"), decisive(other, "attribute_heads"))
    part.save(1, {}, {}, keep_last=1)
    config = replace(config, encoders=replace(config.encoders, parallel=parallel))
    with pytest.raises(BadConfig, match=r"attribute_heads was trained with run\.seed = 5"):
        run(config, folder)
    assert not (folder.path / "landmarks").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (BadConfig("Nothing fits.", hint="Try another one."), "Nothing fits. Try another one."),
        (OSError(28, "No space left on device", "a.pt"), "No space left on device: a.pt. Check"),
    ],
)
def test_what_fails_in_a_process_of_its_own_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    says: str,
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(stage, "train_one", refuse)
    with pytest.raises(SystemExit) as ended:
        stage._work("landmarks", tiny_config(tmp_path, "landmarks"), tmp_path)
    assert ended.value.code == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"landmarks: {says}")


def test_unknown_encoder_names_the_nearest(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "recognizer")
    with pytest.raises(BadConfig, match="Did you mean recogniser"):
        run(config, RunFolder.create(tmp_path, "train-encoders"))
