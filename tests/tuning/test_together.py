"""The CPU kernels of shared adapters are the equations in torch, job by job."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.tuning import together, together_cpu
from scrimp.tuning.together import Low

SPANS = {
    "each a row": ((0, 1), (1, 2), (2, 3), (3, 4)),
    "uneven, out of order": ((3, 4), (0, 3)),
    "rows of nobody": ((1, 3),),
    "nobody's rows": ((0, 0), (0, 2), (2, 4)),
}
RANKS = (3, 8, 1, 5)


class Case:
    """Tensors of a layer with 4 rows of 41 tokens: more than a piece, and no multiple of one."""

    def __init__(self, spans: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.x, self.y, self.gy = normal(4, 41, 24), normal(4, 41, 40), normal(4, 41, 40)
        self.lows = tuple(Low(*span, 0.5 + job) for job, span in enumerate(spans))
        sizes = [(rank, side) for rank in RANKS[: len(spans)] for side in (24, 40)]
        self.factors = [
            normal(*(size if i % 2 == 0 else size[::-1])).requires_grad_() for i, size in enumerate(sizes)
        ]

    def run(self) -> list[Tensor]:
        """Return y, the gradients of x and of the factors."""
        x, y = self.x.clone().requires_grad_(), self.y.clone()
        out = together._add_all(y, x, self.lows, x.dtype, *self.factors)
        return [out.detach(), *torch.autograd.grad(out, [x, *self.factors], self.gy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_the_kernel_is_the_equation(
    monkeypatch: pytest.MonkeyPatch, spans: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    case = Case(spans, dtype)
    assert together_cpu.takes(case.x, case.y, case.factors)
    ours = case.run()
    monkeypatch.setattr(together_cpu, "takes", lambda *given: False)
    for found, expected in zip(ours, case.run(), strict=True):
        torch.testing.assert_close(found, expected)


def test_threads_change_no_bit() -> None:
    case, before = Case(SPANS["each a row"], torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = case.run()
        torch.set_num_threads(3)
        assert all(map(torch.equal, case.run(), alone))
    finally:
        torch.set_num_threads(before)


def test_a_checkpoint_that_keeps_some_results_is_refused() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(ctx: Any, operation: Any, *given: Any, **named: Any) -> CheckpointPolicy:
        is_product = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    case = Case(SPANS["each a row"], torch.float32)
    x, w = case.x.clone().requires_grad_(), torch.randn(24, 40)

    def run(x: Tensor) -> Tensor:
        y = (x.flatten(0, 1) @ w).view(4, 41, 40)
        return together._add_all(y, x, case.lows, x.dtype, *case.factors)  # type: ignore[no-any-return]

    out = checkpoint(
        run, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    with pytest.raises(RuntimeError, match="mutated"):
        out.sum().backward()


def test_a_job_that_diverges_leaves_the_others_as_they_are() -> None:
    case = Case(SPANS["each a row"], torch.float32)
    expected = case.run()
    case.x[1], case.factors[2].data[0, 0], case.gy[1] = torch.nan, torch.inf, torch.nan
    y, gx, *gradients = case.run()
    others = [0, 2, 3]
    assert torch.equal(y[others], expected[0][others])
    assert torch.equal(gx[others], expected[1][others])
    for job in others:
        for i in (2 * job, 2 * job + 1):
            assert torch.equal(gradients[i], expected[2 + i])
    assert not gradients[2].isfinite().all()
