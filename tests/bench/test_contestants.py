"""Names into contestants."""

from __future__ import annotations

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.bench import peers
from scrimp.bench.contestants import contestant, contestants
from scrimp.bench.suites import STATED, SUITES, Suite, suite
from scrimp.methods import METHODS, PIECES, piece
from scrimp.recipe import Recipe, replace

OPTIMIZERS = suite("optimizers")


@pytest.mark.parametrize("each", SUITES, ids=lambda each: each.name)
def test_a_suite_s_own_contestants_exist_and_are_at_most_twelve(each: Suite) -> None:
    found = contestants(each.contestants, each)
    assert 1 < len(found) <= 12
    assert found[0].name == "adamw"
    for one in found:
        recipe = {**STATED, **each.recipe, **one.recipe}
        replace(Recipe(), {name: value for name, value in recipe.items() if value is not None})


@pytest.mark.parametrize("each", SUITES, ids=lambda each: each.name)
def test_all_is_every_method_and_every_peer_of_the_suite_once(each: Suite) -> None:
    names = [one.name for one in contestants(["all"], each)]
    assert len(set(names)) == len(names)
    tunes = {method.name: piece("tune", method.pieces.get("tune", "full")) for method in METHODS}
    ours = {name for name, tune in tunes.items() if each.tunes or not tune.freezes_base}
    assert ours <= set(names)
    assert {entry.name for entry in peers.PEERS if each.name in entry.suites} <= set(names)


def test_pieces_and_precisions_join_a_method_with_a_plus() -> None:
    found = contestant("adamw+recompute+chunked+bf16", OPTIMIZERS)
    assert found.recipe == {
        "optimizer.name": "adamw",
        "activations.name": "recompute",
        "activations.loss": "chunked",
        "precision": "bf16",
    }
    assert found.kind == "ours"


def test_every_piece_can_be_joined() -> None:
    for each in PIECES:
        found = contestant(f"adamw+{each.name}", OPTIMIZERS)
        assert each.name in found.recipe.values()


def test_a_budget_leaves_the_planner_its_choices() -> None:
    found = contestant("plan:400MiB", OPTIMIZERS)
    assert found.recipe["memory"] == "400MiB"
    assert {name for name, value in found.recipe.items() if value is None} == {
        "activations.name",
        "activations.loss",
        "precision",
        "micro_batch",
    }


def test_a_class_of_a_package_is_a_peer_with_its_package_s_install_line() -> None:
    found = contestant("pytorch-optimizer:Fira", OPTIMIZERS)
    assert found.kind == "peer"
    assert found.peer is not None and found.peer.package == "pytorch-optimizer"
    if peers.installed_version(found.peer) is None:
        assert found.why_missing("cpu") == "pip install 'scrimp[oracles]'"


def test_what_works_on_cuda_alone_is_missing_elsewhere() -> None:
    found = contestant("q-galore-torch", OPTIMIZERS)
    assert found.why_missing("cpu")
    if found.peer is not None and peers.installed_version(found.peer):
        assert found.why_missing("cuda") == ""


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adanw"], "did you mean 'adamw'"),
        (["galore-troch"], "did you mean 'galore-torch'"),
        (["adamw", "adamw"], "twice"),
        (["adamw+recompote"], "did you mean 'recompute'"),
        (["galore-torch+bf16"], "leave +bf16 out"),
        (["peft"], "cannot compete in the suite optimizers"),
        (["plan:lots"], "lots"),
        (["torch:AdamWW"], "did you mean 'AdamW'"),
        ([""], "there is no"),
    ],
)
def test_a_wrong_name_is_refused_with_what_to_do(names: list[str], said: str) -> None:
    with pytest.raises(ScrimpError) as error:
        contestants(names, OPTIMIZERS)
    assert said in str(error.value)


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ScrimpError, match="did you mean 'memory'"):
        suite("memry")
