"""Strict typed configuration: small YAML files, dotted overrides, errors that name the fix.

A configuration is a tree of dataclasses. Reading one from YAML refuses unknown and doubled keys,
values of the wrong type or outside their range (``values.py``) and, through each dataclass's
``validate``, values that contradict each other. A file may start from another one with
``base: other.yaml`` (a path relative to itself). The docstring under a field is its help text
(``reference.py``).
"""

from l2vit.config.reading import blamed as blamed
from l2vit.config.reading import check as check
from l2vit.config.reading import dump as dump
from l2vit.config.reading import from_tree as from_tree
from l2vit.config.reading import load as load
from l2vit.config.reading import read_tree as read_tree
from l2vit.config.reading import to_tree as to_tree
