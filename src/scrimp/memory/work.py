"""What operations cost: the products' floating-point operations, and the bytes the others move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

LOGIT_TOUCHES = 4


@dataclass(slots=True)
class Work:
    """The cost of a stretch of operations.

    Attributes:
        flops: Floating-point operations of matrix products and attention.
        moved: Bytes that all other operations read and write.
        operations: How many there were, views left out.
    """

    flops: int = 0
    moved: int = 0
    operations: int = 0

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Add an operation."""
        self.operations += 1
        if func._schema.name == "scrimp::linear_cross_entropy":
            self._add_chunked_loss(args)
            return
        flops = _flops(func, args, kwargs, out)
        if flops is None:
            seen = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            self.moved += sum(tensor.numel() * tensor.itemsize for tensor in seen.values())
        else:
            self.flops += flops

    def _add_chunked_loss(self, args: tuple[Any, ...]) -> None:
        """Add the operator of `activations.linear_cross_entropy`, whose inside nobody else sees."""
        hidden, weight = args[:2]
        products = 1 + sum(args[8:10])  # the logits, and the two gradients where they are needed
        self.flops += 2 * products * hidden.numel() * weight.shape[0]
        # Each logit is written by its product, read for the sum, and read and written as its gradient.
        logits = math.prod(hidden.shape[:-1]) * weight.shape[0]
        self.moved += LOGIT_TOUCHES * logits * hidden.itemsize


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """Return the operations of a product, or None where it is none."""
    name = func._schema.name
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    if name == "aten::_grouped_mm":
        return int(2 * math.prod(args[0].shape) * args[1].shape[-1])
    count = flop_registry.get(func._overloadpacket)
    return None if count is None else int(count(*args, **kwargs, out_val=out))
