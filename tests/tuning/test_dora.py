"""DoRA by factors is peft's DoRA: outputs, gradients, files and merges, without its rounding in bf16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tuning.two_linear import IN, OUT, TOKENS, Two, assert_same, outcome
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from scrimp.tuning.from_peft.dora import FactoredMagnitude, factor_norms, norms_of
from scrimp.weights.affine8 import Affine8
from scrimp.weights.int8_weight import Int8Weight

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def _trained(model: nn.Module, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Return peft's model with an adapter away from its start, and the base in `dtype`."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "use_dora": True, **settings})
    wrapped: Any = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=dtype == torch.bfloat16)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
            if "magnitude" in name:
                p.mul_(1 + 0.1 * torch.randn_like(p))
    return wrapped


def _both(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
    """Return the same trained adapter twice: by factors, and as peft computes it."""
    theirs = _trained(Two(), dtype, **{"target_modules": ["first", "second"], **settings})
    ours = copy.deepcopy(theirs)
    _factor(ours)
    return ours, theirs


def _factor(model: nn.Module, layers: int = 2) -> None:
    factor_norms(model)
    assert sum(isinstance(module, FactoredMagnitude) for module in model.modules()) == layers


def _x(dtype: torch.dtype = torch.float64, *lead: int) -> Tensor:
    return torch.randn(*(lead or (TOKENS,)), IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"bias": "all"}, {"use_rslora": True}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_outputs_and_gradients_are_pefts(
    dtype: torch.dtype, tolerance: float, settings: dict[str, Any]
) -> None:
    ours, theirs = _both(dtype, **settings)
    x = _x(dtype, 2, TOKENS)
    mine = outcome(ours.train(), x)
    assert any("magnitude" in name for name in mine)
    assert_same(mine, outcome(theirs.train(), x), tolerance)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), rtol=tolerance, atol=tolerance)


def test_several_active_adapters_add_up_as_in_peft() -> None:
    theirs = _trained(Two(), target_modules=["first", "second"])
    theirs.add_adapter(
        "more", LoraConfig(r=2, target_modules=["first"], use_dora=True, init_lora_weights=False)
    )
    theirs.add_adapter("plain", LoraConfig(r=2, target_modules=["second"], init_lora_weights=False))
    theirs.base_model.set_adapter(["default", "more", "plain"])
    theirs.double()
    ours = copy.deepcopy(theirs)
    _factor(ours, 3)
    assert_same(outcome(ours, _x()), outcome(theirs, _x()), 1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(reentrant: bool) -> None:
    ours, theirs = _both()

    def again(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return y

    assert_same(outcome(ours, _x(), again), outcome(theirs, _x()), 1e-13)


def test_norms_are_those_of_the_dense_matrix() -> None:
    w, a, b = (torch.randn(s, dtype=torch.float64) for s in ((300, 200), (64, 200), (300, 64)))
    squares = w.square().sum(1)
    dense = torch.linalg.vector_norm(w + 2 * b @ a, dim=1)
    assert torch.allclose(norms_of(squares, w @ a.T, a, b, 2.0), dense, rtol=1e-13, atol=0)
    low = [t.bfloat16().float() for t in (w, a, b)]
    exact = torch.linalg.vector_norm(low[0].double() + 2 * low[2].double() @ low[1].double(), dim=1)
    single = norms_of(low[0].square().sum(1), low[0] @ low[1].T, low[1].bfloat16(), low[2].bfloat16(), 2.0)
    assert ((single - exact) / exact).abs().max() < 1e-6


def test_a_fresh_adapter_changes_nothing_in_bf16() -> None:
    plain = Two().bfloat16()
    x = _x(torch.bfloat16)
    expected = plain(x)
    config = LoraConfig(r=4, target_modules=["first", "second"], use_dora=True)
    model: Any = get_peft_model(plain, config)
    assert not torch.equal(model(x), expected)  # peft's magnitudes are rounded to bf16
    _factor(model)
    assert torch.equal(model(x), expected)


def test_bf16_loses_no_more_than_the_output_is_rounded_to() -> None:
    ours, theirs = _both(torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    x = _x(torch.bfloat16)
    layer, reference = ours.base_model.model.first, exact.base_model.model.first
    with torch.no_grad():
        added = layer(x).double() - reference(x.double())
    assert added.abs().max() / reference(x.double()).abs().max() < 2**-7
    mine, truth = outcome(ours, x), outcome(exact, x.double())
    for name, value in truth.items():
        assert (mine[name].double() - value).norm() / value.norm() < 0.02, name


def test_autocast_computes_in_its_dtype_and_leaves_fp32_gradients() -> None:
    ours, theirs = _both(torch.float32)

    def mixed(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        return y

    mine = outcome(ours, _x(torch.float32), mixed)
    assert mine["output"].dtype == torch.bfloat16
    assert_same(mine, outcome(theirs, _x(torch.float32), mixed), 0.03)


def test_what_is_saved_and_merged_is_plain_pefts(tmp_path: Path) -> None:
    ours, _ = _both(torch.float32)
    ours.eval()
    expected = ours(_x(torch.float32))
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded: Any = PeftModel.from_pretrained(Two(), tmp_path).eval()
    loaded.base_model.model.load_state_dict(  # the weights of the base, which no adapter's file holds
        {k: v for k, v in ours.base_model.model.state_dict().items() if "base_layer" in k}, strict=False
    )
    assert not any("squares" in name for name in ours.state_dict())
    assert torch.allclose(loaded(_x(torch.float32)), expected, rtol=0, atol=1e-6)
    ours.merge_adapter()
    assert torch.allclose(ours(_x(torch.float32)), expected, rtol=0, atol=1e-6)
    ours.unmerge_adapter()
    assert torch.allclose(ours(_x(torch.float32)), expected, rtol=0, atol=1e-6)
    merged = ours.merge_and_unload()
    assert type(merged.first) is nn.Linear
    assert torch.allclose(merged(_x(torch.float32)), expected, rtol=0, atol=1e-6)


def test_norms_follow_a_changed_base_weight() -> None:
    ours, theirs = _both()
    ours(_x())
    for change in (_scale, _replace):
        for model in (ours, theirs):
            change(model.base_model.model.first.base_layer)
        assert torch.allclose(ours(_x()), theirs(_x()), rtol=1e-13, atol=1e-13)


@torch.no_grad()
def _scale(layer: nn.Linear) -> None:
    layer.weight.mul_(1.5)


def _replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() + 0.1, requires_grad=False)


def test_transposed_weights_are_read_as_pefts() -> None:
    theirs = _trained(
        nn.Sequential(Conv1D(OUT, IN), Conv1D(IN, OUT)), target_modules=["0", "1"], fan_in_fan_out=True
    )
    ours = copy.deepcopy(theirs)
    _factor(ours)
    assert_same(outcome(ours, _x()), outcome(theirs, _x()), 1e-13)


def test_a_quantised_base_weight_is_read_as_what_it_decodes_to() -> None:
    ours, theirs = _both(torch.float32)
    for model, decodes in ((ours, False), (theirs, True)):
        for layer in (model.base_model.model.first, model.base_model.model.second):
            coded = Int8Weight.of(layer.base_layer.weight.detach(), Affine8(group=8, dtype=torch.float32))
            layer.base_layer.weight = nn.Parameter(
                coded.dequantize() if decodes else coded, requires_grad=False
            )
    x = _x(torch.float32)
    assert_same(outcome(ours, x), outcome(theirs, x), 2e-6)


def test_frozen_parts_get_no_gradient_and_the_rest_stays_right() -> None:
    for frozen in ("lora_A", "lora_B", "magnitude"):
        ours, theirs = _both()
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                p.requires_grad_("lora" in name and frozen not in name)
        assert_same(outcome(ours, _x()), outcome(theirs, _x()), 1e-13)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_a_compiled_layer_is_one_graph() -> None:
    ours, _ = _both(torch.float32)
    eager = outcome(ours, _x(torch.float32))
    for p in ours.parameters():
        p.grad = None
    compiled = torch.compile(ours.base_model.model, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(outcome(ours, _x(torch.float32), lambda _, x: compiled(x)), eager, 1e-6)


def test_an_output_may_be_changed_in_place() -> None:
    class InPlace(Two):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).mul_(2).tanh())
            return y

    theirs = _trained(InPlace(), target_modules=["first", "second"])
    ours = copy.deepcopy(theirs)
    _factor(ours)
    assert_same(outcome(ours, _x()), outcome(theirs, _x()), 1e-13)


def test_embeddings_stay_pefts_and_a_llama_trains() -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, use_cache=False)  # fmt: skip
    torch.manual_seed(0)
    theirs = _trained(
        LlamaForCausalLM(config), torch.float64, target_modules=["embed_tokens", "q_proj", "down_proj"]
    )
    ours = copy.deepcopy(theirs)
    _factor(ours, 4)
    ids = torch.randint(0, 64, (2, 9))
    losses = [model(input_ids=ids, labels=ids).loss for model in (ours, theirs)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-12)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-14), name
