"""One tiny step leaves the process as later ones find it, and nothing else."""

from __future__ import annotations

import gc

import pytest
import torch

from scrimp.base import platform
from scrimp.memory.warmup import settle_resident, warm_up


def _alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_a_warm_up_leaves_neither_tensors_nor_a_trace_in_the_random_state(precision: str) -> None:
    warm_up(precision)
    state = torch.get_rng_state()
    tensors = _alive()
    warm_up(precision)
    assert _alive() == tensors
    assert torch.equal(torch.get_rng_state(), state)


def test_after_one_warm_up_another_adds_nothing() -> None:
    warm_up("fp32")
    settled = settle_resident()
    warm_up("fp32")
    assert abs(settle_resident() - settled) < 2**20


def test_settling_gives_free_pages_back() -> None:
    if not platform.set_mmap_threshold(2**25):
        pytest.skip("this malloc is not glibc's")
    blocks = [torch.ones(2**16) for _ in range(400)]  # 100 MiB in the heap
    del blocks[:-1]  # the last one keeps the heap's end from being given back by itself
    held = platform.resident_bytes()
    assert settle_resident() < held - 2**26
