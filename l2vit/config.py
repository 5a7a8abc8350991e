"""Strict typed configuration: small YAML files, dotted overrides, errors that name the fix.

A configuration is a tree of dataclasses. Reading one from YAML refuses unknown keys, values of
the wrong type and, through each dataclass's ``validate``, impossible values. A file may start
from another one with ``base: other.yaml`` (a path relative to itself).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from l2vit.errors import ConfigError

T = TypeVar("T")


def load(schema: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Read ``path`` (and its bases), apply ``key.sub=value`` overrides, check everything.

    Raises:
        ConfigError: names the file, the dotted key and what it should be.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    try:
        return from_tree(schema, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_tree(path: Path) -> dict[str, Any]:
    """The YAML mapping at ``path`` laid over its bases."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"configuration file not found: {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    base = tree.pop("base", None)
    return tree if base is None else _merge(read_tree(path.parent / base), tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    *parents, leaf = dotted.split(".")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[leaf] = text


def from_tree(schema: type[T], tree: Any, where: str = "") -> T:
    """Build the dataclass ``schema`` from plain mappings, refusing anything it does not know."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or 'configuration'}: expected a section, found {tree!r}")
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise ConfigError(_unknown(str(key), where, fields))
    hints = typing.get_type_hints(schema)
    values = {}
    for name, field in fields.items():
        key = f"{where}.{name}" if where else name
        if name in tree:
            values[name] = _convert(hints[name], tree[name], key)
        elif _required(field):
            raise ConfigError(f"{key} is required: set it in the file or as {key}=VALUE")
    built = schema(**values)
    _validate(built, where)
    return built


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _validate(built: Any, where: str) -> None:
    check = getattr(built, "validate", None)
    if check is None:
        return
    try:
        check()
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from None


def _unknown(key: str, where: str, fields: Mapping[str, Any]) -> str:
    dotted = f"{where}.{key}" if where else key
    close = difflib.get_close_matches(key, fields, n=1)
    if close:
        better = f"{where}.{close[0]}" if where else close[0]
        return f"unknown key {dotted}; did you mean {better}?"
    return f"unknown key {dotted}; known here: {', '.join(sorted(fields))}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is Literal:
        if value not in arguments:
            options = ", ".join(map(str, arguments))
            raise ConfigError(f"{key}: {value!r} is not one of {options}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected a mapping, found {value!r}")
        return {str(k): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_tree(typing.cast(type, hint), value, key)
    return _convert_scalar(hint, value, key)


def _convert_union(options: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, key)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(problems[0])


def _convert_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}: expected a list, found {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(f"{key}: expected {len(arguments)} values, found {len(value)}")
    return tuple(_convert(a, v, key) for a, v in zip(arguments, value, strict=True))


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as a string: accept what any reader takes for a number.
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {hint.__name__}, found {value!r}")


def to_tree(config: Any) -> dict[str, Any]:
    """The configuration as plain mappings and lists, as ``from_tree`` reads them."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def dump(config: Any) -> str:
    """The configuration as YAML, every key present, readable by ``load``."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)
