"""A tracker sees the bytes that the allocator hands out, on real tensors and on fake ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.memory import tracker as module
from scrimp.memory.allocator import allocator_events, peak_of
from scrimp.memory.fake import simulation, tensors_of, to_fake
from scrimp.memory.tracker import Record, Tracker

N = 4096  # elements of a small tensor
SCALARS = 64  # bytes at most: kernels make tensors of the numbers they are given


def _alive(record: Record) -> list[int]:
    """Return the bytes alive after each operation, what kernels hold inside included."""
    change = [0] * (len(record.operations) + 2)
    for storage in record.storages:
        change[storage.born] += storage.size
        if storage.died is not None:
            change[storage.died + 1] -= storage.size
    return [held + record.scratch.get(point, 0) for point, held in enumerate(accumulate(change[:-1]))]


def _tracked(program: Callable[[], object], *existing: Tensor) -> Record:
    tracker = Tracker(existing)
    with tracker:
        tracker.calibrate()
        program()
    return tracker.record


class Branches(nn.Module):
    """A value that is used often, so that its gradient is a sum of many."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.lift = nn.Linear(32, 64, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        # Views of different kinds: what the engine may add to in place depends on who else holds them.
        parts = [h.sin(), h.cos() * h, h * 2, h + 1, h[:, :32].repeat(1, 2), h.t().exp().t()]
        return torch.stack([part.float().square().sum() for part in parts]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tracker_sees_the_allocators_bytes_though_it_changes_the_run(dtype: torch.dtype) -> None:
    """The engine adds gradients in place, but not while a dispatch mode watches."""
    torch.manual_seed(0)
    model = Branches(dtype)
    x = torch.randn(256, 32, dtype=dtype)

    def step() -> None:
        model.zero_grad()
        model(x).backward()

    step()
    tracker = Tracker([*tensors_of(model), x])
    model.zero_grad()
    measured = peak_of(step)
    model.zero_grad()
    with tracker:
        tracker.calibrate()
        step()
    assert max(_alive(tracker.record)) == pytest.approx(measured, abs=SCALARS)
    assert {"add.Tensor", "add_.Tensor"} <= set(tracker.record.operations)  # some sums are held, some are not


def test_without_the_repair_of_sums_it_would_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: the repair is what makes it pass."""
    leaf = torch.ones(8, N, requires_grad=True)

    def step() -> None:
        h = leaf * 2
        torch.stack([h[i].sum() for i in range(8)]).sum().backward()  # each row's gradient is as large as all

    step()
    leaf.grad = None
    measured = peak_of(step)
    leaf.grad = None
    assert max(_alive(_tracked(step))) == pytest.approx(measured, abs=SCALARS)
    leaf.grad = None
    monkeypatch.setattr(module, "_IN_PLACE", {})
    assert max(_alive(_tracked(step))) > measured + 8 * 4 * N - 1024


def test_a_tied_heads_gradient_is_not_added_to_in_place() -> None:
    """It reaches the sum as a view, whose base holds the storage too: a third matrix is made."""
    torch.manual_seed(0)
    words, deep = nn.Embedding(256, 64), nn.Linear(64, 64)
    head = nn.Linear(64, 256, bias=False)
    head.weight = words.weight
    ids = torch.arange(8)

    def step() -> None:
        head(deep(words(ids))).sin().sum().backward()

    step()
    measured = []
    existing = [*words.parameters(), *deep.parameters(), ids]
    for run in (peak_of, lambda program: max(_alive(_tracked(program, *existing)))):
        words.zero_grad()
        deep.zero_grad()
        measured.append(run(step))
    assert measured[1] == pytest.approx(measured[0], abs=SCALARS)
    assert measured[0] > 3 * words.weight.nbytes


def test_values_are_those_of_the_run_without_a_tracker() -> None:
    torch.manual_seed(0)
    model, x = Branches(torch.float32), torch.randn(64, 32)
    model(x).backward()
    expected = model.lift.weight.grad
    assert expected is not None
    model.zero_grad()
    with Tracker() as tracker:
        tracker.calibrate()
        model(x).backward()
    assert model.lift.weight.grad is not None
    torch.testing.assert_close(model.lift.weight.grad, expected)


def test_without_calibration_nothing_is_done_in_place() -> None:
    """A sum that somebody holds must not change under them."""
    with Tracker() as tracker:
        h = torch.ones(N, requires_grad=True) * 2
        (h.sin() * h.cos()).sum().backward()
    assert "add.Tensor" in tracker.record.operations
    assert "add_.Tensor" not in tracker.record.operations


def test_views_share_their_storage_and_deaths_are_seen() -> None:
    x = torch.ones(N)

    def program() -> None:
        doubled = x * 2
        view = doubled[: N // 2].view(2, -1)
        del doubled
        view.exp_()
        del view
        x.clone()

    record = _tracked(program, x)
    assert [storage.size for storage in record.storages] == [4 * N, 4 * N]
    first, second = record.storages
    assert first.died is not None
    assert first.born < first.died < second.born
    assert max(_alive(record)) == 4 * N


def test_what_a_kernel_holds_inside_counts_while_it_runs() -> None:
    wide, narrow = torch.ones(N), torch.ones(N, dtype=torch.bfloat16)
    record = _tracked(lambda: (wide + narrow, wide * 2), wide, narrow)
    assert record.scratch == {1: 4 * N}
    with allocator_events() as events:
        kept = (wide + narrow, wide * 2)
    assert max(_alive(record)) == pytest.approx(events.peak, abs=SCALARS)
    assert len(kept) == 2


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    tracker = Tracker(granularity=512)
    with tracker:
        kept = [torch.ones(3), torch.ones(128), torch.ones(129)]
    assert [storage.size for storage in tracker.record.storages] == [512, 512, 1024]
    assert len(kept) == 3


def test_marks_name_points_and_a_new_record_starts_from_what_is_alive() -> None:
    tracker = Tracker()
    with tracker:
        kept = torch.ones(N)
        tracker.mark("middle")
        torch.zeros(N)
        tracker.mark("middle")  # the first of a name stays
        assert tracker.record.marks == {"middle": 1}
        assert tracker.index_of(kept) == 0
        tracker.forget()
        assert tracker.index_of(kept) is None
        assert tracker.record.storages == []
        del kept
    assert tracker.record.storages == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_hold_what_real_ones_do(dtype: torch.dtype) -> None:
    def curve(model: nn.Module, x: Tensor) -> tuple[list[str], list[int]]:
        tracker = Tracker([*tensors_of(model), x])
        with tracker:
            tracker.calibrate()
            model(x).backward()
        return tracker.record.operations, _alive(tracker.record)

    real = curve(Branches(dtype), torch.randn(128, 32, dtype=dtype))
    with torch.device("meta"):
        model = Branches(dtype)
    with simulation() as mode:
        to_fake(model, mode)
        assert curve(model, torch.empty(128, 32, dtype=dtype)) == real


def test_ties_stay_tied_and_strides_stay_as_they_were() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        model[1].weight = model[0].weight
        model.register_buffer("table", torch.empty(4, 6).t())
    with simulation() as mode:
        to_fake(model, mode)
        assert model[1].weight is model[0].weight
        assert model[0].weight.device.type == "cpu"
        assert model.get_buffer("table").stride() == (1, 6)


def test_a_value_that_is_not_known_is_answered_and_remembered() -> None:
    def asks(x: Tensor) -> float:
        return 2.0 if x.isnan().any() else x.sum().item()

    with simulation() as mode:
        assert asks(torch.empty(3)) == 1.0
        assert asks(torch.empty(3)) == 1.0
        assert len(mode.answers) == 2
        assert all("asks was told" in answer for answer in mode.answers)
        assert torch.tensor(7).item() == 7  # what is known is not made up


@pytest.mark.parametrize(("routing", "rows"), [("balanced", [48, 48, 48, 48]), ("one", [32, 32, 32, 96])])
def test_a_mixtures_tokens_go_where_the_routing_says(routing: Any, rows: list[int]) -> None:
    """Four experts, 96 tokens with two choices each; the fifth place is for tokens of other machines."""
    with simulation(routing) as mode:
        chosen = F.one_hot(torch.empty(96, 2, dtype=torch.int64), 5).permute(2, 1, 0)
        hit = chosen.sum((1, 2)).nonzero()
        found = [len(torch.where(chosen[expert[0]])[1]) for expert in hit]
        assert found == rows
        assert sum(found) == 96 * 2
        assert any("4 of 5 are not zero" in answer for answer in mode.answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_has_the_dtype_and_the_shape_of_the_real_one(dtype: torch.dtype) -> None:
    def step() -> list[tuple[torch.Size, torch.dtype, tuple[int, ...]]]:
        x = torch.ones(12, 16, dtype=dtype, requires_grad=True)
        w = torch.ones(3, 16, 8, dtype=dtype, requires_grad=True)
        ends = torch.tensor([4, 8, 12], dtype=torch.int32)
        out = F.grouped_mm(x, w, offs=ends)
        out.square().sum().backward()
        assert x.grad is not None and w.grad is not None
        return [(t.shape, t.dtype, t.stride()) for t in (out, x.grad, w.grad)]

    with simulation():
        simulated = step()
    assert simulated == step()
