"""A plan's picture: true to scale, complete in itself, readable without colour, safe with any name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.base.extras import is_installed
from scrimp.base.ledger import TERMS
from scrimp.memory.planner import Candidate, Plan
from scrimp.report.plan_bars import COLOURS, Panel, panels
from scrimp.report.plan_picture import HATCHES, check, png, write
from scrimp.report.plan_svg import LEFT, PATTERNS, RIGHT, WIDTH, html, svg

MakePlan = Callable[..., Plan]
MakeCandidate = Callable[..., Candidate]
SVG = "{http://www.w3.org/2000/svg}"
GIB = 2**30
HOSTILE = "</title><script>alert(1)</script>&\x1b[31m\x00"


def _panels(plan: Plan) -> Sequence[Panel]:
    return panels(plan, plan.candidates)


def _groups(text: str) -> list[ET.Element]:
    """Return the bars of a drawing."""
    return list(ET.fromstring(text).iter(f"{SVG}g"))


def test_bars_and_budget_are_true_to_scale(make_plan: MakePlan) -> None:
    root = ET.fromstring(svg("title", _panels(make_plan())))
    pixels = (WIDTH - LEFT - RIGHT) / (1.04 * 54.4 * GIB)
    first = next(root.iter(f"{SVG}g"))
    widths = [float(rect.attrib["width"]) for rect in first.iter(f"{SVG}rect")]
    assert widths == pytest.approx([13.6 * GIB * pixels, 40.8 * GIB * pixels], abs=0.1)
    limit = next(path for path in root.findall(f"{SVG}path") if path.find(f"{SVG}title") is not None)
    assert float(re.findall(r"[\d.]+", limit.attrib["d"])[0]) == pytest.approx(
        LEFT + 24 * GIB * pixels, abs=0.1
    )
    ends = [
        float(r.attrib["x"]) + float(r.attrib["width"]) for r in root.iter(f"{SVG}rect") if "x" in r.attrib
    ]
    assert max(ends) < WIDTH - RIGHT + 0.1


def test_one_panel_has_every_recipe_and_one_every_moment_of_the_chosen(make_plan: MakePlan) -> None:
    plan = make_plan()
    recipes, moments = _panels(plan)
    assert [bar.label for bar in recipes.bars] == [c.name for c in plan.candidates]
    assert [bar.marked for bar in recipes.bars] == [False, True, False]
    assert [bar.fits for bar in recipes.bars] == [False, True, True]
    assert plan.chosen is not None
    assert [bar.label for bar in moments.bars] == [m.name for m in plan.chosen.ledger.moments]
    assert [bar.verdict for bar in moments.bars] == ["", "peak", "", ""]
    assert "fira" in moments.title
    assert len(_groups(svg("title", [recipes, moments]))) == 3 + 4


def test_without_a_choice_the_moments_are_those_of_what_needs_least(make_plan: MakePlan) -> None:
    plan = make_plan(chosen=None)
    _, moments = _panels(plan)
    assert "needs least" in moments.title
    assert "apollo" in moments.title
    assert not any(bar.marked for bar in _panels(plan)[0].bars)


def test_terms_can_be_told_apart_without_colour(make_plan: MakePlan) -> None:
    assert set(COLOURS) == set(PATTERNS) == set(HATCHES) == set(TERMS)
    for looks in (COLOURS, PATTERNS, HATCHES):
        assert len(set(looks.values())) == len(TERMS)
    text = svg("title", _panels(make_plan()))
    titles = [title.text for group in _groups(text) for title in group.iter(f"{SVG}title")]
    assert "activations 40.8 GiB" in titles
    root = ET.fromstring(text)
    shown = {t.text for t in root.iter(f"{SVG}text")}
    assert {*TERMS, "budget", "40.8 GiB", "13.6 GiB"} <= shown


def test_a_screen_reader_is_told_every_number(make_plan: MakePlan) -> None:
    root = ET.fromstring(svg("a title", _panels(make_plan())))
    named = {element.attrib["id"]: element.text or "" for element in root if "id" in element.attrib}
    assert root.attrib["role"] == "img"
    title, words = (named[name] for name in root.attrib["aria-labelledby"].split())
    assert title == "a title"
    assert "54.4 GiB, 30.4 GiB over (weights 13.6 GiB, activations 40.8 GiB)" in words


@pytest.mark.parametrize("kind", [".svg", ".html"])
def test_a_file_fetches_nothing_runs_nothing_and_follows_the_theme(
    make_plan: MakePlan, tmp_path: Path, kind: str
) -> None:
    plan = make_plan()
    write(plan, plan.candidates, tmp_path / f"plan{kind}")
    text = (tmp_path / f"plan{kind}").read_text(encoding="utf-8")
    assert re.findall(r"(?:href|src)=|@import|url\((?!#)|<script|\bon\w+=", text) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert "prefers-color-scheme:dark" in text
    for name in re.findall(r"url\(#([\w-]+)\)", text):
        assert f'id="{name}"' in text


def test_a_page_holds_the_numbers_the_reasons_and_the_command(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    write(plan, plan.candidates, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    body = re.sub(r"<!doctype html>|<meta[^>]*>", "", page)
    root = ET.fromstring(body)  # well-formed, so that nothing is left open
    assert len(root.findall(".//table")) == 2
    assert "40.8 GiB" in {cell.text for cell in root.iter("td")}
    assert page.count("<code>scrimp train --model llama-7b") == 1
    assert "(somebody, 2025)" in page


def test_a_hostile_name_stays_text(make_plan: MakePlan, make_candidate: MakeCandidate) -> None:
    plan = make_plan(make_candidate(9.0, method=HOSTILE), chosen=0, why=HOSTILE)
    for text in (svg(HOSTILE, _panels(plan)), html(HOSTILE, _panels(plan), [("why", HOSTILE)])):
        assert "<script" not in text
        assert not {"\x1b", "\x00"} & set(text)
        assert "&lt;script&gt;" in text
    ET.fromstring(svg(HOSTILE, _panels(plan)))


def test_a_png_is_drawn_from_the_same_bars(make_plan: MakePlan) -> None:
    if not is_installed("matplotlib"):
        pytest.skip("needs the extra plots")
    drawn = png("a $title", _panels(make_plan()))
    assert drawn.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(drawn[16:20]) > 1000  # pixels wide


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("plan.pdf", "must end in .svg, .html or .png"),
        ("plan", "must end in"),
        ("plan.sgv", "did you mean '.svg'?"),
        ("no/such/plan.svg", "there is no folder"),
        ("folder.svg", "this is a folder"),
        ("file/plan.svg", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_is_refused(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ScrimpError, match=re.escape(sentence)):
        check(tmp_path / name)
    check(tmp_path / "plan.SVG")


def test_a_png_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrimp.base.extras.is_installed", lambda module: module != "matplotlib")
    with pytest.raises(ScrimpError, match=r"pip install 'scrimp\[plots\]'"):
        check(tmp_path / "plan.png")
