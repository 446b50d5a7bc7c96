"""Quantised state against bitsandbytes and torchao.

On a CPU bitsandbytes rounds x / absmax to a grid of 2^16 values before it looks for the nearest code; with
that grid before our own look-up, codes are equal and 50 steps agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.optim.pieces import Slot
from scrimp.optim.rules.adam import Adam
from scrimp.optim.stores import dynamic_map
from scrimp.optim.stores.blockwise import unit
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.four_bit import FourBit
from scrimp.optim.stores.fp8 import FP8

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
theirs: Any = pytest.importorskip("bitsandbytes.functional")
torchao: Any = pytest.importorskip("torchao.optim")
quant_utils, subclass_4bit, subclass_fp8 = (
    torchao.quant_utils,
    torchao.subclass_4bit,
    torchao.subclass_fp8,
)
NOISE = torch.tensor(0)
BOTH = pytest.mark.parametrize("signed", [True, False])


def on_grid(x: Tensor) -> Tensor:
    """Round as bitsandbytes does on a CPU.

    One point of the grid, 0.59218740, lies within a last place of the end of a cell, 0.5921875. The factor
    moves it to the side that is right; no other point comes to another cell by it.
    """
    return (2 * ((x + 1) / 2 * 65535 + 0.5).floor() / 65535 - 1) * (1 - 2**-22)


@dataclass(frozen=True, slots=True)
class GridDynamic8(Dynamic8):
    """Our store with their grid, and the last places of their map."""

    def quantize(self, rows: Tensor, signed: bool) -> tuple[Tensor, ...]:
        x, scale = unit(rows)
        codes = dynamic_map.encode(torch.where(scale > 0, on_grid(x), x), decades=7, signed=signed)
        return codes, scale

    def dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...], signed: bool) -> Tensor:
        return theirs.create_dynamic_map(signed=signed)[codes.int()] * numbers[0]


def slot(x: Tensor, signed: bool) -> Slot:
    return Slot(name="m", shape=tuple(x.shape), signed=signed)


@BOTH
def test_the_maps_are_bitsandbytes_and_torchaos(signed: bool) -> None:
    ours = dynamic_map.decode(torch.arange(256, dtype=torch.uint8), decades=7, signed=signed)
    assert torch.allclose(ours, theirs.create_dynamic_map(signed=signed), rtol=7e-7, atol=0)
    assert torch.allclose(ours, torch.tensor(quant_utils.create_dynamic_map(signed)), rtol=7e-7, atol=0)


@BOTH
def test_codes_are_bitsandbytes_at_every_point_of_its_grid(signed: bool) -> None:
    points = 2 * torch.arange(0 if signed else 32768, 65535, dtype=torch.float64) / 65535 - 1
    points = torch.cat([points, points.new_zeros(-len(points) % 255)]).view(-1, 255)
    x = torch.cat([points, torch.ones(len(points), 1)], dim=1).float().flatten()  # each block's largest is 1
    codes, state = theirs.quantize_blockwise(x, code=theirs.create_dynamic_map(signed=signed), blocksize=256)
    entries = GridDynamic8().encode(x, slot(x, signed), NOISE)
    assert torch.equal(entries["codes"], codes) and torch.equal(entries["scale"], state.absmax)
    plain = Dynamic8().encode(x, slot(x, signed), NOISE)["codes"]
    assert not torch.equal(plain, codes)  # the grid is theirs alone


def test_50_steps_are_bitsandbytes(generator: Any) -> None:
    w = torch.randn(80, 64, generator=generator)
    p = torch.nn.Parameter(w.clone())
    optimizer = bitsandbytes.optim.AdamW8bit([p], lr=1e-2, weight_decay=0.1)
    rule, store, own = Adam(), GridDynamic8(), (slot(w, True), slot(w, False))
    state = [store.encode(torch.zeros_like(w), each, NOISE) for each in own]
    for age in range(1, 51):
        g = torch.randn(80, 64, generator=generator) * (1 + age % 3)
        p.grad = g.clone()
        optimizer.step()
        numbers = rule.scalars({"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}, age) | {"lr": 1e-2}
        scalars = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
        m, v = (store.decode(e, each, torch.float32) for e, each in zip(state, own, strict=True))
        step = rule.step(g, {"exp_avg": m, "exp_avg_sq": v}, scalars, w)
        w = w * (1 - 1e-2 * 0.1) - step.size * step.direction
        state = [store.encode(x, each, NOISE) for x, each in zip(step.slots.values(), own, strict=True)]
    assert torch.equal(state[0]["codes"], optimizer.state[p]["state1"].flatten())
    assert torch.equal(state[1]["codes"], optimizer.state[p]["state2"].flatten())
    assert (w - p.detach()).abs().max().item() < 2e-7 * w.abs().max().item()


@BOTH
def test_4_bit_codes_are_torchaos(signed: bool, generator: Any) -> None:
    x = torch.randn(64, 128, generator=generator)
    x = x if signed else x * x
    entries = FourBit().encode(x, slot(x, signed), NOISE)
    qmap = torch.tensor(subclass_4bit.get_qmap_signed() if signed else subclass_4bit.get_qmap_unsigned())
    scaled, scale = quant_utils.scale_tensor(x.flatten(), 128)
    codes = quant_utils.quantize_4bit_with_qmap(scaled, qmap)
    assert torch.equal(entries["codes"], (codes[::2] << 4) | codes[1::2])
    assert torch.equal(entries["scale"], scale)
    value = FourBit().decode(entries, slot(x, signed), torch.float32)
    assert torch.allclose(value.flatten(), quant_utils.dequant_with_qmap(codes, qmap, scale), rtol=1e-6)


def test_plain_fp8_is_torchaos(generator: Any) -> None:
    x = torch.randn(64, 256, generator=generator)
    store = FP8(block_size=256, expansion=False)
    entries = store.encode(x, slot(x, True), NOISE)
    codes, scale = subclass_fp8.quantize_fp8(x, 256)
    differ = entries["codes"].view_as(x) != codes.view(torch.uint8)
    assert differ.float().mean() < 1e-3  # halves, which the order of two divisions decides
    assert torch.allclose(entries["scale"], 448 * scale, rtol=1e-6)
    value, other = store.decode(entries, slot(x, True), torch.float32), codes.float() * scale[:, None]
    assert torch.allclose(value[~differ], other[~differ], rtol=1e-6)
