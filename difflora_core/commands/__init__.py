"""The shell commands: one module each, found by being in this folder.

A command module has
- `add_parser(subparsers) -> ArgumentParser`: adds its parser and returns it (`--json` is added to
  every command);
- `run(args) -> dict`: does the work; the result is what `--json` prints, so JSON values only;
- `describe(report) -> str`: the same report for people.
Heavy imports belong into `run`. User errors are `DiffLoRAError`s; `__main__` prints them and sets
the exit code.
"""
