"""What a run is seen to hold is what it held."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from scrimp.base import platform
from scrimp.memory.measure import PeakMeter, fixed_bytes, free_bytes

CPU = torch.device("cpu")
MIB = 2**20


def _touch(size: int) -> None:
    np.ones(size, np.uint8)


def test_a_peak_is_seen_after_it_is_gone() -> None:
    meter = PeakMeter(CPU)
    before = meter.read()
    _touch(96 * MIB)
    grown = meter.read() - before
    assert 64 * MIB < grown < 160 * MIB
    assert meter.read() - before >= grown


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can start the peak afresh")
def test_a_new_meter_forgets_what_was_before() -> None:
    first = PeakMeter(CPU)
    _touch(96 * MIB)
    high = first.read()
    if not platform.reset_peak_resident():
        pytest.skip("this container does not let a process reset its peak")
    assert PeakMeter(CPU).read() < high - 48 * MIB


def test_on_a_cpu_the_process_itself_counts() -> None:
    resident = platform.resident_bytes()
    assert resident <= fixed_bytes(CPU) <= resident + 65 * MIB
    assert free_bytes(CPU) > resident


@pytest.mark.gpu
def test_on_a_gpu_only_what_the_allocator_gave_counts() -> None:
    device = torch.device("cuda")
    meter = PeakMeter(device)
    before = meter.read()
    block = torch.ones(32 * MIB, dtype=torch.uint8, device=device)
    del block
    assert 32 * MIB <= meter.read() - before < 40 * MIB
    assert fixed_bytes(device) == 0
    assert free_bytes(device) > 0
