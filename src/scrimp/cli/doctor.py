"""`scrimp doctor`: what this machine has, what works on it and what is missing."""

from __future__ import annotations

import os
import platform as host
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from scrimp import __version__
from scrimp.base import extras, platform
from scrimp.base.units import format_bytes
from scrimp.cli.guard import print_json
from scrimp.cli.train import load_torch, make_reporter

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "pyarrow", "pydantic", "numpy")
EXTRAS = {
    "gguf": "gguf",
    "hub": "datasets",
    "tensorboard": "tensorboard",
    "plots": "matplotlib",
    "wandb": "wandb",
    "trackio": "trackio",
    "browser": "playwright",
}
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def doctor(
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the token files; none: the platform's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings as one JSON document.")] = False,
) -> None:
    """Show versions, device, memory, threads, compiler and caches; what works, and what is missing."""
    load_torch(make_reporter())
    from scrimp.data.cache import cache_folder

    found = _findings(cache or cache_folder())
    if as_json:
        print_json(found)
        return
    for topic, facts in found.items():
        print(topic)
        for name, value in facts.items():
            print(f"  {name:<16} {value}")


def _findings(cache: Path) -> dict[str, dict[str, Any]]:
    from scrimp.data.cache import cache_bytes

    return {
        "versions": {
            "scrimp": __version__,
            "python": host.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": _machine(),
        "memory": {
            "available": format_bytes(platform.available_memory_bytes()),
            "this process": format_bytes(platform.resident_bytes()),
            "free disk here": format_bytes(shutil.disk_usage(Path.cwd()).free),
        },
        "threads": {
            "usable cores": platform.usable_cores(),
            **{name: os.environ.get(name, "not set") for name in OPENMP},
        },
        "cache": {"folder": str(cache), "size": format_bytes(cache_bytes(cache))},
        "extras": {
            name: "installed" if extras.is_installed(module) else f"missing: pip install 'scrimp[{name}]'"
            for name, module in EXTRAS.items()
        },
    }


def _machine() -> dict[str, Any]:
    import torch

    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    cuda = torch.cuda.is_available()
    return {
        "system": f"{host.system()} {host.release()} {host.machine()}",
        "cpu kernels": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if cuda else "none",
        "bf16 on cuda": torch.cuda.is_bf16_supported() if cuda else "no device",
        "mps": "yes" if torch.backends.mps.is_available() else "none",
        "C++ compiler": compiler or "none: --compile does not work on the CPU",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
