"""Series, parallel and invertible adapters: where they lie, how they begin, and what they compute."""

from __future__ import annotations

import pytest
import torch
from tests.tuning.small_adapted import begin, llama, logits, loss_of, train
from tests.tuning.test_scaling import opt
from torch import nn
from torch.nn import functional

from scrimp.base.errors import ScrimpError
from scrimp.tuning.modules.attached import AttachedTuning
from scrimp.tuning.modules.bottleneck import (
    Bottleneck,
    Coupling,
    InvertibleAdapter,
    ParallelAdapter,
    Series,
    SeriesAdapter,
)


@pytest.fixture(
    params=[
        lambda: SeriesAdapter(bottleneck=8, sublayers="both"),
        lambda: ParallelAdapter(bottleneck=8, sublayers="both", scale=4.0),
        InvertibleAdapter,
    ]
)
def tune(request: pytest.FixtureRequest) -> AttachedTuning:
    """Make each."""
    made: AttachedTuning = request.param()
    return made


def disturb(model: nn.Module) -> None:
    """Let every parameter that trains be away from its start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def test_it_begins_as_the_model_and_only_it_trains(tune: AttachedTuning) -> None:
    model = llama()
    before = logits(model)
    trained, optimizer = begin(model, tune)
    assert trained and all(".attached." in name for name in trained)
    assert torch.equal(logits(model), before)
    base = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    start = {n: p.clone() for n, p in trained.items()}
    train(model, tune, optimizer, range(3))
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in base.items())
    assert not any(torch.equal(p, trained[n]) for n, p in start.items())


def test_selecting_again_gives_the_same(tune: AttachedTuning) -> None:
    model = llama()
    first, again = tune.select(model), tune.select(model)
    assert first.keys() == again.keys() and all(first[n] is again[n] for n in first)


def test_it_cannot_be_merged(tune: AttachedTuning) -> None:
    model = llama()
    tune.select(model)
    assert not tune.is_mergeable
    with pytest.raises(ScrimpError, match="cannot be merged"):
        tune.merge(model)


def test_a_series_adapter_sees_what_the_mlp_gives_and_a_parallel_one_what_it_takes() -> None:
    for make, source in ((SeriesAdapter, 1), (ParallelAdapter, 0)):
        model = llama()
        make(bottleneck=8).select(model)
        disturb(model)
        mlp = model.get_submodule("model.layers.0.mlp")
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
        plain = mlp.forward(x)
        net = mlp.get_submodule("attached.net")
        assert isinstance(net, Bottleneck)
        h = (x, plain)[source]
        by_hand = functional.relu(h @ net.down.T + net.down_bias) @ net.up.T + net.up_bias
        assert torch.allclose(mlp(x), plain + by_hand, atol=1e-6)


def test_a_coupling_is_undone_by_its_inverse() -> None:
    nets = [Bottleneck(16, 8, activation="gelu", seed=seed) for seed in (1, 2)]
    coupling = Coupling(*nets)
    disturb(coupling)
    h = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    o = coupling(h)
    assert not torch.allclose(o, h, atol=0.1)
    assert torch.allclose(coupling.inverse(o), h, atol=1e-5)


def test_a_model_without_layers_undoes_its_invertible_adapter_before_the_head() -> None:
    model = llama()
    tune = InvertibleAdapter(bottleneck=0)
    model.get_submodule("model").layers = nn.ModuleList()
    model.get_submodule("model").norm = nn.Identity()
    model.config.num_hidden_layers = 0
    before = logits(model)
    tune.select(model)
    disturb(model)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_an_mlp_in_pieces_takes_a_series_adapter_after_its_last() -> None:
    model, tune = opt(), SeriesAdapter(bottleneck=8)
    tune.select(model)
    assert list(tune.parts) == [f"model.decoder.layers.{i}.fc2" for i in (0, 1)]
    assert all(isinstance(part, Series) for part in tune.parts.values())
    loss_of(model).backward()
    with pytest.raises(ScrimpError, match="in pieces"):
        ParallelAdapter().select(opt())


def test_nonsense_is_refused() -> None:
    with pytest.raises(ScrimpError, match="bottleneck 0 must be above 0"):
        SeriesAdapter(bottleneck=0)
    with pytest.raises(ScrimpError, match="activation 'swish' is unknown"):
        SeriesAdapter(activation="swish")  # type: ignore[arg-type]
    with pytest.raises(ScrimpError, match="width 32 has no halves"):
        InvertibleAdapter(reduction=17).select(llama())
    with pytest.raises(ScrimpError, match="no sub-layers"):
        SeriesAdapter().select(_Headless())


class _Headless(nn.Module):
    """A model of no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = llama().config
