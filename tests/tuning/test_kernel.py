"""SNELL: its change against its equations, the threshold against a sort, and what the backward pass keeps."""

from __future__ import annotations

import pytest
import torch
from tests.tuning.small import llama, loss_of, tokens
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.tuning.deltas.kernel import Kernelised, threshold
from scrimp.tuning.sparse.kernel import Snell


def delta(**options: object) -> Kernelised:
    """Make one for 7 inputs and 5 outputs."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 7, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    return Kernelised(p, q, **{"sparsity": 0.4, "variant": "paper", **options})


def dense(some: Kernelised) -> Tensor:
    """Return D, entry by entry, out x in."""
    distance = [(some.q[h][:, None] - some.p[h][None]).square().sum(-1).sqrt() for h in range(2)]
    return 0.1 * (distance[0] - distance[1])


def test_threshold_separates_as_a_quantile_does() -> None:
    size = torch.rand(11, 13, generator=torch.Generator().manual_seed(1))
    for sparsity in (0.0, 0.25, 0.3, 0.5, 0.9):
        wanted = size > torch.quantile(size, sparsity)
        assert torch.equal(size > threshold(size, sparsity), wanted)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_change_and_gradients_are_those_of_the_equations(variant: str) -> None:
    some, base = delta(variant=variant), nn.Linear(7, 5)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    d = dense(some)
    size = d.detach().abs()
    kept = size > torch.quantile(size, 0.4)
    expected = d * (kept * size if variant == "released" else kept)
    assert int((some.change(base.weight) == 0).sum()) == int((~kept).sum()) == 14
    assert torch.allclose(some.change(base.weight), expected, atol=1e-6)
    (x @ expected.T).square().sum().backward()
    wanted = some.p.grad.clone(), some.q.grad.clone()
    some.zero_grad()
    (some(x, base) - base(x)).square().sum().backward()
    assert torch.allclose(some.p.grad, wanted[0], atol=1e-5) and some.p.grad.any()
    assert torch.allclose(some.q.grad, wanted[1], atol=1e-5)


def test_linear_kernel_without_threshold_is_a_lora() -> None:
    some, base = delta(kernel="linear", sparsity=0.0), nn.Linear(7, 5)
    found = some.factors()
    assert found is not None and found.a.shape == (6, 7)
    assert torch.allclose(some.change(base.weight), found.b @ found.a, atol=1e-6)
    assert torch.linalg.matrix_rank(delta(sparsity=0.0).change(base.weight)) == 5
    assert delta().factors() is None


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    some, base, x = delta(), nn.Linear(7, 5).requires_grad_(False), torch.randn(4, 7, requires_grad=True)
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        some(x, base)
    assert (4, 7) in saved
    assert sum(sorted(shape[-2:]) == [5, 7] for shape in saved) <= 1  # the base's own weight


def test_it_trains_and_merges_into_the_same_function() -> None:
    model = llama(2)
    tune = Snell(rank=4)
    trained = tune.select(model)
    before = {name: p.detach().clone() for name, p in trained.items()}
    losses = [loss_of(model, 0).item()]
    optimizer = torch.optim.AdamW(trained.values(), lr=0.3, weight_decay=0)
    for _ in range(8):
        loss = loss_of(model, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]
    with torch.no_grad():
        adapted = model(tokens(9)).logits
        tune.merge(model)
        assert torch.allclose(model(tokens(9)).logits, adapted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 3}, "even"),
        ({"rank": 10}, "rank 10 does not fit"),
        ({"sparsity": 1.0}, "sparsity 1.0"),
        ({"variant": "squared"}, "variant 'squared'"),
    ],
)
def test_mistakes_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ScrimpError, match=word):
        Snell(**options).select(llama(2))
