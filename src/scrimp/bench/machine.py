"""The machine under a measurement: what it is, how busy it was, and whether a timing can be trusted.

A figure is marked busy where the load was high before it began, or where other programs took more than
a twentieth of all cores' time while it ran. It imports no torch.
"""

from __future__ import annotations

import os
import platform as host
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from scrimp.base import platform

PACKAGES = ("scrimp", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")
OPENMP_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
BUSY_LOAD_PER_CORE = 0.5
BUSY_OTHERS_SHARE = 0.05  # of all cores' time, by processes that are not ours
CORES = psutil.cpu_count() or 1


def environment(packages: Sequence[str] = (), *, device: str = "cpu") -> dict[str, Any]:
    """Return what a measured number depends on besides the code.

    Args:
        packages: Distributions to name with their versions, besides the usual ones.
        device: The type of the device that trains.
    """
    gpus = platform.nvidia_gpus() if device == "cuda" else []
    named = {name: found for name in (*PACKAGES, *packages) if (found := installed_version(name))}
    return {
        "device": device,
        "device_name": gpus[0] if gpus else platform.processor_name(),
        "cpu": platform.processor_name(),
        "cores": CORES,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{host.system()} {host.release()}",
        "versions": {"python": host.python_version(), **named},
        "openmp": {name: os.environ[name] for name in OPENMP_SETTINGS if name in os.environ},
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clean_env(added: dict[str, str] | None = None) -> dict[str, str]:
    """Return this environment without the OpenMP settings, which a program we start makes for itself."""
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP_SETTINGS}
    return {**kept, **(added or {})}


@dataclass(slots=True)
class LoadWatch:
    """Watches the load of the machine from the moment it is made."""

    before: tuple[float, float, float] = field(default_factory=psutil.getloadavg)
    _cpu: tuple[float, float] = field(default_factory=lambda: _cpu_seconds())  # noqa: PLW0108 - defined below
    _began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    def others_share(self) -> float:
        """Return the share of all cores' time that programs which are not ours took so far.

        Windows does not tell what finished children took, so there it is 0.
        """
        if os.name == "nt":
            return 0.0
        machine, own = (after - before for after, before in zip(_cpu_seconds(), self._cpu, strict=True))
        return round(max(0.0, machine - own) / max(1e-9, self.seconds * CORES), 3)

    def end(self) -> tuple[dict[str, Any], bool]:
        """Return the load before and after with the share that others took, and whether it was too much."""
        others = self.others_share()
        busy = self.before[0] / CORES > BUSY_LOAD_PER_CORE or others > BUSY_OTHERS_SHARE
        return {"before": self.before, "after": psutil.getloadavg(), "others_share_of_cpu": others}, busy


def settle(seconds: float) -> None:
    """Wait at most so many seconds for the load to fall to where timings can be trusted."""
    until = time.monotonic() + seconds
    while psutil.getloadavg()[0] / CORES > BUSY_LOAD_PER_CORE and time.monotonic() < until:
        time.sleep(1)


def _cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds of the machine and of this process with its finished children."""
    busy, own = psutil.cpu_times(), os.times()
    return (
        busy.user + busy.system + getattr(busy, "nice", 0.0),  # Windows knows none
        own.user + own.system + own.children_user + own.children_system,
    )
