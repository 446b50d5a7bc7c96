"""The operator against cross-entropy over full logits, in value, gradient and bytes.

Sizes are awkward: a width that is no power of two, a vocabulary that fills no slice, one token, a chunk
and one more. Every chunk here has 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from scrimp.activations.linear_cross_entropy import (
    TILE_TOKENS,
    chunk_tokens,
    linear_cross_entropy,
    scratch_bytes,
)
from scrimp.base.protocols import IGNORED
from scrimp.memory.allocator import allocator_events

HIDDEN, VOCAB, CHUNK = 36, 301, 256
TOKENS = [1, TILE_TOKENS + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 90]
OPERATOR = torch.ops.scrimp.linear_cross_entropy.default


def make(
    generator: torch.Generator,
    tokens: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return hidden, weight, bias and labels, of which every fifth is ignored."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[1::5] = IGNORED
    return random(tokens, hidden), random(vocab, hidden), random(vocab) if bias else None, labels


def full(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    divisor: float,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Compute the same over the logits of all tokens at once."""
    z = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z.float() if z.itemsize < 4 else z, labels, reduction="sum") / divisor


def outcome(function: Callable[..., Tensor], *inputs: Tensor | None, **options: Any) -> list[Tensor]:
    """Return a loss and the gradients of whatever input has one."""
    loss = function(*inputs, **options)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [t for t in inputs if t is not None and t.requires_grad]),
    ]


def doubled(*inputs: Tensor | None) -> list[Tensor | None]:
    """Return the same values in fp64, as leaves."""
    return [
        None if t is None else t.detach().double().requires_grad_() if t.is_floating_point() else t
        for t in inputs
    ]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (0.5, 4.0)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_loss_and_gradients_are_those_of_full_logits(
    generator: torch.Generator, tokens: int, bias: bool, scale: float, softcap: float | None
) -> None:
    inputs = make(generator, tokens, bias=bias)
    options = {"divisor": 7.0, "scale": scale, "softcap": softcap}
    truth = outcome(full, *doubled(*inputs), **options)
    ours = outcome(linear_cross_entropy, *inputs, **options)
    assert len(ours) == len(truth) == 3 + bias
    for found, expected in zip(ours, truth, strict=True):
        assert found.dtype == torch.float32
        assert error(found, expected) < 1e-6  # sums of some hundred roundings of 6e-8
    exact = outcome(linear_cross_entropy, *doubled(*inputs), **options)
    for found, expected in zip(exact, truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("targets", [0, 1, CHUNK, CHUNK + 9, 2 * CHUNK])
def test_rows_without_a_target_are_left_out(generator: torch.Generator, targets: int, bias: bool) -> None:
    hidden, weight, offset, labels = make(generator, 2 * CHUNK, bias=bias)
    labels.random_(0, VOCAB, generator=generator)
    labels[torch.randperm(2 * CHUNK, generator=generator)[targets:]] = IGNORED
    inputs = (hidden, weight, offset, labels)
    truth = outcome(full, *doubled(*inputs), divisor=7.0, softcap=4.0)
    for found, expected in zip(
        outcome(linear_cross_entropy, *inputs, divisor=7.0, softcap=4.0, targets=targets), truth, strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert targets or not found.any()
    exact = outcome(linear_cross_entropy, *doubled(*inputs), divisor=7.0, softcap=4.0, targets=targets)
    for found, expected in zip(exact, truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_rows_without_a_target_cost_no_memory(generator: torch.Generator) -> None:
    hidden, weight, _, labels = make(generator, 2 * CHUNK)
    labels[9:] = IGNORED
    weight.requires_grad_(False)
    targets = int((labels != IGNORED).sum())
    with allocator_events() as events:
        linear_cross_entropy(hidden, weight, None, labels, divisor=9.0, targets=targets).backward()
    assert events.peak < 4 * (9 * VOCAB + 3 * hidden.numel())


@pytest.mark.parametrize("tokens", TOKENS)
def test_fp32_agrees_with_torchs_own_operator(generator: torch.Generator, tokens: int) -> None:
    hidden, weight, _, labels = make(generator, tokens)

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)

    expected = outcome(theirs, hidden, weight)
    found = outcome(linear_cross_entropy, hidden, weight, None, labels, divisor=1.0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for ours, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def by_checkpoint(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The oracle: plain cross-entropy of each chunk, whose logits are computed twice."""
    parts = [
        checkpoint(full, hidden[rows], weight, bias, labels[rows], divisor=1.0, use_reentrant=False)
        for rows in torch.arange(len(labels)).split(CHUNK)
    ]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_bf16_is_as_exact_as_checkpointed_chunks(generator: torch.Generator, tokens: int, bias: bool) -> None:
    inputs = make(generator, tokens, bias=bias, dtype=torch.bfloat16)
    truth = outcome(full, *doubled(*inputs), divisor=1.0)
    oracle = outcome(by_checkpoint, *inputs)
    ours = outcome(linear_cross_entropy, *inputs, divisor=1.0)
    assert ours[0].dtype == torch.float32
    # The logits are rounded to bf16 on both sides; the loss after that is exact.
    torch.testing.assert_close(ours[0], oracle[0], rtol=1e-6, atol=0)
    for found, theirs, expected in zip(ours[1:], oracle[1:], truth[1:], strict=True):
        assert found.dtype == torch.bfloat16
        # A logit of 16 rounds by 0.03, and so do the probabilities of both.
        assert error(found, expected) < 1.1 * error(theirs, expected) < 0.03


def test_the_gradient_of_a_wider_head_is_not_rounded(generator: torch.Generator) -> None:
    """Under autocast the head is fp32 and what enters it bf16: products run in bf16, sums in fp32."""
    tokens = 2 * CHUNK + 90
    hidden, weight, bias, labels = make(generator, tokens, bias=True)
    narrow = hidden.detach().bfloat16().requires_grad_()
    loss, d_hidden, d_weight, d_bias = outcome(
        linear_cross_entropy, narrow, weight, bias, labels, divisor=1.0
    )
    rounded = [t.detach().bfloat16().requires_grad_() for t in (narrow, weight, bias)]
    same = outcome(linear_cross_entropy, *rounded, labels, divisor=1.0)
    assert torch.equal(loss, same[0]) and torch.equal(d_hidden, same[1])
    assert d_hidden.dtype == torch.bfloat16
    assert d_weight.dtype == d_bias.dtype == torch.float32
    assert torch.equal(d_weight.bfloat16(), same[2]) and not torch.equal(d_weight, same[2].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", ["first chunk", "last chunk", "all"])
def test_ignored_tokens_have_neither_loss_nor_gradient(
    generator: torch.Generator, which: str, dtype: torch.dtype
) -> None:
    hidden, weight, bias, labels = make(generator, 2 * CHUNK + 3, bias=True, dtype=dtype)
    rows = {"first chunk": slice(0, CHUNK), "last chunk": slice(2 * CHUNK, None), "all": slice(None)}[which]
    labels[rows] = IGNORED
    loss, d_hidden, *others = outcome(linear_cross_entropy, hidden, weight, bias, labels, divisor=3.0)
    assert not d_hidden[rows].any()
    if which == "all":
        assert loss == 0 and not any(gradient.any() for gradient in others)
        return
    kept = labels != IGNORED
    parts = [hidden.detach()[kept].requires_grad_(), weight, bias, labels[kept]]
    assert d_hidden[kept].any(1).all()
    truth = outcome(full, *doubled(*parts), divisor=3.0)
    tolerance = 2e-7 if dtype == torch.float32 else 1e-4
    assert error(loss, truth[0]) < tolerance
    for found, expected in zip(others, truth[2:], strict=True):
        assert error(found, expected) < (1e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_is_the_slope_of_the_loss(generator: torch.Generator, softcap: float | None) -> None:
    hidden, weight, bias, labels = make(generator, CHUNK + 9, bias=True, dtype=torch.float64)
    assert bias is not None
    inputs = (hidden, weight, bias)
    steps = [torch.randn(t.shape, generator=generator).double() for t in inputs]

    def along(distance: float) -> Tensor:
        moved = [t.detach() + distance * step for t, step in zip(inputs, steps, strict=True)]
        return linear_cross_entropy(*moved, labels, divisor=5.0, scale=0.5, softcap=softcap)

    _, *gradients = outcome(linear_cross_entropy, *inputs, labels, divisor=5.0, scale=0.5, softcap=softcap)
    slope = sum((g * step).sum() for g, step in zip(gradients, steps, strict=True))
    # Central differences err by the step's square, 1e-10, and by rounding over the step, 1e-11.
    torch.testing.assert_close((along(1e-5) - along(-1e-5)) / 2e-5, slope, rtol=1e-7, atol=0)


def test_gradients_of_two_micro_batches_add_up_to_that_of_one(generator: torch.Generator) -> None:
    hidden, weight, bias, labels = make(generator, 2 * CHUNK + 90, bias=True)
    whole = outcome(linear_cross_entropy, hidden, weight, bias, labels, divisor=9.0)
    weight.grad = None
    for rows in (slice(0, 300), slice(300, None)):
        linear_cross_entropy(hidden[rows], weight, bias, labels[rows], divisor=9.0).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, whole[2], rtol=1e-5, atol=1e-6)


def test_an_upstream_factor_reaches_every_gradient(generator: torch.Generator) -> None:
    inputs = make(generator, CHUNK + 9, bias=True)
    once = outcome(linear_cross_entropy, *inputs, divisor=9.0)
    twice = outcome(lambda *args, **kw: 2 * linear_cross_entropy(*args, **kw), *inputs, divisor=9.0)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


def test_a_loss_beyond_what_exp_can_hold_is_exact(generator: torch.Generator) -> None:
    """The target's probability is 0 in fp32, its loss is not infinite; and one that is certain costs 0."""
    hidden, weight, _, labels = make(generator, 20)
    with torch.no_grad():
        hidden *= 100
    loss, *gradients = outcome(linear_cross_entropy, hidden, weight, None, labels, divisor=1.0)
    truth = outcome(full, *doubled(hidden, weight, None, labels), divisor=1.0)
    assert truth[0] > 1000 * 16
    assert error(loss, truth[0]) < 1e-6
    for found, expected in zip(gradients, truth[1:], strict=True):
        assert error(found, expected) < 1e-3  # logits of 1e4 round by 5e-4


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_gradient_that_nobody_needs_is_not_made(
    generator: torch.Generator, needed: tuple[bool, bool, bool]
) -> None:
    inputs = make(generator, CHUNK + 9, bias=True)
    everything = outcome(linear_cross_entropy, *inputs, divisor=9.0)
    for tensor, needs in zip(inputs, needed, strict=False):
        assert tensor is not None
        tensor.requires_grad_(needs)
    loss, found = outcome(linear_cross_entropy, *inputs, divisor=9.0)
    assert torch.equal(loss, everything[0]) and torch.equal(found, everything[1 + needed.index(True)])
    made = OPERATOR(*(t.detach() if t is not None else t for t in inputs), 9.0, 1.0, None, None, *needed)
    assert [t.numel() > 0 for t in made[1:]] == list(needed)


def test_without_autograd_the_loss_alone_is_computed(generator: torch.Generator) -> None:
    inputs = make(generator, 2 * CHUNK)
    loss = linear_cross_entropy(*inputs, divisor=9.0)
    with torch.no_grad(), allocator_events() as events:
        alone = linear_cross_entropy(*inputs, divisor=9.0)
    assert torch.equal(alone, loss) and not alone.requires_grad
    assert events.peak < 1.05 * 4 * CHUNK * VOCAB


def test_a_second_backward_pass_is_an_error(generator: torch.Generator) -> None:
    loss = linear_cross_entropy(*make(generator, 9), divisor=9.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands its gradients over once"):
        loss.backward()


def test_a_label_outside_the_vocabulary_is_an_error(generator: torch.Generator) -> None:
    hidden, weight, _, labels = make(generator, 9)
    for wrong in (VOCAB, -1):
        labels[0] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, None, labels, divisor=9.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [CHUNK, CHUNK + 9])
def test_memory_that_was_never_written_reaches_no_result(
    generator: torch.Generator, tokens: int, dtype: torch.dtype
) -> None:
    """In torch's deterministic mode every new block is full of NaN."""
    inputs = make(generator, tokens, bias=True, dtype=dtype, vocab=4500)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = [outcome(linear_cross_entropy, *inputs, divisor=9.0, softcap=cap) for cap in (None, 3.0)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensors in found for tensor in tensors)
    again = outcome(linear_cross_entropy, *inputs, divisor=9.0)
    assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_autocast_around_it_changes_no_bit(generator: torch.Generator) -> None:
    inputs = make(generator, CHUNK + 9, bias=True)
    alone = outcome(linear_cross_entropy, *inputs, divisor=9.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = outcome(linear_cross_entropy, *inputs, divisor=9.0)
    assert all(torch.equal(a, b) for a, b in zip(alone, inside, strict=True))


# torch's own code, which traces an autograd function by making one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_it_is_the_same(generator: torch.Generator) -> None:
    inputs = make(generator, CHUNK + 9, bias=True)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    alone = outcome(linear_cross_entropy, *inputs, divisor=9.0, softcap=3.0)
    found = outcome(compiled, *inputs, divisor=9.0, softcap=3.0)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_fake_tensors_it_makes_the_same_shapes(
    generator: torch.Generator, dtype: torch.dtype, bias: bool
) -> None:
    inputs = [t if t is None else t.detach() for t in make(generator, CHUNK + 9, bias=bias, dtype=dtype)]
    for needed in [(True, True, bias), (True, False, False), (False, False, False)]:
        options = (9.0, 1.0, 3.0, None, *needed)
        torch.library.opcheck(OPERATOR, (*inputs, *options), test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode() as mode:
        fake = [t if t is None else mode.from_tensor(t) for t in inputs]
        fake[1].requires_grad_()  # type: ignore[union-attr]
        loss = linear_cross_entropy(*fake, divisor=9.0)  # type: ignore[arg-type]
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert fake[1] is not None and fake[1].grad is not None and fake[1].grad.dtype == dtype


def test_the_dispatcher_sees_one_operator(generator: torch.Generator) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    for tokens in (CHUNK, 3 * CHUNK):
        names: list[str] = []
        inputs = make(generator, tokens)
        with Seen():
            linear_cross_entropy(*inputs, divisor=9.0)
        assert [name for name in names if not name.startswith("aten.detach")] == [str(OPERATOR)]


def test_a_chunk_is_about_half_as_large_as_the_head() -> None:
    assert [chunk_tokens(d) for d in (1, 36, 512, 576, 768, 2048, 4096, 5120, 16384)] == [
        *(256, 256, 256, 256, 512, 1024, 2048, 2048, 4096)
    ]


def product_scratch(hidden: Tensor, vocab: int) -> int:
    """Return what the library holds in the largest product: oneDNN packs bf16, MKL's fp32 takes nothing."""

    def held(rows: int) -> int:
        dz, weight = hidden.new_zeros(rows, vocab), hidden.new_zeros(vocab, hidden.shape[1])
        out = hidden.new_zeros(rows, hidden.shape[1])
        with allocator_events() as events:
            out.addmm_(dz, weight, beta=0)
        return events.peak

    tokens = len(hidden)
    return max(held(rows) for rows in (min(CHUNK, tokens), (tokens - 1) % CHUNK + 1))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("needed", ["all", "no weight", "none"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16 and fp32"])
@pytest.mark.parametrize("shape", [(100, 64, 8000), (300, 320, 6000), (700, 600, 5000)], ids=str)
def test_scratch_is_what_the_allocator_hands_out(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtypes: str,
    needed: str,
    bias: bool,
    softcap: float | None,
) -> None:
    tokens, hidden, vocab = shape
    given = make(generator, tokens, hidden=hidden, vocab=vocab, bias=bias)
    h, w, b, labels = (t if t is None else t.detach() for t in given)
    assert h is not None and w is not None
    h = 0.1 * h  # products with subnormal numbers, probabilities below 1e-38, are very slow
    h = h.to(torch.float32 if dtypes == "fp32" else torch.bfloat16)
    w = w.to(torch.bfloat16 if dtypes == "bf16" else torch.float32)
    flags = (needed != "none", needed == "all", needed == "all" and bias)
    with allocator_events() as events:
        made = OPERATOR(h, w, b, labels, 9.0, 1.0, softcap, None, *flags)
    assert events.left == pytest.approx(sum(t.nbytes for t in made), abs=64)
    formula = scratch_bytes(
        tokens,
        hidden,
        vocab,
        h.itemsize,
        weight_itemsize=w.itemsize,
        needs_gradient=flags[0],
        needs_weight_grad=flags[1],
        needs_bias_grad=flags[2],
        softcap=softcap is not None,
    )
    beside = product_scratch(h, vocab)
    measured = events.peak - events.left
    assert -0.005 * events.peak < formula + beside - measured < 0.005 * events.peak + beside
    if dtypes == "fp32":
        assert beside == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_backward_pass_makes_no_second_gradient_of_the_head(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    hidden, weight, _, labels = make(generator, 100, vocab=5000, dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, None, labels, divisor=9.0)
    kept = loss.grad_fn.gradients[1].data_ptr()  # type: ignore[union-attr]
    with allocator_events() as events:
        loss.backward()
    assert weight.grad is not None and weight.grad.data_ptr() == kept
    assert events.peak < hidden.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_gpu_computes_the_same_and_waits_for_nothing(
    generator: torch.Generator, dtype: torch.dtype, softcap: float | None
) -> None:
    inputs = make(generator, 2 * CHUNK + 90, bias=True, dtype=dtype)
    truth = outcome(full, *doubled(*inputs), divisor=9.0, softcap=softcap)
    there = [None if t is None else t.detach().cuda().requires_grad_(t.requires_grad) for t in inputs]
    outcome(linear_cross_entropy, *there, divisor=9.0, softcap=softcap)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = outcome(linear_cross_entropy, *there, divisor=9.0, softcap=softcap)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    assert all(error(f.cpu(), t) < tolerance for f, t in zip(found, truth, strict=True))
