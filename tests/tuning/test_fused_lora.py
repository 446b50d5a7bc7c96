"""LoRA by one product is peft's LoRA: outputs, gradients, merges, and whatever is not plain is peft's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tuning.two_linear import IN, OUT, TOKENS, Two, assert_same, outcome
from torch import Tensor, nn

from scrimp.memory.allocator import allocator_events
from scrimp.tuning.from_peft.fused_lora import FusedLinear, fuse


def both(dtype: torch.dtype = torch.float64, *, mixed: bool = False, **settings: Any) -> tuple[Any, Any]:
    """Return one adapter away from its start twice: fused, and as peft computes it."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **settings})
    theirs: Any = get_peft_model(Two().to(dtype), config, autocast_adapter_dtype=mixed)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    ours = copy.deepcopy(theirs)
    fuse(ours)
    return ours, theirs


@pytest.mark.parametrize("shape", [(TOKENS,), (2, TOKENS), (2, 3, TOKENS)], ids=len)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}], ids=str)
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    ours, theirs = both(**settings)
    assert sum(type(module) is FusedLinear for module in ours.modules()) == 2
    x = torch.randn(*shape, IN, dtype=torch.float64)
    assert_same(outcome(ours, x), outcome(theirs, x), 1e-13)
    assert_same(outcome(ours.eval(), x), outcome(theirs.eval(), x), 1e-13)


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "bf16 base, fp32 adapter"])
def test_low_precision_rounds_no_more_than_pefts(mixed: bool) -> None:
    ours, theirs = both(torch.bfloat16, mixed=mixed)
    x = torch.randn(3, TOKENS, IN, dtype=torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    truth, found, peers = (outcome(model, x.to(kind)) for model, kind in _kinds(exact, ours, theirs))
    for name, value in truth.items():
        mine, other = ((side[name].double() - value).norm() / value.norm() for side in (found, peers))
        assert found[name].dtype == peers[name].dtype
        assert mine < 1.2 * other + 1e-3, name


def _kinds(exact: Any, ours: Any, theirs: Any) -> list[tuple[Any, torch.dtype]]:
    return [(exact, torch.float64), (ours, torch.bfloat16), (theirs, torch.bfloat16)]


def test_autocast_gives_what_it_gives_peft() -> None:
    ours, theirs = both(torch.float32)

    def run(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        return y

    x = torch.randn(3, TOKENS, IN)
    assert_same(outcome(ours, x, run), outcome(theirs, x, run), 2e-2)


def test_a_disabled_adapter_and_a_second_one_are_pefts() -> None:
    ours, theirs = both()
    x = torch.randn(2, TOKENS, IN, dtype=torch.float64)
    adapted = theirs(x)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
        assert not torch.allclose(ours(x), adapted)
    for model in (ours, theirs):
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(r=3, target_modules=["first"], init_lora_weights=False))
        model.double().base_model.set_adapter(["default", "other"])
    assert not torch.allclose(theirs(x), adapted)
    torch.testing.assert_close(ours(x), theirs(x))


def test_merging_is_pefts() -> None:
    ours, _ = both()
    x = torch.randn(2, TOKENS, IN, dtype=torch.float64)
    adapted = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), adapted)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), adapted)
    plain = ours.merge_and_unload()
    assert type(plain.first) is nn.Linear
    torch.testing.assert_close(plain(x), adapted)


def test_a_variant_of_pefts_stays_as_it_is() -> None:
    ours, _ = both(use_dora=True)
    assert not any(type(module) is FusedLinear for module in ours.modules())


def test_no_second_tensor_of_the_outputs_size_is_made() -> None:
    peaks = []
    for model in both(torch.float32, target_modules=["first"]):
        x = torch.randn(4096, IN)
        with torch.no_grad(), allocator_events() as events:
            model.base_model.model.first(x)
        peaks.append(events.peak / (4 * 4096 * OUT))
    assert peaks[0] < 2.2 and peaks[1] > 2.9  # h and y; peft: h, the change, what it is scaled to
