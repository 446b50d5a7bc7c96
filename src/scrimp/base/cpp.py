"""Builds C++ operators against the installed torch: on first use, once for text, flags and torch, and kept.

Who cannot build it lacks speed alone: each operator has its equations in torch beside it.

It is one call of the compiler: torch's own loader needs ninja, and waits for ever on the lock of a build that
was killed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

# Exact arithmetic, but for flags and traps that nobody reads: they forbid vectors of roots and of choices.
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# The vectors that torch found. What else the machine has would make files that others of its kind cannot run;
# tuning alone decides whether table look-ups become gathers, and with it half of the time.
_VECTORS = {
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mtune=native"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ),
    "AVX2": (
        *("-mavx2", "-mfma", "-mf16c", "-mtune=native"),
        *("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    ),
}
# Without OpenMP, torch's parallel loops run on one thread. On macOS compilers do not bring it.
_THREADS = ("-fopenmp",) if sys.platform == "linux" else ("-fopenmp-simd",)


def load(source: Path, *, slower: str) -> bool:
    """Build and load the operators of a C++ file, and tell whether they are there.

    Args:
        source: The file; headers lie beside it.
        slower: What takes longer without them, for the one warning where they cannot be built.
    """
    try:
        torch.ops.load_library(_library(source))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        lines = [line for line in output.splitlines() if "error" in line] or [output]
        warnings.warn(
            f"{slower} slower here, as their C++ could not be built ({lines[0]}). "
            "Install a C++ compiler (g++ or clang) to have it.",
            stacklevel=2,
        )
        return False
    return True


def _library(source: Path) -> Path:
    """Return the compiled library of a C++ file, compiling it where this torch and machine have none yet.

    Args:
        source: The file; headers lie beside it.

    Raises:
        OSError: There is no compiler, or no room.
        subprocess.SubprocessError: It failed.
    """
    from torch.utils import cpp_extension

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", *_EXACT, *_THREADS, *_VECTORS.get(capability, ())]
    for folder in cpp_extension.include_paths():
        flags += ["-isystem", folder]
    for folder in cpp_extension.library_paths():
        flags += ["-L", folder]
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    identity = f"{torch.__version__} {flags} {texts}"
    name = f"scrimp_{source.stem}_{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}.so"
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / name
            command = [cpp_extension.get_cxx_compiler(), *flags, str(source), "-lc10", "-ltorch_cpu"]
            subprocess.run(
                [*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=300
            )
            made.replace(built)  # whole or not at all, whoever else builds it
    return built
