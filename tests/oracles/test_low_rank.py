"""Low-rank optimizers against the packages of their authors: the same groups, the same gradients, 50 steps.

apollo-torch is CC-BY-NC: it is run here, and nothing of it is copied.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.optim.named.apollo import Apollo
from scrimp.optim.named.galore import GaLore, QGaLore
from scrimp.optim.named.low_rank import Fira

for package in ("apollo_torch", "fira", "galore_torch", "q_galore_torch"):
    pytest.importorskip(package)

STEPS, GAP, RANK = 50, 7, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
REST = [(7,), (6, 9)]  # not projected, and counted by apollo-torch's seeds
SHAPES = [(24, 16), (16, 24), (20, 20)]
SIDES = ["std", "reverse_std", "left", "right"]
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        # Small, so that it is the updates that are rounded, and not the sum.
        nn.Parameter(0.01 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in REST + SHAPES
    ]


def gradients(dtype: torch.dtype) -> list[list[Tensor]]:
    """Return spiky gradients of a decaying spectrum: the limiter works, and singular vectors lie apart."""
    generator = torch.Generator().manual_seed(2)

    def draw(shape: tuple[int, ...], size: float) -> Tensor:
        g = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2:
            g = g * 0.85 ** torch.arange(shape[1])
        return g.to(dtype)

    return [[draw(shape, 1 + 9 * (step % 5 == 3)) for shape in REST + SHAPES] for step in range(STEPS)]


def run(
    make: Make, group: dict[str, Any], dtype: torch.dtype, *, steps: list[list[Tensor]] | None = None
) -> list[Tensor]:
    """Return how far each parameter has moved: the first ones whole, the others in two projected groups."""
    ps = parameters(dtype)
    before = [p.detach().clone() for p in ps]
    split = len(REST) + 2
    groups = [
        {"params": ps[: len(REST)]},
        {"params": ps[len(REST) : split], **group},
        {"params": ps[split:], **group, "rank": group["rank"] - 1},
    ]
    optimizer = make(groups)
    for step in steps or gradients(dtype):
        for p, g in zip(ps, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() - old for p, old in zip(ps, before, strict=True)]


def farthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of two runs, relative to the way that the oracle's parameter went."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def authors(module: str, name: str, **options: Any) -> Make:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = getattr(__import__(module, fromlist=[name]), name)

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # their AdamW calls itself deprecated
            made: torch.optim.Optimizer = cls(groups, lr=0.01, **options)
        return made

    return make


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", [*SIDES, "full"])
def test_galore_follows_galore_torch(side: str, dtype: torch.dtype) -> None:
    group = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": side}
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    ours = run(lambda groups: GaLore(groups, lr=0.01, **options), group, dtype)
    theirs = run(authors("galore_torch", "GaLoreAdamW", **options), group, dtype)
    # Of both sides, R is diagonal at a refresh: the rest of it is rounding, which Adam makes larger.
    noise = 3 if side == "full" and dtype == torch.float32 else 1
    assert farthest(ours, theirs) < noise * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_fira_follows_fira(scale: float, side: str, dtype: torch.dtype) -> None:
    group = {"rank": RANK, "update_proj_gap": GAP, "alpha": scale, "proj_type": side}
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    ours = run(lambda groups: Fira(groups, lr=0.01, **options), group, dtype)
    theirs = run(authors("fira", "FiraAdamW", **options), group, dtype)
    assert farthest(ours, theirs) < TOLERANCE[dtype]


APOLLOS = [
    *itertools.product(["channel", "tensor"], [False, True], ["random"], ["std"]),
    ("channel", False, "svd", "std"),
    # Channels of a forced opposite side are a shape error of theirs, but not one factor a tensor.
    *itertools.product(["tensor"], [False], ["random"], ["reverse_std", "left", "right"]),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("scale_type", "front", "proj", "side"), APOLLOS)
def test_apollo_follows_apollo_torch(
    scale_type: Any, front: bool, proj: Any, side: str, dtype: torch.dtype
) -> None:
    group = {
        "rank": RANK,
        "update_proj_gap": GAP,
        "scale": 3.0,
        "proj_type": side,
        "scale_type": scale_type,
        "proj": proj,
    }
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "scale_front": front}
    ours = run(
        lambda groups: Apollo(groups, lr=0.01, variant="released", seed=len(REST), **options), group, dtype
    )
    theirs = run(authors("apollo_torch", "APOLLOAdamW", **options), group, dtype)
    assert farthest(ours, theirs) < TOLERANCE[dtype]


def test_apollo_takes_a_rank_above_the_smaller_side_as_apollo_torch_does() -> None:
    group = {
        "rank": 40,
        "update_proj_gap": GAP,
        "scale": 1.0,
        "proj_type": "std",
        "scale_type": "channel",
        "proj": "random",
    }
    ours = run(
        lambda groups: Apollo(groups, lr=0.01, variant="released", seed=len(REST)), group, torch.float64
    )
    theirs = run(authors("apollo_torch", "APOLLOAdamW"), group, torch.float64)
    assert farthest(ours, theirs) < 1e-12


def test_apollos_papers_draw_is_another_and_as_good(generator: torch.Generator) -> None:
    group = {
        "rank": RANK,
        "update_proj_gap": GAP,
        "scale": 1.0,
        "proj_type": "std",
        "scale_type": "channel",
        "proj": "random",
    }
    ours = run(lambda groups: Apollo(groups, lr=0.01), group, torch.float64)
    theirs = run(authors("apollo_torch", "APOLLOAdamW"), group, torch.float64)
    assert farthest(ours, theirs) > 0.01
    for a, b in zip(ours, theirs, strict=True):
        assert 0.8 < (a.norm() / b.norm()).item() < 1.25


def test_firas_limiter_survives_a_zero_first_gradient_and_theirs_does_not() -> None:
    steps = gradients(torch.float64)[:10]
    steps[0] = [torch.zeros_like(g) for g in steps[0]]
    group = {"rank": RANK, "update_proj_gap": GAP, "alpha": 0.25, "proj_type": "std"}
    ours = run(lambda groups: Fira(groups, lr=0.01), group, torch.float64, steps=steps)
    theirs = run(authors("fira", "FiraAdamW"), group, torch.float64, steps=steps)
    galore = run(
        authors("galore_torch", "GaLoreAdamW"),
        {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"},
        torch.float64,
        steps=steps,
    )
    for mine, dead, plain in list(zip(ours, theirs, galore, strict=True))[len(REST) :]:
        assert ((dead - plain).norm() / plain.norm()).item() < 1e-6  # no residual at all: GaLore
        assert ((mine - plain).norm() / plain.norm()).item() > 0.5


def test_galores_authors_keep_three_times_the_state_that_their_tensors_show() -> None:
    group = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    made: list[torch.optim.Optimizer] = []

    def keeping(make: Make) -> Make:
        def make_and_keep(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            made.append(make(groups))
            return made[-1]

        return make_and_keep

    run(keeping(lambda groups: GaLore(groups, lr=0.01)), group, torch.float32)
    run(keeping(authors("galore_torch", "GaLoreAdamW")), group, torch.float32)
    ours, theirs = made
    p, q = ours.param_groups[1]["params"][0], theirs.param_groups[1]["params"][0]  # (24, 16)
    basis = ours.state[p]["basis"]
    assert basis.shape == (16, RANK) and basis.untyped_storage().nbytes() == basis.nbytes == 4 * 16 * RANK
    assert theirs.state[q]["projector"].ortho_matrix.untyped_storage().nbytes() == 4 * 16 * 16


def test_q_galores_projector_is_ours_with_its_lazy_refreshes() -> None:
    # The optimizer itself needs a GPU; what it projects with runs anywhere. Theirs lays a left basis out as
    # ours, (d, r), so that the groups of 256 are the same.
    from q_galore_torch.q_galore_projector import GaLoreProjector  # type: ignore[import-untyped]

    theirs = GaLoreProjector(8, update_proj_gap=2, quant=True, group_size=256, n_bit=4, queue_size=5)
    p = nn.Parameter(torch.zeros(32, 48))
    optimizer = QGaLore([{"params": [p], "rank": 8, "refresh_every": 2}], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    steady = torch.randn(32, 48, generator=generator) * 0.8 ** torch.arange(48)
    refreshes, last = 0, torch.zeros(32, 8)
    for step in range(60):
        g = steady + 0.01 * torch.randn(32, 48, generator=generator)
        r = theirs.project(g, step)
        p.grad = g.clone()
        optimizer.step()
        basis = optimizer.plan_of(p).basis(optimizer.state[p], g)
        refreshes += not torch.equal(basis, last)
        last = basis
        torch.testing.assert_close(basis.mT @ g, r, rtol=1e-5, atol=1e-5)
        assert optimizer.state[p]["period"] == theirs.update_proj_gap
    assert refreshes == theirs.svd_count < 30 and theirs.update_proj_gap > 2
