"""State that leaves the device between updates: the same bits, no memory of the process, no files left."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.optim import methods
from tests.optim.methods import NAMED, differing, gradients, make, parameters, run, values
from tests.optim.test_state import through_a_file
from torch import Tensor, nn

from scrimp.base import platform
from scrimp.base.errors import ScrimpError
from scrimp.base.paged import is_paged, paged_zeros, release
from scrimp.optim import AdamW, GaLore, paging
from scrimp.training import optimizer_state, safetensors_stream

MIB = 2**20
WIDE = 2048  # a matrix of 16 MiB, and moments of 32


@pytest.fixture
def pages_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "SMALL", 1)


@pytest.mark.usefixtures("pages_all")
@pytest.mark.parametrize("name", [*NAMED, "GaLore of both sides", "DCTAdamW with feedback"])
def test_paged_state_computes_the_same_bits_and_can_be_saved_and_loaded(name: str, tmp_path: Path) -> None:
    ps, qs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    steps = gradients(ps, 5)
    plain, paged = make(name, ps), make(name, qs)
    paged.page_state(tmp_path)
    run(plain, ps, steps[:4])
    run(paged, qs, steps[:4])
    tensors = [t for state in paged.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert all(is_paged(t) for t in tensors if t.numel())
    assert sum(t.nbytes for t in tensors) == sum(
        paged.plan_of(q).paged_bytes(paged.state[q].get("refreshed", 0)) for q in qs.values()
    )
    rs = parameters(torch.bfloat16)
    for key, r in rs.items():
        r.data.copy_(qs[key])
    loaded = make(name, rs)
    loaded.page_state(tmp_path)
    loaded.load_state_dict(through_a_file(paged.state_dict()))
    run(plain, ps, steps[4:])
    for other, params in ((paged, qs), (loaded, rs)):
        run(other, params, steps[4:])
        assert differing(values(params), values(ps)) == []
        assert differing(methods.state(other, params), methods.state(plain, ps)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("pages_all")
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", ["AdamW", "GaLore", "Fira"])
def test_updates_inside_the_backward_pass_page_too(name: str, micro_batches: int, tmp_path: Path) -> None:
    ps, qs = parameters(), parameters()
    plain, paged = make(name, ps), make(name, qs)
    paged.page_state(tmp_path)
    for optimizer in (plain, paged):
        optimizer.fuse_backward(micro_batches=micro_batches)
    for step in gradients(ps, 4):
        for params, optimizer in ((ps, plain), (qs, paged)):
            for _ in range(micro_batches):
                methods.loss(params, step).backward()
            optimizer.step()
    assert differing(values(qs), values(ps)) == []


def test_state_that_was_there_leaves_and_a_copy_has_its_own(tmp_path: Path) -> None:
    model = nn.Linear(256, 256)
    optimizer = AdamW(model)
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    before = {name: t.clone() for name, t in optimizer.state[model.weight].items() if isinstance(t, Tensor)}
    optimizer.page_state(tmp_path)
    held = optimizer.state[model.weight]
    assert all(is_paged(held[name]) and torch.equal(held[name], t) for name, t in before.items())
    assert not is_paged(optimizer.state[model.bias]["exp_avg"])  # too small
    copied = copy.deepcopy(optimizer)
    assert copied.pager is None
    states = [t for state in copied.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert len(states) == 4 and not any(map(is_paged, states))


def test_between_steps_the_process_does_not_hold_it(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(4)))
    optimizer = AdamW(model)
    optimizer.page_state(tmp_path)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = platform.resident_bytes()
    peak = before
    for p in model.parameters():
        optimizer.update(p, p.grad, optimizer.param_groups[0])  # type: ignore[arg-type]
        peak = max(peak, platform.resident_bytes())
    assert sum(optimizer.plan_of(p).paged_bytes() for p in model.parameters()) == 128 * MIB
    assert peak - before < 16 * MIB
    # A save and a load hold one tensor at a time.
    named = list(model.named_parameters())
    file = tmp_path / "optimizer.safetensors"
    if platform.reset_peak_resident():
        safetensors_stream.write_tensors(file, optimizer_state.optimizer_tensors(optimizer, named))
        optimizer_state.load_optimizer(
            file, optimizer, named, optimizer_state.optimizer_numbers(optimizer, named)
        )
        assert platform.peak_resident_bytes() - before < 48 * MIB
    first = optimizer.state[model[0].weight]["exp_avg"]
    assert is_paged(first) and torch.equal(first, torch.full_like(first, 0.1))
    optimizer.state.clear()
    del first
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()


def test_what_is_released_stays(tmp_path: Path) -> None:
    tensor = paged_zeros((300, 100), torch.bfloat16, tmp_path / "new")
    assert not tensor.any() and list((tmp_path / "new").iterdir()) == []
    tensor.copy_(torch.arange(30_000).view(300, 100))
    kept = tensor.clone()
    release(tensor)
    assert torch.equal(tensor, kept)
    release(kept)  # of no file: nothing happens
    assert torch.equal(tensor, kept)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    model = nn.Linear(256, 256)
    optimizer = GaLore(model, rank=64)
    optimizer.page_state(tmp_path / "taken")
    model(torch.randn(2, 256)).sum().backward()
    with pytest.raises(ScrimpError, match=r"no file of 64 KiB can be made in .*taken to page state to"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW", "GaLore", "Frugal", "AdamW8bit"])
def test_beside_a_gpu_state_lies_on_the_host_and_bits_are_the_same(name: str, tmp_path: Path) -> None:
    def on_gpu() -> methods.Parameters:
        return {key: nn.Parameter(p.detach().cuda()) for key, p in parameters().items()}

    ps, qs = on_gpu(), on_gpu()
    plain, paged = make(name, ps), make(name, qs)
    paged.page_state(tmp_path)
    for step in gradients(parameters(), 5):
        there = {key: g.cuda() for key, g in step.items()}
        run(plain, ps, [there])
        run(paged, qs, [there])
    assert differing(values(qs), values(ps)) == []
    states = [t for state in paged.state_dict()["state"].values() for t in state.values()]
    large = [t for t in states if isinstance(t, Tensor) and t.nbytes >= paging.SMALL]
    assert large and all(t.is_pinned() for t in large)
