"""A report as one file: complete without a script, safe with any text, small, and nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.base.ledger import TERMS
from scrimp.report.page import SCRIPTS, page, rounded, write_page
from scrimp.report.plan_bars import COLOURS

HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 \x1b[31m \ud800"
MIB = 2**20


def _spread(median: float) -> dict[str, Any]:
    return {"median": median, "lowest": median - 0.01, "highest": median + 0.01, "all": [median] * 3}


def _contestant(name: str, loss: float, **changes: Any) -> dict[str, Any]:
    return {
        **_absent(name, "done", ""),
        "lr": 0.01,
        "lr_at_edge": True,
        "loss": _spread(loss),
        "to_target": {"tokens": 250_000, "seconds": 12.5, "reached": 2, "of": 3},
        "state_bytes": 8_000_000,
        "tensor_bytes": 38 * MIB,
        "speed_ratio": _spread(1.05),
        **changes,
    }


def _absent(name: str, status: str, why: str) -> dict[str, Any]:
    return {"name": name, "kind": "ours", "title": name, "status": status, "why": why, "curves": []}


def _suite(*contestants: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "suite",
        "suite": "optimizers",
        "title": "Optimizers",
        "made": "2026-11-22T09:00:00Z",
        "job": {"model": "llama-1m", "parameters": 1_000_000, "threads": 1},
        "protocol": {"reference": "adamw", "seeds": 3, "trials": 3, "lr_factor": 3.1623},
        "contestants": list(contestants) or [_contestant("adamw", 1.9), _contestant("galore", 2.0)],
        **changes,
    }


def _run(name: str, **changes: Any) -> dict[str, Any]:
    column = [1.0, 2.0, 4.0]
    return {
        "name": name,
        "finished": True,
        "steps": 3,
        "recipe": {"optimizer.lr": 0.004, "batch": 8},
        "train": {
            "step": [1, 2, 3],
            "loss": column,
            "tokens_per_s": column,
            "peak_bytes": [MIB, 2 * MIB, 4 * MIB],
        },
        "eval": {"step": [3], "eval_loss": [1.5]},
        "tokens_per_s": 2.0,
        "peak_bytes": 4 * MIB,
        "predicted_bytes": 3 * MIB,
        "sample": "def main():\n    pass",
        **changes,
    }  # fmt: skip


def _runs(*runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "runs",
        "title": "one",
        "runs": list(runs) or [_run("one")],
        "changes": [],
        **changes,
    }


class _Reader(HTMLParser):
    """Collects a page's tables as rows of texts, its tags, and the document it holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.document = ""
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = "document" if dict(attrs).get("id") == "document" else tag
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = "cell" if tag in {"small", "abbr", "span"} else ""

    def handle_data(self, data: str) -> None:
        if self._in == "document":
            self.document += data
        elif self._in in {"cell", "td", "th", "small", "abbr", "span"}:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()


def _row(text: str, name: str) -> list[str]:
    return next(row for row in _Reader(text).rows if row and row[0].startswith(name))


def test_table_says_medians_with_their_ends_and_differences_to_the_reference() -> None:
    text = page(_suite())
    assert _row(text, "galore")[1:] == [
        "2.0000 1.9900–2.0100", "+0.1000", "0.01 edge", "250 K 2 of 3 seeds", "12.5 2 of 3 seeds",
        "7.63 MiB", "8", "38 MiB", "1.050 1.040–1.060",
    ]  # fmt: skip
    assert _row(text, "adamw")[2] == "+0.0000"


def test_target_that_no_seed_reached_says_so_and_sorts_last() -> None:
    never = {"tokens": None, "seconds": None, "reached": 0, "of": 3}
    text = page(_suite(_contestant("adamw", 1.9), _contestant("sgd", 2.6, to_target=never)))
    assert "not reached" in _row(text, "sgd")[4]
    assert float(re.findall(r'data-value="([^"]+)">not reached', text)[0]) > 1e200


def test_column_that_nobody_measured_is_left_out() -> None:
    heads = next(row for row in _Reader(page(_suite(_contestant("adamw", 1.9)))).rows if row)
    assert not any(head.startswith("peak resident") for head in heads)
    measured = _suite(_contestant("adamw", 1.9, peak_bytes=MIB))
    assert any(
        row and any(cell.startswith("peak resident") for cell in row) for row in _Reader(page(measured)).rows
    )


@pytest.mark.parametrize("status", ["missing", "failed"])
def test_contestant_that_did_not_run_says_why(status: str) -> None:
    row = _row(
        page(_suite(_contestant("adamw", 1.9), _absent("fira", status, "no such package"))),
        "fira",
    )
    assert len(row) == 2 and row[1].endswith("no such package")


def test_suite_in_which_nothing_ran_is_still_a_page() -> None:
    assert "no wheel" in page(_suite(_absent("fira", "failed", "no wheel")))


def test_busy_machine_is_said_first() -> None:
    assert "Busy machine" not in page(_suite())
    text = page(_suite(busy=True))
    assert text.index("Busy machine") < text.index("<table")


def test_papers_figures_stand_apart_and_say_so() -> None:
    figure = {"model": "60M", "metric": "C4 perplexity", "value": 34.88, "source": "GaLore, table 2"}
    text = page(_suite(_contestant("adamw", 1.9), _contestant("galore", 2.0, reported=[figure])))
    assert text.index("Reported by the papers") < text.index("34.88</td>")
    assert _Reader(text).rows[-1] == [
        "galore",
        "60M",
        "C4 perplexity",
        "34.88",
        "GaLore, table 2",
    ]


def test_figure_that_contestants_share_stands_once() -> None:
    figure = {"model": "60M", "metric": "C4 perplexity", "value": 34.88, "source": "GaLore, table 2"}
    rows = [_contestant(name, 1.9, reported=[figure]) for name in ("adamw", "transformers")]
    text = page(_suite(*rows))
    assert text.count("34.88</td>") == 1 and "adamw, transformers" in _Reader(text).rows[-1]


def test_runs_say_their_headlines_and_what_changed() -> None:
    other = _run("two", recipe={"optimizer.lr": 0.002, "batch": 8}, finished=False)
    text = page(_runs(_run("one"), other, changes=[{"field": "optimizer.lr", "values": [0.004, 0.002]}]))
    assert _row(text, "one")[1:] == ["1.5000", "4.0000", "3", "2", "4 MiB", "3 MiB", "−25.0 %"]
    assert "not finished" in _row(text, "two")[0] and "not finished" not in _row(text, "one")[0]
    assert text.count('<tr class="differs">') == 1
    assert "def main():\n    pass" in text
    assert "What changed" in text and "What changed" not in page(_runs())


@pytest.mark.parametrize("make", [_suite, _runs])
def test_hostile_text_stays_text(make: Any) -> None:
    document = make(title=HOSTILE)
    rows = document.get("contestants") or document["runs"]
    rows[0].update(name=HOSTILE, title=HOSTILE, why=HOSTILE, sample=HOSTILE, notes=[HOSTILE])
    text = page(document)
    found = _Reader(text)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert json.loads(found.document)["title"] == HOSTILE
    assert "\u2028" not in text and "\x1b" not in text
    text.encode()


@pytest.mark.parametrize("document", [_suite(), _runs()])
def test_page_fetches_nothing_and_forbids_it(document: dict[str, Any]) -> None:
    text = page(document)
    found = _Reader(text)
    addresses = [values[name] for _, values in found.tags for name in ("src", "href") if name in values]
    assert addresses and all(address and address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(values["content"] for _, values in found.tags if "http-equiv" in values)
    assert policy and policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not any(
        "style" in values or any(name.startswith("on") for name in values) for _, values in found.tags
    )


def test_terms_have_the_colours_of_the_plan() -> None:
    text = page(_suite())
    patterns = re.findall(r'data-term="([^"]+)".*?fill="(#\w+)"', text)
    assert dict(patterns) == COLOURS and len(patterns) == len(TERMS)
    style = files("scrimp.report.web").joinpath("report.css").read_text(encoding="utf-8")
    assert all(f"url(#term-{term.replace(' ', '-')})" in style for term in TERMS)


def test_every_script_is_in_the_page() -> None:
    folder = files("scrimp.report.web")
    assert sorted(SCRIPTS) == sorted(path.name for path in folder.iterdir() if path.name.endswith(".js"))
    lengths = {name: len(folder.joinpath(name).read_text(encoding="utf-8").splitlines()) for name in SCRIPTS}
    assert max(lengths.values()) <= 400


def test_numbers_keep_five_digits_and_whole_numbers_all() -> None:
    assert rounded({"a": [1.23456789, 440_000_123, math.nan, -math.inf, True, (0.1 + 0.2,)]}) == {
        "a": [1.2346, 440_000_123, None, None, True, [0.3]]
    }


def test_largest_suite_stays_under_two_megabytes() -> None:
    def noise(count: int) -> list[float]:
        return [2 + math.sin(i) / 3 for i in range(count)]

    curve = {"lr": 0.01, "tokens": list(range(1024, 307_201, 1024)), "train": noise(300),
             "eval_tokens": list(range(1024, 307_201, 1024)), "eval": noise(300)}  # fmt: skip
    curves = [{"seed": seed, **curve} for seed in range(5)]
    contestants = [_contestant(f"method-{i}", 1.9 + i / 100, curves=curves) for i in range(12)]
    assert len(page(_suite(*contestants)).encode()) < 2_000_000


@pytest.mark.parametrize("changes", [{"kind": "plan"}, {"schema": 2}])
def test_another_kind_of_document_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ScrimpError, match="schema"):
        page(_suite(**changes))


def test_written_page_is_the_page(tmp_path: Path) -> None:
    write_page(_suite(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(_suite())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_target_that_the_median_seed_missed_says_how_many_reached_it() -> None:
    some = {"tokens": None, "seconds": None, "reached": 1, "of": 3}
    text = page(_suite(_contestant("adamw", 1.9), _contestant("sgd", 2.6, to_target=some)))
    assert _row(text, "sgd")[4:6] == ["not reached (1 of 3)", "–"]  # no speed of it was measured
    timed = _contestant("sgd", 2.6, to_target=some, tokens_per_s=_spread(100.0))
    assert _row(page(_suite(_contestant("adamw", 1.9), timed)), "sgd")[5] == "not reached (1 of 3)"


def test_diverged_contestant_says_so_in_place_of_its_loss() -> None:
    lost = [{"seed": seed, "loss": None} for seed in range(3)]
    gone = {**_contestant("sgd", 2.6, curves=lost, why="2 of 3 seeds diverged"), "loss": None}
    row = _row(page(_suite(_contestant("adamw", 1.9), gone)), "sgd")
    assert row[0].endswith("2 of 3 seeds diverged") and row[1] == "diverged"


def test_threads_of_learning_and_of_speed_are_told_apart() -> None:
    job = {"model": "llama-1m", "threads": 1, "speed_threads": 2}
    rules = {"reference": "adamw", "seeds": 3, "trials": 3, "pairs": 5}
    assert "learning with 1 thread, speed with 2" in page(_suite(job=job, protocol=rules))
    assert "· 2 threads<" in page(_suite(job=job, protocol=rules | {"trials": 0}))
    assert "· 1 thread<" in page(_suite(job=job, protocol=rules | {"pairs": 0}))


def test_suite_of_equal_seconds_says_so_and_of_equal_steps_too() -> None:
    job = {"model": "llama-1m", "tokens": 307_200, "steps": 300, "batch": 8, "seq": 128}
    rules = {"reference": "adamw", "seeds": 3, "trials": 3, "lr_factor": 3.1623}
    steps, seconds = (page(_suite(job=job, protocol=rules | {"seconds": s})) for s in (None, 60.0))
    assert "and the steps are the same" in steps and "300 steps of 8 × 128" in steps
    assert "the seconds of training (60 s each) are the same" in seconds
    assert "1 min 00 s of training each" in seconds and "307 K" not in seconds.split("<nav")[0]


def test_peak_of_an_allocator_is_called_so() -> None:
    assert "peak allocated" in page(_runs(_run("one", peak_of="allocator")))
    assert "peak allocated" not in page(
        _runs(_run("one", peak_of="process"), _run("two", peak_of="allocator"))
    )


def test_browser_without_pairs_of_colours_has_the_light_ones() -> None:
    style = files("scrimp.report.web").joinpath("report.css").read_text(encoding="utf-8")
    plain = re.sub(r"@supports \(color: light-dark.*?\n}\n", "", style, flags=re.DOTALL)
    assert "light-dark(" in style and "light-dark(" not in plain
    both = dict(re.findall(r"(--[\w-]+): light-dark\(([^,]+),", style))
    named = dict(re.findall(r"^  (--[\w-]+): (#\w+);", plain, flags=re.MULTILINE))
    assert len(both) > 10
    assert named == {name: light for name, light in both.items() if name != "--c"}
    assert "touch-action: pan-y pinch-zoom" in style
