"""Host files: which nodes there are, how many ranks each takes, and which of them are used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from l2vit.errors import ConfigError


@dataclass(frozen=True)
class Node:
    """One host and the numbers of the devices used there, one rank for each."""

    host: str
    slots: tuple[int, ...]
    all_slots: bool = True

    @property
    def devices(self) -> str:
        """CUDA_VISIBLE_DEVICES for this node; empty where all its devices are used."""
        return "" if self.all_slots else ",".join(map(str, self.slots))


def read(path: Path) -> list[Node]:
    """The nodes of a host file: ``NAME slots=N`` a line, as DeepSpeed reads it, too.

    Raises:
        ConfigError: names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile: cannot read {path}: {error.strerror}") from None
    nodes: list[Node] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([^\s-]\S*)\s+slots=(\d+)", text)
        if match is None or match[2] == "0":
            raise ConfigError(f"{path}:{number}: {text!r} is not 'HOST slots=N'")
        if match[1] in (node.host for node in nodes):
            raise ConfigError(f"{path}:{number}: host {match[1]} is listed twice")
        nodes.append(Node(match[1], tuple(range(int(match[2])))))
    if not nodes:
        raise ConfigError(f"--hostfile: {path} lists no host")
    return nodes


def select(
    nodes: Sequence[Node], *, include: str = "", exclude: str = "", count: int | None = None
) -> list[Node]:
    """The nodes and slots asked for, in the order of the host file.

    Args:
        nodes: what there is.
        include: ``HOST[:SLOT,...]`` separated by ``@``; nothing else is used.
        exclude: likewise; everything else is used.
        count: the first so many nodes.

    Raises:
        ConfigError: contradicting flags, or a host or slot that is not in the file.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude cannot be given together")
    if include or exclude:
        flag = "--include" if include else "--exclude"
        named = _filter(include or exclude, flag, {node.host: node for node in nodes})
        nodes = [_narrowed(node, named, keep=bool(include)) for node in nodes]
        nodes = [node for node in nodes if node.slots]
    if count is not None:
        if not 1 <= count <= len(nodes):
            raise ConfigError(f"--num_nodes: {count} of {len(nodes)} nodes")
        nodes = nodes[:count]
    if not nodes:
        raise ConfigError("--exclude leaves no node")
    return list(nodes)


def _filter(text: str, flag: str, nodes: dict[str, Node]) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {}
    for item in text.split("@"):
        host, _, slots = item.partition(":")
        if host not in nodes:
            raise ConfigError(f"{flag}: {host!r} is not in the host file")
        try:
            wanted = {int(slot) for slot in slots.split(",")} if slots else set(nodes[host].slots)
        except ValueError:
            raise ConfigError(f"{flag}: {item!r} is not HOST[:SLOT,...]") from None
        if missing := wanted - set(nodes[host].slots):
            raise ConfigError(f"{flag}: {host} has no slot {min(missing)}")
        named.setdefault(host, set()).update(wanted)
    return named


def _narrowed(node: Node, named: dict[str, set[int]], *, keep: bool) -> Node:
    chosen = named.get(node.host, set())
    slots = tuple(slot for slot in node.slots if (slot in chosen) == keep)
    return replace(node, slots=slots, all_slots=slots == node.slots)


def with_ranks(nodes: Sequence[Node], ranks: int) -> list[Node]:
    """The same nodes with so many ranks on each."""
    return [replace(node, slots=tuple(range(ranks)), all_slots=False) for node in nodes]
