"""Stage train-encoders: trains the encoders that `encoders.only` names, one by one or at once."""

from __future__ import annotations

import difflib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch.multiprocessing as multiprocessing

from difflora_core.errors import BadConfig, DiffLoRAError
from difflora_core.recogniser import ConvNeXtConfig, IResNetConfig

from .. import trained_for
from ..artifacts import artifacts_folder, record_artifact, save_artifact
from ..config import Config
from ..json_file import read_object
from ..loop import Interrupted
from ..run_config import with_seed
from ..run_folder import RunFolder, refused_by_system
from .attributes import train_attribute_heads, train_self_supervised
from .config import NAMES
from .detector import measure_detector, train_detector
from .image_encoder import train_image_encoder
from .landmarks import measure_landmarks, train_landmarks
from .recogniser import measure_recogniser, train_recogniser

logger = logging.getLogger(__name__)

Figures = dict[str, float]
#: added to run.seed: the metric recogniser shares neither weights nor pictures with the other
_METRIC_SEED = 7919
#: how a worker ends that was told to, in its loop or before it
_STOPPED = (130, -signal.SIGTERM)


def run(config: Config, folder: RunFolder) -> None:
    """Train the chosen encoders and write them to the artifacts folder, figures included."""
    for name in config.encoders.only:
        if name not in NAMES:
            nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
            raise BadConfig(
                f"encoders.only names {name!r}; encoders are {', '.join(NAMES)}.",
                hint=f"Did you mean {nearest}?",
            )
        trained_for.check(RunFolder(folder.path / name), decisive(config, name))
    artifacts_folder(config).mkdir(parents=True, exist_ok=True)
    if config.encoders.parallel and len(config.encoders.only) > 1:
        _train_at_once(config, folder)
    else:
        for name in config.encoders.only:
            train_one(name, config, folder.path)
    for name in config.encoders.only:
        figures = read_object(folder.path / name / "figures.json")
        record_artifact(config, f"{name}.safetensors", figures)
        logger.info("%s: %s", name, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))


def decisive(config: Config, name: str) -> dict[str, Any]:
    """What the training of an encoder depends on, see `trained_for`."""
    values = trained_for.settings(config, "encoders", f"encoders.{name}")
    return values | trained_for.drawings()


def train_one(name: str, config: Config, path: Path) -> None:
    """Train one encoder, write its artifact, and its figures into its run folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = RunFolder(path).part(name)
    trained_for.begin(folder, decisive(config, name))
    start = time.monotonic()
    figures = _TRAINERS[name](config, folder)
    figures["minutes"] = (time.monotonic() - start) / 60
    folder.write_text("figures.json", json.dumps(figures, indent=2) + "\n")


def _train_at_once(config: Config, folder: RunFolder) -> None:
    """Each encoder in a process of its own; the others go on where one fails.

    Errors, once all have ended: DiffLoRAError; Interrupted after Ctrl-C or SIGTERM, which all get.
    """
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(name, config, folder.path), name=name)
        for name in config.encoders.only
    ]
    run_together(workers)
    failed = [worker.name for worker in workers if worker.exitcode not in (0, *_STOPPED)]
    if failed:
        raise DiffLoRAError(f"Training failed for {', '.join(failed)}; see the messages above.")
    if any(worker.exitcode for worker in workers):
        raise Interrupted(f"{folder.name} stopped")


def _work(name: str, config: Config, path: Path) -> None:
    """The process of one encoder."""
    try:
        train_one(name, config, path)
    except (Interrupted, KeyboardInterrupt) as stop:
        logger.warning("%s", str(stop) or f"{name} stopped")
        sys.exit(_STOPPED[0])
    except DiffLoRAError as error:
        logger.error("%s: %s %s", name, error.message, error.hint)
        sys.exit(1)
    except OSError as error:
        logger.error("%s: %s", name, refused_by_system(error))
        sys.exit(1)


def run_together(workers: Sequence[BaseProcess]) -> None:
    """Start the processes and wait for all. They get SIGTERM and Ctrl-C passed on, so that they
    save; without it they would train on alone.
    """
    told: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for worker in workers:
            if worker.pid is not None and worker.is_alive():
                worker.terminate()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in numbers]
    try:
        for worker in workers:
            worker.start()
            if told:  # perhaps before this one could be found
                worker.terminate()
        for worker in workers:
            worker.join()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _detector(config: Config, folder: RunFolder) -> Figures:
    detector = train_detector(config.encoders, config.run, folder)
    figures = measure_detector(detector, config.run.seed, config.encoders.check_people)
    header = {"widths": list(config.encoders.detector.widths), "figures": figures}
    save_artifact(config, "detector", detector.state_dict(), header)
    return figures


def _recogniser(config: Config, folder: RunFolder) -> Figures:
    settings = config.encoders.recogniser
    model = train_recogniser(config.encoders, settings, IResNetConfig(), config.run, folder)
    model.save(artifacts_folder(config) / "recogniser.safetensors", overwrite=True)
    return measure_recogniser(model, config.encoders.check_people, config.run.seed)


def _metric_recogniser(config: Config, folder: RunFolder) -> Figures:
    settings, run = config.encoders.metric_recogniser, with_seed(config.run, _METRIC_SEED)
    model = train_recogniser(config.encoders, settings, ConvNeXtConfig(), run, folder)
    model.save(artifacts_folder(config) / "metric_recogniser.safetensors", overwrite=True)
    return measure_recogniser(model, config.encoders.check_people, config.run.seed)


def _image_encoder(config: Config, folder: RunFolder) -> Figures:
    encoder = train_image_encoder(config.encoders, config.run, folder)
    encoder.save(artifacts_folder(config) / "image_encoder.safetensors", overwrite=True)
    return dict(encoder.config.figures)


def _attribute_heads(config: Config, folder: RunFolder) -> Figures:
    net = train_attribute_heads(config.encoders, config.run, folder)
    net.save(artifacts_folder(config) / "attribute_heads.safetensors")
    return dict(net.config.figures)


def _self_supervised(config: Config, folder: RunFolder) -> Figures:
    net = train_self_supervised(config.encoders, config.run, folder)
    net.save(artifacts_folder(config) / "self_supervised.safetensors")
    return {"parameters": float(sum(p.numel() for p in net.parameters()))}


def _landmarks(config: Config, folder: RunFolder) -> Figures:
    network = train_landmarks(config.encoders, config.run, folder)
    network.save(artifacts_folder(config) / "landmarks.safetensors", overwrite=True)
    return measure_landmarks(network, config.encoders.check_people, config.run)


_TRAINERS: dict[str, Callable[[Config, RunFolder], Figures]] = {
    "detector": _detector,
    "recogniser": _recogniser,
    "metric_recogniser": _metric_recogniser,
    "image_encoder": _image_encoder,
    "attribute_heads": _attribute_heads,
    "self_supervised": _self_supervised,
    "landmarks": _landmarks,
}
