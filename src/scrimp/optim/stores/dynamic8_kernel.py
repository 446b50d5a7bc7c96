"""The C++ of `dynamic8.cpp`: built on first use, in seconds, and kept; who cannot build it lacks speed alone.

Its results are the reference's to the bit, so that a run may go on where it cannot be built. It is compiled
by one call of the compiler: torch's own loader needs ninja, and waits for ever on the lock of a build that
was killed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from scrimp.optim.stores import dynamic_map

DECADES = 7
_SOURCE = Path(__file__).with_name("dynamic8.cpp")
_ONE = 0x3F800000  # 1.0
_BINADES = 24  # from 1 down to below the smallest threshold
# Exact arithmetic, but for flags and traps that nobody reads: they forbid vectors of roots and of choices.
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# The vectors that torch found. What else the machine has would make files that others of its kind cannot run;
# tuning alone decides whether table look-ups become gathers, and with it half of the time.
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mtune=native"),
    "AVX2": ("-mavx2", "-mtune=native"),
}

# Without OpenMP, torch's parallel loops run on one thread. On macOS compilers do not bring it.
_THREADS = ("-fopenmp",) if sys.platform == "linux" else ("-fopenmp-simd",)


@functools.cache
def _loaded() -> bool:
    try:
        torch.ops.load_library(_library())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        lines = [line for line in output.splitlines() if "error" in line] or [output]
        warnings.warn(
            f"8-bit optimizer states are slow here, as their C++ could not be built ({lines[0]}). "
            "Install a C++ compiler (g++ or clang) to have it.",
            stacklevel=2,
        )
        return False
    with _disable_current_modes():  # the first to ask may be a simulation on fake tensors
        for signed in (False, True):
            values = dynamic_map.decode(torch.arange(256, dtype=torch.uint8), decades=DECADES, signed=signed)
            torch.ops.scrimp_dynamic8.set_tables(_bins(signed), values, signed)
    torch.library.register_fake("scrimp_dynamic8::encode", _encode_shapes)
    torch.library.register_fake("scrimp_dynamic8::decode", _decode_shapes)
    torch.library.register_fake(
        "scrimp_dynamic8::is_finite", lambda grad: grad.new_empty((), dtype=torch.bool)
    )
    for rule in ("adam", "lion"):  # they write in place alone
        torch.library.register_fake(f"scrimp_dynamic8::{rule}", lambda *given: None)
    return True


def _library() -> Path:
    """Return the compiled library, compiling it where this torch and machine have none yet.

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
    identity = f"{torch.__version__} {flags} {_SOURCE.read_text()}"
    name = f"scrimp_dynamic8_{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}.so"
    library = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / name
            command = [cpp_extension.get_cxx_compiler(), *flags, str(_SOURCE), "-lc10", "-ltorch_cpu"]
            subprocess.run(
                [*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=300
            )
            made.replace(library)  # whole or not at all, whoever else builds it
    return library


_IS_THERE = False


def prepare() -> bool:
    """Build and load the kernel where that has not been done, and tell whether it is there."""
    global _IS_THERE  # noqa: PLW0603 - compiled code reads it, and cannot build
    _IS_THERE = _loaded()
    return _IS_THERE


def available() -> bool:
    """Tell whether `prepare` found or built the kernel."""
    return _IS_THERE


def encode(rows: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes shaped like float32 `rows` on the CPU, and their largest magnitudes, (rows, 1)."""
    codes, scale = torch.ops.scrimp_dynamic8.encode(rows, signed)
    return codes, scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Return the float32 values of `codes` with `scale`, (rows, 1)."""
    values: Tensor = torch.ops.scrimp_dynamic8.decode(codes, scale, signed)
    return values


def is_finite(grad: Tensor) -> Tensor:
    """Return whether all of a float32 gradient on the CPU is finite, a 0-d bool."""
    found: Tensor = torch.ops.scrimp_dynamic8.is_finite(grad)
    return found


def adam(
    weight: Tensor,
    grad: Tensor,
    entries: Mapping[str, Tensor],
    numbers: Mapping[str, float],
    ok: Tensor,
    *,
    hf: bool,
) -> None:
    """Update weights and both moments in place by one step of `scrimp.optim.rules.adam`.

    Args:
        weight: float32, contiguous, on the CPU.
        grad: Alike.
        entries: The moments' codes and scales of blocks of 256, by the names of the rule's slots.
        numbers: The step's; `size` and `decay` multiply the direction and W.
        ok: A 0-d bool on the CPU; where it is false, nothing is done.
        hf: Whether the convention is the Hugging Face one.
    """
    held = [entries[f"{name}.{part}"] for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "scale")]
    names = ("beta1", "beta2", "inv_c1", "inv_root_c2", "eps", "size", "decay")
    torch.ops.scrimp_dynamic8.adam(weight, grad, *held, ok, hf, *[numbers[name] for name in names])


def lion(
    weight: Tensor, grad: Tensor, entries: Mapping[str, Tensor], numbers: Mapping[str, float], ok: Tensor
) -> None:
    """Update weights and the momentum in place by one step of `scrimp.optim.rules.lion`; else as `adam`."""
    held = [entries[f"exp_avg.{part}"] for part in ("codes", "scale")]
    names = ("beta1", "beta2", "size", "decay")
    torch.ops.scrimp_dynamic8.lion(weight, grad, *held, ok, *[numbers[name] for name in names])


def _bins(signed: bool) -> Tensor:
    """Return an entry for each bin, as `dynamic8.cpp` describes them, int32."""
    edges = _thresholds(signed)
    top = _ONE >> 16
    bins = torch.arange(top - 128 * _BINADES, top + 1)
    below = torch.searchsorted(edges, bins << 16, right=True)
    inside = torch.searchsorted(edges, (bins << 16) + 0xFFFF, right=True) > below
    edge = edges[below.clamp_max(edges.numel() - 1)]
    upper = torch.where(inside, (edge & 0xFFFF) - 1, 0xFFFF)
    return (upper << 16 | below).to(torch.int32)


def _thresholds(signed: bool) -> Tensor:
    """Return the bits of the least float of each positive rank, by bisection of the reference."""
    zero = 2**DECADES - 1 if signed else 0
    codes = torch.arange(zero + 1, 256)
    low, high = torch.zeros_like(codes), torch.full_like(codes, _ONE)
    for _ in range(31):
        middle = (low + high) // 2
        x = middle.to(torch.int32).view(torch.float32)
        reached = dynamic_map.encode(x, decades=DECADES, signed=signed) >= codes
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return high


def _encode_shapes(rows: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=torch.uint8), rows.new_empty((rows.shape[0], 1))


def _decode_shapes(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    return scale.new_empty(codes.shape)
