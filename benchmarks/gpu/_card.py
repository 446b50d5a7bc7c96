"""The graphics card as its driver shows it, asked through `nvidia-smi`: no context is made, no byte taken."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from typing import Any

FIELDS = ("index", "uuid", "name", "compute_cap", "driver_version", "memory.total", "memory.used")


def card() -> dict[str, Any] | None:
    """Return the card that torch's first device is; None where the driver shows none.

    Returns:
        `name`, `capability` (as `9.0`), `driver`, `memory_bytes`, `used_bytes` (by everybody, now).
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return read(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES", "")) if done.returncode == 0 else None


def read(text: str, visible: str) -> dict[str, Any] | None:
    """Read what `nvidia-smi` printed.

    Args:
        text: A line for each card, the values of `FIELDS` separated by commas, memory in MiB.
        visible: What `CUDA_VISIBLE_DEVICES` says: the first entry is torch's first device.
    """
    rows = [dict(zip(FIELDS, map(str.strip, line), strict=True)) for line in csv.reader(text.splitlines())]
    first = visible.split(",", maxsplit=1)[0].strip()
    # An entry is an index or the beginning of an identifier.
    chosen = [row for row in rows if first and (row["index"] == first or row["uuid"].startswith(first))]
    for row in chosen or rows:
        return {
            "name": row["name"],
            "capability": row["compute_cap"],
            "driver": row["driver_version"],
            "memory_bytes": int(row["memory.total"]) * 2**20,
            "used_bytes": int(row["memory.used"]) * 2**20,
        }
    return None
