"""One configuration for all stages: a commented TOML file with one table per section.

Strict: an unknown key or a wrong type is a `BadConfig` that names the nearest known key.
On the command line `section.key=value` overrides a key; values are written as in TOML, and quotes
may be left out for words and lists of words (`eval.rows=[base,teacher]`).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difflora_core.config import from_dict, to_dict
from difflora_core.errors import BadConfig

from .base.config import BaseConfig
from .controlnet.config import ControlnetConfig, PeopleConfig
from .encoders.config import EncodersConfig
from .evaluation.config import EvalConfig
from .guidance.config import GuidanceConfig
from .loras.config import LorasConfig
from .predictor.config import PredictorTrainingConfig
from .run_config import RunConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Config:
    """Every section; each is a dataclass of the package that uses it."""

    run: RunConfig = field(default_factory=RunConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    loras: LorasConfig = field(default_factory=LorasConfig)
    predictor: PredictorTrainingConfig = field(default_factory=PredictorTrainingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    people: PeopleConfig = field(default_factory=PeopleConfig)
    controlnet: ControlnetConfig = field(default_factory=ControlnetConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides. Errors: BadConfig."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(
            f"Cannot read the config file {path}: {error.strerror}.",
            hint="training/configs/mini.toml is a complete example.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} is not valid TOML: {error}.") from error
    for override in overrides:
        apply_override(data, override)
    return from_dict(Config, data)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the nested dictionary `data`. Errors: BadConfig."""
    key, equals, text = override.partition("=")
    *tables, name = key.strip().split(".")
    if not equals or not tables or not name:
        raise BadConfig(
            f"Cannot understand the argument {override!r}.",
            hint="Settings are written section.key=value, as in run.seed=1.",
        )
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise BadConfig(f"{key}: {table} is a value, not a table.")
    kind = _field_type(Config, [*tables, name])
    data[name] = text.strip().strip("\"'") if kind is str else _parse_value(text.strip())


def to_toml(config: Any) -> str:
    """The configuration as TOML, every key under its documentation as a comment."""
    lines: list[str] = []
    _write_table(config, "", lines)
    return "\n".join(lines).strip() + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= dict(_own_field_docs(base))
    return docs


def differences(before: str, after: str) -> list[str]:
    """Dotted keys whose values differ between two TOML texts."""
    old, new = (dict(_flatten(tomllib.loads(text))) for text in (before, after))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _own_field_docs(cls: type) -> Iterator[tuple[str, str]]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            yield statement.target.id, inspect.cleandoc(str(following.value.value))


def _write_table(config: Any, prefix: str, lines: list[str]) -> None:
    docs = field_docs(type(config))
    tables = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            tables.append((item.name, value))
        elif value is not None:  # TOML has no null: a missing key means the default
            lines += [*_comment(docs.get(item.name, "")), f"{item.name} = {_toml_value(value)}"]
    for name, value in tables:
        path = f"{prefix}.{name}" if prefix else name
        doc = docs.get(name) or inspect.cleandoc(type(value).__doc__ or "").split("\n\n")[0]
        lines += ["", *_comment(doc), f"[{path}]"]
        _write_table(value, path, lines)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 96)]


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
        )
    if isinstance(value, (str, Path)):
        escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    if text.startswith("[") and text.endswith("]"):
        return [_parse_value(word.strip()) for word in text[1:-1].split(",") if word.strip()]
    return text


def _field_type(cls: Any, keys: list[str]) -> Any:
    for key in keys:
        if not dataclasses.is_dataclass(cls):
            return None
        cls = typing.get_type_hints(cls).get(key)
    return cls


def _flatten(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


__all__ = [
    "Config", "apply_override", "differences", "field_docs", "load_config", "to_dict", "to_toml",
]  # fmt: skip
