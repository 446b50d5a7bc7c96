"""What there is to run on: found out once, kept in the cache, and answered from there without torch.

    <cache>/plans/machine.json        {"key": what it holds for, "machine": what was found}

The key is what can be told at once: versions, processor, cores, and the GPUs that the driver shows. Anything
else asks torch. Two things are measured: what a training process holds before its model exists, and, where
it was asked for, how fast the device is (`calibrate`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform as host
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.base import files, platform
from scrimp.base.errors import ScrimpError
from scrimp.base.platform import passive_openmp
from scrimp.data import cache_folder
from scrimp.memory.warmup import ADAPTER
from scrimp.methods import piece

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

CUDA_CONTEXT = 7 * 2**30 // 10  # bytes outside the allocator that a CUDA process takes; assumed, not measured
# What a training process imports. Named, not imported: the training loop stands above this package.
_TRAINING = ("scrimp.cli.train", "scrimp.training.run")
_PACKAGES = ("scrimp", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """How fast a device is.

    Attributes:
        flops: Floating-point operations of matrix products a second, by precision.
        bandwidth: Bytes a second that element-wise operations read and write.
        seconds_per_operation: What any operation costs before it computes.
    """

    flops: Mapping[str, float]
    bandwidth: float
    seconds_per_operation: float

    def seconds(self, flops: float, moved: float, operations: float, precision: str) -> float:
        """Return how long some work takes.

        Args:
            flops: Floating-point operations of products.
            moved: Bytes that all other operations read and write.
            operations: How many operations there are.
            precision: Of the products, as in a recipe.
        """
        return (
            flops / self.flops[precision] + moved / self.bandwidth + operations * self.seconds_per_operation
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to run on.

    Attributes:
        device: What `--device auto` means here: cuda, mps or cpu.
        has_bf16: Whether that is a GPU that multiplies in bf16.
        memory: Bytes there are, by type of device; the CPU's are the machine's or its container's.
        name: Of the device.
        fixed: Bytes that a training process holds before its model exists, by precision.
        roofline: How fast `device` is; None where it was not calibrated.
    """

    device: str = "cpu"
    has_bf16: bool = False
    memory: Mapping[str, int] = field(default_factory=dict)
    name: str = ""
    fixed: Mapping[str, int] = field(default_factory=dict)
    roofline: Roofline | None = None

    def fixed_bytes(self, recipe: Recipe) -> int:
        """Return what counts against a recipe's budget before its model exists.

        On CUDA that is what `CUDA_CONTEXT` assumes, elsewhere the process.

        Args:
            recipe: With its device and precision resolved.
        """
        if recipe.device == "cuda":
            return CUDA_CONTEXT
        more = self.fixed[ADAPTER] if piece("tune", recipe.tune.name).freezes_base else 0
        return self.fixed[recipe.precision] + max(0, more)


def known(folder: Path | None = None) -> Machine | None:
    """Return what is in the cache about this machine, without importing torch.

    Args:
        folder: The cache; None is the platform's.

    Returns:
        The machine; None where nothing is known that still holds.
    """
    try:
        document = json.loads(_path(folder).read_text(encoding="utf-8"))
        if document["key"] != _key():
            return None
        found = document["machine"]
        roofline = None if found["roofline"] is None else Roofline(**found["roofline"])
        # A container's limit may be another one every time.
        memory = {**found["memory"], "cpu": platform.total_memory_bytes()}
        return Machine(**{**found, "roofline": roofline, "memory": memory})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def look(folder: Path | None = None, *, calibrate: bool = False, fresh: bool = False) -> Machine:
    """Find out what there is to run on, from the cache as far as that holds.

    Args:
        folder: The cache; None is the platform's.
        calibrate: Measure the device's speed where that is not known; it takes seconds.
        fresh: Whether this process has done nothing yet, so that it can stand for one that trains; else
            one is started.
    """
    machine = found = known(folder)
    if machine is None:
        with passive_openmp():
            machine = _look(fresh=fresh)
    if calibrate and machine.roofline is None:
        with passive_openmp():
            from scrimp.memory.calibrate import measure_roofline
        machine = replace(machine, roofline=measure_roofline(machine.device))
    if machine != found:
        _store(machine, folder)
    return machine


def _look(*, fresh: bool) -> Machine:
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name, memory = platform.processor_name(), {"cpu": platform.total_memory_bytes()}
    if cuda:
        name, memory["cuda"] = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    elif mps:
        memory["mps"] = torch.mps.recommended_max_memory()
    return Machine(
        device="cuda" if cuda else "mps" if mps else "cpu",
        has_bf16=cuda and torch.cuda.is_bf16_supported(),
        memory=memory,
        name=name,
        fixed=_fixed_here() if fresh else _fixed_in_a_child(),
    )


def _fixed_here() -> dict[str, int]:
    from scrimp.memory.warmup import resident_by_precision

    return resident_by_precision(_TRAINING)


def _fixed_in_a_child() -> dict[str, int]:
    """Start a process that imports what training imports and does a tiny step in every precision."""
    source = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    # -P: no file of the user's working folder takes the place of a module.
    command = [sys.executable, "-P", "-m", "scrimp.memory.warmup", *_TRAINING]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    fixed: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return fixed


def _store(machine: Machine, folder: Path | None) -> None:
    """Write a machine into the cache; one that cannot be written to is no loss."""
    path = _path(folder)
    with contextlib.suppress(OSError, ScrimpError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, json.dumps({"key": _key(), "machine": asdict(machine)}, indent=1))


def _path(folder: Path | None) -> Path:
    return (folder or cache_folder()) / "plans" / "machine.json"


def _key() -> dict[str, Any]:
    """Return what the cached answer depends on."""
    return {
        **{name: version(name) for name in _PACKAGES},
        "python": host.python_version(),
        "processor": platform.processor_name(),
        "cores": platform.usable_cores(),
        "gpus": platform.nvidia_gpus(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
