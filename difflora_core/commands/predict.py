"""`predict PHOTO... --out F`: photos of one person to a LoRA."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..mini_world import MINI_FOLDER
from ..shell import check_free

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..face import FaceEncoder
    from ..features import Features
    from ..photos import Pixels
    from ..predictor import Predictor

PREDICTOR = MINI_FOLDER / "predictor.safetensors"
FACE_ROOT = MINI_FOLDER / "insightface"
IMAGE_ENCODER = MINI_FOLDER / "image_encoder.safetensors"
MINI_PACK = "mini"


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("predict", help="photos of one person to a LoRA file")
    parser.add_argument(
        "photos", nargs="+", type=Path, metavar="PHOTO", help="pictures of a person"
    )
    parser.add_argument("--out", type=Path, required=True, help="the LoRA to write, .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--predictor", type=Path, default=PREDICTOR, help="a predictor bundle")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal LoRAs")
    parser.add_argument("--steps", type=int, help="sampling steps, 1 to 50")
    parser.add_argument("--candidates", type=int, default=1, help="draw N, keep the most typical")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="1 = as calibrated for the predictor"
    )
    parser.add_argument("--guidance", type=float, help="1 = none, more = farther from the average")
    parser.add_argument(
        "--face", default="largest", help="largest, leftmost, ..., or its number from the left"
    )
    parser.add_argument(
        "--crops", type=Path, help="write the faces that were found, with their numbers, .png"
    )
    parser.add_argument(
        "--face-root", type=Path, default=FACE_ROOT, help="folder with models/PACK of InsightFace"
    )
    parser.add_argument(
        "--image-encoder",
        type=Path,
        default=IMAGE_ENCODER,
        help="our file or an OpenCLIP checkpoint",
    )
    return parser


def run(args: argparse.Namespace) -> dict:
    from ..header import LoraHeader
    from ..predictor import Predictor
    from ..weights_file import write_lora

    begin = time.perf_counter()
    check_free(args.out, args.overwrite)
    _check_no_photo(args.out, args.photos)
    if args.crops:
        check_free(args.crops, args.overwrite, ".png")
        _check_no_photo(args.crops, args.photos)
    predictor = Predictor.open(args.predictor)
    loaded = time.perf_counter()
    features = _features(args, predictor)
    encoded = time.perf_counter()
    prediction = predictor.predict(
        features,
        seed=args.seed,
        steps=args.steps,
        candidates=args.candidates,
        guidance=args.guidance,
        strength=args.strength * predictor.config.sampling.strength,
    )
    report = prediction.report
    header = LoraHeader(
        title=args.out.stem,
        base=report["base"],
        trigger=report["trigger"],
        space_id=report["space"],
        predictor_hash=report["predictor_hash"],
        strength=report["strength"],
        seed=args.seed,
    )
    write_lora(prediction.lora, args.out, header, args.overwrite)
    seconds = {"load": loaded - begin, "encode": encoded - loaded, "predict": report["seconds"]}
    return {"file": str(args.out), **report, "seconds": seconds}


def describe(report: dict) -> str:
    seconds = report["seconds"]
    lines = [
        f"{report['file']}: a LoRA for {report['base']}, strength {report['strength']:g},"
        f" seed {report['seed']}",
        f"  prompt with  {report['trigger']}",
        f"  photos       {seconds['encode']:.2f} s to encode",
        *map(_photo_line, report["photos"]),
        f"  prediction   {seconds['predict']:.2f} s, {report['steps']} steps",
    ]
    if report["candidates"] > 1:
        lines.append(f"  candidates   {report['candidates']}, spread {report['spread']:.2f}")
    return "\n".join(lines)


def _photo_line(photo: dict) -> str:
    line = f"    {photo['number']}: weight {photo['weight']:.2f}"
    if photo["faces"] > 1:
        line += f", face {photo['face']} of {photo['faces']} from the left"
    return f"{line} {photo['note']}".rstrip()


def _check_no_photo(path: Path, photos: Sequence[Path]) -> None:
    """What is written must not take the place of a photo. Errors: BadConfig."""
    from ..errors import BadConfig

    existing = [photo for photo in photos if os.path.exists(photo)]
    if os.path.exists(path) and any(os.path.samefile(path, photo) for photo in existing):
        raise BadConfig(f"{path} is one of the photos.", hint="Choose another name to write to.")


def _write_crops(photos: Sequence[Pixels], encoder: FaceEncoder, path: Path) -> None:
    """One row of numbered faces per photo, whole or not at all. Errors: BadImage."""
    import numpy as np
    from PIL import Image

    from ..errors import BadImage
    from ..face import face_previews
    from ..whole_file import refusals, whole_file

    rows = [np.concatenate(list(face_previews(p, f)), 1) for p in photos if (f := encoder.faces(p))]
    if not rows:
        return
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    with refusals(path, BadImage), whole_file(path) as file:
        Image.fromarray(np.concatenate(padded)).save(file, "png")


def _features(args: argparse.Namespace, predictor: Predictor) -> Features:
    """The photos, encoded by the encoders that the predictor was trained with."""
    from ..encode import encode_photos
    from ..face import FaceEncoder
    from ..image_encoder import ImageEncoder
    from ..photos import load_photo

    photos = [load_photo(path) for path in args.photos]
    face_name = predictor.config.face_encoder.name or MINI_PACK
    face_encoder = FaceEncoder.open(args.face_root, face_name)
    if args.crops:
        _write_crops(photos, face_encoder, args.crops)
    model = "" if predictor.space.base == "mini" else predictor.config.image_encoder.name
    image_encoder = ImageEncoder.open(args.image_encoder, model)
    return encode_photos(photos, face_encoder, image_encoder, args.face)
