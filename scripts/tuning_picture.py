"""Draw what `benchmarks/tuning_task.py` measured: score, peak memory and tokens/s of every method.

`python scripts/tuning_picture.py` reads `benchmarks/results/tuning_task.json` and writes
`docs/assets/tuning-task.svg`, which the benchmarks page shows above the table (`results_table.py`). Methods
are sorted by their score; a light bar is a method on the whole model, the red line what chance gives.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scrimp.base import files
from scrimp.report.suite_plots import STYLE

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "tuning_task.json"
PICTURE = ROOT / "docs" / "assets" / "tuning-task.svg"
COLOURS = {"cut": "#0072b2", "whole": "#8fb8d4"}
PANELS: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("right answers, %", lambda row: None if row["score"] is None else 100 * row["score"]),
    ("peak memory, GiB", lambda row: row["peak_bytes"] and row["peak_bytes"] / 2**30),
    ("tokens/s", lambda row: row["tokens_per_s"] and row["tokens_per_s"]["median"]),
)


def draw(document: dict[str, Any]) -> bytes:
    """Return the picture of a result as an SVG, the same bytes for the same result and matplotlib."""
    done = [row for row in document["results"]["rows"] if row["score"] is not None]
    rows = sorted(done, key=lambda row: (row["model"], -row["score"]))
    rows.reverse()  # the lowest bar is drawn first
    style: Any = dict(STYLE)
    with mpl.rc_context(style):
        figure = Figure(figsize=(10, 1.2 + 0.19 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True, width_ratios=(3, 2, 2))
        for axes, (label, value) in zip(panels, PANELS, strict=True):
            _bars(axes, rows, [value(row) for row in rows], label)
        panels[0].axvline(100 * document["results"]["task"]["chance"], color="#b00020", linewidth=0.8)
        panels[0].set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=7.5)
        panels[0].set_ylim(-0.6, len(rows) - 0.4)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], values: Sequence[float | None], label: str) -> None:
    axes.barh(range(len(rows)), [v or 0 for v in values], color=[COLOURS[row["model"]] for row in rows])
    axes.set_title(label, loc="left", fontsize=9)
    axes.tick_params(axis="y", length=0)


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']}, whole model" if row["model"] == "whole" else row["name"]


def main() -> None:
    """Draw the committed result."""
    files.write_atomic(PICTURE, draw(json.loads(RESULT.read_text(encoding="utf-8"))))
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
