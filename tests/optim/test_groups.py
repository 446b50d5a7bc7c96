"""What the user hands in becomes groups and targets, or one sentence that says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from scrimp.base.errors import ScrimpError
from scrimp.optim.groups import Given, read

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
PROJECTED = {"rank": 4, "refresh_every": 200, "scale": 0.25, "side": "std"}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


def given(params: Any, projected: dict[str, Any] | None = PROJECTED, **options: Any) -> Given:
    return read(params, options={**OPTIONS, **options}, projected=projected)


def ranks(found: Given) -> list[Any]:
    return [group.get("rank") for group in found.groups]


def test_a_model_is_divided_by_role_and_decays_in_matrices_alone() -> None:
    model = llama()
    found = given(model)
    names = [group["param_names"] for group in found.groups]
    assert ranks(found) == [4, None, None] and [len(group) for group in names] == [7, 2, 3]
    assert all("proj" in name for name in names[0])
    assert names[1] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all("norm" in name for name in names[2])
    assert [group["weight_decay"] for group in found.groups] == [0.1, 0.1, 0.0]


def test_every_group_has_every_option_and_none_where_it_is_not_projected() -> None:
    first, *others = given(llama()).groups
    assert {key: first[key] for key in PROJECTED} == PROJECTED
    for group in others:
        assert {key: group[key] for key in PROJECTED} == dict.fromkeys(PROJECTED)
        assert {key: group[key] for key in ("lr", "betas", "eps")} == {
            key: OPTIONS[key] for key in ("lr", "betas", "eps")
        }


def test_targets_name_parameters_as_the_model_does_with_roles_and_heads() -> None:
    model = llama()
    found = given(model)
    attention = model.model.layers[0].self_attn
    query = found.targets[attention.q_proj.weight]
    assert (query.name, query.role) == ("model.layers.0.self_attn.q_proj.weight", "linear")
    assert (query.heads, found.targets[attention.k_proj.weight].heads) == (4, 2)
    assert (found.targets[attention.v_proj.weight].heads, query.asked) == (1, False)
    assert list(found.targets) == [p for group in found.groups for p in group["params"]]


def test_frozen_parameters_of_a_model_are_left_out_and_tied_ones_there_once() -> None:
    model = llama(tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    names = [name for group in given(model).groups for name in group["param_names"]]
    assert "model.norm.weight" not in names and "lm_head.weight" not in names
    assert names.count("model.embed_tokens.weight") == 1


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ScrimpError, match="no parameter of Linear trains"):
        given(nn.Linear(3, 3).requires_grad_(False))


def test_without_projection_a_model_is_divided_by_decay_alone() -> None:
    found = given(nn.Linear(6, 4), projected=None)
    assert [(group["param_names"], group["weight_decay"]) for group in found.groups] == [
        (["weight"], 0.1),
        (["bias"], 0.0),
    ]
    assert "rank" not in found.groups[0]


def test_bare_parameters_are_projected_by_shape() -> None:
    inner = [parameter(24, 16), parameter(16, 127), parameter(3, 8, 24)]
    rest = [parameter(16, 128), parameter(24), parameter(), parameter(8, 8, 3, 3), parameter(64, 1, 4)]
    found = given(p for p in [*inner, *rest])
    assert [group["params"] for group in found.groups] == [inner, rest]
    assert ranks(found) == [4, None]
    assert [group["weight_decay"] for group in found.groups] == [0.1, 0.1]
    assert [found.targets[p].role for p in inner] == ["linear", "linear", "experts"]
    assert found.targets[inner[2]].name == "parameter 2" and "param_names" not in found.groups[0]


def test_names_in_pairs_decide_where_the_shape_would_be_wrong() -> None:
    embedding, head, keys, norm = parameter(24, 16), parameter(24, 16), parameter(8, 256), parameter(16)
    pairs = [("embed_tokens.weight", embedding), ("lm_head.weight", head), ("attn.k_proj.weight", keys)]
    found = given([*pairs, ("norm.weight", norm)])
    assert [group["param_names"] for group in found.groups] == [
        ["attn.k_proj.weight"],
        ["embed_tokens.weight", "lm_head.weight", "norm.weight"],
    ]
    assert found.targets[norm].role == "norm"


def test_groups_with_a_rank_are_projected_and_the_others_are_not() -> None:
    a, b, c = parameter(24, 16), parameter(24, 16), parameter(1000, 16)
    found = given([{"params": [a]}, {"params": [b, c], "rank": 8, "lr": 0.5}])
    assert [group["params"] for group in found.groups] == [[a], [b, c]]
    assert ranks(found) == [None, 8] and [group["lr"] for group in found.groups] == [1e-3, 0.5]
    assert found.groups[1]["refresh_every"] == 200
    assert found.targets[c].asked and found.targets[c].role == "linear" and not found.targets[a].asked


def test_groups_of_which_none_has_a_rank_are_divided_each() -> None:
    a, b, norm = parameter(24, 16), parameter(24, 16), parameter(16)
    groups = [{"params": [a, norm], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.0}]
    found = given(groups)
    assert [group["params"] for group in found.groups] == [[a], [norm], [b]]
    assert ranks(found) == [4, None, 4]
    assert [group["weight_decay"] for group in found.groups] == [0.5, 0.5, 0.0]


def test_nothing_is_projected_unasked_where_the_method_has_no_rank_of_its_own() -> None:
    found = given([parameter(24, 16)], projected={**PROJECTED, "rank": None})
    assert ranks(found) == [None]


@pytest.mark.parametrize(
    "written",
    [
        {"update_proj_gap": 50, "scale": 2.0, "proj_type": "reverse_std"},  # galore-torch, apollo-torch
        {"update_proj_gap": 50, "alpha": 2.0, "proj_type": "reverse_std"},  # fira
        {"refresh_every": 50, "scale": 2.0, "side": "reverse_std"},
    ],
)
def test_authors_words_are_read_as_ours(written: dict[str, Any]) -> None:
    (group,) = given([{"params": [parameter(24, 16)], "rank": 8, **written}]).groups
    found = {key: group[key] for key in PROJECTED}
    assert found == {"rank": 8, "refresh_every": 50, "scale": 2.0, "side": "reverse_std"}
    assert not set(group) & {"update_proj_gap", "proj_type", "alpha"}


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"refresh_every": 5, "update_proj_gap": 5}, ["refresh_every", "update_proj_gap"]),
        ({"refresh_every": 5, "proj_type": "std"}, ["refresh_every", "proj_type"]),
        ({"scale": 1.0, "alpha": 1.0}, ["scale", "alpha"]),
    ],
)
def test_a_group_in_two_vocabularies_is_refused_with_both_words(
    written: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ScrimpError, match="group 1 has") as error:
        given([{"params": []}, {"params": [parameter(24, 16)], "rank": 8, **written}])
    assert all(repr(word) in str(error.value) for word in named)


def test_an_unknown_option_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(ScrimpError, match=r"group 0 has the option 'wieght_decay'.*'weight_decay'"):
        given([{"params": [parameter(2)], "wieght_decay": 0.1}])
    with pytest.raises(ScrimpError, match="'rank'"):
        given([{"params": [parameter(2)], "rank": 4}], projected=None)


def test_an_option_of_projected_groups_without_a_rank_is_refused() -> None:
    with pytest.raises(ScrimpError, match="group 1: refresh_every has no effect without rank"):
        groups = [{"params": [parameter(9, 9)], "rank": 4}, {"params": [parameter(9, 9)], "refresh_every": 5}]
        given(groups)


def test_none_in_a_projected_group_is_the_default() -> None:
    (group,) = given([{"params": [parameter(24, 16)], "rank": 8, "refresh_every": None}]).groups
    assert group["refresh_every"] == 200


def test_what_schedulers_keep_in_a_group_stays() -> None:
    (group,) = given([{"params": [parameter(2)], "initial_lr": 0.5, "name": "norms"}]).groups
    assert (group["initial_lr"], group["name"]) == (0.5, "norms")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("rank", 0, "at least 1, not 0"),
        ("rank", 8.0, r"8.0 \(float\)"),
        ("rank", True, r"True \(bool\)"),
        ("refresh_every", 0, "at least 1"),
        ("scale", 0.0, "above 0"),
        ("scale", float("nan"), "finite"),
        ("side", "both", "one of std, reverse_std"),
        ("lr", -1e-3, "at least 0"),
        ("lr", float("inf"), "finite"),
        ("lr", torch.tensor([1.0, 2.0]), "finite"),
        ("lr", None, "NoneType"),
        ("betas", (0.9, 1.0), "below 1"),
        ("betas", 0.9, "below 1"),
        ("eps", -1e-8, "at least 0"),
        ("weight_decay", "0.1", "str"),
    ],
)
def test_a_value_out_of_range_is_refused_at_construction(option: str, value: Any, says: str) -> None:
    with pytest.raises(ScrimpError, match=rf"group 0: {option} must be .*{says}"):
        given([{"params": [parameter(24, 16)], "rank": 8, option: value}])


def test_a_value_out_of_range_is_refused_as_a_default() -> None:
    with pytest.raises(ScrimpError, match=r"^lr must be"):
        given([parameter(3)], lr=-1.0)
    with pytest.raises(ScrimpError, match=r"^rank must be"):
        given(nn.Linear(9, 9), projected={**PROJECTED, "rank": 0})


def test_a_learning_rate_may_be_a_tensor_of_one_number() -> None:
    rate = torch.tensor(0.5)
    (group,) = given([parameter(3)], lr=rate).groups
    assert group["lr"] is rate


@pytest.mark.parametrize(
    "params", [[], (p for p in ()), [{"params": {1}}], {"params": []}, torch.zeros(2), "w"]
)
def test_what_is_no_ordered_collection_of_parameters_is_refused(params: Any) -> None:
    with pytest.raises(ScrimpError, match=r"no parameters|in an order"):
        given(params)


def test_what_is_no_parameter_is_refused_by_its_place() -> None:
    with pytest.raises(ScrimpError, match=r"group 1, parameter 1 must be a tensor .* not an int"):
        given([{"params": [parameter(2)]}, {"params": [parameter(2), 3]}])
    with pytest.raises(ScrimpError, match="group 1 must be a dict"):
        given([{"params": [parameter(2)]}, parameter(2)])


def test_a_parameter_twice_is_refused_by_both_names() -> None:
    p = parameter(2)
    with pytest.raises(
        ScrimpError, match="group 1, parameter 0 is the same parameter as group 0, parameter 1"
    ):
        given([{"params": [parameter(2), p]}, {"params": p}])
    with pytest.raises(ScrimpError, match="head is the same parameter as embedding"):
        given([("embedding", p), ("head", p)])


def test_complex_and_computed_tensors_are_refused_by_name() -> None:
    with pytest.raises(ScrimpError, match="w is complex"):
        given([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])
    with pytest.raises(ScrimpError, match="parameter 0 is computed"):
        given([parameter(2) * 2])


def test_some_names_and_some_without_are_refused() -> None:
    with pytest.raises(ScrimpError, match="name all or none"):
        given([("a", parameter(2)), parameter(2)])


def test_torch_takes_the_groups_that_are_read() -> None:
    model = llama()
    groups = given(model).groups
    optimizer = torch.optim.Optimizer(groups, {**OPTIONS, **dict.fromkeys(PROJECTED)})
    assert optimizer.param_groups == groups
    again = given(optimizer.param_groups)
    assert ranks(again) == [4, None, None]
    names = [group["param_names"] for group in again.groups]
    assert names == [group["param_names"] for group in groups]
    assert again.targets[model.lm_head.weight].role == "head"


def test_the_first_number_sets_new_groups_apart() -> None:
    p = parameter(3)
    found = read([{"params": [p]}], options=OPTIONS, projected=None, first=2)
    assert found.targets[p].name == "group 2, parameter 0"
