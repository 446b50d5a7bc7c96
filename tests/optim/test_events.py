"""Where two events meet: resets, refreshes, simulations, refused calls, gradients that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.base.errors import ScrimpError
from scrimp.optim import DCTAdamW, Frugal, GaLore, QGaLore
from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.optimizer import Optimizer
from scrimp.optim.pieces import Composition
from scrimp.optim.projectors.dct import cosine_basis
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.rules.adafactor import Adafactor
from scrimp.optim.stores.full import Full


def matrices(count: int, shape: tuple[int, int] = (24, 16)) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(count)]


def test_a_constant_gradient_moves_evenly_through_resets_and_refreshes() -> None:
    """The bias correction counts from whichever came last."""
    (p,) = matrices(1)
    optimizer = Frugal(
        [p], lr=0.1, density=0.5, projector="columns", residual="none", refresh_every=4, reset_every=5
    )
    for _ in range(17):
        before, p.grad = p.detach().clone(), torch.ones_like(p)
        optimizer.step()
        moved = (p.detach() - before).abs().amax() / 0.1
        assert moved == pytest.approx(1.0, rel=1e-5)


def test_a_reset_may_fall_on_the_step_at_which_a_block_wakes() -> None:
    ps = matrices(4, (96, 64))
    optimizer = Frugal(ps, lr=0.01, density=0.5, refresh_every=2, reset_every=3, store="8bit")
    for _ in range(9):
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert all(p.isfinite().all() for p in ps)


def test_mirrored_blocks_are_counted_before_they_are_refused() -> None:
    optimizer = Frugal(matrices(8), lr=0.01, density=0.75, order="mirror")
    assert sum(optimizer.plan_of(p).composition.projector is not None for p in optimizer.state or []) == 0
    assert all(
        optimizer.plan_of(p).composition.projector is not None
        for group in optimizer.param_groups
        for p in group["params"]
    )
    with pytest.raises(ScrimpError, match="3"):
        Frugal(matrices(6), lr=0.01, density=0.5, order="mirror")


def test_a_cosine_basis_of_a_simulation_is_no_real_one() -> None:
    device = torch.device("cpu")
    real = cosine_basis(24, torch.float32, device)
    for _ in range(2):
        with FakeTensorMode():
            assert cosine_basis(24, torch.float32, device).shape == (24, 24)
    again = cosine_basis(24, torch.float32, device)
    assert torch.equal(again, real) and type(again) is torch.Tensor


def test_dct_adamw_runs_after_its_own_simulation() -> None:
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(32, 20))
        p.grad = torch.empty_like(p)
        DCTAdamW([p], rank=4).step()
    q = nn.Parameter(torch.randn(32, 20))
    q.grad = torch.randn_like(q)
    DCTAdamW([q], rank=4).step()
    assert q.isfinite().all()


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    first, second = matrices(2)
    optimizer = GaLore([first, second], rank=4)
    with pytest.raises(ScrimpError, match="already"):
        optimizer.add_param_group({"params": [first], "rank": None})
    assert optimizer.plan_of(first).composition.projector is not None


def test_gradients_that_are_not_finite_do_not_lengthen_a_lazy_period() -> None:
    (p,) = matrices(1)
    optimizer = QGaLore([p], rank=4, refresh_every=2, threshold=-1.0)
    for step in range(16):
        p.grad = torch.randn_like(p) if step == 0 else torch.full_like(p, torch.nan)
        optimizer.step()
    assert optimizer.state[p]["period"] == 2


def test_a_rule_whose_state_cannot_be_rotated_is_refused_with_rotation() -> None:
    def compose(options: Any) -> Composition:
        return Composition(
            rule=Adafactor(relative_step=False, scale_parameter=False),
            projector=SingularVectors(rank=4, on_refresh="rotate"),
            lift=ProjectBack(),
            store=Full(),
            basis_store=Full(),
        )

    with pytest.raises(ScrimpError, match="cannot be rotated"):
        Optimizer(matrices(1), compose=compose, options={"lr": 0.1, "weight_decay": 0.0})


def test_a_rank_that_fits_no_matrix_is_refused_and_not_another_algorithm() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    with pytest.raises(ScrimpError, match=r"no matrix would be projected.*lower rank"):
        GaLore(model, rank=128)
    with pytest.raises(ScrimpError, match="no optimizer's state dict"):
        GaLore(model, rank=4).load_state_dict({})


def test_without_names_a_vocabulary_is_told_by_its_rare_length() -> None:
    """As transformers' Trainer hands parameters over: two groups, no names."""
    shapes = [(320, 48)] + 2 * [(48, 48), (48, 48), (130, 48), (130, 48), (48, 130)] + [(320, 48), (48,)]
    ps = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = GaLore([{"params": ps[:-1], "weight_decay": 0.1}, {"params": ps[-1:]}], rank=8)
    projected = [tuple(p.shape) for p in ps if optimizer.plan_of(p).composition.projector]
    assert (320, 48) not in projected and len(projected) == 10
