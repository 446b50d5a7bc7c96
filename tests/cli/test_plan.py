"""`scrimp plan`: what it says, what it asks torch for, and what it refuses.

Most choices are pinned, so that one or two traces of a tiny model answer each test. One test starts the
program: what a warm plan loads cannot be seen in a process that has loaded everything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scrimp.memory.untraceable import Untraceable
from scrimp.recipe import fields
from scrimp.shapes import SHAPES

Cli = Callable[..., Any]
Refused = Callable[..., str]
PINNED = ("--precision", "fp32", "--activations.loss", "logits", "--batch", "4", "--seq", "32")
ONE = (*PINNED, "--activations.name", "everything")
MIB = 2**20


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache that the plans of these tests share."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture
def planned(cli: Cli, here: Path, tiny: Path, traces: Path) -> Cli:
    """Return a function that plans the tiny model with options, and expects an answer."""

    def run(*options: str | Path, model: str | Path = tiny) -> Any:
        outcome = cli("plan", model, *options, "--cache", traces)
        assert outcome.code == 0, outcome.err
        return outcome

    return run


@pytest.fixture
def early(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Return a function that plans what must be refused before anything is traced."""

    def trace(_: object) -> None:
        raise AssertionError("a trace was asked for")

    monkeypatch.setattr("scrimp.memory.profiles.Profiles._make_tracer", trace)
    return refused


def test_the_document_holds_every_candidate_and_the_choice(planned: Cli) -> None:
    document = planned(*PINNED, "--memory", "4GiB", "--json").document
    assert document.keys() == {
        *("model", "parameters", "device", "budget", "host", "disk", "candidates", "chosen", "why"),
        *("command", "notes", "answers"),
    }
    assert document["budget"] == 4 * 2**30
    assert document["parameters"] == 264 * 16 * 2 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
    assert len(document["candidates"]) > 1
    needs = [candidate["needed"] for candidate in document["candidates"]]
    assert needs == sorted(needs, reverse=True)
    for candidate in document["candidates"]:
        peak = max(moment["total"] for moment in candidate["ledger"]["moments"])
        assert all(sum(m["terms"].values()) == m["total"] for m in candidate["ledger"]["moments"])
        assert candidate["needed"] == round(peak * (1 + candidate["ledger"]["error"]))
        assert candidate["spare"] == document["budget"] - candidate["needed"]
        assert candidate["fits"] == (candidate["spare"] >= 0)
        assert candidate["recipe"].keys() == fields().keys()
        assert (candidate["recipe"]["precision"], candidate["recipe"]["seq"]) == ("fp32", 32)
    chosen = document["candidates"][document["chosen"]]
    assert chosen["fits"]
    assert chosen["gives_up"] == []  # with room to spare


def test_the_command_that_is_named_runs_what_was_chosen(planned: Cli, tiny: Path) -> None:
    document = planned(*PINNED, "--memory", "4GiB", "--json").document
    words = document["command"].split()
    assert words[:4] == ["scrimp", "train", "--model", str(tiny)]
    for option, value in (("--memory", "4GiB"), ("--precision", "fp32"), ("--batch", "4"), ("--seq", "32")):
        assert words[words.index(option) + 1] == value
    chosen = document["candidates"][document["chosen"]]["recipe"]
    assert int(words[words.index("--micro-batch") + 1]) == chosen["micro_batch"]


def test_the_page_shows_the_document(planned: Cli, tiny: Path) -> None:
    document = planned(*PINNED, "--memory", "4GiB", "--json").document
    page = planned(*PINNED, "--memory", "4GiB").out
    head, *lines = page.splitlines()
    assert head.startswith(f"{tiny}   ")
    assert "fp32   4 x 32 tokens   budget 4 GiB on the CPU" in head
    for candidate in document["candidates"]:
        assert sum(re.split(r"\s{2,}", line)[0] == candidate["name"] for line in lines) == 1
    marked = [line for line in lines if line.endswith("<- chosen")]
    assert [re.split(r"\s{2,}", line)[0] for line in marked] == [
        document["candidates"][document["chosen"]]["name"]
    ]
    assert f"why: {document['why']}" in lines
    assert lines[-1] == f"run: {document['command']}"


def test_a_stated_option_pins_its_choice_and_the_rest_is_open(planned: Cli) -> None:
    def names(*options: str) -> list[str]:
        return [c["name"] for c in planned(*options, "--memory", "4GiB", "--json").document["candidates"]]

    assert len(names(*ONE)) == 1
    assert len(names(*PINNED)) > 1
    assert set(names(*ONE)) < set(names(*PINNED))


def test_a_warm_plan_is_the_cold_one_without_torch_and_soon(planned: Cli, traces: Path) -> None:
    """Started as a program: this process has loaded torch, and its clock has no start-up in it."""
    cold = planned(*ONE, "--memory", "4GiB", "--json", model="llama-1m")
    code = (
        "import sys\nfrom scrimp.cli import main\ntry:\n    main()\nfinally:\n"
        "    print(*sorted({'torch', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    arguments = ("plan", "llama-1m", *ONE, "--memory", "4GiB", "--json", "--cache", str(traces))
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    wall, after = time.monotonic() - began, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.stderr.strip() == ""  # no module of these, and nothing was traced
    assert done.stdout == cold.out
    assert used < 3, f"{wall:.1f} s on the clock"


def test_standard_error_says_that_it_traces_only_where_it_does(
    cli: Cli, here: Path, tiny: Path, tmp_path: Path
) -> None:
    options = ("plan", tiny, *ONE, "--memory", "4GiB", "--cache", tmp_path / "fresh")
    first, second = cli(*options), cli(*options)
    assert f"tracing {tiny}" in first.err
    assert second.err == ""
    assert first.out == second.out


def test_where_nothing_fits_the_answer_says_what_to_give_up(planned: Cli) -> None:
    outcome = planned(*ONE, "--memory", "20MiB")
    assert "<- chosen" not in outcome.out
    assert "run:" not in outcome.out
    assert "why: nothing fits" in outcome.out
    assert "note: the least is" in outcome.out
    document = planned(*ONE, "--memory", "20MiB", "--json").document
    assert document["chosen"] is None
    assert document["command"] is None
    wanted = re.search(r"--memory (\d+)MiB", document["notes"][-1])
    assert wanted is not None
    again = planned(*ONE, "--memory", f"{wanted[1]}MiB", "--json").document
    assert again["chosen"] is not None  # what it said it would take is enough
    less = planned(*ONE, "--memory", f"{int(wanted[1]) - 2}MiB", "--json").document
    assert less["chosen"] is None


def test_a_budget_that_is_not_given_is_the_machine_s_and_says_so(planned: Cli) -> None:
    document = planned(*ONE, "--json").document
    assert document["budget"] > 64 * MIB
    assert "no --memory was given" in document["notes"][0]
    assert "the cpu of this machine has" in document["notes"][0]
    own = planned(*ONE, "--json", model="llama-1m").document
    assert own["budget"] == 2**30
    assert "1GiB is llama-1m's own" in own["notes"][0]


def test_more_than_the_machine_has_and_a_device_it_lacks_are_noted(planned: Cli) -> None:
    notes = planned(*ONE, "--memory", "900TiB", "--json").document["notes"]
    assert any("is more than the" in note for note in notes)
    notes = planned(*ONE, "--memory", "24GiB", "--device", "mps", "--json").document["notes"]
    assert any("this machine has no mps" in note for note in notes)
    notes = planned(*ONE, "--memory", "4GiB", "--host", "8GiB", "--json").document["notes"]
    assert any("--host limits nothing" in note for note in notes)


def test_a_disk_that_is_too_small_keeps_a_recipe_from_fitting(planned: Cli) -> None:
    outcome = planned(*ONE, "--memory", "4GiB", "--disk", "1KB")
    assert "over on disk" in outcome.out
    assert "<- chosen" not in outcome.out


def test_the_goal_decides_where_a_model_starts(planned: Cli, finished: Path) -> None:
    model = finished / "model"
    for goal, init in (("pretrain", "scratch"), ("finetune", "weights")):
        document = planned(*ONE, "--memory", "4GiB", "--goal", goal, "--json", model=model).document
        assert document["candidates"][0]["recipe"]["model.init"] == init
        assert f"--model.init {init}" in document["command"]


def test_fine_tuning_a_model_without_weights_is_refused(refused: Refused, tiny: Path, traces: Path) -> None:
    said = refused("plan", tiny, *ONE, "--memory", "4GiB", "--goal", "finetune", "--cache", traces)
    assert "has no stored weights" in said


def test_the_largest_batch_and_sequence_fit_and_one_more_does_not(planned: Cli) -> None:
    needs = planned(*ONE, "--memory", "4GiB", "--json").document["candidates"][0]["needed"]
    budget = f"{needs + 2 * MIB}"
    found = planned(*ONE, "--memory", budget, "--largest", "batch", "--json").document
    most = found["answers"]["batch"]["value"]
    assert most >= 4
    for rows, fits in ((most, True), (most + 1, False)):
        options = [*ONE, "--batch", str(rows), "--micro-batch", str(rows), "--memory", budget, "--json"]
        assert (planned(*options).document["chosen"] is not None) == fits
    outcome = planned(*ONE, "--memory", "4GiB", "--largest", "seq", "--largest", "batch")
    assert (
        "largest: seq: 64 tokens in a micro-batch of 1, all that the model has positions for" in outcome.out
    )
    assert "largest: batch: at least 4096 sequences of 32 tokens" in outcome.out
    nothing = planned(*ONE, "--memory", "20MiB", "--largest", "seq", "--largest", "batch", "--json").document
    assert [answer["value"] for answer in nothing["answers"].values()] == [None, None]


def test_the_largest_model_is_the_largest_shape_with_a_recipe_that_fits(
    planned: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: SHAPES[name] for name in ("llama-1m", "llama-9m")}
    monkeypatch.setattr("scrimp.memory.inverse.SHAPES", two)
    needs = planned(*ONE, "--memory", "4GiB", "--json", model="llama-9m").document["candidates"][0]["needed"]
    for budget, name in ((needs, "llama-9m"), (needs - MIB, "llama-1m"), (20 * MIB, None)):
        options = (*ONE, "--micro-batch", "4", "--memory", str(budget), "--placement", "device")
        assert planned(*options, "--largest", "model", "--json").document["answers"]["model"]["value"] == name


def test_a_model_that_cannot_be_traced_is_answered_by_the_formula_and_said_so(
    cli: Cli, here: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        raise Untraceable("ValueError in OwnModel.forward: what now?")

    monkeypatch.setattr("scrimp.memory.profiling.Tracer.step", step)
    for _ in range(2):  # that it cannot is remembered too
        outcome = cli("plan", tiny, *ONE, "--memory", "4GiB", "--cache", tmp_path / "fresh")
        assert outcome.code == 0, outcome.err
        assert "±30%" in outcome.out
        assert "OwnModel.forward: what now?" in outcome.out
        assert "closed formula" in outcome.out
        assert "<- chosen" in outcome.out


@pytest.mark.parametrize("kind", [".svg", ".html"])
def test_a_picture_is_written_beside_the_answer(planned: Cli, here: Path, kind: str) -> None:
    outcome = planned(*ONE, "--memory", "4GiB", "--picture", f"plan{kind}")
    assert "<- chosen" in outcome.out
    text = (here / f"plan{kind}").read_text(encoding="utf-8")
    assert "Each recipe at its peak" in text
    assert [path.name for path in here.iterdir()] == [f"plan{kind}"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--memory", "0"), "memory"),
        (("--memory=-3GiB",), "memory"),
        (("--memory", "24 GBB"), "the units are"),
        (("--memory", "24parsecs"), "the units are"),
        (("--memory", "4GiB", "--host", "much"), "--host: 'much' is not an amount of memory"),
        (("--memory", "4GiB", "--disk", "0"), "--disk: '0'"),
        (("--memory", "4GiB", "--largest", "bath"), "did you mean 'batch'?"),
        (("--memory", "4GiB", "--goal", "finetuning"), "did you mean 'finetune'?"),
        (("--memory", "4GiB", "--goal", "finetune", "--model.init", "scratch"), "goal finetune"),
        (("--memory", "4GiB", "--picture", "plan.pdf"), "must end in"),
        (("--memory", "4GiB", "--picture", "no/plan.svg"), "there is no folder"),
        (("llama-9m", "--memory", "4GiB", "--model", "llama-60m"), "the model is given twice"),
        (("--memory", "4GiB", "--optimizer", "adam"), "did you mean 'adamw'?"),
        (("--memory", "4GiB", "--seq", "4096"), "has positions for 2048 tokens"),
        (("--model", "llama-60m", "--device", "mps"), "say how much it has with --memory"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_mistake_is_one_sentence_before_anything_is_traced(
    early: Refused, options: tuple[str, ...], sentence: str, as_json: bool
) -> None:
    assert sentence in early("plan", *options, as_json=as_json)


def test_an_unknown_model_is_refused(early: Refused) -> None:
    assert "did you mean 'llama-60m'?" in early("plan", "llama-60", "--memory", "4GiB")


def test_a_png_without_its_package_names_the_extra(early: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrimp.base.extras.is_installed", lambda module: module != "matplotlib")
    said = early("plan", "llama-1m", "--memory", "4GiB", "--picture", "plan.png")
    assert "pip install 'scrimp[plots]'" in said
