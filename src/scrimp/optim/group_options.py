"""The options of a parameter group: whose words they are, and which values they may have.

    ours             galore-torch, apollo-torch     fira
    rank             rank                           rank
    refresh_every    update_proj_gap                update_proj_gap
    side             proj_type                      proj_type
    scale            scale                          alpha

An option that is mistyped would silently be another algorithm (torch takes any key, and galore-torch
projects where it finds a `rank`), so unknown ones are refused, with the nearest known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean

Authors = Mapping[str, Callable[[Any], Any]]  # what to make of a value in a group of the authors' words
AUTHORS_WORDS = {"update_proj_gap": "refresh_every", "proj_type": "side", "alpha": "scale"}
_SIDES = ("std", "reverse_std", "left", "right", "full")
_KEPT = ("initial_lr", "name")  # Schedulers and Lightning keep theirs in a group.


def marker(projected: Mapping[str, Any]) -> str:
    """Return the option that makes a group a projected one: `rank`, or what the method has in its place."""
    return "rank" if "rank" in projected else next(iter(projected))


def own_words(
    group: Mapping[str, Any],
    options: Mapping[str, Any],
    projected: Mapping[str, Any] | None,
    where: str,
    authors: Authors | None = None,
) -> dict[str, Any]:
    """Return a group's options in our words.

    Args:
        group: The options as written, without "params".
        options: The options of every group.
        projected: Those of projected groups alone.
        where: What messages call the group.
        authors: How values are converted in a group of the authors' words.

    Raises:
        ScrimpError: An option is unknown, or the group has ours and an author's words.
    """
    known = {*options, *(projected or ())}
    words = {word: ours for word, ours in AUTHORS_WORDS.items() if ours in known and word not in known}
    theirs = [key for key in group if key in words]
    ours = [key for key in group if key in ("refresh_every", "side") or key in {words[t] for t in theirs}]
    if theirs and ours:
        raise ScrimpError(
            f"{where} has {ours[0]!r} and {theirs[0]!r}, which are the words of two packages: "
            f"write {words[theirs[0]]!r} for {theirs[0]!r}"
        )
    for key in group:
        if key not in known and key not in words and key not in _KEPT:
            near = did_you_mean(key, [*known, *words])
            raise ScrimpError(f"{where} has the option {key!r}, which this optimizer does not know{near}")
    convert = authors if theirs and authors else {}
    return {
        words.get(key, key): convert[key](value) if key in convert else value for key, value in group.items()
    }


def check_options(group: Mapping[str, Any], where: str) -> None:
    """Check the values of a complete group.

    Raises:
        ScrimpError: One is of the wrong type or out of range.
    """
    for key, (is_allowed, allowed) in _ALLOWED.items():
        value = group.get(key, _ABSENT)
        is_unset = value is _ABSENT or (value is None and key in _OPTIONAL)
        if not is_unset and not is_allowed(value):
            prefix = f"{where}: " if where else ""
            raise ScrimpError(f"{prefix}{key} must be {allowed}, not {value!r} ({type(value).__name__})")


_ABSENT = object()
_OPTIONAL = ("rank", "density", "refresh_every", "scale", "side")  # None in groups that are not projected.


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _is_rate(value: Any) -> bool:
    # Schedulers may write into a learning rate that is a tensor.
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return _is_number(number) and number >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check_all(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(map(check, value))

    return check_all


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


_Check = tuple[Callable[[Any], bool], str]
_COUNT: _Check = (_is_count, "a whole number of at least 1")
_AMOUNT: _Check = (lambda value: _is_number(value) and value >= 0, "a finite number of at least 0")
_ALLOWED: dict[str, _Check] = {
    "rank": _COUNT,
    "density": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "refresh_every": _COUNT,
    "scale": (lambda value: _is_number(value) and value > 0, "a finite number above 0"),
    "side": (lambda value: value in _SIDES, f"one of {', '.join(_SIDES)}"),
    "lr": (_is_rate, "a finite number of at least 0"),
    "betas": (
        lambda value: _all(_is_fraction)(value) and len(value) == 2,
        "numbers of at least 0 and below 1, as (0.9, 0.999)",
    ),
    "store": (lambda value: isinstance(value, str), "the name of a store, as 'fp32'"),
    "reset_every": (lambda value: value == 0 or _is_count(value), "a whole number of at least 0"),
    "momentum": (_is_fraction, "a number of at least 0 and below 1"),
    # Adafactor has two.
    "eps": (lambda value: _AMOUNT[0](value) or _all(_AMOUNT[0])(value), _AMOUNT[1]),
    "weight_decay": _AMOUNT,
}
