"""Training of the network that the landmark term looks through: eyes, nose and mouth of a face."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difflora_core.face_crop import TEMPLATE_SIZE
from difflora_core.mask_aware.landmarks import ROOM, LandmarkNetwork, cut_squares
from difflora_core.mask_aware.losses import landmark_distance
from difflora_core.mask_aware.pairing import FlatFaces
from difflora_core.recogniser import IResNetConfig, Recogniser, RecogniserConfig

from ..budget import train
from ..drawing import generator_for, people_scenes, render_in_parts, somebody
from ..example_pool import Examples, as_bytes
from ..portraits import render, sample_scenes
from ..run_config import RunConfig
from ..run_folder import RunFolder
from .config import EncodersConfig
from .damage import damage
from .detector import mirror
from .drawn_pool import drawn_pool

POINTS = 5
#: how much boxes of training differ from true ones: a detector's do, too
_SHIFT, _SCALE = 0.08, 0.15


def train_landmarks(config: EncodersConfig, run: RunConfig, folder: RunFolder) -> Recogniser:
    """Train; returns a network of the recogniser's form with weights that fp16 holds exactly."""
    settings, device = config.landmarks, run.torch_device()
    torch.manual_seed(run.seed)
    form = RecogniserConfig(IResNetConfig(embedding=2 * POINTS), name="mini landmarks")
    network = Recogniser(form).to(device)
    pool = drawn_pool(draw_examples, config, run)

    def step(i: int) -> dict[str, Tensor]:
        batch = pool.draw(settings.batch)
        squares, points = jittered(batch)
        found = network(damage(squares)).unflatten(1, (POINTS, 2))
        # half a square is ROOM / 2 of a face
        return {"loss": (found - points).norm(dim=-1).mean() * ROOM / 2}

    modules: dict[str, nn.Module] = {"network": network}
    trainer = train(
        modules, settings.optim, run, folder, step,
        batch=settings.batch, minutes=config.minutes, pool=pool,
    )  # fmt: skip
    network.load_state_dict(trainer.averaged("network"))
    return network.eval().half().float()


def draw_examples(count: int, generator: torch.Generator, device: torch.device) -> Examples:
    """Pictures of one to three people, and the box and points of one of them."""
    drawn = render(sample_scenes(count, generator, people="mixed", device=device))
    one = somebody(drawn, generator)
    return {
        "images": as_bytes(drawn.images),
        "boxes": drawn.boxes[one],
        "points": drawn.landmarks[one],
    }


def jittered(batch: Examples) -> tuple[Tensor, Tensor]:
    """Squares [B, 3, 112, 112] around shaken boxes, some mirrored, and points [B, 5, 2] in -1..1
    of them."""
    boxes, points = batch["boxes"], batch["points"]
    middles, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    middles = middles + _SHIFT * sizes * _around(sizes)
    sizes = sizes * (1 + _SCALE * _around(sizes[:, :1]))
    boxes = torch.cat([middles - sizes / 2, middles + sizes / 2], 1)
    squares, frame = cut_squares(batch["images"], boxes, TEMPLATE_SIZE)
    half = TEMPLATE_SIZE / 2
    pixels = (frame.inside(points) + 1) * half + 0.5  # of which the middle of a pixel is 0.5
    which = torch.rand(len(boxes), device=boxes.device) < 0.5
    squares, _, pixels = mirror(squares, boxes[:, None], pixels[:, None], which)
    return squares, (pixels[:, 0] - 0.5) / half - 1


@torch.no_grad()
def measure_landmarks(network: Recogniser, count: int, run: RunConfig) -> dict[str, float]:
    """Mean error in face widths on people never trained on, true boxes given."""
    device = run.torch_device()
    scenes, _ = people_scenes(count, generator_for(run.seed, 10**6), device, split="test")
    drawn = render_in_parts(scenes)
    faces = FlatFaces.of(list(drawn.boxes), list(drawn.landmarks))
    reader = LandmarkNetwork("mini landmarks", network.network, TEMPLATE_SIZE).to(device)
    errors = landmark_distance(reader(drawn.images, faces), faces.landmarks, faces.widths)
    return {"error_of_width": errors.mean().item()}


def _around(like: Tensor) -> Tensor:
    return 2 * torch.rand_like(like) - 1
