"""scrimp: train any language model in the memory you have.

The public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["Interrupted", "Recipe", "Run", "ScrimpError", "__version__", "load_recipe", "train"]

_WHERE = {
    "Interrupted": "scrimp.base.errors",
    "Recipe": "scrimp.recipe",
    "Run": "scrimp.training.run",
    "ScrimpError": "scrimp.base.errors",
    "load_recipe": "scrimp.recipe_file",
    "train": "scrimp.api",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scrimp.base.platform import passive_openmp

    with passive_openmp():  # it counts only when torch is loaded, which may be now
        return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
