"""L²ViT (arXiv 2501.16182): ``import l2vit`` registers every model with timm.

The models are imported together with timm, before or after this package, so that programs which
need no model start without it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


class _RegisterWithTimm:
    """An import hook: when timm is imported, our models are registered with it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (f.find_spec(name, path, target) for f in others)), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module("l2vit.models")

        loader.exec_module = exec_module


def _install() -> None:
    if "timm" in sys.modules:
        importlib.import_module("l2vit.models")
    elif not any(type(finder).__name__ == _RegisterWithTimm.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterWithTimm())


def __getattr__(name: str) -> ModuleType:
    if name == "models":
        return importlib.import_module("l2vit.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_install()
