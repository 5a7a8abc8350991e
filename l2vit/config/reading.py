"""Reading configurations from YAML and overrides into dataclasses, and writing them back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from l2vit.errors import ConfigError

T = TypeVar("T")


def load(schema: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Read ``path`` (and its bases), apply ``key.sub=value`` overrides, check everything.

    Raises:
        ConfigError: names the file or override at fault, the whole key and what it should be.
    """
    tree, sources = _read(Path(path), ())
    for override in [*overrides, *_implied(schema, tree, overrides)]:
        _apply_override(tree, override, sources)
    try:
        return from_tree(schema, tree)
    except ConfigError as error:
        raise _blamed(error, sources, path) from None


def _implied(schema: type, tree: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Further overrides that follow from these, if the schema's ``implied`` knows any."""
    implied = getattr(schema, "implied", None)
    return implied(tree, overrides) if implied is not None else []


def blamed(error: ConfigError, path: Path | str, overrides: Sequence[str] = ()) -> ConfigError:
    """``error`` with the file or override in front that holds its key, as `load` reports it."""
    tree, sources = _read(Path(path), ())
    for override in overrides:
        _apply_override(tree, override, sources)
    return _blamed(error, sources, path)


def _blamed(error: ConfigError, sources: Mapping[str, str], path: Path | str) -> ConfigError:
    source = _source_of(error.key, sources) or str(path)
    return ConfigError(f"{source}: {error}", key=error.key)


def read_tree(path: Path) -> dict[str, Any]:
    """The YAML mapping at ``path`` laid over its bases."""
    return _read(path, ())[0]


# -- YAML files


class _Loader(yaml.SafeLoader):
    """YAML without doubled keys: the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree at ``path`` over its bases, and which file each dotted key comes from."""
    own = _parse_file(path, above)
    base = own.pop("base", None)
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{path}: base: expected the name of a YAML file, found {base!r}")
        chain = (*above, path.resolve())
        below = path.parent / base
        if below.resolve() in chain:
            raise ConfigError(f"{path}: base: {base} is based on this file in turn")
        tree, sources = _read(below, chain)
    return _merge(tree, own, "", str(path), sources), sources


def _parse_file(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        where = f" (the base of {above[-1].name})" if above else ""
        raise ConfigError(f"configuration file not found: {path}{where}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def _merge(
    below: dict[str, Any],
    above: Mapping[str, Any],
    where: str,
    source: str,
    sources: dict[str, str],
) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        dotted = f"{where}{key}"
        if isinstance(value, Mapping):
            under = merged.get(key) if isinstance(merged.get(key), dict) else {}
            merged[key] = _merge(under or {}, value, f"{dotted}.", source, sources)
        else:
            merged[key] = value
        sources[dotted] = source
    return merged


def _apply_override(tree: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    *parents, leaf = dotted.split(".")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:  # an empty section of the file
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.load(text, _Loader)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"override {override!r}: {error.problem}") from None
    except yaml.YAMLError:
        node[leaf] = text
    for known in [k for k in sources if k.startswith(f"{dotted}.")]:
        del sources[known]
    sources[dotted] = f"override {override}"


def _source_of(key: str, sources: Mapping[str, str]) -> str:
    """Where ``key``, or the section around it, was given; empty if nowhere."""
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0] if "[" not in key else key.rpartition("[")[0]
    return ""


# -- dataclasses


def from_tree(schema: type[T], tree: Any, where: str = "") -> T:
    """Build the dataclass ``schema`` from plain mappings, refusing anything it does not know."""
    if tree is None and where:
        tree = {}  # an empty section
    if not isinstance(tree, Mapping):
        raise _refusal(where or "configuration", f"expected a section, found {tree!r}")
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            dotted = f"{where}.{key}" if where else str(key)
            raise ConfigError(_unknown(str(key), where, fields), key=dotted)
    hints = typing.get_type_hints(schema, include_extras=True)
    values = {}
    for name, field in fields.items():
        key = f"{where}.{name}" if where else name
        if name in tree or (_required(field) and dataclasses.is_dataclass(hints[name])):
            values[name] = _convert(hints[name], tree.get(name), key)
        elif _required(field):
            raise ConfigError(f"{key} is required: set it in the file or as {key}=VALUE", key=where)
    built = schema(**values)
    _validate(built, where)
    return built


def check(config: Any) -> None:
    """Check a configuration that was built in code as if it had been read from a file.

    Raises:
        ConfigError: names the key inside ``config``.
    """
    from_tree(type(config), to_tree(config))


def _refusal(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{key}: {problem}", key=key)


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _validate(built: Any, where: str) -> None:
    """Call ``built.validate()``, whose messages begin with the key inside this section."""
    check = getattr(built, "validate", None)
    if check is None:
        return
    try:
        check()
    except ConfigError as error:
        dotted = f"{where}.{error}" if where else str(error)
        raise ConfigError(dotted, key=dotted.partition(":")[0].partition(" ")[0]) from None


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
    if origin is Annotated:
        return _convert_annotated(arguments, value, key)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            options = ", ".join(map(str, arguments))
            raise _refusal(key, f"{value!r} is not one of {options}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, key)
    if origin is dict:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise _refusal(key, f"expected a mapping, found {value!r}")
        return {str(k): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_tree(typing.cast(type, hint), value, key)
    return _convert_scalar(hint, value, key)


def _convert_annotated(arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    hint, *rules = arguments
    converted = _convert(hint, value, key)
    for rule in rules:
        if problem := rule.problem(converted):
            raise _refusal(key, f"{converted!r} {problem}")
    return converted


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
            problems.append(error)
    raise problems[0]


def _convert_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _refusal(key, f"expected a list, found {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if len(value) != len(arguments):
        raise _refusal(key, f"expected {len(arguments)} values, found {len(value)}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_convert(hint, item, f"{key}[{i}]") for i, (hint, item) in pairs)


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    if hint is float and not isinstance(value, bool):
        number = _number(value)
        if number is not None and math.isfinite(number):
            return number
    elif hint is str and not isinstance(value, bool):
        if value is None:  # `key=` and `key: ~` mean no text
            return ""
        if isinstance(value, int | float | str):
            return str(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = "a finite number" if hint is float else hint.__name__
    found = "nothing" if value is None else repr(value)
    raise _refusal(key, f"expected {wanted}, found {found}")


def _number(value: Any) -> float | None:
    """YAML 1.1 reads 1e-3 as a string: accept what any reader takes for a number."""
    if isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return None


# -- writing


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
