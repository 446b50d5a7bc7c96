"""The one door to optional packages: late, and with the remedy in the error."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from scrimp.base.errors import MissingExtraError


def is_installed(module: str) -> bool:
    """Tell whether `module` could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str, *, extra: str, purpose: str) -> None:
    """Check that `module` is installed, without importing it.

    Raises:
        MissingExtraError: It is not; the message names `purpose` and the install line.
    """
    if not is_installed(module):
        raise MissingExtraError(purpose, extra)


def load(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Raises:
        MissingExtraError: It is not installed; the message names `purpose` and the install line.
    """
    require(module, extra=extra, purpose=purpose)
    return importlib.import_module(module)
