"""What people wear: five kinds of clothes and six accessories."""

from __future__ import annotations

import torch
from torch import Tensor

from .anatomy import Anatomy, Pose
from .canvas import Canvas, box, choose, circle, cover, ellipse, outline, soft, wide
from .vocabulary import ACCESSORIES, CLOTHES

CLOTH_COLOURS = (
    (0.82, 0.14, 0.16), (0.16, 0.32, 0.76), (0.15, 0.55, 0.27), (0.95, 0.82, 0.2),
    (0.52, 0.22, 0.66), (0.95, 0.52, 0.12), (0.1, 0.1, 0.12), (0.95, 0.95, 0.95),
)  # fmt: skip
ACCENTS = (
    (0.16, 0.15, 0.18),
    (0.62, 0.24, 0.26),
    (0.14, 0.3, 0.5),
    (0.3, 0.36, 0.22),
    (0.42, 0.2, 0.5),
)
SCARF_COLOURS = CLOTH_COLOURS[:5]
GOLD = (0.93, 0.76, 0.25)
#: half width, half height and corner radius of a lens, in units of the head
LENS = (8.2, 6.4, 4.6)
_KIND = {name: i for i, name in enumerate(CLOTHES)}
_WORN = {name: i for i, name in enumerate(ACCESSORIES)}


def draw_body(canvas: Canvas, who: Anatomy, pose: Pose, kind: Tensor, colour: Tensor) -> Tensor:
    """Shoulders in their clothes, under the neck; returns their cover [B, H, W]."""
    u, v = pose.body(canvas.x, canvas.y)
    rise = 1.3e-4 * u.abs() ** 3
    slope = (1 + (3.9e-4 * u * u) ** 2).sqrt()
    torso = torch.maximum((43.5 + rise - v) / slope, u.abs() - 49.0)
    shape = cover(torso, canvas.pixel * pose.scale)
    cloth = choose(colour, CLOTH_COLOURS)
    folds = (
        1
        - 0.1 * soft(2.5 - (u.abs() - 27 - 0.1 * v).abs(), 5.0)
        - 0.07 * (v - 44).clamp(0, 40) / 40
    )
    surface = cloth[:, :, None, None] * folds.unsqueeze(1)
    surface = torch.where(
        wide(kind == _KIND["sweater"])[:, None], _striped(surface, v, cloth), surface
    )
    canvas.paint(shape, surface)
    canvas.paint(0.5 * outline(torso, 0.5, canvas.pixel * pose.scale), cloth * 0.4)
    return shape


def _striped(surface: Tensor, v: Tensor, cloth: Tensor) -> Tensor:
    stripe = soft((torch.remainder(v, 9.0) - 4.5).abs() - 2.2, 0.8)
    bright = cloth.mean(1) > 0.8
    other = torch.where(bright[:, None], torch.full_like(cloth, 0.2), torch.full_like(cloth, 0.96))
    return torch.lerp(surface, other[:, :, None, None].expand_as(surface), stripe.unsqueeze(1))


def draw_collar(canvas: Canvas, who: Anatomy, pose: Pose, kind: Tensor, colour: Tensor) -> None:
    """What lies over the neck, kind by kind."""
    painters = {
        "t-shirt": _round_neck, "sweater": _round_neck, "shirt": _shirt, "hoodie": _hoodie,
        "suit": _suit,
    }  # fmt: skip
    for name, painter in painters.items():
        index = (kind == _KIND[name]).nonzero()[:, 0]
        if len(index):
            part, place = canvas.rows(index), pose.rows(index)
            u, v = place.body(part.x, part.y)
            cloth = choose(colour[index], CLOTH_COLOURS)
            painter(part, u, v, part.pixel * place.scale, cloth, who.rows(index))
            canvas.put_rows(index, part)


def _round_neck(c: Canvas, u: Tensor, v: Tensor, px: Tensor, cloth: Tensor, who: Anatomy) -> None:
    neckline = ellipse(u, v - 41.5, 12.5, 6.5)
    skin = torch.maximum(neckline, 41.0 - v)
    c.paint(cover(skin, px), who.skin * 0.9)
    ring = torch.maximum(neckline.abs() - 1.3, 41.0 - v)
    c.paint(cover(ring, px), cloth * 0.78)


def _shirt(c: Canvas, u: Tensor, v: Tensor, px: Tensor, cloth: Tensor, who: Anatomy) -> None:
    opening = torch.maximum(u.abs() * 1.1 + v - 55.0, 42.0 - v) * 0.7
    c.paint(cover(opening, px), who.skin * 0.9)
    flap = torch.maximum(
        (u.abs() - 8.5).abs() - 5.0 + 0.22 * (v - 40), (v - 47.0 + 0.5 * u.abs() - 4).abs() - 5.5
    )
    c.paint(cover(flap, px), (cloth * 1.12).clamp(0, 1))
    c.paint(0.55 * outline(flap, 0.45, px), cloth * 0.5)
    line = torch.maximum(u.abs() - 0.5, 56.0 - v)
    c.paint(0.6 * cover(line, px), cloth * 0.55)
    buttons = circle(u, torch.remainder(v - 60, 9.0) - 4.5, 1.1).maximum(58.0 - v)
    c.paint(
        cover(buttons, px),
        torch.full_like(cloth, 0.9) * (0.35 + 0.65 * (cloth.mean(1, keepdim=True) < 0.8)),
    )


def _hoodie(c: Canvas, u: Tensor, v: Tensor, px: Tensor, cloth: Tensor, who: Anatomy) -> None:
    hood = ellipse(u, v - 41.0, 21.0, 9.5)
    hood = torch.maximum(hood, -ellipse(u, v - 37.5, 12.5, 7.5)).maximum(37.0 - v)
    c.paint(cover(hood, px), cloth * 0.8)
    c.paint(0.5 * outline(hood, 0.5, px), cloth * 0.45)
    for side in (-1.0, 1.0):
        string = torch.maximum((u - side * 6.5).abs() - 0.8, (v - 58.0).abs() - 9.0)
        c.paint(
            cover(string, px),
            torch.full_like(cloth, 0.93) * (0.25 + 0.75 * (cloth.mean(1, keepdim=True) < 0.8)),
        )


def _suit(c: Canvas, u: Tensor, v: Tensor, px: Tensor, cloth: Tensor, who: Anatomy) -> None:
    opening = torch.maximum(u.abs() * 1.9 + v - 74.0, 41.5 - v) * 0.47
    bright = (cloth.mean(1, keepdim=True) > 0.8).float()
    c.paint(cover(opening, px), torch.full_like(cloth, 0.97) * (1 - 0.75 * bright))
    collar = torch.maximum(u.abs() * 1.2 + v - 52.0, 42.0 - v) * 0.64
    c.paint(cover(collar, px), who.skin * 0.9)
    knot = torch.maximum(u.abs() - 2.6 + 0.15 * (v - 50), (v - 52.5).abs() - 2.6)
    tie = torch.maximum(u.abs() - 1.5 - 0.1 * (v - 53), 53.0 - v)
    red = torch.tensor([0.66, 0.1, 0.14], device=u.device).expand_as(cloth)
    c.paint(cover(torch.minimum(knot, tie).maximum(opening), px), red)
    lapel = torch.maximum(opening.abs() - 3.2, (v - 56).abs() - 15).maximum(-opening)
    c.paint(cover(lapel, px), (cloth * 0.7 + 0.06).clamp(0, 1))


def draw_accessory(
    canvas: Canvas, who: Anatomy, pose: Pose, worn: Tensor, accent: Tensor
) -> Tensor:
    """Glasses, hat and so on; accent [B] in 0..1 picks a colour. Returns cover [B, H, W]."""
    total = torch.zeros_like(canvas.image[:, 0])
    painters = {
        "glasses": _glasses, "sunglasses": _sunglasses, "hat": _hat, "scarf": _scarf,
        "headphones": _headphones, "earrings": _earrings,
    }  # fmt: skip
    for name, painter in painters.items():
        index = (worn == _WORN[name]).nonzero()[:, 0]
        if len(index):
            part, place = canvas.rows(index), pose.rows(index)
            table = SCARF_COLOURS if name == "scarf" else ACCENTS
            colour = choose((accent[index] * len(table)).long().clamp(max=len(table) - 1), table)
            total[index] = painter(part, place, who.rows(index), colour)
            canvas.put_rows(index, part)
    return total


def _lenses(u: Tensor, v: Tensor, who: Anatomy, pose: Pose, half: Tensor | float) -> Tensor:
    left = box(u - pose.turned(-who.eye_x), v - who.eye_y, half, *LENS[1:])
    right = box(u - pose.turned(who.eye_x), v - who.eye_y, half, *LENS[1:])
    return torch.minimum(left, right)


def _reach(who: Anatomy, pose: Pose) -> Tensor:
    """From the middle of a turned face to the middle of an eye."""
    return who.eye_x * (1 - 0.16 * pose.yaw.abs())


def _frame(u: Tensor, v: Tensor, who: Anatomy, pose: Pose, half: Tensor | float) -> Tensor:
    lenses = _lenses(u, v, who, pose, half)
    side = (u - pose.turned(0.0)).abs()
    reach = _reach(who, pose)
    edge = half - 1.0  # bridge and temples reach a little into the rims
    bridge = torch.maximum((v - who.eye_y + 1.5).abs() - 0.7, side - reach + edge)
    temples = torch.maximum((v - who.eye_y + 2).abs() - 0.7, reach + edge - side)
    temples = torch.maximum(temples, u.abs() - who.width - 0.5)
    return torch.minimum(lenses.abs() - 1.1, torch.minimum(bridge, temples))


def _glasses(c: Canvas, pose: Pose, who: Anatomy, colour: Tensor) -> Tensor:
    u, v = pose.head(c.x, c.y)
    px = c.pixel * pose.scale
    lenses = cover(_lenses(u, v, who, pose, LENS[0]), px)
    c.paint(0.12 * lenses, torch.ones_like(colour))
    shape = cover(_frame(u, v, who, pose, LENS[0]), px)
    c.paint(shape, colour * 0.45)
    return shape


def _sunglasses(c: Canvas, pose: Pose, who: Anatomy, colour: Tensor) -> Tensor:
    u, v = pose.head(c.x, c.y)
    half = (_reach(who, pose) - 1.6).clamp(max=LENS[0])  # near eyes, too, leave a bridge
    px = c.pixel * pose.scale
    glass = cover(_lenses(u, v, who, pose, half), px)
    tint = 0.01 + 0.05 * ((v - who.eye_y + 6) / 12).clamp(0, 1)
    c.paint(glass, tint.unsqueeze(1).expand(-1, 3, -1, -1))
    frame = cover(_frame(u, v, who, pose, half), px)
    c.paint(frame, colour * 0.35)
    return torch.maximum(glass, frame)


def _hat(c: Canvas, pose: Pose, who: Anatomy, colour: Tensor) -> Tensor:
    u, v = pose.head(c.x, c.y)
    px = c.pixel * pose.scale
    rim = -who.height * 0.62
    crown = torch.maximum(ellipse(u, v - rim, who.width + 4.5, 24.0), v - rim)
    brim = ellipse(u - pose.yaw, v - rim, who.width + 11.0, 5.4)
    c.paint(cover(crown, px), colour)
    band = torch.maximum(crown, rim - 9.0 - v)
    c.paint(cover(band, px), colour * 0.3 + 0.6)  # a light ribbon: black hats are seen at night
    c.paint(cover(brim, px), colour * 0.85)
    hat = torch.minimum(crown, brim)
    c.paint(0.8 * outline(hat, 0.6, px), colour * 0.25)
    return cover(hat, px)


def _scarf(c: Canvas, pose: Pose, who: Anatomy, colour: Tensor) -> Tensor:
    u, v = pose.body(c.x, c.y)
    px = c.pixel * pose.scale
    end = box(u - 9.0, v - 58.0, 6.0, 15.0, 1.5)
    sag = v - 41.0 - 0.008 * (18.0 - u.abs()).clamp(min=0) ** 2  # as cloth lies
    wrap = box(u, sag, 18.0, 6.5, 4.5)
    stripes = torch.maximum(end + 0.6, torch.remainder(v - 57.0, 7.0) - 1.4)
    folds = torch.maximum((torch.remainder(sag + 0.12 * u, 4.4) - 2.2).abs() - 0.5, wrap + 1.0)
    for part in (end, wrap):  # a wrap without an end, or without folds, looks like a plate
        c.paint(cover(part, px), colour)
        if part is end:
            c.paint(cover(stripes, px), colour * 0.2 + 0.78)
        else:
            c.paint(0.6 * cover(folds, px), colour * 0.4)
        c.paint(0.85 * outline(part, 0.7, px), colour * 0.2)
    return cover(torch.minimum(end, wrap), px)


def _headphones(c: Canvas, pose: Pose, who: Anatomy, colour: Tensor) -> Tensor:
    u, v = pose.head(c.x, c.y)
    px = c.pixel * pose.scale
    arc = ellipse(u, v + 3, who.width + 6.5, who.height + 9.0).abs() - 3.0
    arc = torch.maximum(arc, v + 2)
    cups = box(u.abs() - who.width - 3.2, v - 2, 5.2, 9.0, 4.0)
    shape = cover(torch.minimum(arc, cups), px)
    c.paint(shape, colour * 0.3)
    inner = cover(torch.minimum(arc + 1.5, cups + 2.0), px)
    c.paint(inner, 0.25 * colour + 0.7)
    return shape


def _earrings(c: Canvas, pose: Pose, who: Anatomy, colour: Tensor) -> Tensor:
    u, v = pose.head(c.x, c.y)
    px = c.pixel * pose.scale
    gold = torch.tensor(GOLD, device=u.device).expand_as(colour)
    drops = circle(u.abs() - who.width - 1.2, v - 11.5, 4.6)
    shape = cover(drops, px)
    c.paint(shape, gold)
    c.paint(0.8 * outline(drops, 0.5, px), gold * 0.35)
    return shape
