"""What kernels allocate inside: bytes beyond their outputs, by operation.

A dispatch mode cannot see them, on fake tensors or on real ones. Each rule (`scratch_rules`) was found by
the probe of `scrimp.memory.probe`, which holds every operation of a step against the allocator's own events
and runs in CI, so that a new version of torch that changes one is noticed.

Left out: what oneDNN packs for a bf16 product on recent CPUs (`is_known`), 13 KiB to 10 MiB, most for the
gradient of a wide layer's input. Models of a few MiB are underestimated by up to 4 % where the peak lies in
such a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.memory import scratch_rules as rules
from scrimp.memory.scratch_rules import Call, narrow_products

Kernels = Literal["cpu", "cuda"]
Rule = Callable[[Call], int]

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_GROUPED = "aten::_grouped_mm"


def scratch_bytes(
    func: Any,
    args: tuple[Any, ...],
    out: Any,
    *,
    kernels: Kernels = "cpu",
    threads: int | None = None,
) -> int:
    """Return the bytes that an operation holds at its peak beyond its outputs.

    Args:
        func: The operation, as a dispatch mode is handed it.
        args: Its positional arguments.
        out: What it returned.
        kernels: Whose kernels run; tensors are on the CPU either way.
        threads: How many threads run a CPU's kernels; None is as many as torch now has.
    """
    rule = RULES[kernels].get(func._schema.name)
    return 0 if rule is None else rule(Call(args, out, threads or torch.get_num_threads()))


def is_known(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether `scratch_bytes` answers for an operation: not for what narrow products pack.

    Of a grouped product it guesses how large the groups are, wherever that matters.
    """
    unknown = {"packed": (*_PRODUCTS, _GROUPED), "widened": (_GROUPED,), "plain": ()}[narrow_products()]
    narrow = any(isinstance(a, Tensor) and a.is_floating_point() and a.itemsize < 4 for a in args)
    return not narrow or func._schema.name not in unknown


_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "addcmul", "addcdiv")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and", "bitwise_or")

_OURS: dict[str, Rule] = {"scrimp::linear_cross_entropy": rules.linear_cross_entropy}

RULES: dict[Kernels, dict[str, Rule]] = {
    "cpu": {
        **_OURS,
        **{f"aten::{name}": rules.promotion for name in (*_ARITHMETIC, *_COMPARISONS)},
        **{f"aten::{name}_": rules.promotion_in_place for name in _ARITHMETIC},
        **dict.fromkeys(_PRODUCTS, rules.product),
        _GROUPED: rules.grouped_product,
        "aten::where": rules.where,
        **{f"aten::{name}": rules.reduction for name in ("prod", "cumsum", "cumprod")},
        "aten::sum": rules.add_up,
        "aten::mean": rules.mean,
        "aten::linalg_vector_norm": rules.norm,
        "aten::_safe_softmax": rules.safe_softmax,
        "aten::logsumexp": rules.logsumexp,
        "aten::sort": rules.sort,
        **{f"aten::{name}": rules.scatter for name in ("scatter", "scatter_", "scatter_add", "scatter_add_")},
        "aten::convolution": rules.convolution,
        "aten::convolution_backward": rules.convolution_backward,
        "aten::_linalg_svd": rules.svd,
        "aten::_scaled_dot_product_flash_attention_for_cpu": rules.attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": rules.attention_backward,
        "scrimp_cpu::adam_projected": rules.projected_step,
    },
    "cuda": {
        **_OURS,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": rules.flash_backward_cuda,
        "aten::_scaled_dot_product_flash_attention_backward": rules.flash_backward_cuda,
    },
}
