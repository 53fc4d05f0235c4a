"""Scenes to pictures, with the ground truth that a photograph never comes with."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import features, head, wear
from .anatomy import Anatomy, Pose, measure
from .backgrounds import draw_background
from .canvas import Canvas
from .scene import Scene
from .styles import apply_style

#: on a CPU, pictures drawn at a time: the working set then stays in the cache
CPU_CHUNK = 16


@dataclass(frozen=True)
class Portraits:
    """Drawn pictures [B, 3, S, S] (0..1) and what is true about them.

    boxes [B, P, 4] face boxes (x0, y0, x1, y1), landmarks [B, P, 5, 2] (eyes, nose tip, mouth
    corners; left of the picture first), both in pixels and NaN for absent people;
    masks [B, P, S, S] bool, the visible pixels of each person; identity [B, P, 20];
    present [B, P] bool; attributes name -> index [B] (of the first person).
    """

    images: Tensor
    boxes: Tensor
    masks: Tensor
    landmarks: Tensor
    identity: Tensor
    present: Tensor
    attributes: dict[str, Tensor]

    def face_pixels(self) -> Tensor:
        """1 inside the face boxes, float32 [B, S, S]."""
        size = self.images.shape[-1]
        axis = torch.arange(size, device=self.images.device) + 0.5
        boxes = self.boxes.nan_to_num(-1)[..., None]
        across = (axis > boxes[:, :, 0]) & (axis < boxes[:, :, 2])
        down = (axis > boxes[:, :, 1]) & (axis < boxes[:, :, 3])
        return (across[:, :, None, :] & down[:, :, :, None]).any(1).float()


@torch.no_grad()
def render(scene: Scene, size: int = 128) -> Portraits:
    """Draw scenes, each independent of the others in the batch, on the scene's device."""
    chunk = len(scene) if scene.style.is_cuda else CPU_CHUNK
    parts = [_render(scene[i : i + chunk], size) for i in range(0, len(scene), max(chunk, 1))]
    images, masks, boxes, points = (torch.cat(p) for p in zip(*parts, strict=True))
    return Portraits(
        images, boxes, masks, points, scene.identity, scene.present, scene.attributes()
    )


def _render(scene: Scene, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, people = scene.present.shape
    device = scene.style.device
    canvas = Canvas.blank(n, size, device)
    draw_background(canvas, scene.background, scene.texture)
    masks = torch.zeros(n, people, size, size, dtype=torch.bool, device=device)
    boxes = torch.full((n, people, 4), torch.nan, device=device)
    points = torch.full((n, people, 5, 2), torch.nan, device=device)
    for person in range(people):
        index = scene.present[:, person].nonzero()[:, 0]
        if not len(index):
            continue
        part, some = canvas.rows(index), scene[index]
        mask, box, marks = _draw_person(part, some, person)
        canvas.put_rows(index, part)
        masks[index] &= ~mask[:, None]  # whoever is drawn later stands in front
        masks[index, person] = mask
        boxes[index, person] = box * canvas.pixel
        points[index, person] = marks * canvas.pixel
    apply_style(canvas, scene.style, scene.light, scene.texture)
    return canvas.image.clamp_(0, 1), masks, boxes, points


def _draw_person(canvas: Canvas, scene: Scene, person: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one person of each picture; returns mask [B, S, S], box [B, 4], landmarks [B, 5, 2]."""
    who, pose = measure(scene.identity[:, person]), Pose.of(scene, person)
    kind, colour = scene.clothes[:, person], scene.clothes_colour[:, person]
    expression, worn = scene.expression[:, person], scene.accessory[:, person]
    covers = [
        wear.draw_body(canvas, who, pose, kind, colour),
        head.draw_back_hair(canvas, who, pose),
        head.draw_neck(canvas, who, pose),
    ]
    wear.draw_collar(canvas, who, pose, kind, colour)
    covers.append(head.draw_face(canvas, who, pose))
    features.draw_features(canvas, who, pose, expression)
    covers.append(head.draw_front_hair(canvas, who, pose))
    covers.append(wear.draw_accessory(canvas, who, pose, worn, scene.texture[:, 7]))
    mask = torch.stack(covers).amax(0) > 0.5
    return mask, face_box(who, pose), features.landmarks(who, pose, expression)


def face_box(who: Anatomy, pose: Pose) -> Tensor:
    """Upright box [B, 4] around the face from hairline to chin, in units."""
    zero = torch.zeros_like(who.width)
    corners = [(-who.width, zero), (who.width, zero), (zero, -who.height * 0.9), (zero, who.height)]
    xy = [pose.to_picture((u + 1.5 * pose.yaw)[:, 0, 0], v[:, 0, 0]) for u, v in corners]
    x = torch.stack([p[0] for p in xy])
    y = torch.stack([p[1] for p in xy])
    return torch.stack([x.amin(0), y.amin(0), x.amax(0), y.amax(0)], -1)


def renderer_digest() -> str:
    """Of this package's code: another one may mean other scenes, prompts or drawings.

    Comments and line breaks do not count.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    code = "".join(ast.unparse(ast.parse(path.read_bytes())) for path in sources)
    return hashlib.sha256(code.encode()).hexdigest()[:12]
