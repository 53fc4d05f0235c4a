"""The exported pack in the real insightface, and the shipped one on people never trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difflora_core.errors import BadWeightsFile, LayoutMismatch
from difflora_core.face import FaceEncoder
from difflora_core.face_crop import align
from difflora_core.face_pack import find_pack
from difflora_core.recogniser import IResNetConfig, Recogniser, RecogniserConfig
from training.artifacts import SHIPPED, artifacts_folder
from training.config import Config
from training.drawing import generator_for, pictures_of
from training.encoders import detector as training
from training.encoders.detector_loss import detector_loss
from training.encoders.detector_net import Detector
from training.encoders.export_face_pack import export_detector, export_recogniser
from training.encoders.face_pack import (
    RECOGNISER_FILE,
    face_encoder_name,
    open_face_encoder,
)
from training.example_pool import Examples
from training.portraits import render, sample_scenes
from training.run_config import RunConfig

pytest.importorskip("insightface")
pytest.importorskip("onnx")

STEPS = 300


def pixels(image: torch.Tensor) -> np.ndarray:
    return (image.permute(1, 2, 0) * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Six pictures of one, two and three people at 128 px."""
    drawn = training.draw_examples(6, generator_for(0, 0), torch.device("cpu"))
    drawn["images"] = F.avg_pool2d(drawn["images"].float() / 255, 2)
    return drawn | {"boxes": drawn["boxes"] / 2, "landmarks": drawn["landmarks"] / 2}


@pytest.fixture(scope="module")
def memorised(examples: Examples) -> Detector:
    """A detector that knows six pictures by heart (about twenty seconds)."""
    torch.manual_seed(0)
    detector = Detector((8, 16, 24, 32, 32), 24)
    optimiser = torch.optim.Adam(detector.parameters(), lr=5e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    images = training.normalise(examples["images"])
    truth = (examples["boxes"], examples["landmarks"], examples["present"])
    for _ in range(STEPS):
        loss = detector_loss(detector.levels(images), 128, *truth)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        detector(images)
    return detector.eval()


@pytest.fixture(scope="module")
def twin() -> Recogniser:
    torch.manual_seed(0)
    return Recogniser(RecogniserConfig(IResNetConfig())).half().float().eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, memorised: Detector, twin: Recogniser) -> Path:
    root = tmp_path_factory.mktemp("insightface")
    place = root / "models" / "mini"
    assert export_detector(memorised, place / "det_mini.onnx") < 1e-3
    assert export_recogniser(twin, place / "rec_mini.onnx") < 1e-4
    assert (place / "rec_mini.onnx").stat().st_size < 1_500_000  # half precision
    return root


def test_real_face_analysis_finds_what_the_torch_detector_finds(
    root: Path, memorised: Detector, examples: Examples
) -> None:
    encoder = FaceEncoder(FaceEncoder.open(root).analysis, "mini", sizes=(128,))
    for i in range(6):
        picture = pixels(examples["images"][i])
        image = torch.from_numpy(picture).permute(2, 0, 1) / 255
        with torch.no_grad():
            boxes, points = training.detect(memorised, image, threshold=0.6)
        truth = examples["boxes"][i][examples["present"][i]]
        hits = training.box_iou(boxes, truth)
        assert (hits.max(0).values > 0.5).all()  # every face is found
        on_face = hits.max(1).values > 0.5  # others are at the threshold
        boxes, points = boxes[on_face], points[on_face]
        faces = encoder.faces(picture)
        found = torch.from_numpy(np.stack([face.box for face in faces]))
        overlap, which = training.box_iou(boxes, found).max(1)
        assert overlap.min() > 0.99
        theirs = np.stack([faces[k].landmarks for k in which.tolist()])
        assert np.abs(theirs - points.numpy()).max() < 0.1


def test_embedding_is_the_torch_twins(root: Path, twin: Recogniser, examples: Examples) -> None:
    from insightface.utils.face_align import norm_crop

    encoder = FaceEncoder(FaceEncoder.open(root).analysis, "mini", sizes=(128,))
    picture = pixels(examples["images"][0])
    face = encoder.face(picture)
    crop = torch.from_numpy(norm_crop(picture, face.landmarks)).permute(2, 0, 1)[None] / 255
    own = align(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255,
                torch.from_numpy(face.landmarks)[None])  # fmt: skip
    with torch.no_grad():
        expected, ours = twin(crop)[0].numpy(), twin(own)[0].numpy()
    assert np.abs(face.embedding - expected).max() < 1e-4
    assert np.corrcoef(ours, expected)[0, 1] > 0.9  # cv2 rounds to 1/32 pixel
    assert (own - crop).abs().mean() < 0.01
    assert face.embedding.shape == (128,) and face.sharpness > 0


def test_incomplete_packs_say_what_is_missing(root: Path, tmp_path: Path) -> None:
    source = root / "models" / "mini"
    for name, missing in (("det_mini.onnx", "a recogniser"), ("rec_mini.onnx", "a detector")):
        place = tmp_path / missing[2:] / "models" / "mini"
        place.mkdir(parents=True)
        (place / name).write_bytes((source / name).read_bytes())
        with pytest.raises(BadWeightsFile, match=rf"lacks {missing}; found there: {name}"):
            FaceEncoder.open(tmp_path / missing[2:])


SHIPPED_PACK = SHIPPED / "insightface"
shipped = pytest.mark.skipif(
    not (SHIPPED_PACK / "models" / "mini").exists(), reason="no face pack is shipped yet"
)


@shipped
def test_shipped_pack_in_plain_insightface() -> None:
    """As any other node pack would load it, at insightface's own default sizes."""
    from insightface.app import FaceAnalysis

    analysis = FaceAnalysis(
        name="mini", root=str(SHIPPED_PACK), providers=["CPUExecutionProvider"],
        allowed_modules=["detection", "recognition"],
    )  # fmt: skip
    analysis.prepare(ctx_id=-1)
    drawn = pictures_of(torch.arange(12), 1, generator_for(5, 0), torch.device("cpu"))
    faces = [analysis.get(pixels(image)[..., ::-1]) for image in drawn.images]
    assert sum(len(found) >= 1 for found in faces) >= 11
    assert faces[0][0].normed_embedding.shape == (128,)


@shipped
@pytest.mark.parametrize("size", [128, 320])
@pytest.mark.parametrize("people", [1, 2, 3])
def test_shipped_pack_counts_people(size: int, people: int) -> None:
    encoder = FaceEncoder.open(SHIPPED_PACK)
    generator = torch.Generator().manual_seed(people)
    drawn = render(sample_scenes(8, generator, people=people, split="test"), size)
    counts = [len(encoder.faces(pixels(image))) for image in drawn.images]
    assert sum(count == people for count in counts) >= 7, counts


@shipped
def test_shipped_pack_sees_nobody_where_nobody_is() -> None:
    encoder = FaceEncoder.open(SHIPPED_PACK)
    x, y = np.meshgrid(np.arange(128), np.arange(128))
    gradient = np.stack([x * 2, y * 2, 255 - x], -1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    for picture in (gradient, noise, np.zeros_like(noise), noise // 128 * 255):
        assert encoder.faces(picture) == []


@shipped
def test_shipped_pack_tells_people_apart() -> None:
    unit = shipped_embeddings()[0]
    same = (unit[:, 0] * unit[:, 1]).sum(-1)
    different = (unit[:, 0] * unit[:, 1].roll(1, 0)).sum(-1)
    assert same.mean() > different.mean() + 0.3


@shipped
@pytest.mark.parametrize("side", [256, 1024])
def test_shipped_pack_knows_people_in_larger_pictures(side: int) -> None:
    """Enlarged, faces fill more of the detector's field than it places well in one look."""
    unit, images, _ = shipped_embeddings()
    encoder = FaceEncoder.open(SHIPPED_PACK)
    large = F.interpolate(images.float(), (side, side), mode="bicubic").clamp(0, 255)
    faces = [encoder.face(image.permute(1, 2, 0).round().byte().numpy()) for image in large]
    seen = torch.from_numpy(np.stack([face.unit_embedding for face in faces]))
    assert (seen * unit.flatten(0, 1)).sum(-1).mean() > 0.8


@shipped
def test_shipped_pack_agrees_with_its_twin() -> None:
    unit, images, points = shipped_embeddings()
    twin = Recogniser.open(SHIPPED / "recogniser.safetensors")
    ours = twin.embed(images[:4].float() / 255, points[:4])
    assert (ours * unit.flatten(0, 1)[:4]).sum(-1).min() > 0.99


def shipped_embeddings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit embeddings [8 people, 3 photos, D], photos [24, 3, H, W], landmarks [24, 5, 2]."""
    encoder = FaceEncoder.open(SHIPPED_PACK)
    drawn = pictures_of(torch.arange(20, 28), 3, generator_for(9, 0), torch.device("cpu"))
    faces = [encoder.face(pixels(image)) for image in drawn.images]
    unit = torch.from_numpy(np.stack([face.unit_embedding for face in faces])).view(8, 3, -1)
    points = torch.from_numpy(np.stack([face.landmarks for face in faces]))
    images = torch.from_numpy(np.stack([pixels(image) for image in drawn.images]))
    return unit, images.permute(0, 3, 1, 2), points


def test_a_retrained_recogniser_has_a_name_of_its_own(
    root: Path, twin: Recogniser, tmp_path: Path
) -> None:
    config = Config(run=RunConfig(root=str(tmp_path / "run")))
    place = artifacts_folder(config)
    shutil.copytree(root / "models/mini", place / "insightface/models/mini")
    twin.save(place / "recogniser.safetensors")
    name = face_encoder_name(config)
    assert name.startswith("mini@")
    with pytest.raises(LayoutMismatch, match=f"of this run is {name}, that of its face pack mini"):
        open_face_encoder(config)
    training = name.removeprefix("mini@")
    export_recogniser(twin, place / RECOGNISER_FILE, training)
    assert open_face_encoder(config).name == name
    opened = FaceEncoder.open(place / "insightface", name)
    assert (opened.name, FaceEncoder.wrap(opened.analysis).name) == (name, name)
    copy = shutil.copytree(place / "insightface/models/mini", tmp_path / "packs" / name)
    assert FaceEncoder.open(tmp_path / "packs", name).name == name
    assert find_pack(tmp_path / "packs", name) == copy


@shipped
def test_the_shipped_recogniser_keeps_the_plain_name(tmp_path: Path) -> None:
    config = Config(run=RunConfig(root=str(tmp_path)))
    assert face_encoder_name(config) == open_face_encoder(config).name == "mini"
