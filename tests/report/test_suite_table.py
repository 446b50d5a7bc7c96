"""A suite as text: who is best stands first, who is absent says why, and the papers' figures stand apart."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from tests.report.suite_document import suite_document

from scrimp.report.suite_cells import columns, job_line, protocol_line, ranked
from scrimp.report.suite_papers import metrics, paper_rows
from scrimp.report.suite_table import BUSY, print_suite, table, write


def _page(document: dict[str, Any], width: int) -> str:
    page = io.StringIO()
    print_suite(document, Console(file=page, width=width, highlight=False))
    return page.getvalue()


def _contestant(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in document["contestants"] if one["name"] == name)


def _row(page: str, name: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(name))


def _without(document: dict[str, Any], *fields: str) -> dict[str, Any]:
    for one in document["contestants"]:
        one.update(dict.fromkeys(fields))
    return document


def test_contestants_are_sorted_by_held_out_loss_and_the_absent_are_last() -> None:
    rows = ranked(suite_document())
    losses = [one["loss"]["median"] for one in rows if one["loss"]]
    assert len(losses) == 10
    assert losses == sorted(losses)
    assert [one["status"] for one in rows[10:]] == ["missing", "failed"]


def test_a_row_says_what_was_measured() -> None:
    document = suite_document()
    fira = _contestant(document, "fira")
    fira["loss"] = {"median": 1.8634, "lowest": 1.8611, "highest": 1.8701, "all": [1.8634, 1.8611, 1.8701]}
    fira["speed_ratio"] = {"median": 0.62, "lowest": 0.6, "highest": 0.63, "all": [0.62, 0.6, 0.63]}
    fira["to_target"] = {"tokens": 246_100, "seconds": 21.44, "reached": 2, "of": 3}
    fira |= {"state_bytes": 3 << 20, "tensor_bytes": 35 << 20, "peak_bytes": 437 << 20}
    row = _row(_page(document, 160), "fira").split()
    assert row[1:5] == ["1.863", "±0.007", "0.0237*", "246K"]  # the farthest seed; a rate at the edge
    assert row[5:7] == ["2/3", "21.4"]
    assert row[7:10] == ["3.00", "35.0", "437"]
    assert row[-2:] == ["0.62", "±0.02"]


def test_who_is_absent_or_unfinished_says_why() -> None:
    page = _page(suite_document(), 160)
    assert "missing: torchao:AdamW4bit: pip install 'scrimp[oracles]'" in page
    assert "failed: q-galore-torch: AssertionError: Torch not compiled with CUDA enabled" in page
    assert "partial: came-pytorch: 1 of 3 seeds" in page
    for name in ("torchao:AdamW4bit (missing)", "q-galore-torch (failed)"):
        assert set(_row(page, name).removeprefix(name).split()) == {"-"}


def test_who_diverged_says_so_though_its_row_is_done() -> None:
    document = suite_document()
    lion, fira = (_contestant(document, name) for name in ("lion-pytorch", "fira"))
    lion |= {"loss": None, "to_target": None, "lr": None, "curves": []}
    lion["why"] = "diverged at every learning rate tried"
    for trial in lion["trials"]:
        trial["loss"] = None
    fira["curves"][2]["loss"], fira["why"] = None, "1 of 3 seeds diverged"
    page = _page(document, 160)
    assert "note: lion-pytorch: diverged at every learning rate tried" in page
    assert "note: fira: 1 of 3 seeds diverged" in page
    assert _row(page, "lion-pytorch").split()[1] == "diverged"
    assert "diverged" not in _row(page, "fira")  # its median did not


def test_a_target_that_some_seeds_reached_but_not_the_median_is_never_with_their_number() -> None:
    document = suite_document()
    lion = _contestant(document, "lion-pytorch")
    lion["to_target"] = {"tokens": None, "seconds": None, "reached": 1, "of": 3}
    cells = _row(_page(document, 160), "lion-pytorch").split()
    assert cells[4:7] == ["never", "1/3", "never"]


def test_the_job_line_says_how_long_and_with_how_many_threads() -> None:
    document = suite_document()
    assert "learning with 1 thread, speed with 2" in job_line(document)
    document["protocol"]["pairs"] = 0
    assert job_line(document).endswith(", 1 thread")
    document["protocol"]["seconds"] = 60.0
    assert "1 min 00 s of training each" in job_line(document)
    assert "300 steps" not in job_line(document)
    document["protocol"] |= {"trials": 0, "seconds": None}
    document["job"] |= {"tokens": None, "steps": None}
    assert job_line(document).endswith(", 2 threads")
    assert "steps of 8 x 128" in job_line(document)


@pytest.mark.parametrize("width", [100, 80, 60])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(len(line) for line in _page(suite_document(), width).splitlines()) <= width


def test_a_hundred_columns_hold_everything_and_fewer_hold_the_loss() -> None:
    document = suite_document()
    whole = len(columns(document))
    found = {width: table(document, Console(width=width)) for width in (100, 80, 60)}
    assert len(found[100].columns) == whole == 10
    assert whole > len(found[80].columns) > len(found[60].columns) >= 3
    assert "held-out" in str(found[60].columns[1].header)


def test_a_busy_machine_is_told_of_above_the_table_and_in_the_heads() -> None:
    document = suite_document()
    assert BUSY not in _page(document, 160)
    page = _page(document | {"busy": True}, 160)
    assert page.index(BUSY) < page.index("contestant")
    assert "tokens/s?" in page
    assert "MiB?" not in page  # bytes are not spoilt


def test_the_papers_figures_stand_in_a_table_of_their_own() -> None:
    ours, _, papers = _page(suite_document(), 160).partition("What the papers report")
    assert "34.88" not in ours
    assert "34.88 +0.024" in papers  # ln(34.88 / 34.06)
    assert "arXiv 2403.03507, table 2" in papers
    row = next(one for one in paper_rows(suite_document(), "C4 perplexity") if one.name == "galore-torch")
    medians = {one["name"]: one["loss"]["median"] for one in suite_document()["contestants"] if one["loss"]}
    assert row.here == medians["galore-torch"] - medians["adamw"]


def test_where_no_paper_reports_anything_there_is_no_second_table() -> None:
    document = suite_document()
    for one in document["contestants"]:
        one["reported"] = []
    assert metrics(document) == []
    assert "papers" not in _page(document, 160)


def test_a_suite_of_speed_alone_ranks_by_speed_and_leaves_the_loss_out() -> None:
    document = _without(suite_document(), "loss", "lr", "to_target") | {"suite": "speed"}
    document["protocol"] |= {"trials": 0, "seeds": 0, "lr_centre": None, "lr_law": None, "target_loss": None}
    heads = [column.name.split("\n")[0] for column in columns(document)]
    assert heads == ["contestant", "state", "tensors", "resident", "tokens/s", "speed over"]
    assert ranked(document)[0]["name"] == "adamw"
    assert protocol_line(document) == "speed in 5 interleaved pairs of turns of 10 steps"
    assert "1.9" not in _row(_page(document, 160), "lion-pytorch")


def test_a_suite_of_memory_ranks_by_peak_and_shows_the_prediction() -> None:
    document = suite_document() | {"suite": "memory"}
    _contestant(document, "fira")["tensor_bytes"] = 1 << 20
    assert ranked(document)[0]["name"] == "fira"
    heads = [column.name.split("\n")[0] for column in columns(document)]
    assert heads.index("error") == heads.index("predicted") + 1
    assert "+2.0%" in _row(_page(document, 160), "adamw")
    assert "learning rate" not in protocol_line(document)
    assert "held-out" not in heads


def test_nothing_but_nulls_is_still_a_table() -> None:
    document = suite_document()
    document["contestants"] = document["contestants"][-2:]
    document["job"]["parameters"] = None
    document["protocol"] |= {"lr_centre": None, "lr_law": None, "target_loss": None, "target_rule": None}
    assert [column.name for column in columns(document)] == ["contestant"]
    assert "torchao:AdamW4bit (missing)" in _page(document, 160)


def test_off_a_terminal_nothing_is_left_out_folded_or_coloured() -> None:
    page = io.StringIO()
    write(suite_document(), page)
    assert "1.913" in _row(page.getvalue(), "bitsandbytes:AdamW8bit ")
    assert max(len(line) for line in page.getvalue().splitlines()) > 160
    assert "\x1b" not in page.getvalue()
    assert all(line == line.rstrip() for line in page.getvalue().splitlines())


def test_an_error_of_a_peer_cannot_write_to_the_terminal() -> None:
    document = suite_document()
    _contestant(document, "q-galore-torch")["why"] = "\x1b[2Jgone"
    assert "\x1b[2J" not in _page(document, 160)
