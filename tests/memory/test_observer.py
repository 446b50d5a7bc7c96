"""What a run is seen to hold is what it held."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.activations.loss import TokenLoss
from scrimp.base import platform
from scrimp.data.loader import MicroBatch
from scrimp.memory import measure
from scrimp.memory.machine import CUDA_CONTEXT
from scrimp.memory.observer import Observer, PeakMeter, fixed_bytes, free_bytes
from scrimp.memory.profile import highest
from scrimp.memory.profiling import Tracer
from scrimp.optim import AdamW
from scrimp.recipe import Recipe, replace

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
    held = np.ones(64 * MIB, np.uint8)
    with_it = fixed_bytes(replace(Recipe(), {"device": "cpu", "precision": "fp32"}))
    del held
    without = fixed_bytes(replace(Recipe(), {"device": "cpu", "precision": "fp32"}))
    assert 56 * MIB < with_it - without < 72 * MIB
    assert free_bytes(CPU) > without


def test_on_a_gpu_the_context_is_assumed() -> None:
    assert fixed_bytes(replace(Recipe(), {"device": "cuda", "precision": "bf16"})) == CUDA_CONTEXT


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_step(rows: int, seq: int) -> tuple[Any, LlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=8192))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 8192, (rows, seq))
    batch = MicroBatch(ids, ids, None, rows * seq)

    def step() -> None:
        TokenLoss(model)(batch, divisor=1.0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer


def test_a_measured_step_is_the_predicted_one_term_by_term() -> None:
    rows, seq = 2, 128
    step, model, optimizer = make_step(rows, seq)
    step()  # which makes the optimizer's state
    measured = {moment.name: moment for moment in measure(step, model=model, optimizer=optimizer).moments}
    recipe = replace(
        Recipe(), {"seq": seq, "precision": "fp32", "device": "cpu", "optimizer.lr": 1e-3, "threads": 1}
    )
    tracer = Tracer(model.config)
    profile, state = tracer.step(recipe, rows), tracer.optimizer(recipe).state
    assert list(measured) == ["forward", "loss", "backward", "optimizer step"]
    for name in ("forward", "loss", "backward"):
        (activations, gradients, temporaries), _ = highest(profile.first[name], rows)
        terms = measured[name].terms
        assert terms["weights"] == tracer.size(recipe).weights
        assert terms["optimizer state"] == state
        held = sum(terms[term] for term in ("activations", "gradients", "temporaries"))
        assert held == pytest.approx(activations + gradients + temporaries, rel=1e-3)
    assert measured["optimizer step"].terms["gradients"] == tracer.size(recipe).gradients


def test_tracking_leaves_every_bit_as_it_was() -> None:
    found = []
    for watched in (False, True):
        step, model, optimizer = make_step(2, 16)
        for _ in range(3):
            if watched:
                measure(step, model=model, optimizer=optimizer)
            else:
                step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_several_micro_batches_are_told_apart() -> None:
    """From the second on, the gradients of those before are alive while the loss is taken."""
    _, model, optimizer = make_step(2, 64)
    observer = Observer(PeakMeter(CPU), model, optimizer, CPU)
    ids = torch.zeros((2, 64), dtype=torch.int64)
    batch = MicroBatch(ids, ids, None, 128)
    with observer.step(several=True):
        for _ in range(3):
            TokenLoss(model)(batch, divisor=1.0).backward()
        observer.before_update()
        optimizer.step()
    ledger = observer.ledger
    assert ledger is not None
    found = {moment.name: moment.terms for moment in ledger.moments}
    gradients = sum(4 * p.numel() for p in model.parameters())
    assert found["forward, micro-batch 1"]["gradients"] == 0
    assert found["forward, micro-batch 2"]["gradients"] == gradients
    assert found["loss, micro-batch 2"]["gradients"] == gradients
    assert "forward, micro-batch 3" not in found
    assert ledger.basis == "measured"


@pytest.mark.gpu
def test_on_a_gpu_only_what_the_allocator_gave_counts() -> None:
    device = torch.device("cuda")
    meter = PeakMeter(device)
    before = meter.read()
    block = torch.ones(32 * MIB, dtype=torch.uint8, device=device)
    del block
    assert 32 * MIB <= meter.read() - before < 40 * MIB
    assert free_bytes(device) > 0
