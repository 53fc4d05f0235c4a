"""The shell commands: `python -m difflora_core COMMAND ...`.

Exit codes: 0 done, 2 the user's input was wrong, 1 an error of ours.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import pkgutil
import sys
import traceback

from . import commands
from .errors import DiffLoRAError

DONE, OUR_ERROR, USER_ERROR = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments the way every other user error is reported."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise DiffLoRAError(f"{message}.", hint=f"`{self.prog} --help` shows the arguments.")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a title may have letters that a console has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(arguments)
        report = args.module.run(args)
        text = json.dumps(report) if as_json else args.module.describe(report)
        return _finish(text, DONE)
    except DiffLoRAError as error:
        return _fail(error.message, error.hint, as_json, USER_ERROR)
    except KeyboardInterrupt:
        return _fail("Interrupted.", "", as_json, OUR_ERROR)
    except Exception as error:  # the last line of defence: a JSON caller must always get JSON
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}", "Please report this.", as_json, OUR_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m difflora_core", description="Identity LoRAs from photos.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in sorted(found.name for found in pkgutil.iter_modules(commands.__path__)):
        module = importlib.import_module(f"{commands.__name__}.{name}")
        command = module.add_parser(subparsers)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(module=module)
    return parser


def _fail(message: str, hint: str, as_json: bool, code: int) -> int:
    if as_json:
        return _finish(json.dumps({"error": message, "hint": hint}), code)
    print(f"Error: {message}" + (f"\n{hint}" if hint else ""), file=sys.stderr)
    return code


def _finish(text: str, code: int) -> int:
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
