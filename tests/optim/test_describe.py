"""The table: every parameter is in it once, and every byte."""

from __future__ import annotations

import re

from scrimp.optim.describe import Row, describe_table


def row(
    name: str, *, shape: tuple[int, ...] = (4, 8), piece: str = "GaLore", why: str = "", held: int = 128
) -> Row:
    return Row(name=name, shape=shape, role="linear", piece=piece, state_bytes=held, why=why)


def first_columns(table: str) -> list[str]:
    lines = table.split("\n\n", maxsplit=1)[0].splitlines()[1:]
    return [re.split(r"  +", line)[0] for line in lines]


def test_rows_alike_but_for_numbers_are_one_with_their_count_and_sum() -> None:
    table = describe_table(row(f"layers.{i}.up_proj.weight") for i in range(32))
    assert first_columns(table) == ["layers.{0..31}.up_proj.weight (32)"]
    assert "4 KiB" in table.splitlines()[1]


def test_rows_that_differ_in_anything_else_stay_apart() -> None:
    rows = [row("h.0.w"), row("h.1.w", shape=(4, 9)), row("h.2.w", piece="AdamW"), row("h.3.w", why="thin")]
    rows += [row("h.4.w", held=64), row("h.5.v")]
    assert first_columns(describe_table(rows)) == ["h.0.w", "h.1.w", "h.2.w", "h.3.w", "h.4.w", "h.5.v"]


def test_numbers_with_gaps_are_shown_as_runs() -> None:
    table = describe_table([row(f"h.{i}.w") for i in (0, 1, 2, 5, 7, 8)])
    assert first_columns(table) == ["h.{0..2,5,7..8}.w (6)"]


def test_a_grid_of_two_numbers_is_one_row_and_what_is_no_grid_is_divided() -> None:
    grid = [row(f"h.{i}.experts.{j}.w") for i in range(3) for j in range(4)]
    assert first_columns(describe_table(grid)) == ["h.{0..2}.experts.{0..3}.w (12)"]
    assert first_columns(describe_table(grid[:-1])) == [
        "h.0.experts.{0..3}.w (4)",
        "h.1.experts.{0..3}.w (4)",
        "h.2.experts.{0..2}.w (3)",
    ]


def test_numbers_inside_words_are_names() -> None:
    assert first_columns(describe_table([row("h.0.w1"), row("h.0.w2")])) == ["h.0.w1", "h.0.w2"]


def test_totals_count_parameters_numbers_and_bytes_by_piece() -> None:
    rows = [row(f"h.{i}.w", held=96) for i in range(3)] + [row("norm", shape=(), piece="AdamW", held=8)]
    totals = describe_table(rows).split("\n\n")[1].splitlines()
    assert [re.split(r"  +", line) for line in totals] == [
        ["GaLore", "3 parameters", "96 numbers", "288 B", "288 bytes", "3.00 B a number"],
        ["AdamW", "1 parameter", "1 numbers", "8 B", "8 bytes", "8.00 B a number"],
        ["total", "4 parameters", "97 numbers", "296 B", "296 bytes", "3.05 B a number"],
    ]


def test_the_reason_stands_in_the_last_column_and_columns_are_aligned() -> None:
    table = describe_table([row("a"), row("a.long.name", why="its state would not be smaller than Adam's")])
    head, first, second = table.split("\n\n", maxsplit=1)[0].splitlines()
    assert second.endswith("its state would not be smaller than Adam's")
    assert head.index("shape") == first.index("4 x 8") == second.index("4 x 8")


def test_no_rows_are_said_to_be_none() -> None:
    assert describe_table([]) == "no parameters"
