"""Random numbers as a pure function of a seed and an index: no generator, no state, no order.

What is drawn again at every step must be the same in eager and in compiled code, on a CPU and on a GPU,
in one piece and in blocks. Torch's generators are none of these; a hash of (seed, index) is. It is the
32-bit finaliser of Chris Wellon's "lowbias32", applied twice, in wrapping int32 arithmetic, which every
device vectorises. Bits are equal everywhere; normal numbers to the last places of log and cos.

It serves projections and rounding. It is no generator for cryptography.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WEYL = 0x9E3779B1 - (1 << 32)  # 2^32 over the golden ratio, as a signed number
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_STEP = 2.0**-24


def bits(seed: Tensor | int, count: int, *, device: torch.device, start: int = 0) -> Tensor:
    """Return `count` uniform 32-bit numbers as int32.

    Args:
        seed: 63 bits; a 0-d int64 tensor keeps compiled code from being compiled for each.
        count: How many.
        device: Where.
        start: Index of the first one: a block of a larger draw.
    """
    whole = torch.as_tensor(seed, dtype=torch.int64)
    low, high = whole.to(torch.int32), (whole >> 32).to(torch.int32)
    x = torch.arange(start, start + count, dtype=torch.int32, device=device)
    return _mix_(_mix_(x.mul_(_WEYL).add_(low)).bitwise_xor_(high))


def _mix_(x: Tensor) -> Tensor:
    # Signed shifts drag the sign along; the masks make them logical. In place: eager code is twice as fast.
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def uniform(seed: Tensor | int, count: int, *, device: torch.device, start: int = 0) -> Tensor:
    """Return `count` numbers in (0, 1], float32, each a multiple of 2^-25."""
    return ((bits(seed, count, device=device, start=start) >> 8) & 0xFFFFFF).float() * _STEP + _STEP / 2


def normal(seed: Tensor | int, count: int, *, device: torch.device) -> Tensor:
    """Return `count` standard normal numbers, float32, none beyond 4.86 (Box and Muller).

    Two numbers come of one hash: 2^16 radii, each as likely, and 2^16 angles.
    """
    drawn = bits(seed, (count + 1) // 2, device=device)
    tail = ((drawn >> 16) & 0xFFFF).float().add_(0.5).mul_(2.0**-16)
    angle = (drawn & 0xFFFF).float().mul_(2 * math.pi * 2.0**-16)
    radius = tail.log_().mul_(-2).sqrt_()
    return torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)])[:count]


def round_to_bf16(value: Tensor, seed: Tensor | int, *, start: int = 0) -> Tensor:
    """Round float32 to bfloat16 stochastically: up with the probability of what is cut off.

    The expectation is the value itself (short of overflow). Non-finite values stay as they are.

    Args:
        value: float32, of any shape.
        seed: As in `bits`.
        start: Index of the first element, where `value` is a block of a larger tensor.
    """
    noise = bits(seed, value.numel(), device=value.device, start=start).view(value.shape) & 0xFFFF
    raw = value.float().contiguous().view(torch.int32)
    rounded = ((raw + noise) & -0x10000).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
