"""What kernels allocate inside is known, for every operation of a step: the check that a new torch must pass.

Small models stand for the kinds of operations: dense, with masks, with experts, with convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from scrimp.activations.loss import chunked, logits
from scrimp.data.loader import MicroBatch
from scrimp.memory import scratch
from scrimp.memory.allocator import peak_of
from scrimp.memory.probe import probe, unexplained
from scrimp.optim import Apollo, Fira, GaLore

WIDTHS = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}
GATED = {**WIDTHS, "intermediate_size": 176, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("LlamaConfig", GATED),
    "masked": ("Gemma3TextConfig", {**GATED, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 32}),
    "experts": ("GptOssConfig", {**GATED, **EXPERTS, "head_dim": 16}),
    "convolved": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128}),
}
SEQUENCE = {"convolved": 24}
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def _step(model: str, precision: str, loss: Callable[..., Any] = logits) -> Callable[[], object]:
    """Return one forward and backward pass of a model."""
    torch.manual_seed(0)
    kind, values = MODELS[model]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = getattr(transformers, kind)(**values)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    of_batch = loss(network, torch.bfloat16 if precision == "bf16-mixed" else None)
    ids = torch.randint(0, 128, (2, SEQUENCE.get(model, 200)))
    batch = MicroBatch(ids, ids, None, ids.numel())

    def step() -> None:
        of_batch(batch, divisor=1.0).backward()

    step()
    network.zero_grad()
    return step


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("model", MODELS)
def test_every_kernel_that_allocates_inside_has_its_rule(model: str, precision: str) -> None:
    step = _step(model, precision)
    peak = peak_of(step)
    assert unexplained(probe(step), peak=peak) == []


def test_the_chunked_loss_says_what_it_is_made_in() -> None:
    """In fp32, where its products hold nothing inside."""
    step = _step("dense", "fp32", chunked)
    peak = peak_of(step)
    found = probe(step)
    assert "scrimp::linear_cross_entropy" in {finding.operation for finding in found}
    assert unexplained(found, peak=peak) == []


def test_a_missing_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _step("dense", "fp32")
    peak = peak_of(step)
    monkeypatch.delitem(scratch.RULES["cpu"], ATTENTION)
    assert {finding.operation for finding in unexplained(probe(step), peak=peak)} == {ATTENTION}


def test_a_kernel_that_is_said_to_hold_more_than_it_does_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _step("dense", "fp32")
    peak = peak_of(step)
    monkeypatch.setitem(scratch.RULES["cpu"], "aten::silu", lambda call: peak)
    assert {finding.operation for finding in unexplained(probe(step), peak=peak)} == {"aten::silu"}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 2, 128, 16), (1, 4, 4, 300, 33), (1, 4, 1, 1000, 64), (4, 4, 4, 32, 16), (2, 8, 8, 512, 64)],
)
def test_attention_holds_a_tile_for_each_thread(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, threads: int
) -> None:
    """Long and short, with grouped queries and odd widths."""
    batch, heads, key_heads, seq, width = shape
    q = torch.randn(batch, heads, seq, width, dtype=dtype)
    k, v = torch.randn(2, batch, key_heads, seq, width, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = probe(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    finally:
        torch.set_num_threads(before)
    (finding,) = [f for f in found if f.operation == ATTENTION]
    assert finding.measured == finding.declared


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("a bf16 operand of a sum", lambda x, y: x + y),
        ("a bf16 result of a sum in fp32", lambda x, y: y.add_(x)),
        ("a comparison", lambda x, y: x > y),
        ("a choice", lambda x, y: torch.where(x > 0, x, y)),
        ("a sum into fp32", lambda x, y: y.sum(-1, dtype=torch.float32)),
        ("a sum of bf16 over dimensions apart", lambda x, y: y.sum((0, 2))),
        ("a mean of bf16", lambda x, y: y.mean(-1)),
        ("a count", lambda x, y: (x > 0).cumsum(-1)),
        ("a norm", lambda x, y: torch.linalg.vector_norm(y, dtype=torch.float32)),
        ("the log of a sum", lambda x, y: x.logsumexp(-1)),
        ("an order", lambda x, y: x.flatten().sort()),
        ("values to places", lambda x, y: y.scatter(2, torch.zeros(4, 8, 1, dtype=torch.int64), y[:, :, :1])),
        ("singular vectors", lambda x, y: torch.linalg.svd(x[0].T @ x[0], full_matrices=False)),
    ],
)
def test_a_kernel_holds_what_its_rule_says(name: str, operation: Callable[..., object]) -> None:
    x = torch.randn(4, 8, 160)
    y = torch.randn(4, 8, 160).bfloat16()
    found = probe(lambda: operation(x, y))
    assert max(finding.declared for finding in found) > 1000, name
    for finding in found:
        assert finding.declared == pytest.approx(finding.measured, rel=0.02, abs=64), name


@pytest.mark.parametrize(("shape", "rank"), [((300, 130), 1), ((130, 300), 40)], ids=str)
@pytest.mark.parametrize("method", [GaLore, Fira, Apollo])
def test_a_step_in_a_subspace_holds_what_its_rule_says(
    method: Any, shape: tuple[int, int], rank: int
) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = method([{"params": [p], "rank": rank}], lr=1e-3)
    p.grad = torch.randn(shape)
    optimizer.step()
    found = probe(optimizer.step)
    (finding,) = [f for f in found if f.operation == "scrimp_cpu::adam_projected"]
    assert finding.declared == finding.measured > 0


def test_a_gpu_holds_attentions_gradient_of_queries_in_fp32() -> None:
    q, k, v, g = torch.randn(4, 1, 2, 64, 16, dtype=torch.bfloat16)
    forward = getattr(torch.ops.aten, ATTENTION.removeprefix("aten::"))
    backward = getattr(torch.ops.aten, ATTENTION.removeprefix("aten::") + "_backward")
    out, sums = forward(q, k, v, 0.0, True)
    args = (g, q, k, v, out, sums, 0.0, True)
    grads = backward(*args)
    assert scratch.scratch_bytes(backward.default, args, grads, kernels="cuda") == 4 * q.numel()
    assert scratch.scratch_bytes(forward.default, args[1:4], out, kernels="cuda") == 0
    assert scratch.scratch_bytes(forward.default, args[1:4], out, kernels="cpu") > 0
