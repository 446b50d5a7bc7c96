"""Refusals that the builders of several methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scrimp.base.errors import ScrimpError


def check_positive(tune: str, options: Mapping[str, float]) -> None:
    """Refuse an option at or below 0.

    Raises:
        ScrimpError: One is; the message names it.
    """
    for name, value in options.items():
        if not value > 0:
            raise ScrimpError(f"tune {tune}: {name} {value} must be above 0")


def check_counts(tune: str, options: Mapping[str, int]) -> None:
    """Refuse a number below 1.

    Raises:
        ScrimpError: One is; the message names it.
    """
    for name, value in options.items():
        if value < 1:
            raise ScrimpError(f"tune {tune}: {name} {value} must be at least 1")


def check_choice(tune: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a word that is none of those allowed.

    Raises:
        ScrimpError: It is none; the message lists them.
    """
    if value not in allowed:
        raise ScrimpError(f"tune {tune}: {name} {value!r} is unknown; choose from: {', '.join(allowed)}")
