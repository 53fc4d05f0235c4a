"""Training of the face detector on drawn people, one to three in a picture, at every size."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..budget import train
from ..drawing import generator_for
from ..example_pool import Examples, Pool, as_bytes
from ..loop import Trainer
from ..portraits import Scene, render, sample_scenes
from ..run_config import RunConfig
from ..run_folder import RunFolder
from .config import EncodersConfig
from .damage import damage
from .detector_loss import detector_loss
from .detector_net import MEAN, STD, STRIDES, Detector

#: drawn larger than the mini world's pictures, so that large faces are sharp
DRAWN_SIZE = 256
#: pictures without anybody, and pictures cut into tiles and shuffled: what is not a face
EMPTY_SHARE, SHUFFLED_SHARE = 0.06, 0.06
#: side of the picture on the canvas, as a share of the canvas
ZOOM = (0.35, 1.8)


def train_detector(config: EncodersConfig, run: RunConfig, folder: RunFolder) -> Detector:
    """Train; returns the averaged network, in evaluation mode."""
    device, settings = run.torch_device(), config.detector
    torch.manual_seed(run.seed)
    detector = Detector(settings.widths).to(device)
    chunk = max(config.chunk // 4, 1)
    pool = Pool(
        lambda k: draw_examples(chunk, generator_for(run.seed, k), device),
        config.pool // 4, config.reuse,
    )  # fmt: skip

    def step(i: int) -> dict[str, Tensor]:
        side = settings.canvases[i % len(settings.canvases)]
        batch = max(settings.batch * settings.canvases[0] // side, 1)
        images, boxes, points, present = place(pool.draw(batch), side)
        levels = detector.levels(normalise(images))
        return detector_loss(levels, side, boxes, points, present)

    modules: dict[str, torch.nn.Module] = {"detector": detector}
    trainer: Trainer = train(
        modules, settings.optim, run, folder, step,
        batch=settings.batch, minutes=config.minutes, pool=pool,
    )  # fmt: skip
    detector.load_state_dict(trainer.averaged("detector"))
    return detector.eval()


def draw_examples(count: int, generator: torch.Generator, device: torch.device) -> Examples:
    """Pictures of nobody, one, two or three people: images, boxes, landmarks, present."""
    third = -(-count // 3)
    parts: list[Examples] = []
    for people, share in ((1, count - 2 * (third // 2)), (2, third // 2), (3, third // 2)):
        if not share:
            continue
        scene = sample_scenes(share, generator, people=people, device=device)
        nobody = torch.rand(share, 1, generator=generator) < EMPTY_SHARE
        scene = replace(scene, present=scene.present & ~nobody.to(device))
        parts.append(_examples(scene))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _examples(scene: Scene) -> Examples:
    drawn = render(scene, DRAWN_SIZE)
    missing = 3 - drawn.present.shape[1]
    return {
        "images": as_bytes(drawn.images),
        "boxes": F.pad(drawn.boxes, (0, 0, 0, missing)),
        "landmarks": F.pad(drawn.landmarks, (0, 0, 0, 0, 0, missing)),
        "present": F.pad(drawn.present, (0, missing)),
    }


def place(examples: Examples, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put pictures on square canvases, enlarged or shrunk, shifted, some mirrored, all damaged.

    Returns: images [B, 3, side, side], boxes [B, 3, 4] and landmarks [B, 3, 5, 2] in pixels of the
    canvas, present [B, 3].
    """
    images, count = examples["images"], len(examples["images"])
    device = images.device
    span = math.log(ZOOM[1] / ZOOM[0])
    middle = ZOOM[0] * math.exp(span * float(torch.rand(())))
    zoom = middle * torch.exp(0.4 * (torch.rand(count, 1, device=device) - 0.5))
    images = _tiles_shuffled(images, SHUFFLED_SHARE, examples["present"])
    source = images
    while source.shape[-1] > 64 and middle * side < 0.6 * source.shape[-1]:
        source = F.avg_pool2d(source, 2)
    room = (1 - zoom).abs() * 0.5 + 0.1
    shift = 0.5 - zoom / 2 + room * (2 * torch.rand(count, 2, device=device) - 1)
    canvas = _sample(source, zoom, shift, side)
    to_pixels = side * zoom[:, None] / DRAWN_SIZE
    offset = side * shift[:, None]
    boxes = examples["boxes"] * to_pixels + offset.repeat(1, 1, 2)
    points = examples["landmarks"] * to_pixels[..., None] + offset[:, :, None]
    present = examples["present"] & _inside(boxes, side)
    canvas, boxes, points = mirror(canvas, boxes, points, torch.rand(count, device=device) < 0.5)
    return damage(canvas), boxes, points, present


def _sample(images: Tensor, zoom: Tensor, shift: Tensor, side: int) -> Tensor:
    """The picture spans shift..shift+zoom of the canvas (0..1); around it black or one colour."""
    device = images.device
    axis = (torch.arange(side, device=device) + 0.5) / side
    x = (axis - shift[:, :1]) / zoom * 2 - 1
    y = (axis - shift[:, 1:]) / zoom * 2 - 1
    shape = (len(images), side, side)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1)
    canvas = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    outside = (grid.abs().amax(-1) > 1)[:, None]
    colour = torch.rand(len(images), 3, 1, 1, device=device)
    colour = colour * (torch.rand(len(images), 1, 1, 1, device=device) < 0.5)
    return torch.where(outside, colour, canvas)


def _inside(boxes: Tensor, side: int) -> Tensor:
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    return ((centre > 0) & (centre < side)).all(-1)


def mirror(
    images: Tensor, boxes: Tensor, points: Tensor, which: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror some pictures; left and right landmarks change places."""
    side = images.shape[-1]
    flipped = points[:, :, [1, 0, 2, 4, 3]]
    flipped = torch.stack([side - flipped[..., 0], flipped[..., 1]], -1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    turned = torch.stack([side - x2, y1, side - x1, y2], -1)
    images = torch.where(which[:, None, None, None], images.flip(-1), images)
    boxes = torch.where(which[:, None, None], turned, boxes)
    return images, boxes, torch.where(which[:, None, None, None], flipped, points)


def _tiles_shuffled(images: Tensor, share: float, present: Tensor) -> Tensor:
    """Shuffle the tiles of some pictures and mark their people as absent (in place)."""
    which = torch.rand(len(images), device=images.device) < share
    present[which] = False
    tiles = rearrange(images, "b c (y i) (x j) -> b (y x) c i j", y=8, x=8)
    tiles = tiles[:, torch.randperm(64, device=images.device)]
    mixed = rearrange(tiles, "b (y x) c i j -> b c (y i) (x j)", y=8)
    return torch.where(which[:, None, None, None], mixed, images)


def normalise(images: Tensor) -> Tensor:
    """0..1 to what insightface feeds the detector."""
    return (images * 255 - MEAN) / STD


@torch.no_grad()
def measure_detector(detector: Detector, seed: int, count: int) -> dict[str, float]:
    """Recall and precision at score 0.5 and IoU 0.5 on fresh pictures at their own size, 128 px."""
    device = next(detector.parameters()).device
    examples = draw_examples(count, generator_for(seed, 10**6), device)
    images = F.avg_pool2d(examples["images"].float() / 255, 2)
    found = right = 0
    errors = []
    for i, image in enumerate(images):
        boxes, points = detect(detector, image)
        here = examples["present"][i]
        truth, marks = (examples[k][i][here].cpu() / 2 for k in ("boxes", "landmarks"))
        found += len(boxes)
        if len(boxes) and len(truth):
            overlap, which = box_iou(truth, boxes).max(1)
            right += int((overlap > 0.5).sum())
            width = (truth[:, 2] - truth[:, 0])[:, None]
            errors.append(((points[which] - marks).norm(dim=-1) / width)[overlap > 0.5].flatten())
    people = int(examples["present"].sum())
    return {
        "recall": right / max(people, 1),
        "precision": right / max(found, 1),
        "landmark_error_of_width": float(torch.cat(errors).mean()) if errors else math.nan,
    }


def detect(detector: Detector, image: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] and landmarks [N, 5, 2] in a picture [3, H, W], on the CPU, as insightface
    decodes them.
    """
    all_scores, all_boxes, all_points = [], [], []
    height, width = image.shape[-2:]
    levels = [[part.cpu() for part in level] for level in detector(normalise(image)[None])]
    for (score, box, point), stride in zip(levels, STRIDES, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height // stride), torch.arange(width // stride), indexing="ij"
        )
        centre = torch.stack([x, y], -1).float()[:, :, None] * stride
        sides = box[0] * stride
        corners = torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], -1)
        all_scores.append(score.sigmoid().flatten())
        all_boxes.append(corners.reshape(-1, 4))
        spots = centre[..., None, :] + point[0].unflatten(-1, (5, 2)) * stride
        all_points.append(spots.reshape(-1, 5, 2))
    scores, boxes, points = (torch.cat(v) for v in (all_scores, all_boxes, all_points))
    some = (scores > threshold) & (scores >= scores.topk(min(300, len(scores))).values[-1])
    scores, boxes, points = scores[some], boxes[some], points[some]
    keep = suppress(boxes, scores)
    return boxes[keep], points[keep]


def suppress(boxes: Tensor, scores: Tensor, limit: float = 0.4) -> list[int]:
    """Greedy non-maximum suppression of boxes: kept indices, best first."""
    left = scores.argsort(descending=True).tolist()
    overlap = box_iou(boxes, boxes)
    keep: list[int] = []
    while left:
        keep.append(left.pop(0))
        left = [i for i in left if overlap[keep[-1], i] <= limit]
    return keep


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """[N, 4] and [M, 4] -> IoU [N, M]."""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (first, second)]
    return overlap / (areas[0][:, None] + areas[1] - overlap)
