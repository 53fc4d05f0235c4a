"""Command line of all training stages.

    python -m training STAGE --config training/configs/mini.toml [section.key=value ...]

Run the same command again and a training goes on from its newest checkpoint.
`python -m training config --config X.toml` prints the complete configuration with comments.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from difflora_core.errors import BadConfig, DiffLoRAError

from . import parallel
from .config import Config, differences, load_config, to_toml
from .loop import Interrupted
from .run_folder import RunFolder, refused_by_system

logger = logging.getLogger("training")

STAGES: dict[str, str] = {
    "train-base": "training.base.stage:run",
    "train-encoders": "training.encoders.stage:run",
    "export-face-pack": "training.encoders.export_face_pack:run",
    "train-identity-loras": "training.loras.stage:run",
    "collect-loras": "training.loras.collect:run",
    "train-autoencoder": "training.predictor.autoencoder_stage:run",
    "train-dit": "training.predictor.dit_stage:run",
    "finetune-predictor": "training.predictor.finetune_stage:run",
    "paint-portraits": "training.evaluation.portraits_sheet:run",
    "evaluate": "training.evaluation.stage:run",
    "evaluate-guidance": "training.guidance.stage:run",
    "build-people-dataset": "training.controlnet.people_stage:run",
    "train-controlnet": "training.controlnet.stage:run",
    "evaluate-controlnet": "training.controlnet.evaluate_stage:run",
    "demo": "training.demo:run",
    "ship": "training.artifacts:ship",
}
"""Stage name -> "module:function"; each is `function(config: Config, folder: RunFolder)`."""

PARALLEL = ["train-base", "finetune-predictor"]
"""Stages that torchrun may start in several processes."""

Stage = Callable[[Config, RunFolder], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage. Exit code 0, 2 (the user's input), or 130 (stopped)."""
    level = logging.INFO if parallel.rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = _parser().parse_intermixed_args(arguments)
    try:
        _run(options)
    except Interrupted as stop:
        logger.warning("%s; run the same command again to go on", stop)
        return 130
    except KeyboardInterrupt:  # outside of training loops, which make an Interrupted of it
        logger.warning("stopped; the same command goes on, or starts over where nothing is kept")
        return 130
    except DiffLoRAError as error:
        logger.error("error: %s", error)
        return 2
    except OSError as error:
        logger.error("error: %s", refused_by_system(error))
        return 2
    finally:
        parallel.leave()
    return 0


def _run(options: argparse.Namespace) -> None:
    overrides = list(options.overrides)
    if options.json:
        overrides.append(f"eval.json={options.json}")
    config = load_config(options.config, overrides)
    if options.stage == "config":
        sys.stdout.write(to_toml(config))
        return
    stage = find_stage(options.stage)
    if parallel.count() > 1 and options.stage not in PARALLEL:
        raise BadConfig(f"{options.stage} runs in one process; start it without torchrun.")
    folder = RunFolder.create(config.run.root, options.stage)
    with folder.held(), folder.kept_if_refused("config.toml", "environment.json"):
        with parallel.first_one_first():
            folder = open_run(config, options.stage)
        stage(config, folder)


def find_stage(name: str) -> Stage:
    """Import a stage's function. Errors: BadConfig, with the nearest name."""
    if name not in STAGES:
        nearest = difflib.get_close_matches(name, STAGES, n=1, cutoff=0.0)[0]
        raise BadConfig(
            f"There is no stage {name!r}; stages are {', '.join(STAGES)}.",
            hint=f"Did you mean {nearest}?",
        )
    module, _, function = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), function)


def open_run(config: Config, stage: str) -> RunFolder:
    """The stage's run folder with the resolved config and the environment written into it.

    Errors: BadConfig for a device that is not there.
    """
    device = config.run.torch_device()
    folder = RunFolder.create(config.run.root, stage)
    text = to_toml(config)
    copy = folder.path / "config.toml"
    if folder.has_checkpoints() and copy.exists():
        for key in differences(copy.read_text(encoding="utf-8"), text):
            logger.warning("resuming %s with another %s than before", stage, key)
    folder.write_text("config.toml", text)
    folder.write_environment(device)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Training stages.")
    parser.add_argument("stage", help=f"config, {', '.join(STAGES)}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--json", default="", help="evaluate: where to write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
