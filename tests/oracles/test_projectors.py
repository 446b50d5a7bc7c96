"""Our projectors against the authors' packages: the same subspaces, draws and refreshes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.optim.pieces import Entries, Target
from scrimp.optim.projectors.random import Random
from scrimp.optim.projectors.refresh import Lazy
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.projectors.two_sided import TwoSided

GradientProjector: Any = pytest.importorskip("apollo_torch.random_projector").GradientProjector
GaLoreProjector: Any = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
LazyProjector: Any = pytest.importorskip("q_galore_torch.q_galore_projector").GaLoreProjector
SHAPES = [(24, 16), (16, 24), (16, 16)]
SIDES: list[Any] = ["std", "reverse_std", "left", "right"]


def gradient(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


class Held:
    """A projector with what an optimizer would keep for it."""

    def __init__(self, projector: Any, shape: tuple[int, int], index: int = 0) -> None:
        self.projector, self.transposed = projector, projector.transposes(shape)
        seen = shape[::-1] if self.transposed else shape
        self.target = Target(name="w", shape=seen, index=index)
        sizes = projector.tensors(self.target).items()
        self.entries: Entries = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in sizes}
        self.entries |= dict.fromkeys(projector.counters, 0)
        self.slots: dict[str, Tensor] = {}

    def project(self, grad: Tensor, step: int) -> Tensor:
        """Return what the package's `project` returns, in its layout."""
        g = grad.mT if self.transposed else grad
        if self.projector.due(self.entries, step):
            old = self.basis(g) if step else None
            self.slots, _ = self.projector.refresh(g, old, self.entries, self.target, step)
        r = self.projector.down(g, self.basis(g))
        return r.mT if self.transposed else r

    def basis(self, g: Tensor) -> Any:
        return self.projector.load(self.slots, self.entries, self.target, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_released_singular_vectors_are_galore_torchs_to_the_last_bit(
    shape: tuple[int, int], side: Any, dtype: torch.dtype
) -> None:
    theirs = GaLoreProjector(5, update_proj_gap=3, proj_type=side)
    ours = Held(SingularVectors(rank=5, every=3, side=side, method="svd", align=False, released=True), shape)
    for step in range(7):
        g = gradient(shape, seed=step).to(dtype)
        expected = theirs.project(g, step)
        r = ours.project(g, step)
        basis = theirs.ortho_matrix if ours.transposed else theirs.ortho_matrix.mT
        assert torch.equal(ours.basis(g), basis)
        # The products are the same but for the order of summation.
        error = 2e-2 if dtype == torch.bfloat16 else 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(r, expected, rtol=error, atol=error)


@pytest.mark.parametrize("method", ["svd", "power", "randomized"])
@pytest.mark.parametrize("side", [*SIDES, "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subspaces_are_galore_torchs(shape: tuple[int, int], side: Any, method: Any) -> None:
    # A gap after the fifth singular value, so that every method finds the same five.
    g = gradient((shape[0], 5)) @ gradient((5, shape[1])) + 1e-6 * gradient(shape, seed=2)
    theirs = GaLoreProjector(5, proj_type=side)
    theirs.project(g, 0)
    if side == "full":
        ours = Held(TwoSided(rank=5, method=method), shape)
        ours.project(g, 0)
        pairs = [
            (ours.slots["left"], theirs.ortho_matrix[0]),
            (ours.slots["right"], theirs.ortho_matrix[1].mT),
        ]
    else:
        ours = Held(SingularVectors(rank=5, side=side, method=method), shape)
        ours.project(g, 0)
        pairs = [(ours.slots["basis"], theirs.ortho_matrix if ours.transposed else theirs.ortho_matrix.mT)]
    for basis, other in pairs:
        torch.testing.assert_close(basis @ basis.mT, other @ other.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_released_two_sided_vectors_are_galore_torchs(shape: tuple[int, int]) -> None:
    theirs = GaLoreProjector(5, update_proj_gap=3, proj_type="full")
    ours = Held(TwoSided(rank=5, every=3, method="svd", align=False, released=True), shape)
    for step in range(7):
        g = gradient(shape, seed=step)
        torch.testing.assert_close(ours.project(g, step), theirs.project(g, step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_released_draws_are_apollo_torchs_to_the_last_bit(
    shape: tuple[int, int], side: Any, dtype: torch.dtype
) -> None:
    for index in range(2):
        theirs = GradientProjector(20, update_proj_gap=3, proj_type=side, seed=1 + index)
        ours = Held(Random(rank=20, every=3, side=side, seed=1, released=True), shape, index)
        for step in range(10):
            g = gradient(shape, seed=step).to(dtype)
            theirs.project(g, step)
            ours.project(g, step)
            drawn = theirs.ortho_matrix if ours.transposed else theirs.ortho_matrix.mT
            assert torch.equal(ours.basis(g), drawn)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_released_laziness_is_q_galores(shape: tuple[int, int]) -> None:
    # Alike enough to double now and then, with signs as they come.
    base = gradient((shape[0], 3)) @ gradient((3, shape[1]))
    theirs = LazyProjector(5, update_proj_gap=2, queue_size=3, cos_threshold=0.3)
    lazy = Lazy(queue=3, threshold=0.3, signed=True)
    projector = SingularVectors(rank=5, every=2, method="svd", align=False, released=True, lazy=lazy)
    ours = Held(projector, shape)
    for step in range(60):
        g = base + gradient(shape, seed=step + 1)
        expected = theirs.project(g, step)
        torch.testing.assert_close(ours.project(g, step), expected, rtol=1e-4, atol=1e-4)
        assert ours.entries["period"] == theirs.update_proj_gap
    assert theirs.update_proj_gap > 2
