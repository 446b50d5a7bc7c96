"""NormalFloat, the 4-bit code of QLoRA: w = level[code] absmax, of each group of 64.

    absmax = max |w| of a group          code = that of the level nearest to w / absmax
    second = the 8-bit dynamic code of absmax - mean(absmax), in groups of 256 with a float32 scale

The sixteen levels are quantiles of a normal distribution, scaled to [-1, 1]: eight above 0, seven below it,
and 0. Codes and layout are those of bitsandbytes, bit for bit. Oddities:

- The matrix is one sequence of elements. Groups run across the ends of rows, and the last may be short.
- Of two elements in a byte the first has the high nibble.
- What lies half way between two levels goes to the lower.
- A group of zeros has absmax 0; with second-level codes it decodes to zeros still, whatever its absmax.

Source: QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314; of the dynamic code, 8-bit Optimizers via
Block-wise Quantization, Dettmers et al., ICLR 2022, arXiv 2110.02861.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.weights.nf4_cuda import kernel_for

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SECOND = 256  # groups that share a scale of the second level
_TINY = 1e-38  # a group's absmax is taken to be at least this where it divides

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NF4Code:
    """What a matrix of `numel` elements is kept as.

        codes         (ceil(numel / 2),) uint8, two a byte
        absmax        (groups,) float32; uint8 where `double`
        second_scale  (ceil(groups / 256),) float32, where `double`
        offset        () float32, the mean of absmax, where `double`

    Memory: numel / 2 + groups + 4 groups / 256 + 4 bytes (4.127 bits an element) where `double`, else
    numel / 2 + 4 groups (4.5 bits).
    Error: |w - decode(encode(w))| <= 0.1519 absmax, and what the second level adds.

    Attributes:
        group: Elements that share an absmax; even.
        double: Whether absmax is coded too.
        dtype: Of the weight to those who use it; nothing is stored in it.
    """

    group: int = 64
    double: bool = True
    dtype: torch.dtype = torch.bfloat16

    def layout(self, numel: int) -> Layout:
        """Return shape and dtype of every part."""
        groups = -(-numel // self.group)
        parts: Layout = {
            "codes": ((-(-numel // 2),), torch.uint8),
            "absmax": ((groups,), torch.uint8 if self.double else torch.float32),
        }
        if self.double:
            parts["second_scale"] = ((-(-groups // SECOND),), torch.float32)
            parts["offset"] = ((), torch.float32)
        return parts

    def nbytes(self, numel: int) -> int:
        """Return the bytes of all parts."""
        groups = -(-numel // self.group)
        scales = groups + 4 * -(-groups // SECOND) + 4 if self.double else 4 * groups
        return -(-numel // 2) + scales

    def decode(self, parts: Mapping[str, Tensor], first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return elements `first` to `last` (excluded) of the sequence, in `dtype`, rounded once. Pure."""
        start, end = first // self.group, -(-last // self.group)
        codes = parts["codes"][start * self.group // 2 : end * self.group // 2]
        absmax = self.decode_absmax(parts, start, end)
        if kernel := kernel_for(codes):
            value = kernel(codes, absmax, self.group, "nf4", [2 * codes.numel()], dtype)
        else:
            value = _pairs(codes)
            if missing := (end - start) * self.group - value.numel():
                value = torch.cat([value, value.new_zeros(missing)])
            value = value.view(-1, self.group).mul_(absmax[:, None]).to(dtype).view(-1)
        return value[first - start * self.group : last - start * self.group]

    def decode_absmax(self, parts: Mapping[str, Tensor], start: int, end: int) -> Tensor:
        """Return absmax of groups `start` to `end` (excluded), float32. Pure."""
        absmax = parts["absmax"][start:end]
        if not self.double:
            return absmax
        second = parts["second_scale"][start // SECOND : -(-end // SECOND)]
        scale = second[:, None].expand(-1, SECOND).reshape(-1)[start % SECOND :][: end - start]
        value = _table(dynamic_map, absmax).index_select(0, absmax.int()) * scale
        return value + parts["offset"]

    def encode_absmax(self, absmax: Tensor) -> dict[str, Tensor]:
        """Return the parts that hold absmax (groups,), float32. Pure."""
        if not self.double:
            return {"absmax": absmax}
        offset = absmax.mean()
        rest = _grouped(absmax - offset, SECOND)
        scale = rest.abs().amax(-1)
        scaled = rest / scale.clamp(min=_TINY)[:, None]
        codes = _nearest(scaled, _table(dynamic_map, absmax)).view(-1)[: absmax.numel()]
        return {"absmax": codes, "second_scale": scale, "offset": offset}


def encode(value: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return codes, two a byte, and absmax of a sequence of elements that begins with a group. Pure.

    Args:
        value: (n,), float32.
        group: Elements that share an absmax; even.
    """
    grouped = _grouped(value, group)
    absmax = grouped.abs().amax(-1)
    scaled = grouped * (1 / absmax.clamp(min=_TINY))[:, None]
    code = _nearest(scaled, _table(levels, value)).view(-1, 2)
    packed = (code[:, 0] << 4) | code[:, 1]
    return packed[: -(-value.numel() // 2)], absmax


def levels(device: torch.device) -> Tensor:
    """Return the sixteen levels, float32, in order."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values of the signed dynamic code, float32, in order.

    Decade i of seven has 2^i values on either side of 0, in the middle of equal parts of [0.1, 1] times
    10^(i - 6); 0 and 1 are added.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6))
    above = torch.cat(positive)
    ends = torch.tensor([0.0]), torch.tensor([1.0])
    return torch.cat([-above.flip(0), ends[0], above, ends[1]]).to(device)


def _pair_levels(device: torch.device) -> Tensor:
    """Return for every byte its two levels, as the eight bytes of an int64."""
    byte = torch.arange(256, device=device)
    pairs = torch.stack([levels(device)[byte >> 4], levels(device)[byte & 15]], 1)
    return pairs.view(torch.int64).view(256)


_Make = Callable[[torch.device], Tensor]
_kept: dict[tuple[_Make, torch.device], Tensor] = {}


def _table(make: _Make, like: Tensor) -> Tensor:
    """Return a table on the device of a tensor; made once, but anew for fake tensors."""
    if type(like) is not Tensor:
        return make(like.device)
    key = make, like.device
    if key not in _kept:
        _kept[key] = make(like.device)
    return _kept[key]


def _pairs(codes: Tensor) -> Tensor:
    """Return the levels of packed codes, (2 n,) float32: one look-up gives two."""
    # Six times as fast on a CPU as indexing.
    return _table(_pair_levels, codes).index_select(0, codes.int()).view(torch.float32)


def _nearest(value: Tensor, table: Tensor) -> Tensor:
    """Return places in a sorted table, uint8."""
    middle = (table[:-1] + table[1:]) / 2
    return torch.bucketize(value, middle, out_int32=True).to(torch.uint8)


def _grouped(value: Tensor, group: int) -> Tensor:
    """Return (n,) as (groups, group), filled up with zeros."""
    if missing := -value.numel() % group:
        value = torch.cat([value, value.new_zeros(missing)])
    return value.view(-1, group)
