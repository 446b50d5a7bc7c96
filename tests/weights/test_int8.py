"""Int8 weights: to everyone else a parameter, in memory codes, and a plain model again when asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import QuantizedParameter
from scrimp.weights import coded as coded_module
from scrimp.weights.affine8 import Affine8
from scrimp.weights.int8 import Int8Linear, int8
from scrimp.weights.int8_weight import PARTS, Int8Weight

IN, OUT, GROUP = 40, 24, 16
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even in small matrices, the last one shorter."""
    monkeypatch.setattr(coded_module, "BLOCK", 7 * IN)


def linears(dtype: torch.dtype = torch.float32) -> tuple[Int8Linear, nn.Linear]:
    """Return an int8 layer, and a plain one of the same values."""
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT, dtype=dtype)
    coded = Int8Weight.of(dense.weight.detach(), Affine8(group=GROUP, dtype=dtype))
    layer = Int8Linear(as_parameter(coded), dense.bias)
    dense.weight = nn.Parameter(coded.dequantize())
    return layer, copy.deepcopy(dense)


def as_parameter(weight: Any) -> Any:
    return nn.Parameter(weight)


def gradients(layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = (y.detach(), x.grad, layer.weight.grad, layer.bias.grad)
    assert all(isinstance(each, Tensor) for each in found)
    layer.zero_grad()
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


# ---- the weight -------------------------------------------------------------------------------------


def test_it_is_a_leaf_parameter_and_a_quantized_one() -> None:
    layer, dense = linears()
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.weight, QuantizedParameter)
    assert not isinstance(dense.weight, QuantizedParameter)
    assert layer.weight.is_leaf and layer.weight.requires_grad
    assert (layer.weight.shape, layer.weight.dtype) == (dense.weight.shape, dense.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_computes_and_derives_as_the_decoded_one(dtype: torch.dtype) -> None:
    layer, dense = linears(dtype)
    # Sums over blocks are rounded in another order; of bf16, dx is rounded once a block instead of once.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for found, wanted in zip(gradients(layer, inputs(dtype)), gradients(dense, inputs(dtype)), strict=True):
        assert type(found) is Tensor and found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_autocast_decides_the_dtype_of_the_product_and_not_of_the_gradient() -> None:
    layer, dense = linears()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (gradients(each, inputs()) for each in (layer, dense))
    assert [each.dtype for each in found] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=2**-6)


def test_recomputation_gives_the_same_bits() -> None:
    layer, _ = linears()
    again = copy.deepcopy(layer)
    once = gradients(layer, inputs())
    forward = again.forward
    vars(again)["forward"] = lambda x: checkpoint(forward, x, use_reentrant=False)
    twice = gradients(again, inputs())
    assert all(torch.equal(*pair) for pair in zip(once, twice, strict=True))


def test_a_hook_sees_a_whole_gradient_and_may_drop_it() -> None:
    layer, _ = linears()
    seen = []

    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        seen.append((weight is layer.weight, tuple(weight.grad.shape), weight.grad.dtype))
        weight.grad = None

    layer.weight.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    layer(inputs()).sum().backward()
    assert seen == [(True, (OUT, IN), torch.float32)]
    assert layer.weight.grad is None


class _Largest(TorchDispatchMode):
    """Notes every tensor that an operation returns with as many elements as the matrix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(type(leaf) is Tensor and leaf.numel() >= OUT * IN for leaf in tensors):
            self.whole.append(func.__name__)
        return out


def test_no_more_than_a_block_is_ever_decoded_and_nothing_decoded_is_kept() -> None:
    layer, _ = linears()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, IN, requires_grad=True)  # two tokens, so that all but the matrix is small
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with _Largest() as forward:
            y = layer(x).sum()
        with _Largest() as backward:
            y.backward()
    assert forward.whole == []
    assert {name.partition(".")[0] for name in backward.whole} <= {"mm", "detach"}  # dW and its name `.grad`
    assert {type(each) for each in kept if each.shape == (OUT, IN)} == {Int8Weight}


def test_rows_are_renewed_in_place_and_others_left_alone() -> None:
    layer, _ = linears()
    weight, before = layer.weight, layer.weight.detach().dequantize()
    address, noise = weight.codes.data_ptr(), torch.tensor(3)
    weight.requantize_rows_(5, 9, weight.dequantize_rows(5, 9) + 1, noise)
    after = weight.detach().dequantize()
    assert weight.codes.data_ptr() == address
    assert torch.equal(after[:5], before[:5]) and torch.equal(after[9:], before[9:])
    step = float(weight.scale[5:9].max())
    assert (after[5:9] - before[5:9] - 1).abs().max() <= step


def test_a_matrix_renewed_in_blocks_is_the_matrix_renewed_at_once() -> None:
    first, second = (linears()[0].weight for _ in range(2))
    value, noise = first.detach().dequantize() + 0.01, torch.tensor(4)
    first.requantize_rows_(0, OUT, value, noise)
    for rows in coded_module.blocks(OUT, IN):
        second.requantize_rows_(rows.start, rows.stop, value[rows], noise)
    assert all(torch.equal(getattr(first, part), getattr(second, part)) for part in PARTS)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_what_would_be_lost_in_rounding_is_refused(optimizer: Any) -> None:
    layer, _ = linears()
    before = layer.weight.detach().dequantize()
    layer(inputs()).sum().backward()
    with pytest.raises(ScrimpError, match=r"in place.*optimizer of scrimp\.optim"):
        optimizer(layer.parameters(), lr=0.1).step()
    assert torch.equal(layer.weight.detach().dequantize(), before)


def test_a_view_that_would_not_write_through_is_refused() -> None:
    layer, _ = linears()
    views: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda w: w.mT,
        lambda w: w.detach().view(-1),
        lambda w: w[0],
    )
    for view in views:
        with torch.no_grad(), pytest.raises(ScrimpError, match="would be lost"):
            view(layer.weight)
    with pytest.raises(RuntimeError, match="in-place"):  # torch's own refusal, with gradients
        layer.weight.t().zero_()


def test_it_can_be_filled_copied_moved_and_read() -> None:
    layer, dense = linears()
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter) and twin.weight.codes is not layer.weight.codes
    with torch.no_grad():
        nn.init.normal_(twin.weight, 3.0, 0.5)
        value = twin.weight.dequantize()
        assert abs(value.mean() - 3) < 0.1 and abs(value.std() - 0.5) < 0.05
        twin.weight.copy_(dense.weight)
    assert torch.equal(twin.weight.codes, layer.weight.codes)
    twin.to(torch.bfloat16)
    assert twin.weight.scale.dtype == twin.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.t() @ torch.eye(OUT), dense.weight.t())
    assert torch.zeros_like(layer.weight).dtype == torch.float32


def test_fake_tensors_carry_it() -> None:
    with FakeTensorMode():
        weight = Int8Weight.empty((OUT, IN), Affine8(group=GROUP), device="cpu")
        layer = Int8Linear(as_parameter(weight), None)
        layer(torch.zeros(2, IN, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is not None
        assert (layer.weight.grad.shape, layer.weight.grad.dtype) == ((OUT, IN), torch.bfloat16)


# ---- the model --------------------------------------------------------------------------------------


def coded(model: nn.Module) -> Iterator[tuple[str, Int8Linear]]:
    return ((name, each) for name, each in model.named_modules() if isinstance(each, Int8Linear))


def test_the_decoders_matrices_are_coded_and_nothing_else() -> None:
    model = llama()
    int8(group=GROUP).apply(model)
    names = [name for name, _ in coded(model)]
    assert len(names) == 2 * len(SEVEN)
    assert {name.rpartition(".")[2] for name in names} == SEVEN
    assert type(model.lm_head) is nn.Linear
    assert {name for name, p in model.named_parameters() if isinstance(p, Int8Weight)} == {
        f"{name}.weight" for name in names
    }


def test_materialize_makes_a_plain_model_of_the_same_function() -> None:
    model = llama()
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights, ids = int8(group=GROUP), torch.arange(12)[None]
    weights.apply(model)
    found = model(ids).logits
    weights.materialize(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert not list(coded(model))
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ids).logits, found, rtol=1e-5, atol=1e-5)


def test_only_named_targets_are_coded() -> None:
    model = llama()
    int8(targets=("up_proj",)).apply(model)
    assert {name.rpartition(".")[2] for name, _ in coded(model)} == {"up_proj"}


def test_tied_matrices_stay_tied() -> None:
    model = llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    int8().apply(model)
    assert first.up_proj.weight is second.up_proj.weight
    assert isinstance(first.up_proj.weight, Int8Weight)


def test_a_model_on_meta_is_coded_and_drawn_without_another_precision() -> None:
    with torch.device("meta"):
        model = llama(torch.bfloat16)
    int8(group=GROUP).apply(model)
    model.to_empty(device="cpu")
    with torch.no_grad(), _Largest() as watched:
        model.initialize_weights()
    assert set(watched.whole) <= {"normal_.default"}  # the embedding and the head
    for _, linear in coded(model):
        assert abs(float(linear.weight.detach().dequantize().float().std()) / 0.02 - 1) < 0.15
    assert model(torch.arange(12)[None]).logits.isfinite().all()


def test_codes_and_scales_go_through_safetensors_under_plain_names(tmp_path: Path) -> None:
    first, second = llama(), llama()
    weights = int8(group=GROUP)
    weights.apply(first)
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    weights.apply(second)
    state = first.state_dict()
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    assert state["model.layers.0.mlp.up_proj.weight_codes"].dtype == torch.uint8
    save_file(state, tmp_path / "model.safetensors")
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in state.items())


def test_state_dict_is_the_memory_itself() -> None:
    """A checkpoint may be read into it."""
    layer, _ = linears()
    layer.state_dict()["weight_codes"].fill_(7)
    assert (layer.weight.codes == 7).all()


def test_a_full_precision_state_dict_is_coded_as_it_is_loaded() -> None:
    dense, other = llama(), llama()
    weights = int8(group=GROUP)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    weights.apply(other)
    other.load_state_dict(dense.state_dict())
    weights.apply(dense)
    wanted = dense.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())


def test_a_missing_or_misfitting_part_is_named() -> None:
    layer, _ = linears()
    state = layer.state_dict()
    scale = state.pop("weight_scale")
    with pytest.raises(RuntimeError, match=r'Missing.*"weight"'):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="other groups than of 16"):
        layer.load_state_dict({**state, "weight_scale": scale[:, :1]})


@pytest.mark.parametrize("group", [1, 0, -8, 2.5, True])
def test_a_group_that_is_none_is_refused(group: Any) -> None:
    with pytest.raises(ScrimpError, match="group must be a whole number from 2"):
        int8(group)


def test_a_model_without_matrices_or_of_another_dtype_is_refused() -> None:
    with pytest.raises(ScrimpError, match="no linear layer; use weights dense"):
        int8().apply(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ScrimpError, match=r"torch\.float64"):
        int8().apply(llama(torch.float64))
