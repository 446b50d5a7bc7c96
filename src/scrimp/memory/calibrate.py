"""A short measured roofline: products, element-wise operations, and what an operation costs by itself.

Both rates are harmonic means: the same work is done in each of some sizes and kinds, of those that small
models have, and divided by the time of it all. Products come as in the forward pass and as for either
gradient; the others write into fresh memory, as in a step, where the largest sizes pay for new pages. What an
operation costs by itself, autograd's and the modules' share included, is the time of a training step too
small to compute anything, over the number of its operations. Of repeated times the shortest counts: a busy
machine only adds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from scrimp.base import platform
from scrimp.memory.machine import Roofline
from scrimp.memory.tracker import Tracker
from scrimp.memory.warmup import tiny_step

# (rows, inner, columns) of products, and bytes of the inputs of element-wise operations.
PRODUCTS = {
    "cpu": ((1024, 128, 352), (2048, 384, 1024), (2048, 1024, 1024), (512, 384, 32000)),
    "gpu": ((2048, 512, 2048), (2048, 1024, 4096), (4096, 4096, 4096), (2048, 2048, 32000)),
}
MIB = 2**20
SIZES = {
    "cpu": (2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB),
    "gpu": (8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB),
}
COLUMNS = 2**14  # of a softmax
REPEATS = 5
LEAST_SECONDS = 0.2  # of repeats


def measure_roofline(device: str) -> Roofline:
    """Measure how fast a device is, with as many threads as runs take by default.

    Args:
        device: Its type.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(platform.usable_cores())
    try:
        bf16 = _product_rate(device, torch.bfloat16)
        return Roofline(
            flops={"fp32": _product_rate(device, torch.float32), "bf16": bf16, "bf16-mixed": bf16},
            bandwidth=_bandwidth(device),
            seconds_per_operation=_seconds_per_operation(device),
        )
    finally:
        torch.set_num_threads(threads)


def _product_rate(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of matrix products."""
    rates = []
    for rows, inner, columns in PRODUCTS[_kind(device)]:
        x = torch.ones((rows, inner), dtype=dtype, device=device)
        weight = torch.ones((columns, inner), dtype=dtype, device=device)
        grad = torch.ones((rows, columns), dtype=dtype, device=device)
        operations = 2.0 * rows * inner * columns
        factors = ((x, weight.mT), (grad, weight), (grad.mT, x))
        rates += [operations / _shortest(partial(torch.mm, a, b), device) for a, b in factors]
    return statistics.harmonic_mean(rates)


def _bandwidth(device: str) -> float:
    """Return the bytes a second that a product of elements, an activation and a softmax read and write."""
    rates = []
    for size in SIZES[_kind(device)]:
        a, b = (torch.ones((size // 4 // COLUMNS, COLUMNS), device=device) for _ in range(2))
        programs = {
            partial(torch.mul, a, b): 3,
            partial(F.silu, a): 2,
            partial(torch.log_softmax, a, dim=-1): 2,
        }
        rates += [float(count * size) / _shortest(program, device) for program, count in programs.items()]
    return statistics.harmonic_mean(rates)


def _seconds_per_operation(device: str) -> float:
    step = tiny_step("fp32", device)
    step()  # loads what the first one loads
    with Tracker([]) as tracker:
        step()
    # One thread does all of it, so on a CPU its own time can be taken, which busy neighbours leave alone.
    clock = time.process_time if device == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    operations: int = tracker.record.work.operations
    return _shortest(step, device, clock) / operations


def _shortest(
    program: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of the fastest of some calls."""
    seconds: list[float] = []
    until = time.monotonic() + LEAST_SECONDS
    while len(seconds) <= REPEATS or time.monotonic() < until:  # the first one loads kernels
        _synchronize(device)
        began = clock()
        program()
        _synchronize(device)
        seconds.append(clock() - began)
    return min(seconds)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "gpu"
