"""Where the figures of an evaluation go: the run folder, and the file that `--json` names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difflora_core.errors import BadConfig
from training.config import Config
from training.run_folder import RunFolder, write_whole


def check_place(config: Config) -> None:
    """Before hours of work: the figures can be written there. Errors: BadConfig, OSError."""
    if not config.eval.json:
        return
    path = Path(config.eval.json)
    if path.exists() and not path.is_file():  # a device would be replaced by the file
        kind = "a folder" if path.is_dir() else "no file"
        raise BadConfig(f"{path} is {kind}.", hint="Name a file for the figures.")
    write_whole(path.with_name(f".{path.name}.probe"), "").unlink()


def write_figures(config: Config, folder: RunFolder, outcome: Mapping[str, Any]) -> None:
    """`results.json` of the run folder, and the same as `eval.json` where that is asked for."""
    text = json.dumps(outcome, indent=2) + "\n"
    folder.write_text("results.json", text)
    if config.eval.json:
        write_whole(Path(config.eval.json), text)
