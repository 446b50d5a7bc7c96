"""Roles on real models: every parameter of every architecture, and through every wrapper."""

from __future__ import annotations

from collections import Counter
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from scrimp.optim.roles import heads, role_by_name, roles

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, **changes}))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=16, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=4))


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def switch() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=1,
        num_sparse_decoder_layers=0,
        num_heads=4,
        num_experts=4,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=16))


def bert_classifier() -> nn.Module:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config)


def vit() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    )


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 50))


# Counted by hand from the architectures.
COUNTS: list[tuple[Any, dict[str, int]]] = [
    (llama, {"linear": 7, "norm": 3, "embedding": 1, "head": 1}),
    (gpt2, {"linear": 4, "norm": 3, "bias": 7, "embedding": 2}),
    (mixtral, {"linear": 4, "experts": 2, "router": 1, "norm": 3, "embedding": 1, "head": 1}),
    (qwen2_moe, {"linear": 7, "experts": 2, "router": 2, "norm": 3, "bias": 3, "embedding": 1, "head": 1}),
    (bert, {"linear": 7, "norm": 4, "bias": 12, "embedding": 3}),
    (bert_classifier, {"linear": 7, "norm": 3, "bias": 11, "embedding": 3, "head": 1}),
    (t5, {"linear": 16, "norm": 7, "embedding": 3}),
    (mamba, {"linear": 4, "norm": 2, "bias": 2, "conv": 1, "other": 2, "embedding": 1}),
    (vit, {"linear": 6, "norm": 3, "bias": 11, "conv": 1, "embedding": 2, "head": 1}),
    (conv_net, {"conv": 1, "norm": 1, "linear": 1, "bias": 3}),
    (sequential, {"embedding": 1, "linear": 1, "norm": 1, "head": 1, "bias": 3}),
]


@pytest.mark.parametrize(("make", "counts"), COUNTS, ids=[make.__name__ for make, _ in COUNTS])
def test_every_parameter_has_the_role_that_the_architecture_gives_it(
    make: Any, counts: dict[str, int]
) -> None:
    model = make()
    found = roles(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert Counter(found.values()) == counts


def test_transposed_matrices_of_gpt2_are_linear_and_its_tied_head_is_an_embedding() -> None:
    model = gpt2()
    found = roles(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert found["transformer.wte.weight"] == "embedding" and "lm_head.weight" not in found
    assert found["transformer.h.0.attn.c_attn.weight"] == "linear"


def test_stacked_experts_are_experts_and_what_chooses_among_them_a_router() -> None:
    found = roles(qwen2_moe())
    mlp = "model.layers.0.mlp."
    assert found[mlp + "experts.gate_up_proj"] == found[mlp + "experts.down_proj"] == "experts"
    assert found[mlp + "gate.weight"] == found[mlp + "shared_expert_gate.weight"] == "router"
    assert found[mlp + "shared_expert.gate_proj.weight"] == "linear"


def test_a_router_whose_matrix_is_called_classifier_is_no_head() -> None:
    found = roles(switch())
    routers = [name for name, role in found.items() if role == "router"]
    assert routers and routers == [name for name in found if "router" in name]
    assert all(name.endswith("classifier.weight") for name in routers) and "head" not in found.values()


def test_a_linear_called_gate_is_a_router_only_if_its_rows_are_the_experts() -> None:
    class Config:
        num_experts = 4

    class Mlp(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.config = Config()
            self.gate = nn.Linear(8, rows, bias=False)

    assert roles(Mlp(4)) == {"gate.weight": "router"}
    assert roles(Mlp(16)) == {"gate.weight": "linear"}


def test_parameters_of_a_bare_module_are_told_by_shape_and_name() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(3, 4, 5))
    model.position = nn.Parameter(torch.zeros(1, 4, 5))
    model.in_weight = nn.Parameter(torch.zeros(4, 5))
    model.a_log = nn.Parameter(torch.zeros(4, 5))
    model.weight = nn.Parameter(torch.zeros(4))
    model.temperature = nn.Parameter(torch.zeros(()))
    assert roles(model) == {
        "experts": "experts",
        "position": "other",
        "in_weight": "linear",
        "a_log": "other",
        "weight": "norm",
        "temperature": "other",
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler says so
def test_wrappers_change_names_and_no_role() -> None:
    plain = llama()
    expected, expected_heads = roles(plain), heads(plain)

    for prefix, wrapped in [("_orig_mod.", torch.compile(plain)), ("module.", nn.DataParallel(plain))]:
        assert roles(wrapped) == {prefix + name: role for name, role in expected.items()}
        assert heads(wrapped) == {prefix + name: count for name, count in expected_heads.items()}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_adapters_are_linear_wherever_they_sit_and_the_weights_below_keep_their_role() -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], modules_to_save=["down_proj"]
    )
    model = peft.get_peft_model(llama(), config)
    found = roles(model)
    adapters = {name: role for name, role in found.items() if "lora_" in name}
    assert len(adapters) == 6 and set(adapters.values()) == {"linear"}
    start = "base_model.model."
    assert found[start + "model.embed_tokens.base_layer.weight"] == "embedding"
    assert found[start + "lm_head.base_layer.weight"] == "head"
    assert found[start + "model.layers.0.mlp.down_proj.modules_to_save.default.weight"] == "linear"
    assert heads(model)[start + "model.layers.0.self_attn.q_proj.base_layer.weight"] == 4


def test_heads_are_the_configurations_for_queries_and_keys_alone() -> None:
    attention = "model.layers.0.self_attn."
    assert heads(llama()) == {attention + "q_proj.weight": 4, attention + "k_proj.weight": 2}
    below = "bert.encoder.layer.0.attention.self."
    assert heads(bert()) == {below + "query.weight": 4, below + "key.weight": 4}
    assert heads(gpt2()) == {}  # fused: queries, keys and values in one matrix


def test_rows_that_do_not_divide_among_the_heads_have_none() -> None:
    model = llama()
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 30)
    assert list(heads(model)) == ["model.layers.0.self_attn.k_proj.weight"]


@pytest.mark.parametrize("make", [llama, bert, bert_classifier, mixtral, t5, gpt2])
def test_names_tell_what_the_model_tells_or_nothing(make: Any) -> None:
    model = make()
    known = roles(model)
    told = {name: role_by_name(name, p.ndim) for name, p in model.named_parameters()}
    wrong = {name for name, role in told.items() if role not in (None, known[name])}
    assert wrong == set()
    # Short names (T5's `q`) and `gate` are left to the shape.
    silent = {name.split(".")[-2] for name, role in told.items() if role is None}
    assert silent <= {"q", "k", "v", "o", "wi", "wo", "gate"}
