"""JSON that stages keep for each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from difflora_core.errors import BadWeightsFile


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys.

    Errors: BadWeightsFile where the file holds something else or breaks off, OSError.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, "it breaks off or is no JSON") from error
    if not isinstance(found, dict):
        raise _damaged(path, "it is no JSON object")
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise _damaged(path, f"it has no {lacking[0]}")
    return found


def _damaged(path: Path, reason: str) -> BadWeightsFile:
    return BadWeightsFile(
        f"{path.name} in {path.parent} is damaged: {reason}.",
        hint="Delete it and run the stage that writes it again.",
    )
