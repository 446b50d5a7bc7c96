"""NF4 weights: frozen codes in memory, a linear layer to everyone else, plain again when asked."""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import QuantizedParameter
from scrimp.weights import coded, nf4_weight
from scrimp.weights.int8 import int8
from scrimp.weights.nf4 import NF4Linear, nf4
from scrimp.weights.nf4_code import LEVELS, NF4Code, dynamic_map
from scrimp.weights.nf4_weight import NF4Weight

AWKWARD = [(24, 40), (7, 9), (3, 64), (1, 1), (300, 200)]  # (7, 9): an odd number of elements
IN, OUT = 40, 24
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even in small matrices, which begin within groups, and the last one shorter."""
    for module in (coded, nf4_weight):
        monkeypatch.setattr(module, "BLOCK", 7 * IN)


def matrix(shape: tuple[int, int] = (OUT, IN), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype) * 0.02


def linears(dtype: torch.dtype = torch.float32) -> tuple[NF4Linear, nn.Linear]:
    """Return a coded layer, and a frozen plain one of the same values."""
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT, dtype=dtype)
    coded: Any = nn.Parameter(NF4Weight.of(dense.weight.detach(), NF4Code(dtype=dtype)), requires_grad=False)
    layer = NF4Linear(coded, dense.bias)
    return layer, copy.deepcopy(layer).plain()


def gradients(layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of x and bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = (y.detach(), x.grad, layer.bias.grad)
    assert all(isinstance(each, Tensor) for each in found)
    return found  # type: ignore[return-value]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    made: LlamaForCausalLM = model.to(dtype)
    return made


# ---- the code ---------------------------------------------------------------------------------------


def test_the_levels_are_quantiles_of_a_normal_distribution() -> None:
    """Eight from 0.9677083 down to the middle, seven below it, and 0, over the largest."""
    inverse, start = NormalDist().inv_cdf, 0.9677083
    above = [inverse(start + (0.5 - start) * i / 8) for i in range(8)]
    below = [-inverse(start + (0.5 - start) * i / 7) for i in range(7)]
    wanted = sorted([*above, *below, 0.0])
    assert pytest.approx([value / wanted[-1] for value in wanted], abs=3e-7) == LEVELS


def test_the_dynamic_map_has_one_zero_and_one_one() -> None:
    table = dynamic_map(torch.device("cpu"))
    assert table.shape == (256,) and bool((table.diff() > 0).all())
    assert table[127] == 0 and table[255] == 1 and table[0] == pytest.approx(-0.992968738)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", AWKWARD)
def test_every_element_comes_back_within_half_the_widest_gap(shape: tuple[int, int], double: bool) -> None:
    weight = matrix(shape)
    found = NF4Weight.of(weight, NF4Code(double=double, dtype=torch.float32)).dequantize()
    flat, error = weight.flatten(), (found - weight).abs().flatten()
    for first in range(0, flat.numel(), 64):
        absmax = flat[first : first + 64].abs().max()
        slack = 0.05 * flat.abs().max() if double else 1e-7  # of the second level
        assert (error[first : first + 64] <= absmax * 0.152 + slack).all()


def test_coding_what_was_decoded_changes_nothing() -> None:
    """The largest of a group is a level itself, or next to one; without the second level it is exact."""
    code = NF4Code(double=False, dtype=torch.float32)
    once = NF4Weight.of(matrix(), code).dequantize()
    assert torch.equal(NF4Weight.of(once, code).dequantize(), once)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", AWKWARD)
def test_bytes_are_those_of_the_formula(shape: tuple[int, int], double: bool) -> None:
    code = NF4Code(double=double)
    parts = NF4Weight.of(matrix(shape), code).parts
    assert code.nbytes(shape[0] * shape[1]) == sum(part.nbytes for part in parts.values())


def test_a_llama_takes_4_13_bits_a_weight() -> None:
    numel = 11008 * 4096
    assert 4.126 < 8 * NF4Code().nbytes(numel) / numel < 4.13
    assert 8 * NF4Code(double=False).nbytes(numel) / numel == 4.5


@pytest.mark.parametrize("shape", AWKWARD)
def test_rows_are_the_rows_of_the_whole(shape: tuple[int, int]) -> None:
    weight = NF4Weight.of(matrix(shape), NF4Code(dtype=torch.float32))
    whole = weight.dequantize()
    for first in range(shape[0]):
        for last in (first + 1, shape[0]):
            assert torch.equal(weight.dequantize_rows(first, last), whole[first:last])


def test_groups_of_zeros_decode_to_zeros() -> None:
    weight = matrix()
    weight.view(-1)[64:128] = 0
    found = NF4Weight.of(weight, NF4Code(dtype=torch.float32)).dequantize()
    assert (found.view(-1)[64:128] == 0).all() and (
        NF4Weight.of(weight * 0, NF4Code()).dequantize() == 0
    ).all()


# ---- the weight -------------------------------------------------------------------------------------


def test_it_is_a_frozen_parameter_that_can_be_read() -> None:
    layer, dense = linears()
    assert isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, QuantizedParameter)
    assert not layer.weight.requires_grad
    assert (layer.weight.shape, layer.weight.dtype) == (dense.weight.shape, dense.weight.dtype)
    with pytest.raises(ScrimpError, match="frozen"):
        layer.weight.requantize_rows_(0, 1, torch.zeros(1, IN), torch.tensor(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_computes_and_derives_as_the_decoded_one(dtype: torch.dtype) -> None:
    layer, dense = linears(dtype)
    # Sums over blocks are rounded in another order; of bf16, dx is rounded once a block instead of once.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for found, wanted in zip(gradients(layer, inputs(dtype)), gradients(dense, inputs(dtype)), strict=True):
        assert type(found) is Tensor and found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_an_evaluation_changes_nothing_of_what_follows() -> None:
    layer, _ = linears()
    before = gradients(layer, inputs())
    layer.eval()
    with torch.no_grad():
        seen = layer(inputs())
    with torch.inference_mode():
        assert torch.equal(layer(inputs()), seen)
    after = gradients(layer.train(), inputs())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_autocast_decides_the_dtype_of_the_product_and_not_of_the_gradient() -> None:
    layer, dense = linears()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (gradients(each, inputs()) for each in (layer, dense))
    assert [each.dtype for each in found] == [torch.bfloat16, *[torch.float32] * 2]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_bits(reentrant: bool) -> None:
    layer, _ = linears()
    again = copy.deepcopy(layer)
    forward = again.forward
    vars(again)["forward"] = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    for pair in zip(gradients(layer, inputs()), gradients(again, inputs()), strict=True):
        assert torch.equal(*pair)


def test_autograd_keeps_the_codes_and_no_input() -> None:
    layer, _ = linears()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(inputs().requires_grad_())
    assert [type(each) for each in kept] == [NF4Weight]


def test_it_cannot_be_trained_or_written_to() -> None:
    layer, _ = linears()
    with pytest.raises(ScrimpError, match="frozen: tune an adapter"):
        copy.deepcopy(layer).requires_grad_(True)(inputs())
    with pytest.raises(ScrimpError, match="frozen"):
        layer.weight.add_(1)
    with pytest.raises(ScrimpError, match="would be lost"):
        layer.weight[0]


def test_it_can_be_filled_copied_moved_and_read() -> None:
    layer, dense = linears()
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter) and twin.weight.codes is not layer.weight.codes
    with torch.no_grad():
        nn.init.normal_(twin.weight, 3.0, 0.5)
        value = twin.weight.dequantize()
        assert abs(value.mean() - 3) < 0.1 and abs(value.std() - 0.5) < 0.1
        twin.weight.copy_(layer.weight)
    assert torch.equal(twin.weight.codes, layer.weight.codes)
    twin.to(torch.bfloat16)
    assert twin.weight.dtype == torch.bfloat16 and twin.weight.absmax.dtype == torch.uint8
    assert torch.equal(twin.weight.dequantize(), dense.weight.bfloat16())
    assert torch.equal(layer.weight + 0, dense.weight)
    assert torch.zeros_like(layer.weight).dtype == torch.float32


def test_fake_tensors_carry_it_and_leave_nothing_behind() -> None:
    with FakeTensorMode():
        weight: Any = NF4Weight.empty((OUT, IN), NF4Code(), device="cpu")
        x = torch.zeros(2, IN, dtype=torch.bfloat16, requires_grad=True)
        F.linear(x, weight).sum().backward()
        assert x.grad is not None and x.grad.shape == (2, IN)
        F.linear(x, NF4Weight.of(torch.zeros(OUT, IN), NF4Code())).sum().backward()
    assert torch.isfinite(linears()[0](inputs())).all()


@pytest.mark.parametrize("weights", [nf4(), int8()])
def test_an_adapter_may_add_to_the_output_in_place(weights: Any) -> None:
    model = llama()
    weights.apply(model)
    x = torch.randn(2, 3, model.model.layers[0].mlp.up_proj.in_features, requires_grad=True)
    y = model.model.layers[0].mlp.up_proj(x)
    y += 1
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


# ---- the model --------------------------------------------------------------------------------------


def test_the_decoders_matrices_are_coded_as_int8_codes_them() -> None:
    model, other = llama(), llama()
    weights = nf4()
    weights.apply(model)
    int8().apply(other)
    found = {name for name, p in model.named_parameters() if isinstance(p, NF4Weight)}
    assert found == {name for name, p in other.named_parameters() if isinstance(p, QuantizedParameter)}
    assert len(found) == 14 and type(model.lm_head) is nn.Linear


def test_materialize_makes_a_plain_model_of_the_same_function() -> None:
    model = llama()
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights, ids = nf4(), torch.arange(12)[None]
    weights.apply(model)
    found = model(ids).logits
    weights.materialize(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
    torch.testing.assert_close(model(ids).logits, found, rtol=1e-5, atol=1e-5)


def test_tied_matrices_stay_tied() -> None:
    model = llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    nf4().apply(model)
    assert first.up_proj.weight is second.up_proj.weight and isinstance(first.up_proj.weight, NF4Weight)


def test_a_model_on_meta_is_coded_and_drawn() -> None:
    with torch.device("meta"):
        model = llama(torch.bfloat16)
    nf4().apply(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.initialize_weights()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert isinstance(weight, NF4Weight)
    assert abs(float(weight.dequantize().float().std()) / 0.02 - 1) < 0.15
    assert model(torch.arange(12)[None]).logits.isfinite().all()


@pytest.mark.parametrize("double", [True, False])
def test_codes_go_through_safetensors_under_plain_names(double: bool, tmp_path: Path) -> None:
    first, second = llama(), llama()
    weights = nf4(double=double)
    weights.apply(first)
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    weights.apply(second)
    state = first.state_dict()
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    save_file(state, tmp_path / "model.safetensors")
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in state.items())
    with pytest.raises(RuntimeError, match="with other options than"):
        other = llama()
        nf4(128, double=double).apply(other)
        other.load_state_dict(state)


def test_a_full_precision_state_dict_is_coded_as_it_is_loaded() -> None:
    dense, other = llama(), llama()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    nf4().apply(other)
    other.load_state_dict(dense.state_dict())
    nf4().apply(dense)
    wanted = dense.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(ScrimpError, match=r"model\.layers\.1\.mlp\.up_proj holds values that are not finite"):
        nf4().apply(model)


@pytest.mark.parametrize("group", [0, 48, 16, 8192, 64.0, True])
def test_a_group_that_is_none_is_refused(group: Any) -> None:
    with pytest.raises(ScrimpError, match="group must be a power of two"):
        nf4(group)


def test_a_model_without_matrices_or_of_another_dtype_is_refused() -> None:
    with pytest.raises(ScrimpError, match="no linear layer; use weights dense"):
        nf4().apply(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ScrimpError, match=r"torch\.float64"):
        nf4().apply(llama(torch.float64))


# ---- adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [nf4(), nf4(double=False), int8(group=16)], ids=["nf4", "nf4-plain", "int8"]
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_of_peft_trains_on_codes_as_on_the_decoded_model(weights: Any, dora: bool) -> None:
    from peft import LoraConfig, LoraModel

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    ids = torch.arange(12)[None]

    def adapted(is_plain: bool) -> Any:
        model = llama()
        weights.apply(model)
        if is_plain:
            weights.materialize(model)
        torch.manual_seed(1)
        made: Any = LoraModel(model, config, "default")
        made(input_ids=ids, labels=ids).loss.backward()
        return made

    coded, plain = adapted(False), adapted(True)
    found, wanted = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for model in (coded, plain)
    )
    assert found.keys() == wanted.keys() and all("lora" in name for name in found) and len(found) >= 28
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        before = coded(input_ids=ids).logits
        weights.materialize(coded)
        merged = coded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert all(type(p) is nn.Parameter for p in merged.parameters())
