"""The reference of every key: name, type, default and meaning, from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from l2vit.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One key of a configuration."""

    name: str
    """With its sections, ``optim.lr``."""
    kind: str
    """Type and range for people."""
    default: str
    """As YAML; empty for a key that must be given."""
    meaning: str
    required: bool = False

    def __str__(self) -> str:
        value = "must be given" if self.required else f"default {self.default}"
        meaning = textwrap.indent(textwrap.fill(self.meaning, 88), "    ")
        return f"{self.name}  ({self.kind}; {value})\n{meaning}"


def keys(schema: type, where: str = "") -> list[Key]:
    """Every key of the configuration ``schema``, section by section."""
    return list(_keys(schema, where))


def find(schema: type, name: str) -> list[Key]:
    """The key called ``name``, or all of the section of that name.

    Raises:
        ConfigError: there is none; names close ones.
    """
    import difflib

    every = keys(schema)
    found = [key for key in every if key.name == name or key.name.startswith(f"{name}.")]
    if not found:
        names = [key.name for key in every]
        ends = [n for n in names if n.rpartition(".")[2] == name]
        close = ends or difflib.get_close_matches(name, names, n=3)
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise ConfigError(f"no key or section {name}{hint}")
    return found


def markdown(
    schema: type, used_by: Mapping[str, Sequence[str]], *, without: type | None = None
) -> str:
    """The reference as tables, one a section.

    Args:
        schema: the configuration's dataclass.
        used_by: which recipes give each key a value.
        without: another configuration: leave out what ``schema`` has from it unchanged.
    """
    lines = []
    docs = field_docs(schema)
    hints = typing.get_type_hints(schema)
    known = typing.get_type_hints(without) if without else {}
    for field in dataclasses.fields(schema):
        section = hints[field.name]
        if not dataclasses.is_dataclass(section) or known.get(field.name) is section:
            continue
        about = _own_doc(typing.cast(type, section)) or docs.get(field.name, "")
        lines += [f"## {field.name}", "", *([about, ""] if about else [])]
        lines += ["| key | type | default | meaning | set by |", "|---|---|---|---|---|"]
        lines += [_row(key, used_by) for key in keys(typing.cast(type, section), field.name)]
        lines.append("")
    plain = [key for key in keys(schema) if "." not in key.name and key.name not in known]
    if not plain:
        return "\n".join(lines).strip() + "\n"
    head = ["| key | type | default | meaning | set by |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(_row(key, used_by) for key in plain), "", *lines]).strip() + "\n"


def _row(key: Key, used_by: Mapping[str, Sequence[str]]) -> str:
    recipes = used_by.get(key.name, ())
    shown = ", ".join(f"`{name}`" for name in recipes[:3])
    shown += f" and {len(recipes) - 3} more" if len(recipes) > 3 else ""
    default = "**required**" if key.required else f"`{key.default}`"
    cells = [f"`{key.name}`", key.kind, default, key.meaning, shown]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _keys(schema: type, where: str) -> Iterator[Key]:
    hints = typing.get_type_hints(schema, include_extras=True)
    docs = field_docs(schema)
    for field in dataclasses.fields(schema):
        name = f"{where}.{field.name}" if where else field.name
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), name)
            continue
        yield Key(name, _kind(hint), *_default(field, docs.get(field.name, "")))
        inner = _dict_values(hint)
        if inner is not None:
            yield from _keys(inner, f"{name}.NAME")


def _dict_values(hint: Any) -> type | None:
    """The dataclass of a mapping's values, such as one evaluation set."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(arguments[1]):
        return typing.cast(type, arguments[1])
    return None


def _default(field: dataclasses.Field[Any], meaning: str) -> tuple[str, str, bool]:
    if field.default is not dataclasses.MISSING:
        return _as_yaml(field.default), meaning, False
    if field.default_factory is not dataclasses.MISSING:
        return _as_yaml(field.default_factory()), meaning, False
    return "", meaning, True


def _as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return "{}" if value == {} else str(value)


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rules = ", ".join(map(str, arguments[1:]))
        return rules if arguments[0] is str else f"{_kind(arguments[0])} {rules}"
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of: {_kind(arguments[0])}"
        return f"{len(arguments)} of: {_kind(arguments[0])}"
    if origin is dict:
        return "sections by name" if _dict_values(hint) else "mapping"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(a) for a in arguments if a is not type(None))
    names = {float: "number", int: "whole number", str: "text", bool: "`true` or `false`"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


@functools.cache
def field_docs(schema: type) -> Mapping[str, str]:
    """The docstring under each field of a dataclass, of its bases too, as one line."""
    found: dict[str, str] = {}
    for part in reversed(schema.__mro__):
        if dataclasses.is_dataclass(part):
            found |= _own_field_docs(part)
    return found


def _own_field_docs(schema: type) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        text = after.value if isinstance(after, ast.Expr) else None
        if named and isinstance(text, ast.Constant) and isinstance(text.value, str):
            assert isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(text.value.replace("``", "`").split())
    return found


def _own_doc(schema: type) -> str:
    """The class's own docstring; empty for the signature that ``dataclass`` writes."""
    text = inspect.getdoc(schema) or ""
    return "" if text.startswith(f"{schema.__name__}(") else text.replace("``", "`")
