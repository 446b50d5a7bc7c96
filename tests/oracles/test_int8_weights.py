"""The released form of the int8 code is Q-GaLore's, bit for bit in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scrimp.weights.affine8 import Affine8

AUTHORS: Any = pytest.importorskip("q_galore_torch.q_galore_adamw8bit").AdamW8bit


@pytest.mark.parametrize("offset", [0.0, 0.3, 1.5, -1.5])
def test_released_codes_are_those_of_q_galore(offset: float) -> None:
    value = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * 0.4 + offset
    codes, scale, zero = AUTHORS._quantize(None, value, q_group_size=16)
    codec = Affine8(group=16, dtype=torch.float32, variant="released")
    entries = codec.encode(value, None)
    assert torch.equal(entries["codes"], codes)
    assert torch.equal(entries["scale"].flatten(), scale.flatten())
    decoded = AUTHORS._dequantize(None, codes, torch.float32, 16, scale, zero)
    # scale (code - zero) against scale code - scale zero
    torch.testing.assert_close(codec.decode(entries, torch.float32), decoded, rtol=0, atol=2e-6)


def test_a_group_on_one_side_of_zero_is_lost_in_q_galore_and_held_by_ours() -> None:
    value = torch.linspace(1, 2, 16)[None]
    codes, scale, zero = AUTHORS._quantize(None, value, q_group_size=16)
    theirs = AUTHORS._dequantize(None, codes, torch.float32, 16, scale, zero)
    codec = Affine8(group=16, dtype=torch.float32)
    ours = codec.decode(codec.encode(value, None), torch.float32)
    assert (theirs - value).abs().max() > 0.9
    assert (ours - value).abs().max() < 0.003
