"""What kernels allocate inside, rule by rule: bytes beyond the outputs of a call.

- Most are a copy of an operand in another dtype, which the CPU's element-wise kernels make where operands
  differ, or in a wider one for a sum. A GPU converts in registers.
- Attention's tiles are buffers of each thread, so the bytes depend on the number of threads.
- Products of bf16 depend on the machine (`narrow_products`), as oneDNN chooses its kernels by it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.activations import linear_cross_entropy as chunked

KIB = 1024


class Call:
    """An operation that was called.

    Attributes:
        args: Its positional arguments.
        out: What it returned.
        threads: How many run it.
        tensors: The tensors among the positional arguments.
    """

    __slots__ = ("args", "out", "tensors", "threads")

    def __init__(self, args: tuple[Any, ...], out: Any, threads: int) -> None:
        self.args, self.out, self.threads = args, out, threads
        self.tensors: list[Tensor] = [argument for argument in args if isinstance(argument, Tensor)]


def narrow_products() -> Literal["packed", "widened", "plain"]:
    """Tell how this machine multiplies bf16 matrices.

    Returns:
        `packed`: a block of an operand is copied, whose shape oneDNN's heuristics choose; `widened`: the
        result is made in fp32 and then rounded (AVX-512 without bf16); `plain`: nothing is made.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        return "packed"
    if torch.cpu._is_avx512_bf16_supported():
        return "packed"
    return "widened" if torch.cpu._is_avx512_supported() else "plain"


def _bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _copy(tensor: Tensor) -> int:
    """Return the bytes of the contiguous copy that a kernel makes of a tensor that is not."""
    return 0 if tensor.is_contiguous() else _bytes(tensor)


def promotion(call: Call) -> int:
    """Count the operands that an element-wise kernel copies into the dtype of the computation."""
    if len(call.tensors) < 2:
        return 0
    dtype = _common_dtype(call.tensors)
    return sum(_bytes(tensor, dtype) for tensor in call.tensors if tensor.dtype != dtype)


def promotion_in_place(call: Call) -> int:
    """As `promotion`, and where the target is not of that dtype, the result before it is rounded."""
    dtype, target = _common_dtype(call.tensors), call.args[0]
    return promotion(call) + (_bytes(target, dtype) if target.dtype != dtype else 0)


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype that tensors promote to; those without dimensions only have a say among themselves."""
    ranked = [tensor.dtype for tensor in tensors if tensor.ndim > 0] or [tensor.dtype for tensor in tensors]
    common = ranked[0]
    for dtype in ranked[1:]:
        common = torch.promote_types(common, dtype)
    return common


def where(call: Call) -> int:
    """As `promotion`, of the two that are chosen from."""
    return promotion(Call(call.args[1:], call.out, call.threads))


def reduction(call: Call) -> int:
    """A reduction into another dtype first copies its input into it."""
    return 0 if call.args[0].dtype == call.out.dtype else _bytes(call.args[0], call.out.dtype)


def add_up(call: Call) -> int:
    """As `reduction`; and bf16 is summed over several separate dimensions as a copy in fp32."""
    values = call.tensors[0]
    if values.itemsize == 2 and values.dtype == call.out.dtype and _separate_dims(call) > 1:
        return _bytes(values, torch.float32) + _bytes(call.out, torch.float32)
    return reduction(call)


def _separate_dims(call: Call) -> int:
    """Count the dimensions that a sum runs over, those that lie in memory as one counted once."""
    values = call.tensors[0]
    dims = call.args[1] if len(call.args) > 1 and call.args[1] else range(values.ndim)
    inner_first = sorted((values.stride(d), values.shape[d]) for d in dims if values.shape[d] > 1)
    joined = sum(a[0] * a[1] == b[0] for a, b in pairwise(inner_first))
    return len(inner_first) - joined


def mean(call: Call) -> int:
    """A mean of less than fp32 is that of a copy in fp32."""
    values = call.tensors[0]
    if values.is_floating_point() and values.itemsize < 4:
        return _bytes(values, torch.float32) + _bytes(call.out, torch.float32)
    return reduction(call)


def norm(call: Call) -> int:
    """A norm of a whole tensor squares a contiguous copy where it is not of the result's dtype."""
    values = call.tensors[0]
    return _bytes(values, call.out.dtype) if values.dtype != call.out.dtype else 0


def safe_softmax(call: Call) -> int:
    """One byte a score and one a row: which are masked."""
    scores = call.tensors[0]
    return scores.numel() + scores.numel() // scores.shape[-1]


def logsumexp(call: Call) -> int:
    """The exponentials, and the rows' maxima."""
    return _bytes(call.args[0]) + _bytes(call.out)


def sort(call: Call) -> int:
    """Eight bytes an element of the dimension that is sorted."""
    values, dim = call.tensors[0], call.args[1] if len(call.args) > 1 else -1
    return 8 * values.shape[dim] if values.ndim and isinstance(dim, int) else 8 * values.numel()


def scatter(call: Call) -> int:
    """Scattering bf16 values goes through a copy in fp32."""
    return _bytes(call.out, torch.float32) if call.out.dtype == torch.bfloat16 else 0


def convolution(call: Call) -> int:
    """OneDNN reorders the input into blocks, and the output back; Mamba's short filter is the one case."""
    values, weight = call.tensors[:2]
    return max(_bytes(values) + _bytes(weight), _bytes(call.out)) + _copy(values)


def convolution_backward(call: Call) -> int:
    """The gradient is reordered, after what is not contiguous was copied."""
    gradient, values = call.tensors[:2]
    return _bytes(gradient) + _copy(gradient) + _copy(values)


def svd(call: Call) -> int:
    """LAPACK's copy of the matrix, and a workspace from 33 rows on."""
    matrix = call.tensors[0]
    return _bytes(matrix) + (14404 if min(matrix.shape[-2:]) > 32 else 4)


def _tiles(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Return how many queries and keys a tile of attention has."""
    queries, keys = query.shape[2], key.shape[2]
    return min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32), min(keys, 512)


def attention(call: Call) -> int:
    """Each thread's tile of scores with its rows' maxima, sums and outputs; in bf16 also packed keys."""
    query, key = call.tensors[:2]
    rows, columns = _tiles(query, key)
    exact = max(4, query.itemsize)
    size = exact * call.threads * (rows * columns + 2 * rows + rows * query.shape[3])
    if query.itemsize == exact:
        return size
    packed = _is_packed(call, rows)
    even = 2 if packed else 1
    width = -(-columns // even) * even
    size += 2 * call.threads * rows * width
    return size + (_packed_bytes(call, rows, columns) if packed else 0)


def _is_packed(call: Call, rows: int) -> bool:
    """Tell whether keys and values are packed for the matrix unit, which pays for long sequences."""
    query, key = call.tensors[:2]
    batch, heads, queries, _ = query.shape
    causal = len(call.args) > 4 and call.args[4]
    if min(queries, key.shape[2]) < 64 or not torch.cpu._is_amx_tile_supported():
        return False
    blocks = (batch * heads * -(-queries // rows) + call.threads - 1) // call.threads
    keys = min(queries, key.shape[2]) if causal else key.shape[2]
    return blocks * rows * keys >= 4 * batch * key.shape[1] * key.shape[2]


def _packed_bytes(call: Call, rows: int, columns: int) -> int:
    batch, heads, keys, width = call.tensors[1].shape
    even = width + width % 2
    padded = (keys - 1) // columns * (columns + columns % 2) + -(-((keys - 1) % columns + 1) // 2) * 2
    size = batch * heads * (even * keys + padded * width) + call.threads * columns * width
    return 2 * (size + (call.threads * rows * even if width % 2 else 0))


def attention_backward(call: Call) -> int:
    """Each thread's tiles of scores and of their gradients (in bf16 twice), and the rows' sums."""
    gradient, query, key = call.tensors[:3]
    rows, columns = _tiles(query, key)
    exact, narrow = max(4, query.itemsize), query.itemsize % 4
    tiles = call.threads * 2 * rows * columns * (exact + narrow)
    sums = exact * rows * min(call.threads, query.shape[0] * key.shape[1])
    return tiles + sums + _tile_product(call, rows, columns) + _copy(gradient.transpose(1, 2))


def _tile_product(call: Call, rows: int, columns: int) -> int:
    """Return what the products of a bf16 tile hold: an operand, packed (an estimate), or a result in fp32."""
    if call.tensors[1].itemsize != 2 or narrow_products() == "plain":
        return 0
    if narrow_products() == "widened":
        return 4 * columns * call.tensors[1].shape[3] + 132
    return call.threads * (min(5 * rows * columns // 2, 160 * KIB) + 8 * KIB)


def product(call: Call) -> int:
    """One matrix of a batch in fp32, where bf16 products are made so; the smallest are not."""
    first = call.tensors[-2]
    rows, columns = call.out.shape[-2:]
    is_small = rows * columns * first.shape[-1] <= 16**3
    return _widened(call, rows * columns) if not is_small else 0


def grouped_product(call: Call) -> int:
    """The same for one group of rows, as if they were equally large."""
    rows, columns = call.out.shape[-2:]
    return _widened(call, rows * columns // (len(call.args[2]) if call.out.ndim == 2 else 1))


def _widened(call: Call, elements: int) -> int:
    return 4 * elements + 128 if call.out.itemsize == 2 and narrow_products() == "widened" else 0


def linear_cross_entropy(call: Call) -> int:
    """The chunked loss says itself what it is made in; a product that is made in fp32 comes on top."""
    hidden, weight, bias, _, _, _, softcap, _, *needed = call.args
    tokens, width = hidden.shape
    size: int = chunked.scratch_bytes(
        tokens,
        width,
        weight.shape[0],
        hidden.itemsize,
        weight_itemsize=weight.itemsize,
        needs_gradient=any(needed),
        needs_weight_grad=needed[1],
        needs_bias_grad=bias is not None and needed[2],
        softcap=softcap is not None,
    )
    if hidden.itemsize != 2 or narrow_products() != "widened":
        return size
    logits: int = 4 * min(chunked.chunk_tokens(width), tokens) * weight.shape[0]
    # The slices of dW that it counts are not there yet while logits are made.
    slices: int = 6 * min(chunked.VOCAB_SLICE, weight.shape[0]) * width
    return size + max(0, logits - slices)


# Rows of a tile, and columns of a panel, of the products of optim/kernels/products.h.
_TILES = {"AVX2": (4, 24), "AVX512": (8, 48)}


def projected_step(call: Call) -> int:
    """The gradient's copy in order, its part in the subspace, the step there, and what a product packs."""
    weight, grad, sketch, basis = call.args[:4]
    pulls, transposed = call.args[10], call.args[12]
    tile = _TILES.get(torch.backends.cpu.get_cpu_capability())

    def packed(across: int, along: int, side: int) -> int:
        width = tile[side] if tile else 0
        return 4 * -(-across // width) * width * along if width else 0

    length: int = basis.shape[0]
    rank: int = basis.shape[1]
    channels: int = weight.shape[1] if transposed else weight.shape[0]
    direction = 4 * channels * rank
    held = direction if sketch is None else _copy(sketch)
    multiplying = packed(rank, length, 0) if sketch is None and rank > 1 else 0
    moving = direction
    if pulls:
        rows, columns = (length, channels) if transposed else (channels, length)
        moving += packed(rows, rank, 0) + packed(columns, rank, 1)
    copied = 0 if grad is None else _copy(grad)
    return copied + held + max(multiplying, moving)


def flash_backward_cuda(call: Call) -> int:
    """Flash attention's kernel adds up the queries' gradient in fp32; fp32 inputs take another kernel."""
    query = call.tensors[1]
    return _bytes(query, torch.float32) if query.itemsize == 2 else 0
