"""Bytes and counts as people write them, and as they read them."""

from __future__ import annotations

import re
from decimal import Decimal

from scrimp.base.errors import ScrimpError

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
}
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_bytes(text: str | int) -> int:
    """Read a byte count such as `6GiB`, `500 MB` or `1073741824`.

    Raises:
        ScrimpError: The unit is unknown, or the amount is not positive.
    """
    return _parse(text, _BYTE_UNITS, "an amount of memory such as 6GiB or 500MB")


def parse_count(text: str | int) -> int:
    """Read a count such as `20M`, `1.1B` or `131072` (powers of ten).

    Raises:
        ScrimpError: The unit is unknown, or the count is not a whole number of at least one.
    """
    return _parse(text, _COUNT_UNITS, "a count such as 131072, 20M or 1.1B")


def _parse(text: str | int, units: dict[str, int], wanted: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    by_lower = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or match[2].lower() not in by_lower:
        known = ", ".join(unit for unit in units if unit)
        raise ScrimpError(f"{text!r} is not {wanted}; the units are {known}")
    value = Decimal(match[1]) * by_lower[match[2].lower()]
    if value < 1 or value != int(value):
        raise ScrimpError(f"{text!r} is not {wanted}: it must be a whole number of at least one")
    return int(value)


def format_bytes(count: float) -> str:
    """Write bytes in binary units with three significant digits, as in `3.44 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"


def format_count(count: float) -> str:
    """Write a count in powers of ten with three significant digits, as in `1.02 M`."""
    value = float(count)
    for unit in ("", " K", " M", " B", " T"):
        if abs(value) < 1000 or unit == " T":
            break
        value /= 1000
    return f"{value:.0f}" if unit == "" else f"{value:.3g}{unit}"


def format_duration(seconds: float) -> str:
    """Write a duration as `12 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
