"""The head without its features: hair behind, neck, ears, face, beard, hair in front."""

from __future__ import annotations

import torch
from torch import Tensor

from .anatomy import Anatomy, Pose
from .canvas import Canvas, box, cover, ellipse, outline, soft

#: strength of the line around hair: without it white hair fades into a bright background
HAIR_LINE = 0.75
#: and around chin and neck, which part from a beard and a background of their colour by it
SKIN_LINE = 0.6


def draw_back_hair(canvas: Canvas, who: Anatomy, pose: Pose) -> Tensor:
    """Hair behind the neck; returns its cover [B, H, W]."""
    u, v = pose.head(canvas.x, canvas.y)
    u = u + 2.0 * pose.yaw
    spread = who.width + 2.2 + 6.0 * who.hair_volume
    length = _length(who)
    nape = 0.15 * who.height  # a dome that goes on along the jaw looks like a beard
    dome = ellipse(u, v + 4, spread, who.height + 2 + 4 * who.hair_volume).maximum(v - nape)
    middle = (length - 6) / 2
    widening = spread * (0.93 + 0.1 * who.hair_volume)
    curtain = box(u, v - middle, widening, (length + 6).clamp(min=0) / 2, 5.0)
    distance, pixel = torch.minimum(dome, curtain), canvas.pixel * pose.scale
    long = who.hair_length > 0.06
    shape = cover(distance, pixel) * long
    canvas.paint(shape, who.hair * 0.8)
    canvas.paint(HAIR_LINE * outline(distance, 0.6, pixel) * long, who.hair * 0.25)
    return shape


def _length(who: Anatomy) -> Tensor:
    """How far down hair hangs: not to the chin's own height, where it looks like a beard."""
    length = -6.0 + 62.0 * who.hair_length
    long = length > 0.75 * who.height
    return torch.where(long, length.maximum(who.height + 9.0), length.minimum(0.45 * who.height))


def draw_neck(canvas: Canvas, who: Anatomy, pose: Pose) -> Tensor:
    u, v = pose.body(canvas.x, canvas.y)
    half = 7.2 + 0.16 * who.width
    distance, pixel = box(u, v - 33, half, 15.0, 4.0), canvas.pixel * pose.scale
    shape = cover(distance, pixel)
    shadow = 1 - 0.3 * soft(v - who.height - 5, 9.0)
    canvas.paint(shape, who.skin[:, :, None, None] * (0.92 * shadow).unsqueeze(1))
    canvas.paint(SKIN_LINE * outline(distance, 0.6, pixel), who.skin * 0.45)
    return shape


def draw_face(canvas: Canvas, who: Anatomy, pose: Pose) -> Tensor:
    """Ears and the face itself; returns its cover."""
    u, v = pose.head(canvas.x, canvas.y)
    pixel = canvas.pixel * pose.scale
    ears = _ears(u, v, who, pose)
    canvas.paint(cover(ears, pixel), who.skin * 0.9)
    distance = face_distance(u, v, who, pose)
    face = cover(distance, pixel)
    canvas.paint(face, _shaded_skin(u, v, who, pose))
    _beard(canvas, u, v, face, who, pose)
    jaw = soft(4.0 - v, 6.0)
    canvas.paint(SKIN_LINE * jaw * outline(distance, 0.6, pixel), who.skin * 0.45)
    return torch.maximum(face, cover(ears, pixel))


def face_distance(u: Tensor, v: Tensor, who: Anatomy, pose: Pose) -> Tensor:
    """An egg: an ellipse whose lower half narrows, the more the less square the jaw."""
    u = u - 1.5 * pose.yaw
    down = (v / who.height).clamp(0, 1)
    narrow = 1 - (0.36 - 0.34 * who.jaw) * down * down
    bulge = 1 + (0.16 * who.jaw) * down * (1 - down) * 2
    return ellipse(u / (narrow * bulge), v, who.width, who.height)


def _ears(u: Tensor, v: Tensor, who: Anatomy, pose: Pose) -> Tensor:
    reach = who.width + 0.3
    left = ellipse(u + reach - 3.2 * pose.yaw.clamp(min=0), v - 1, 3.4, 6.2)
    right = ellipse(u - reach - 3.2 * pose.yaw.clamp(max=0), v - 1, 3.4, 6.2)
    return torch.minimum(left, right)


def _shaded_skin(u: Tensor, v: Tensor, who: Anatomy, pose: Pose) -> Tensor:
    """Skin [B, 3, H, W]: darker towards the rim, rosy on the cheeks."""
    rim = (u / who.width) ** 2 + (v / who.height) ** 2
    light = 1.03 - 0.14 * rim.clamp(0, 1.3) ** 2
    skin = who.skin[:, :, None, None] * light.unsqueeze(1)
    cheeks = torch.zeros_like(rim)
    for side in (-1.0, 1.0):
        cheek = ellipse(u - pose.turned(side * 12.5, 0.6), v - 9, 6.0, 4.5)
        cheeks = cheeks + soft(cheek + 2, 6.0)
    blush = torch.tensor([0.86, 0.36, 0.34], device=u.device)[None, :, None, None]
    return torch.lerp(skin, blush * skin.mean(1, keepdim=True) * 1.3, 0.2 * cheeks.unsqueeze(1))


def _beard(canvas: Canvas, u: Tensor, v: Tensor, face: Tensor, who: Anatomy, pose: Pose) -> None:
    """Along the jaw and over the whole chin: a strap alone looks like hair around the face, and
    on the cheeks and around the mouth it looks like dirt.
    """
    down = (v / who.height).clamp(0, 1)
    depth = face_distance(u, v, who, pose) + (2.0 + 1.5 * who.beard) * (1 + down)
    jaw = torch.minimum(soft(-depth, 1.5), soft(0.1 * who.height - v, 3.0))
    beside = ((u - pose.turned(0.0)).abs() - who.mouth_width).clamp(min=0)
    chin = soft(who.mouth_y + 4.0 + who.lips - 0.8 * beside - v, 1.5)
    strength = (6 * who.beard).clamp(max=0.9)
    canvas.paint(face * torch.maximum(jaw, chin) * strength, who.hair * 0.85)


def draw_front_hair(canvas: Canvas, who: Anatomy, pose: Pose) -> Tensor:
    """Hair on top of the head, with its fringe and strands; returns its cover."""
    u, v = pose.head(canvas.x, canvas.y)
    u = u + 1.2 * pose.yaw
    spread = who.width + 1.6 + 4.2 * who.hair_volume
    top = who.height + 2.5 + 5.5 * who.hair_volume
    dome = ellipse(u, v + 2.0, spread, top)
    line, slope = _hairline(u, who)
    distance = torch.maximum(dome, (v - line) / (1 + slope * slope).sqrt())
    pixel = canvas.pixel * pose.scale
    shape = cover(distance, pixel)
    canvas.paint(shape, _strands(u, v, who))
    canvas.paint(HAIR_LINE * outline(distance, 0.6, pixel), who.hair * 0.25)
    return shape


def _hairline(u: Tensor, who: Anatomy) -> tuple[Tensor, Tensor]:
    """Where hair ends above the face, and how steeply that falls, at the places u."""
    across = u / who.width + 0.14 * (1 - who.fringe)
    bend = 0.62 * who.height * (1.2 - 0.75 * who.fringe)
    fall = 34.0 * (0.25 + 0.75 * (who.hair_length > 0.2))
    beyond = (u.abs() / who.width - 0.9).clamp(min=0)
    line = who.hairline + bend * across**2
    above = line < who.eye_y - 5.5  # hair over the corner of an eye looks like a broken eye
    line = line.minimum(who.eye_y - 5.5) + fall * beyond
    slope = (2 * bend * across * above + fall * (beyond > 0) * u.sign()) / who.width
    return line, slope


def _strands(u: Tensor, v: Tensor, who: Anatomy) -> Tensor:
    wave = torch.sin(u * 1.1 + 0.5 * torch.sin(v * 0.35)) * torch.sin(v * 0.12 + u * 0.3)
    shine = soft(((u + 6) / 15) ** 2 + ((v + who.height * 0.85) / 6) ** 2 - 1, 2.0)
    light = 1.0 + 0.1 * wave + 0.25 * shine
    colour = who.hair[:, :, None, None] * light.unsqueeze(1)
    return (colour + 0.07 * shine.unsqueeze(1)).clamp(0, 1)
