"""Both losses against transformers' own, and the sums that make micro-batches add up."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from scrimp.activations.everything import everything
from scrimp.activations.loss import ChunkedTokenLoss, TokenLoss, check_head, chunked, logits
from scrimp.base.errors import ScrimpError
from scrimp.data.loader import IGNORED, MicroBatch

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {**SIZES, **SPECIAL, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "head_dim": 4}
EXPERTS = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
# Each does something of its own between its decoder and its loss, here strongly enough to be seen.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama tied": {**SIZES, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    | {f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")},
    "gemma2": {**HEADS, "final_logit_softcapping": 0.5, "tie_word_embeddings": False},
    "recurrent_gemma": {**HEADS, "logits_soft_cap": 0.5},
    "cohere": {**HEADS, "logit_scale": 0.25},
    "granite": {**HEADS, "logits_scaling": 4.0},
    "hyperclovax": {**HEADS, "logits_scaling": 4.0},
    "minicpm3": {**SIZES, **SPECIAL, **LATENT, "dim_model_base": 4},  # divides what enters the head by 4
    "phi": {**SIZES, **SPECIAL},
    "opt": {**SIZES, **SPECIAL, "ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0},
    "mamba": {**SIZES, "state_size": 4},
    "mixtral": {**SIZES, **EXPERTS},
    "qwen3_moe": {**HEADS, **EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
LOSSES = (TokenLoss, ChunkedTokenLoss)
BOTH = pytest.mark.parametrize("kind", LOSSES, ids=["logits", "chunked"])


def make_model(family: str) -> PreTrainedModel:
    """Make a tiny model with large random weights, biases too, so that its logits are far from zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.partition(" ")[0], **FAMILIES[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def make_batch(generator: torch.Generator, rows: int = 4, seq: int = 9) -> MicroBatch:
    """Return rows of which each is shorter than the one before."""
    tokens = torch.randint(0, 50, (rows, seq + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(rows):
        labels[row, seq - 2 * row :] = IGNORED
    return MicroBatch(tokens[:, :-1], labels, None, int((labels != IGNORED).sum()))


def theirs(batch: MicroBatch) -> dict[str, Tensor]:
    """Return a batch as transformers takes it: a label stands beside its own token."""
    first, last = torch.full_like(batch.labels[:, :1], IGNORED), torch.zeros_like(batch.input_ids[:, :1])
    return {
        "input_ids": torch.cat([batch.input_ids, last], 1),
        "labels": torch.cat([first, batch.labels], 1),
    }


@BOTH
def test_the_mean_over_targets_is_transformers_loss(
    llama: LlamaForCausalLM, generator: torch.Generator, kind: type[Any]
) -> None:
    batch = make_batch(generator)
    loss = kind(llama)(batch, divisor=batch.targets)
    torch.testing.assert_close(loss, llama(**theirs(batch)).loss, rtol=1e-6, atol=0)
    assert batch.targets < batch.labels.numel()


@BOTH
def test_losses_of_parts_add_up_to_that_of_the_whole(
    llama: LlamaForCausalLM, generator: torch.Generator, kind: type[Any]
) -> None:
    batch = make_batch(generator)
    parts = [
        MicroBatch(batch.input_ids[i : i + 1], batch.labels[i : i + 1], None, 9 - 2 * i) for i in range(4)
    ]
    assert sum(part.targets for part in parts) == batch.targets
    loss = kind(llama)
    added = sum(loss(part, divisor=batch.targets) for part in parts)
    torch.testing.assert_close(added, loss(batch, divisor=batch.targets), rtol=1e-6, atol=0)
    # A mean of means is another number here, so the test can fail.
    mean = sum(loss(part, divisor=part.targets) for part in parts) / 4
    assert abs(mean - added) > 1e-4


@BOTH
def test_a_micro_batch_without_targets_has_no_loss_and_no_gradient(
    llama: LlamaForCausalLM, generator: torch.Generator, kind: type[Any]
) -> None:
    batch = make_batch(generator)
    empty = MicroBatch(batch.input_ids, torch.full_like(batch.labels, IGNORED), None, 0)
    loss = kind(llama)(empty, divisor=5)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in llama.parameters())


@BOTH
def test_positions_are_handed_on(
    llama: LlamaForCausalLM, generator: torch.Generator, kind: type[Any]
) -> None:
    batch = make_batch(generator)
    through = torch.arange(9).expand(4, 9)
    restarted = torch.cat([torch.arange(4), torch.arange(5)]).expand(4, 9)
    loss = kind(llama)
    losses = [
        loss(MicroBatch(batch.input_ids, batch.labels, positions, batch.targets), divisor=1.0)
        for positions in (None, through, restarted)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert abs(losses[0] - losses[2]) > 1e-4


@BOTH
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_loss_is_fp32_whatever_the_model_computes_in(
    llama: LlamaForCausalLM, generator: torch.Generator, autocast: torch.dtype | None, kind: type[Any]
) -> None:
    batch = make_batch(generator)
    loss = kind(llama, autocast=autocast)(batch, divisor=batch.targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    exact = llama(**theirs(batch)).loss
    torch.testing.assert_close(loss, exact, rtol=1e-6 if autocast is None else 2**-7, atol=0)
    assert (loss.item() == pytest.approx(exact.item(), rel=2e-7)) is (autocast is None)
    assert kind(llama.bfloat16())(batch, divisor=batch.targets).dtype == torch.float32


@BOTH
def test_the_balancing_loss_of_experts_is_transformers_own(
    generator: torch.Generator, kind: type[Any]
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, **EXPERTS)
    model = MixtralForCausalLM(config)
    tokens = torch.randint(0, 50, (2, 9), generator=generator)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORED)], 1)
    batch = MicroBatch(tokens, labels, None, 16)
    ours = kind(model)(batch, divisor=16)
    expected = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(ours, expected.loss, rtol=1e-6, atol=0)
    assert expected.aux_loss > 0.1
    model.config.output_router_logits = False
    assert abs(kind(model)(batch, divisor=16) - ours) > 0.01


def test_no_reference_to_the_logits_outlives_the_call(
    llama: LlamaForCausalLM, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Tensor]] = []
    llama.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output.logits)))
    with torch.no_grad():
        loss = TokenLoss(llama)(make_batch(generator), divisor=1.0)
    assert len(seen) == 1 and seen[0]() is None and loss.isfinite()


def test_everything_is_kept_as_autograd_would() -> None:
    with everything().context():
        x = torch.ones(2, requires_grad=True)
        (x * x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss by the parameter's name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_logits_loss_and_gradients_are_transformers_own(
    generator: torch.Generator, family: str
) -> None:
    model = make_model(family)
    batch = make_batch(generator)
    expected = model(**theirs(batch), use_cache=False).loss
    if getattr(model.config, "output_router_logits", False):
        # Transformers balances the padded column too, which ours has not.
        expected = TokenLoss(model)(batch, divisor=batch.targets)
    found = ChunkedTokenLoss(model)(batch, divisor=batch.targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    want, got = gradients(model, expected), gradients(model, found)
    assert got.keys() == want.keys() and len(got) > 5
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("family", ["llama tied", "gemma2", "phi"])
def test_without_logits_mixed_precision_is_as_exact_as_with_them(
    generator: torch.Generator, family: str
) -> None:
    model = make_model(family)
    batch = make_batch(generator)
    truth = gradients(model, TokenLoss(model)(batch, divisor=1.0))
    ours, plain = (
        gradients(model, kind(model, autocast=torch.bfloat16)(batch, divisor=1.0))
        for kind in (ChunkedTokenLoss, TokenLoss)
    )
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        error = float((gradient - truth[name]).norm())
        assert error < 1.2 * float((plain[name] - truth[name]).norm()) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_of_the_families_are_understood(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype).train()
    check_head(model)
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    check_head(model)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"final_logit_softcapping": 20.0}),
        ("granite", {"logits_scaling": 4.2}),
        ("cohere", {"logit_scale": 0.26}),
    ],
)
def test_a_head_that_is_misunderstood_is_refused(
    family: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cap of 20 bends no logit of a new model visibly; the check makes them large."""
    torch.manual_seed(0)
    values = FAMILIES[family] | change
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    check_head(model)
    name = {"gemma2": "BOUNDS", "granite": "DIVISORS", "cohere": "MULTIPLIERS"}[family]
    monkeypatch.setattr(f"scrimp.activations.loss.{name}", ())
    with pytest.raises(ScrimpError, match=r"in a way of its own; use --activations\.loss logits"):
        check_head(model)


def test_a_model_that_transforms_before_its_head_is_refused() -> None:
    config = AutoConfig.for_model("modernbert-decoder", **SIZES, **SPECIAL, cls_token_id=1, sep_token_id=2)
    with pytest.raises(ScrimpError, match=r"ModernBertDecoderForCausalLM computes its logits in a way"):
        check_head(AutoModelForCausalLM.from_config(config))


def test_a_head_that_is_no_plain_linear_layer_is_refused(llama: LlamaForCausalLM) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    llama.lm_head = Scaled(16, 50, bias=False)
    with pytest.raises(ScrimpError, match="the head of model LlamaForCausalLM is Scaled, not a linear layer"):
        chunked(llama, None)


def test_experts_that_are_balanced_in_another_way_are_refused() -> None:
    values = {**SIZES, **SPECIAL, "is_moe": True, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("doge", **values, output_router_logits=True)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ScrimpError, match="balances its experts in a way of its own"):
        chunked(model, None)
    model.config.output_router_logits = False
    chunked(model, None)


def test_the_builders_build_what_they_say(llama: LlamaForCausalLM) -> None:
    build: Callable[..., Any]
    for build, kind in zip((logits, chunked), LOSSES, strict=True):
        built = build(llama, torch.bfloat16)
        assert type(built) is kind and built.model is llama and built.autocast == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_of_a_compiled_model_the_decoder_is_compiled(
    llama: LlamaForCausalLM, generator: torch.Generator
) -> None:
    batch = make_batch(generator)
    eager = gradients(llama, ChunkedTokenLoss(llama)(batch, divisor=1.0))
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    found = gradients(llama, ChunkedTokenLoss(torch.compile(llama, backend=backend))(batch, divisor=1.0))
    assert len(graphs) > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-5, atol=1e-7)


@BOTH
def test_on_fake_tensors_a_step_has_the_same_shapes(generator: torch.Generator, kind: type[Any]) -> None:
    batch = make_batch(generator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model("gemma2")
        fake = MicroBatch(torch.zeros_like(batch.input_ids), torch.zeros_like(batch.labels), None, 3)
        loss = kind(model)(fake, divisor=1.0)
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
