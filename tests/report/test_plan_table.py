"""A plan's table: complete, the choice in sight, readable on any width, and obeyed by no terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from scrimp.memory.planner import Answer, Candidate, Plan
from scrimp.memory.reasons import claim
from scrimp.report.plan_table import ROWS, print_plan, shown, write

MakePlan = Callable[..., Plan]
MakeCandidate = Callable[..., Candidate]
ESCAPE = "\x1b"
TERMS = ("weights", "grads", "state", "acts", "temps", "fixed")


def _plain(plan: Plan, **options: Any) -> str:
    stream = io.StringIO()
    write(plan, stream, **options)
    return stream.getvalue()


def _on_terminal(plan: Plan, width: int) -> list[str]:
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=width, force_terminal=True, highlight=False))
    return re.sub(rf"{ESCAPE}\[[0-9;]*m", "", stream.getvalue()).splitlines()


def test_the_page_holds_the_head_every_row_the_choice_and_the_command(make_plan: MakePlan) -> None:
    lines = _plain(make_plan(notes=("a note",), answers={"batch": Answer(12, "batch: 12 sequences")}))
    head, _, columns, *rows = lines.splitlines()
    assert head == (
        "llama-7b   6.74 B parameters   bf16-mixed   8 x 2048 tokens   budget 24 GiB on one GPU (cuda)"
    )
    assert columns.split() == [
        *("recipe", "micro", "peak", "at", *TERMS, "tokens/s", "gives", "up", "fits"),
    ]
    assert re.split(r"\s{2,}", rows[0]) == [
        *("adamw, bf16-mixed", "4", "54.4", "loss, micro-batch 1", "13.6", "0", "0", "40.8", "0", "0"),
        *("-", "nothing", "30.4 GiB over"),
    ]
    assert re.split(r"\s{2,}", rows[1])[-3:] == ["weights stagnate", "4 GiB spare", "<- chosen"]
    assert "about 30% more work, weights stagnate" in rows[2]
    assert "note: a note" in rows
    assert "largest: batch: 12 sequences" in rows
    assert "why: it gives up the least of what fits" in rows
    assert rows[-1].startswith("run: scrimp train --model llama-7b --memory 24GiB")


def test_the_evidence_of_what_is_given_up_stands_once_below(make_plan: MakePlan) -> None:
    page = _plain(make_plan())
    assert page.count("(somebody, 2025)") == 1
    assert "gives up: about 30%" not in page  # which has no evidence but itself
    assert claim("weights stagnate: an update (somebody: 2025)") == "weights stagnate"
    assert claim("about 30% more work (traced)") == "about 30% more work"


def test_off_a_terminal_there_is_no_escape_no_fold_and_no_space_at_a_line_s_end(make_plan: MakePlan) -> None:
    page = _plain(make_plan(why="because " * 60))
    assert ESCAPE not in page
    assert "because " * 59 in page
    assert all(line == line.rstrip() for line in page.splitlines())


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_a_terminal_of_any_width_shows_what_matters_and_no_line_is_wider(
    make_plan: MakePlan, width: int
) -> None:
    lines = _on_terminal(make_plan(), width)
    text = " ".join(" ".join(lines).split())
    for part in ("recipe", "peak", "54.4", "<- chosen", "why:", "weights stagnate"):
        assert part in text
    run = next(line for line in lines if line.startswith("run:"))
    assert "scrimp train --model llama-7b --memory 24GiB" in run  # in one piece, however long
    assert max(len(line) for line in lines if line is not run) <= width


def test_a_narrow_terminal_loses_the_terms_before_what_is_given_up(make_plan: MakePlan) -> None:
    def heads(width: int) -> set[str]:
        return set(next(line for line in _on_terminal(make_plan(), width) if "recipe" in line).split())

    assert set(TERMS) <= heads(200)
    assert not set(TERMS) & heads(100)
    assert {"gives", "at"} <= heads(100)
    assert {"recipe", "peak", "fits"} <= heads(60)


def test_markup_and_control_characters_in_a_name_are_text(
    make_plan: MakePlan, make_candidate: MakeCandidate
) -> None:
    name = f"/models/[red]a{ESCAPE}[2J.gguf"
    page = _plain(make_plan(make_candidate(9.0, model=name), chosen=0))
    assert page.startswith("/models/[red]a\ufffd[2J.gguf   ")
    assert ESCAPE not in page
    assert ESCAPE not in _plain(make_plan(notes=(name,)))


def test_many_recipes_are_cut_to_the_neighbours_of_the_choice(
    make_plan: MakePlan, make_candidate: MakeCandidate
) -> None:
    many = [make_candidate(60.0 - n, method=f"m{n}") for n in range(50)]
    for chosen in range(50):
        rows = shown(make_plan(*many, chosen=chosen))
        places = [many.index(c) for c in rows]
        assert len(rows) == ROWS == len(set(places))
        assert places == sorted(places)
        wanted = {0, 49, *(n for n in (chosen - 1, chosen, chosen + 1) if 0 <= n < 50)}
        assert wanted <= set(places)
    plan = make_plan(*many, chosen=40)
    assert shown(plan, everything=True) == tuple(many)
    assert "38 more with --all" in _plain(plan)
    assert "--all" not in _plain(plan, everything=True)


def test_where_nothing_fits_the_recipes_that_need_least_are_shown(
    make_plan: MakePlan, make_candidate: MakeCandidate
) -> None:
    many = [make_candidate(90.0 - n, method=f"m{n}") for n in range(50)]
    plan = make_plan(*many, chosen=None, why="nothing fits")
    assert shown(plan) == (many[0], *many[-11:])
    page = _plain(plan)
    assert "<- chosen" not in page
    assert "run:" not in page
    assert "why: nothing fits" in page


def test_a_formula_s_row_says_how_far_it_may_be_off(
    make_plan: MakePlan, make_candidate: MakeCandidate
) -> None:
    page = _plain(make_plan(make_candidate(9.0, basis="formula"), chosen=0, size=None))
    assert "9.00 ±30%" in page
    assert "parameters" not in page
    assert "±" not in _plain(make_plan())


def test_a_limit_elsewhere_has_its_column_and_is_named_where_it_decides(
    make_plan: MakePlan, make_candidate: MakeCandidate
) -> None:
    candidate = make_candidate(9.0, disk=100.0, spare=-50 * 2**30)
    page = _plain(make_plan(candidate, chosen=None, disk=50 * 2**30))
    assert "disk 50 GiB" in page.splitlines()[0]
    assert "50 GiB over on disk" in page
    head, row = (re.split(r"\s{2,}", line) for line in page.splitlines()[2:4])
    assert row[head.index("disk")] == "100"
    assert "disk" not in _plain(make_plan())


def test_tokens_per_second_are_shown_where_they_are_known_and_else_the_way_to_them(
    make_plan: MakePlan, make_candidate: MakeCandidate
) -> None:
    page = _plain(make_plan(make_candidate(9.0, tokens_per_s=12345.6), chosen=0))
    assert "12,346" in page
    assert "--calibrate" not in page
    assert "tokens/s with --calibrate" in _plain(make_plan())


def test_small_models_are_written_in_small_units(make_plan: MakePlan, make_candidate: MakeCandidate) -> None:
    page = _plain(make_plan(make_candidate(0.25), chosen=0))
    row = page.splitlines()[3]
    assert "256" in row
    assert "64.0" in row
    assert "in MiB, at the peak" in page
