"""Cross-entropy of a linear head, a chunk of tokens at a time: the batch's logits never exist.

    z    = softcap tanh(scale (h Wᵀ + b) / softcap)      h: (N, d) hidden, W: (V, d), b: (V,)
    loss = Σ_n (log Σ_v exp z_nv − z_n,label) / divisor  over the labels that are not IGNORED
    dz   = softmax(z) − onehot(label)                    written over the chunk's logits
    dh   = dz W scale / divisor,  dW = dzᵀ h scale / divisor,  db = Σ_n dz scale / divisor

Exact, in value and gradient. Oddities:

- Gradients are taken in the forward pass, while a chunk's logits are at hand. The backward pass hands
  them over once, multiplied in place, so that no second copy of dW ever exists.
- The chunk does not depend on N, so the bytes of a batch grow by a straight line.
- Where the caller knows on the host how many labels are targets, as of a chat of which only the answers
  are learnt, rows without one take part in no product. Their gradient is 0.
- Only `TILE_TOKENS` rows at a time are widened to fp32: logits stay in the dtype of `hidden`. Loss and
  log-sum-exp are fp32, and so is the sum of dW over chunks, where a product is rounded once a chunk.
- The whole is one operator for whoever watches the dispatcher, such as the tracer that predicts memory:
  it sees the outputs alone, and `scratch_bytes` says what they are made in.

torch's own `F.linear_cross_entropy` returns a bf16 loss for bf16 input (steps of 0.03 at a loss of 9),
and there takes 16 V d bytes of scratch unless told otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scrimp.base.protocols import IGNORED

TILE_TOKENS = 64
VOCAB_SLICE = 4096  # rows of a low-precision dW whose product exists at once


def chunk_tokens(hidden_size: int) -> int:
    """Return how many tokens' logits exist at once: the power of two nearest to `hidden_size` / 2.

    A chunk's logits are then half as large as the head. Fewer tokens would cost time, since each chunk
    reads and writes dW once; the limits are 256 and 4096.
    """
    return 1 << round(math.log2(min(max(hidden_size / 2, 256), 4096)))


def scratch_bytes(
    tokens: int,
    hidden: int,
    vocab: int,
    itemsize: int,
    *,
    weight_itemsize: int | None = None,
    needs_gradient: bool = True,
    needs_weight_grad: bool = True,
    needs_bias_grad: bool = False,
    softcap: bool = False,
) -> int:
    """Return what the operator holds at its peak beyond its outputs, in bytes.

    Args:
        tokens: N.
        hidden: d.
        vocab: V.
        itemsize: Bytes of an element of `hidden`, in which the products run: 2, 4 or 8.
        weight_itemsize: Bytes of an element of `weight`; None is `itemsize`.
        needs_gradient: Whether any gradient is taken.
        needs_weight_grad: Whether dW is.
        needs_bias_grad: Whether db is.
        softcap: Whether the logits are capped.
    """
    weight_itemsize = weight_itemsize or itemsize
    chunk = min(chunk_tokens(hidden), tokens)
    tile = min(TILE_TOKENS, chunk) * vocab * max(itemsize, 4)
    tiles = (itemsize < 4) + (softcap and needs_gradient)
    chunks = chunk * vocab * itemsize + tiles * tile + needs_bias_grad * vocab * max(itemsize, 4)
    copy = vocab * hidden * itemsize if weight_itemsize != itemsize else 0
    if not needs_weight_grad or not _in_fp32(tokens, chunk, itemsize, weight_itemsize):
        return copy + chunks
    # A slice of the product is made in that type, widened, and added: 2 and 4 bytes an element.
    chunks += min(VOCAB_SLICE, vocab) * hidden * (itemsize + 4)
    if weight_itemsize >= 4:  # the sum is the output
        return copy + chunks
    output, total = vocab * hidden * weight_itemsize, 4 * vocab * hidden
    return max(copy + chunks + total - output, total)


def _in_fp32(tokens: int, chunk: int, itemsize: int, weight_itemsize: int) -> bool:
    """Tell whether dW is summed in a wider type than that of its products."""
    return itemsize < 4 and (weight_itemsize > itemsize or tokens > chunk)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    divisor: float,
    scale: float = 1.0,
    softcap: float | None = None,
    targets: int | None = None,
) -> Tensor:
    """Return the summed cross-entropy of `softcap tanh(scale (hidden weightᵀ + bias) / softcap)`.

    Gradients that nobody needs are not made: of a frozen head, or where autograd is off.

    Args:
        hidden: (N, d), of the dtype that products run in.
        weight: (V, d), of that dtype or a wider one, in which case its gradient is not rounded to it.
        bias: (V,), or None.
        labels: (N,) int64, `IGNORED` where there is no target.
        divisor: What the sum in nats is divided by.
        scale: What the logits are multiplied by.
        softcap: The bound of the logits, or None.
        targets: How many labels are not `IGNORED`, exactly; None computes every row.

    Returns:
        A scalar, fp32 (fp64 for fp64 `hidden`); 0 where every label is ignored.

    Raises:
        RuntimeError: In the backward pass, where it runs for a second time.
    """
    if torch.is_grad_enabled():
        loss: Tensor = _Loss.apply(hidden, weight, bias, labels, divisor, scale, softcap, targets)  # type: ignore[no-untyped-call]
        return loss
    loss, *_ = _operator(hidden, weight, bias, labels, divisor, scale, softcap, targets, False, False, False)
    return loss


class _Loss(torch.autograd.Function):
    """Keeps the operator's gradients until the backward pass asks for them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        divisor: float,
        scale: float,
        softcap: float | None,
        targets: int | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        loss: Tensor
        loss, *gradients = _operator(hidden, weight, bias, labels, divisor, scale, softcap, targets, *needed)
        ctx.gradients = [made if wanted else None for made, wanted in zip(gradients, needed, strict=True)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy hands its gradients over once: run the forward pass again"
            )
        # Nothing else may hold them: autograd then moves dW into `.grad` instead of copying it.
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if made is None else made.mul_(upstream) for made in gradients), *[None] * 5)


@torch.library.custom_op("scrimp::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    divisor: float,
    scale: float,
    softcap: float | None,
    targets: int | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, d_hidden, d_weight and d_bias; a gradient that is not needed has no elements."""
    d, V = hidden.shape[1], weight.shape[0]
    kept = None if targets is None else _kept(labels, targets)
    N = len(labels) if kept is None else len(kept)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    size = max(1, min(chunk_tokens(d), N))
    in_fp32 = _in_fp32(N, size, hidden.itemsize, weight.itemsize)

    loss = hidden.new_zeros((), dtype=exact)
    make = hidden.new_empty if kept is None else hidden.new_zeros
    d_hidden = make(hidden.shape if needs_hidden else 0)
    d_weight = weight.new_empty(weight.shape if needs_weight else 0, dtype=exact if in_fp32 else None)
    d_bias = hidden.new_zeros(V if needs_bias else 0, dtype=exact)

    # Where it is of that dtype already, this is the weight itself.
    matrix = weight.to(hidden.dtype)
    offset = None if bias is None else bias.to(hidden.dtype)
    chunk = hidden.new_empty(size, V)
    softmax = _Softmax(chunk, softcap, gradient=needs_hidden or needs_weight or needs_bias)
    factor = scale / divisor
    for start in range(0, max(N, 1), size):
        rows = slice(start, start + size) if kept is None else kept[start : start + size]
        h = hidden[rows]
        z = chunk[: len(h)]
        if offset is None:
            z.addmm_(h, matrix.t(), beta=0, alpha=scale)
        else:
            torch.addmm(offset, h, matrix.t(), beta=scale, alpha=scale, out=z)
        loss += softmax.loss_and_gradient_(z, labels[rows], d_bias if needs_bias else None)
        if needs_hidden:
            _write_(d_hidden, rows, z, matrix, factor)
        if needs_weight:
            _add_product_(d_weight, z, h, factor, first=start == 0)
    del matrix, chunk, softmax, z
    empty = weight.new_empty(0)
    return (
        loss / divisor,
        d_hidden,
        d_weight.to(weight.dtype),
        empty if bias is None else d_bias.mul_(factor).to(bias.dtype),
    )


@_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    divisor: float,
    scale: float,
    softcap: float | None,
    targets: int | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    like = weight if bias is None else bias
    return (
        loss,
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        like.new_empty(like.shape if needs_bias else 0),
    )


def _kept(labels: Tensor, targets: int) -> Tensor | None:
    """Return which rows have a target, (targets,) int64; None is all of them. The host waits for nothing."""
    if targets >= len(labels):
        return None
    return torch.nonzero_static(labels != IGNORED, size=targets)[:, 0]


def _write_(d_hidden: Tensor, rows: slice | Tensor, dz: Tensor, matrix: Tensor, factor: float) -> None:
    """Write factor dz W into some rows."""
    if isinstance(rows, slice):
        d_hidden[rows].addmm_(dz, matrix, beta=0, alpha=factor)
    else:
        d_hidden.index_copy_(0, rows, torch.mm(dz, matrix).mul_(factor))


def _add_product_(total: Tensor, dz: Tensor, h: Tensor, factor: float, *, first: bool) -> None:
    """Add factor dzᵀ h to the total, or set it. Where it is of a wider type, slices bound what is rounded."""
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), h, beta=0 if first else 1, alpha=factor)
        return
    for start in range(0, len(total), VOCAB_SLICE):
        rows = slice(start, start + VOCAB_SLICE)
        # No name may hold a slice's product while the next one is made.
        if first:  # the total is not initialised: times zero would keep a NaN
            torch.mul(_product(dz[:, rows], h, total.dtype), factor, out=total[rows])
        else:
            total[rows].add_(_product(dz[:, rows], h, total.dtype), alpha=factor)


def _product(dz: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(dz.t(), h).to(dtype)


class _Softmax:
    """Turns logits into their loss and, in place, their gradient.

    Args:
        chunk: (C, V), the buffer of the logits; only its shape and dtype matter here.
        softcap: The bound of the logits, or None.
        gradient: Whether the gradient is wanted.
    """

    def __init__(self, chunk: Tensor, softcap: float | None, *, gradient: bool) -> None:
        exact = torch.promote_types(chunk.dtype, torch.float32)
        shape = (min(TILE_TOKENS, chunk.shape[0]), chunk.shape[1])
        self._softcap = softcap
        self._gradient = gradient
        self._wide = None if chunk.dtype == exact else chunk.new_empty(shape, dtype=exact)
        capped = gradient and softcap is not None
        self._square = chunk.new_empty(shape, dtype=exact) if capped else None

    def loss_and_gradient_(self, logits: Tensor, labels: Tensor, d_bias: Tensor | None) -> Tensor:
        """Return the summed loss of a chunk of logits; write their gradient over them, and sum it up.

        Args:
            logits: (n, V) before the cap.
            labels: (n,) int64.
            d_bias: (V,), to which the gradient of each token is added.
        """
        loss = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for start in range(0, len(logits), TILE_TOKENS):
            rows = logits[start : start + TILE_TOKENS]
            z = rows if self._wide is None else self._wide[: len(rows)].copy_(rows)
            loss += self._tile_(z, labels[start : start + TILE_TOKENS])
            if d_bias is not None:
                d_bias += z.sum(0)
            if self._gradient and z is not rows:
                rows.copy_(z)
        return loss

    def _tile_(self, z: Tensor, labels: Tensor) -> Tensor:
        """Do the same for the rows of a tile, in a type exact enough."""
        square = self._cap_(z)
        ignored = labels == IGNORED
        target = labels.masked_fill(ignored, 0)[:, None]
        highest = z.amax(1, keepdim=True)
        loss = highest - z.gather(1, target)
        total = z.sub_(highest).exp_().sum(1, keepdim=True)
        loss.add_(total.log()).masked_fill_(ignored[:, None], 0)
        if self._gradient:
            z.mul_(total.reciprocal_().masked_fill_(ignored[:, None], 0))
            z.scatter_(1, target, torch.expm1(-loss))  # p - 1, and 0 where ignored
            if square is not None:
                z.addcmul_(z, square, value=-1)
        return loss.sum()

    def _cap_(self, z: Tensor) -> Tensor | None:
        """Cap logits; return tanh², which the gradient needs: d tanh = 1 − tanh²."""
        if self._softcap is None:
            return None
        z.div_(self._softcap).tanh_()
        square = None if self._square is None else torch.mul(z, z, out=self._square[: len(z)])
        z.mul_(self._softcap)
        return square
