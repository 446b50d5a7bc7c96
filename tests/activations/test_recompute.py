"""Recomputation changes what is kept and what runs twice, and no bit of any gradient."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scrimp.activations import recompute as module
from scrimp.activations.everything import everything
from scrimp.activations.recompute import is_random
from scrimp.base.decoder_layers import decoder_layers
from scrimp.base.errors import ScrimpError

Policy = Callable[[], Any]

recompute, recompute_mlp = module.recompute, module.recompute_mlp
recompute_keep_attention = module.recompute_keep_attention
recompute_keep_matmuls = module.recompute_keep_matmuls
POLICIES: list[Policy] = [recompute, recompute_keep_attention, recompute_keep_matmuls, recompute_mlp]
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, "head_dim": 8},
    "gemma3_text": {**SIZES, "head_dim": 8},
    "phi": SIZES,
    "gpt2": {**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": SIZES,
    "falcon": SIZES,
    "bloom": SIZES,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mamba": {**SIZES, "state_size": 4},
    "mixtral": {**EXPERTS, "num_local_experts": 4, "output_router_logits": True},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "openai-gpt": {**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
WITHOUT_MLP = {"opt", "mamba"}


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a small model of a family in training mode, the same one each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def tokens(rows: int = 2, seq: int = 12) -> Tensor:
    return torch.arange(3, 3 + rows * seq).reshape(rows, seq) % 64


def gradients(model: nn.Module, *, seed: int = 0) -> dict[str, Tensor | None]:
    """Return the loss and the gradients of one step, with dropout drawn from `seed`."""
    torch.manual_seed(seed)
    output = model(input_ids=tokens(), use_cache=False)
    loss = output.logits.float().logsumexp(-1).sum() + (getattr(output, "aux_loss", None) or 0.0)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    """Tell whether two steps agree in every bit."""
    pairs = [(a[name], b[name]) for name in a]
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


class Watch(TorchDispatchMode):
    """Count operations by name, and the bytes of their outputs that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[op.overloadpacket.__name__] += 1
        result = op(*args, **(kwargs or {}))
        # A view of what was there before (a weight) is no output's memory.
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                reference = StorageWeakRef(x.untyped_storage())
                self.storages[reference.cdata] = (reference, x.untyped_storage().nbytes())
        return result

    def live(self) -> int:
        """Return the bytes of living storages."""
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def count(policy: Policy, model: PreTrainedModel) -> tuple[Counter[str], Counter[str]]:
    """Return the operations of a forward and of a backward pass."""
    policy().apply(model)
    with Watch() as forward:
        loss = model(input_ids=tokens(), use_cache=False).logits.sum()
    with Watch() as backward:
        loss.backward()
    return forward.calls, backward.calls


@EACH_POLICY
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_bit_equal(family: str, policy: Policy) -> None:
    model = make(family)
    plain = gradients(model)
    if policy is recompute_mlp and family in WITHOUT_MLP:
        with pytest.raises(ScrimpError, match=f"recompute-mlp: .* {type(model).__name__}; use recompute or"):
            policy().apply(model)
        return
    policy().apply(model)
    assert same(gradients(model), plain)
    assert any(grad is not None and grad.any() for name, grad in plain.items() if name != "loss")


@EACH_POLICY
@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.1}), ("llama", {"attention_dropout": 0.2})],
)
def test_gradients_are_bit_equal_with_dropout(family: str, changes: dict[str, float], policy: Policy) -> None:
    model = make(family, **changes)
    plain = gradients(model)
    assert not same(gradients(model, seed=1), plain)
    policy().apply(model)
    assert same(gradients(model), plain)


def test_dropout_drawn_anew_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2", resid_pdrop=0.1)
    plain = gradients(model)
    monkeypatch.setattr(module, "is_random", lambda _: False)
    recompute().apply(model)
    assert not same(gradients(model), plain)


@pytest.mark.parametrize(
    ("family", "rate"),
    [("gpt2", "resid_pdrop"), ("llama", "attention_dropout"), ("mixtral", "router_jitter_noise")],
)
def test_the_generator_is_stored_only_where_a_model_draws_from_it(
    family: str, rate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[bool] = []
    real = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: drawn.append(True) or real())
    unused = {"summary_first_dropout": 0.0, "classifier_dropout": 0.0}  # rates of other heads
    quiet, noisy = make(family, **{rate: 0.0}, **unused), make(family, **{rate: 0.1}, **unused)
    assert not is_random(quiet) and is_random(noisy)
    recompute().apply(quiet)
    gradients(quiet)
    assert not drawn
    recompute().apply(noisy)
    gradients(noisy)
    assert len(drawn) >= 2


def test_a_rate_within_a_nested_configuration_is_found() -> None:
    torch.manual_seed(0)
    rates = {"attn_pdrop": 1}
    config = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=1, vocab_size=8, attn_config=rates)
    assert is_random(AutoModelForCausalLM.from_config(config))


# Bytes a token and layer in bf16 of a Llama: the table of the module, for d_q = d.
D, KV, F, H = 64, 32, 96, 4
KEPT: list[tuple[Policy, int]] = [
    (everything, 20 * D + 4 * KV + 8 * F + 4 * H + 8),
    (recompute, 2 * D),
    (recompute_keep_attention, 4 * D + 4 * H),
    (recompute_keep_matmuls, 10 * D + 4 * KV + 4 * F + 4 * H),
    (recompute_mlp, 12 * D + 4 * KV + 4 * H),
]


@pytest.mark.parametrize(("policy", "bytes_per_token"), KEPT, ids=[policy.__name__ for policy, _ in KEPT])
def test_a_layer_keeps_what_the_table_says(policy: Policy, bytes_per_token: int) -> None:
    rows, seq = 2, 24

    def live(layers: int) -> int:
        model = make(
            dtype=torch.bfloat16,
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=layers,
            head_dim=D // H,
        )
        policy().apply(model)
        with Watch() as watch:
            loss = model(input_ids=tokens(rows, seq), use_cache=False).logits.sum()
            after = watch.live()
        loss.backward()
        return after

    assert live(4) - live(2) == 2 * rows * seq * bytes_per_token


# Two layers of seven products each, and the head's. The second run repeats all but the last of a layer.
@pytest.mark.parametrize(
    ("policy", "matmuls", "kernels", "activations"),
    [
        (everything, 0, 0, 0),
        (recompute, 12, 2, 2),
        (recompute_keep_attention, 12, 0, 2),
        (recompute_keep_matmuls, 0, 0, 2),
        (recompute_mlp, 4, 0, 2),
    ],
)
def test_what_runs_twice_is_what_the_policy_says(
    policy: Policy, matmuls: int, kernels: int, activations: int
) -> None:
    forward, backward = count(policy, make())
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert (forward["mm"], forward[kernel], forward["silu"]) == (15, 2, 2)
    assert backward["mm"] == 30 + matmuls
    assert backward[kernel] == kernels
    assert backward["silu"] == activations


@pytest.mark.parametrize(("policy", "expected"), [(recompute, 4), (recompute_keep_matmuls, 0)])
def test_grouped_products_of_experts_are_products(policy: Policy, expected: int) -> None:
    forward, backward = count(policy, make("mixtral"))
    # Gate and up are one grouped product, down another: repeated, as the routing weights' gradient reads it.
    grouped = [name for name in forward if "grouped_mm" in name]
    assert sum(forward[name] for name in grouped) == 4
    plain = sum(count(everything, make("mixtral"))[1][name] for name in grouped)
    assert sum(backward[name] for name in grouped) - plain == expected


def test_the_balancing_loss_counts_each_router_once() -> None:
    model = make("mixtral")
    recompute().apply(model)
    output = model(input_ids=tokens(), use_cache=False, labels=tokens())
    output.loss.backward()
    assert output.aux_loss > 0 and len(output.router_logits) == 2


@EACH_POLICY
def test_only_training_recomputes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    policy().apply(model)
    regions: list[bool] = []
    real = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: regions.append(True) or real(*a, **k))
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    model.eval()(input_ids=tokens(), use_cache=False).logits.sum().backward()
    model.generate(tokens(1), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not regions
    model.train()(input_ids=tokens(), use_cache=False)
    assert len(regions) == (6 if policy is recompute_mlp else 2)


@EACH_POLICY
def test_nothing_of_it_is_saved(policy: Policy, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "before")
    names, settings = list(model.state_dict()), model.config.to_dict()
    policy().apply(model)
    gradients(model)
    model.save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == names and model.config.to_dict() == settings
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "config.json" in files and "model.safetensors" in files
    for name in files:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


@EACH_POLICY
def test_frozen_layers_are_neither_kept_nor_run_again(policy: Policy) -> None:
    def freeze(model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(False)
        decoder_layers(model)[1].mlp.requires_grad_(True)
        return model

    model = freeze(make())
    plain = gradients(model)
    policy().apply(model)
    assert same(gradients(model), plain)
    assert sum(grad is not None for grad in plain.values()) == 1 + 3
    # The first layer's activation function would run a second time, too, if the layer were kept.
    assert count(policy, freeze(make()))[1]["silu"] == 1


@EACH_POLICY
def test_gradients_are_bit_equal_under_autocast(policy: Policy) -> None:
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model)
        policy().apply(model)
        assert same(gradients(model), plain)


@EACH_POLICY
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_runs_on_fake_tensors(family: str, policy: Policy) -> None:
    with FakeTensorMode():
        model = make(family, torch.bfloat16, attn_pdrop=0.1)
        policy().apply(model)
        with Watch():  # as the planner traces it
            model(input_ids=tokens(), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("policy", [recompute, recompute_keep_matmuls])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch
def test_a_compiled_model_recomputes_without_a_graph_break(policy: Policy) -> None:
    model = make()
    plain = gradients(model)
    policy().apply(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(compiled)
    assert len(found) == len(plain)
    for name, grad in plain.items():
        other = found[name if name == "loss" else f"_orig_mod.{name}"]
        torch.testing.assert_close(other, grad, rtol=1e-5, atol=1e-6)


def test_a_deep_copy_runs_its_own_layers() -> None:
    model = make()
    recompute().apply(model)
    plain = gradients(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert same(gradients(twin), plain)


@EACH_POLICY
def test_a_model_without_layers_is_refused_by_name(policy: Policy) -> None:
    with pytest.raises(ScrimpError, match=r"^activations\.name recompute.* model Linear; use everything$"):
        policy().apply(nn.Linear(2, 2))


def test_a_product_that_is_changed_in_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**EXPERTS, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    monkeypatch.setitem(FAMILIES, "gpt_oss", sizes)
    model = make("gpt_oss")
    policy = recompute_keep_matmuls()
    policy.apply(model)
    refusal = r"keep-matmuls: .* in place .*; use recompute or everything$"
    with pytest.raises(ScrimpError, match=refusal), policy.context():
        gradients(model)
    model = make("gpt_oss")
    plain = gradients(model)
    recompute().apply(model)
    assert same(gradients(model), plain)


def test_the_context_leaves_other_errors_alone() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), recompute().context():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(("rate", "kept"), [(0.0, True), (0.1, False)])
def test_an_attention_kernel_that_drops_at_random_runs_again(rate: float, kept: bool) -> None:
    """CPU kernels never drop, so the decision is asked for where CUDA's would ask it."""
    keep = recompute_keep_attention().keep
    q = torch.zeros(1, 1, 1, 1)
    for backend in ("flash", "cudnn", "efficient"):
        op = getattr(torch.ops.aten, f"_scaled_dot_product_{backend}_attention").default
        given = {"dropout_p": rate} if "dropout_p" in [a.name for a in op._schema.arguments] else {}
        decision = module._policy(keep, None, op, q, q, q, **given)
        assert (decision == module.CheckpointPolicy.MUST_SAVE) is kept
    decision = module._policy(keep, None, torch.ops.aten.mm.default, q, q)
    assert decision == module.CheckpointPolicy.PREFER_RECOMPUTE
