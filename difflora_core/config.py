"""Strict conversion between plain dictionaries (JSON, TOML) and frozen dataclasses.

Every architecture is described by a frozen dataclass that travels in the header of its weights
file. Reading is strict: an unknown key, a missing key or a wrong type is a `BadConfig` that names
the full key and, for a typing slip, the nearest known key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from .errors import BadConfig

T = TypeVar("T")


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `data`; `where` is the dotted prefix used in messages.

    Lists become tuples, integers become floats where a float is declared, nested mappings become
    nested dataclasses. A union of dataclasses is told apart by its `kind` field.
    Errors: BadConfig.
    """
    if not isinstance(data, Mapping):
        raise BadConfig(f"{where or cls.__name__} must be a table, found {data!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise _unknown_key(where, key, list(fields))
    hints = typing.get_type_hints(cls)
    missing = [n for n, f in fields.items() if n not in data and _is_required(f)]
    if missing:
        raise BadConfig(
            f"{_join(where, missing[0])} is missing.", hint=f"Add it to {where or 'the config'}."
        )
    values = {k: _convert(hints[k], v, _join(where, k)) for k, v in data.items()}
    return _build(cls, values, where)


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: only dict, list, str, int, float, bool and None."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def _build(cls: type[T], values: dict[str, Any], where: str) -> T:
    try:
        return cls(**values)
    except ValueError as error:  # contradictions found by a __post_init__
        raise BadConfig(f"{where or cls.__name__}: {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _unknown_key(where: str, key: str, known: list[str]) -> BadConfig:
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
    hint = f"Did you mean {_join(where, nearest[0])}?" if nearest else "This table has no keys."
    return BadConfig(f"Unknown key {_join(where, str(key))}.", hint=hint)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(kind), value, where)
    if origin is Literal:
        return _convert_choice(typing.get_args(kind), value, where)
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), value, where)
    if origin is dict:
        return _convert_mapping(typing.get_args(kind), value, where)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        return from_dict(kind, value, where)  # type: ignore[arg-type]
    return _convert_scalar(kind, value, where)


def _convert_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise BadConfig(f"{where} must be {kind.__name__}, found {value!r}.")


def _convert_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value in choices:
        return value
    listed = ", ".join(map(str, choices))
    nearest = difflib.get_close_matches(str(value), list(map(str, choices)), n=1, cutoff=0.0)
    raise BadConfig(
        f"{where} must be one of {listed}; found {value!r}.", hint=f"Did you mean {nearest[0]}?"
    )


def _convert_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise BadConfig(f"{where} must be a list, found {value!r}.")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_convert(kinds[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(kinds):
        raise BadConfig(f"{where} must have {len(kinds)} entries, found {len(value)}.")
    return tuple(
        _convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
    )


def _convert_mapping(kinds: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise BadConfig(f"{where} must be a table, found {value!r}.")
    return {k: _convert(kinds[1], v, _join(where, str(k))) for k, v in value.items()}


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(k for k in kinds if k is not type(None))
    if len(kinds) == 1:
        return _convert(kinds[0], value, where)
    classes = {_kind_of(k): k for k in kinds if dataclasses.is_dataclass(k)}
    if classes and isinstance(value, Mapping):
        choice = _convert_choice(tuple(classes), value.get("kind"), _join(where, "kind"))
        return from_dict(classes[choice], value, where)  # type: ignore[arg-type]
    for kind in kinds:
        try:
            return _convert(kind, value, where)
        except BadConfig:
            continue
    names = ", ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise BadConfig(f"{where} must be one of {names}; found {value!r}.")


def _kind_of(cls: Any) -> str:
    return str(next(f.default for f in dataclasses.fields(cls) if f.name == "kind"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value
