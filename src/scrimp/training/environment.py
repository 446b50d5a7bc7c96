"""What a run sets in its process, gives back at its end, and records in its recipe file."""

from __future__ import annotations

import os
import platform as host
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from scrimp.build import Job
    from scrimp.recipe import Recipe

RECORDED_PACKAGES = ("scrimp", "torch", "transformers", "tokenizers", "numpy")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def process_state(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Set threads and determinism for a run, and put everything back afterwards.

    Torch's random state is the caller's: what a run draws leaves no trace in it.
    """
    assert recipe.threads is not None
    threads, determinism = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    workspace = os.environ.get(_CUBLAS)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.set_num_threads(recipe.threads)
            if recipe.deterministic and device.type == "cuda":
                # cuBLAS reads it when its first handle is made, and repeats its sums only with it.
                os.environ.setdefault(_CUBLAS, ":4096:8")
                torch.use_deterministic_algorithms(True)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(determinism)
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed what a step may draw from (`torch.manual_seed` takes 400 microseconds for all devices)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def recorded(job: Job) -> dict[str, Any]:
    """Return what a run ran with, as plain data for its recipe file."""
    name = (
        torch.cuda.get_device_name(job.device)
        if job.device.type == "cuda"
        else host.processor() or host.machine()
    )
    return {
        "python": host.python_version(),
        **{package: version(package) for package in RECORDED_PACKAGES},
        "device": name,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "data": job.prepared.corpus.fingerprint,
        "model": job.identity,
        "fixed_bytes": job.ledger.moments[0].terms["fixed"],  # before there is any slack
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what may change bits between two records, each as `torch 2.13.0, was 2.12.0`."""
    return [
        f"{name} {now[name]}, was {before[name]}"
        for name in now
        if name in before and before[name] != now[name] and name != "fixed_bytes"
    ]
