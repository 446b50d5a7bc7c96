"""bitsandbytes' kernel for decoding NF4 on CUDA, where the package is installed.

One pass over codes and output, where ours takes some five; the same float32 product, rounded once, so that a
run computes the same bits with it and without. On a CPU ours is right for every shape and theirs is not.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from scrimp.base.extras import is_installed

Decode = Callable[[Tensor, Tensor, int, str, list[int], torch.dtype], Tensor]


def kernel_for(codes: Tensor) -> Decode | None:
    """Return `(codes, absmax, group, "nf4", shape, dtype) -> values` for plain tensors on CUDA; else None."""
    # A simulation's tensors are no plain ones: what is planned is ours, which holds more.
    return _loaded() if type(codes) is Tensor and codes.is_cuda else None


@functools.cache
def _loaded() -> Decode | None:
    if not is_installed("bitsandbytes"):
        return None
    try:
        importlib.import_module("bitsandbytes")
        kernel: Decode = torch.ops.bitsandbytes.dequantize_4bit.default
    except Exception:  # it may be built for another CUDA: whatever it raises, ours does as well
        return None
    return kernel
