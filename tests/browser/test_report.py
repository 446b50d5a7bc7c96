"""The report in a real browser: what one clicks, hovers and types does what it says, wide and narrow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
Visit = Callable[..., Any]
WIDTHS = pytest.mark.parametrize("width", [1440, 390])
NAMES = "#contestants tbody tr:not([hidden]) th .name"


def _names(page: Any) -> list[str]:
    """Return the contestants of the rows that are shown, from the top."""
    return list(page.locator(NAMES).all_text_contents())


def _lines(page: Any, chart: str) -> set[str]:
    """Return the contestants that a chart draws."""
    found = page.eval_on_selector_all(f"{chart} svg.plot .series", "all => all.map(one => one.dataset.name)")
    return set(found) - {""}


@WIDTHS
@pytest.mark.parametrize("kind", ["suite", "runs"])
def test_page_does_not_scroll_sideways_and_no_label_sticks_out_or_covers_another(
    visit: Visit, kind: str, width: int
) -> None:
    page = visit(kind, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Text of a chart may not leave its card, whatever its labels.
    out = page.evaluate(
        """() => [...document.querySelectorAll('svg.plot text')].filter(text => {
             const card = text.closest('figure').getBoundingClientRect(), box = text.getBoundingClientRect();
             return box.left < card.left || box.right > card.right;
           }).map(text => text.textContent)"""
    )
    assert page.locator("svg.plot text").count() > 50
    assert out == []
    covered = page.evaluate(
        """() => [...document.querySelectorAll('svg.plot')].flatMap(plot => {
             const boxes = [...plot.querySelectorAll('.axes .tick')].map(t => t.getBoundingClientRect());
             return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
               a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom));
           }).length"""
    )
    assert covered == 0


def test_heading_sorts_by_click_and_by_key_with_the_unmeasured_last(
    visit: Visit, suite: dict[str, Any]
) -> None:
    page = visit("suite")
    losses = {row["name"]: row["loss"]["median"] for row in suite["contestants"] if row["loss"]}
    order = sorted(losses, key=lambda name: losses[name])
    absent = ["q-galore-torch", "fira"]
    assert _names(page) == [*losses, *absent] != [*order, *absent]
    head = page.locator("#contestants thead th", has_text="held-out loss")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert _names(page) == [*order, *absent]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert _names(page) == [*reversed(order), *absent]
    other = page.locator("#contestants thead th", has_text="optimizer state")
    other.get_by_role("button").click()
    assert _names(page)[0] == "sgd"
    assert head.get_attribute("aria-sort") is None


def test_filter_leaves_the_rows_that_hold_every_word(visit: Visit) -> None:
    page = visit("suite")
    box = page.get_by_role("searchbox", name="Filter contestants")
    box.fill("peer TORCH-opt")
    assert _names(page) == ["pytorch-optimizer:Fira"]
    box.fill("")
    assert len(_names(page)) == 14


def test_missing_and_failed_rows_say_why(visit: Visit) -> None:
    page = visit("suite")
    assert "pip install 'scrimp[oracles]'" in page.locator("tr[data-name=q-galore-torch]").inner_text()
    assert "signal 9" in page.locator("tr[data-name=fira]").inner_text()


@WIDTHS
def test_unpicked_method_leaves_every_chart_and_comes_back(visit: Visit, width: int) -> None:
    page = visit("suite", width)
    charts = ("#chart-loss", "#chart-front", "#chart-search", "#chart-memory", "#chart-speed", "#chart-ratio")
    assert all("lora" in _lines(page, chart) for chart in charts)
    page.locator(".chip", has_text="lora").click()
    assert not any("lora" in _lines(page, chart) for chart in charts)
    box = page.get_by_label("show lora in the charts")
    assert not box.is_checked()  # the table and the legend say the same
    box.check()
    assert all("lora" in _lines(page, chart) for chart in charts)
    page.get_by_role("button", name="none", exact=True).click()
    assert _lines(page, "#chart-loss") == set()
    page.get_by_role("button", name="all", exact=True).click()
    assert len(_lines(page, "#chart-loss")) == 12


def test_pointer_on_a_point_shows_its_exact_values_on_screen(visit: Visit, suite: dict[str, Any]) -> None:
    page = visit("suite")
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator("#chart-front .series[data-name=galore-torch] .marker").hover()
    said = tip.inner_text()
    loss = next(row for row in suite["contestants"] if row["name"] == "galore-torch")["loss"]
    assert "galore-torch" in said and f"{loss['median']:.4f}" in said and "MiB" in said
    box = tip.bounding_box()
    assert (
        box["x"] >= 0
        and box["x"] + box["width"] <= 1440
        and box["y"] >= 0
        and box["y"] + box["height"] <= 900
    )
    page.mouse.move(2, 2)
    assert tip.is_hidden()


def test_arrow_keys_walk_a_chart(visit: Visit) -> None:
    page = visit("suite")
    page.locator("#chart-speed svg.plot").focus()
    page.keyboard.press("ArrowDown")
    first = page.locator("#tip").inner_text()
    page.keyboard.press("ArrowDown")
    second = page.locator("#tip").inner_text()
    assert first != second and "tokens/s" in second
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_finger_on_a_bar_shows_its_values_within_a_narrow_screen(visit: Visit) -> None:
    page = visit("suite", 390, has_touch=True, is_mobile=True)
    bar = page.locator("#chart-memory .row[data-name=adamw] .part[data-term=activations]")
    bar.scroll_into_view_if_needed()
    bar.tap()
    tip = page.locator("#tip")
    tip.wait_for()
    assert "activations" in tip.inner_text() and "21 MiB" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_front_changes_with_its_memory(visit: Visit) -> None:
    page = visit("suite")
    chart = page.locator("#chart-front")
    places = []
    for name in ("tensors", "resident", "state"):
        chart.get_by_text(name, exact=True).click()
        places.append(chart.locator(".series[data-name=lora] .marker").get_attribute("transform"))
        front = chart.locator(".line.front").get_attribute("d")
        assert front.count("V") >= 1
    assert len(set(places)) == 3
    assert "optimizer state" in chart.locator("svg.plot").text_content()


def test_loss_switches_between_held_out_and_training_and_its_axes(visit: Visit) -> None:
    page = visit("suite")
    chart = page.locator("#chart-loss")
    path = chart.locator(".series[data-name=adamw] .line.bold")
    held = path.get_attribute("d")
    assert held.count("L") < 20
    chart.get_by_text("training", exact=True).click()
    assert path.get_attribute("d").count("L") > 100
    assert "training loss" in chart.locator("svg.plot").text_content()
    chart.get_by_text("held-out", exact=True).click()
    assert path.get_attribute("d") == held
    chart.get_by_label("log tokens").check()
    logged = path.get_attribute("d")
    assert logged != held
    chart.get_by_label("close-up").uncheck()
    assert path.get_attribute("d") not in (held, logged)
    assert "sgd" in _lines(page, "#chart-loss")


def test_memory_bars_can_leave_out_what_is_fixed(visit: Visit) -> None:
    page = visit("suite")
    fixed = page.locator("#chart-memory [data-term=fixed]")
    assert fixed.count() == 0  # most of this process is fixed: it starts left out
    page.get_by_label("with what is fixed").check()
    assert fixed.count() == 12
    assert "planned" in page.locator("#chart-memory .terms").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_button_changes_the_colours(visit: Visit, theme: str) -> None:
    page = visit("suite", theme=theme)
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    before = page.evaluate(colours)
    page.locator("#theme").click()
    after = page.evaluate(colours)
    assert after[0] != before[0] and after[1] != before[1]
    dark = [sum(map(int, colour[4:-1].split(","))) < 200 for colour in (before[0], after[0])]
    assert dark == [theme == "dark", theme == "light"]


def test_download_holds_the_document(visit: Visit, suite: dict[str, Any], tmp_path: Path) -> None:
    page = visit("suite")
    with page.expect_download() as found:
        page.locator("#download").click()
    found.value.save_as(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert found.value.suggested_filename == "bench-optimizers.json"
    assert [row["name"] for row in data["contestants"]] == [row["name"] for row in suite["contestants"]]


def test_without_javascript_the_tables_are_there(visit: Visit) -> None:
    page = visit("suite", java_script_enabled=False)
    assert len(_names(page)) == 14
    assert "C4 perplexity" in page.locator("#reported").inner_text()
    assert "need JavaScript" in page.locator("#charts").inner_text()


@WIDTHS
def test_runs_show_every_column_of_the_log(visit: Visit, width: int) -> None:
    page = visit("runs", width)
    for chart in ("#chart-loss", "#chart-peak", "#chart-rate", "#chart-lr", "#chart-norm"):
        assert _lines(page, chart) == {"llama-1m-1", "llama-1m-2"}, chart
    peak = page.locator("#chart-peak svg.plot").text_content()
    assert "budget 512 MiB" in peak and "planned 440 MiB" in peak
    assert "measured" in page.locator("#chart-memory-0 svg.plot").text_content()
    steps = page.locator("#chart-lr svg.plot").text_content()
    page.get_by_text("tokens", exact=True).last.click()
    assert page.locator("#chart-lr svg.plot").text_content() != steps


def test_recipe_of_runs_filters_and_marks_what_differs(visit: Visit) -> None:
    page = visit("runs")
    assert page.locator("#recipe .differs").all_text_contents() == ["optimizer.lr0.0040.002"]
    page.get_by_role("searchbox", name="Filter fields").fill("optimizer")
    assert page.locator("#recipe tbody tr:visible").count() == 3
    assert "self.assertEqual" in page.locator("#samples").inner_text()


def test_suite_of_which_little_came_is_shown_without_a_complaint(visit: Visit) -> None:
    page = visit("poor")
    assert _names(page) == ["lora", "q-galore-torch", "fira"]
    assert "Nothing of what is picked was measured" in page.locator("#chart-loss").inner_text()
    page.locator("#chart-loss").get_by_text("training", exact=True).click()
    assert _lines(page, "#chart-loss") == {"lora"}


@pytest.mark.parametrize("kind", ["hostile suite", "hostile runs"])
def test_awkward_names_hinder_no_chart(
    visit: Visit, hostile: dict[str, dict[str, Any]], kind: str, suite: dict[str, Any]
) -> None:
    page = visit(kind)
    charts = (
        ("loss", "front", "search", "memory", "speed") if kind.endswith("suite") else ("loss", "peak", "lr")
    )
    rows = hostile[kind].get("contestants") or hostile[kind]["runs"]
    assert len(rows) == 6
    for chart in charts:
        page.wait_for_selector(f"#chart-{chart} svg.plot")
        assert len(_lines(page, f"#chart-{chart}")) == len(rows), chart
    table = "#contestants" if kind.endswith("suite") else "#runs"
    assert page.locator(f"{table} tbody .pick").count() == len(rows)
    if kind.endswith("suite"):
        page.locator("#contestants tbody .pick input").nth(2).uncheck()
        assert len(_lines(page, "#chart-loss")) == len(rows) - 1


def test_diverged_runs_are_said_in_words_and_never_bold(visit: Visit) -> None:
    page = visit("diverged")
    rows = page.locator("#contestants tbody tr")
    assert "diverged at every learning rate tried" in rows.nth(0).inner_text()
    assert "2 of 3 seeds diverged" in rows.nth(1).inner_text()
    assert page.locator("#contestants tbody td", has_text="diverged").count() == 2  # in the place of a loss
    assert page.locator("#chart-loss .line").count() == 3
    assert page.locator("#chart-loss .line.bold").count() == 0
    assert "Diverged: adam-mini." in page.locator("#chart-loss").inner_text()
    assert page.locator("#chart-search .lost").count() == 3


@pytest.mark.parametrize(("kind", "count"), [("alone", 3), ("pair", 2)])
def test_the_bold_seed_is_the_median_and_of_two_the_upper(
    visit: Visit, suite: dict[str, Any], kind: str, count: int
) -> None:
    page = visit(kind)
    ends = {}
    for line in ("bold", "faint"):
        paths = page.locator(f"#chart-loss .{line}").and_(page.locator("path, g"))
        found = paths.evaluate_all("all => all.map(e => (e.querySelector('path') ?? e).getAttribute('d'))")
        ends[line] = [float(path.split()[-1]) for path in found]
    assert (len(ends["bold"]), len(ends["faint"])) == (1, count - 1)
    # Seeds end one above the other; what is higher on the page has the smaller number.
    assert ends["bold"][0] == sorted([*ends["bold"], *ends["faint"]])[(count - 1) // 2]
    assert ("upper of the two" in page.locator("#chart-loss").inner_text()) == (count == 2)


def test_suite_of_memory_shows_no_loss_but_the_prediction(visit: Visit) -> None:
    page = visit("memory")
    heads = page.locator("#contestants thead").first.inner_text()
    assert "predicted" in heads and "error" in heads
    assert not any(word in heads for word in ("loss", "lr", "target"))
    assert page.locator("figure.chart").count() == 3  # memory, tokens/s and their ratio
    assert page.locator("#chart-memory svg.plot").count() == 1
    said = page.locator("#protocol").inner_text()
    assert "tuning" not in said and "seed" not in said and "target" not in said


def test_suite_of_speed_says_nothing_of_training(visit: Visit) -> None:
    page = visit("speed")
    assert page.locator("figure.chart").count() == 2
    lead = page.locator(".lead").inner_text()
    assert "2 threads" in lead and "1 thread" not in lead
    assert " tokens" not in lead and "steps of 8 × 128" in lead and "300" not in lead
    said = page.locator("#protocol").inner_text()
    assert "Speed is compared with adamw" in said
    assert not any(word in said for word in ("tuning", "seed", "target", "centred", "None"))


def test_crowd_starts_with_the_twelve_best_and_its_front_is_of_all(
    visit: Visit, suite: dict[str, Any]
) -> None:
    page = visit("crowd")
    losses = {row["name"]: row["loss"]["median"] for row in suite["contestants"] if row["loss"]}
    best = sorted(losses, key=lambda name: losses[name])[:4]
    shown = _lines(page, "#chart-loss")
    assert shown == {f"{name}{end}" for name in best for end in ("", "-2", "-3")}
    front = page.locator("#chart-front .line.front").get_attribute("d")
    page.get_by_role("button", name="all", exact=True).click()
    page.get_by_label("show bitsandbytes:AdamW8bit in the charts", exact=True).uncheck()
    corners = page.locator("#chart-front .line.front").get_attribute("d").count("V")
    assert corners == front.count("V") >= 1


def test_what_a_chart_leaves_out_is_said_beneath_it(visit: Visit) -> None:
    page = visit("suite")
    chart = page.locator("#chart-loss")
    assert "Above the close-up: sgd 2.67" in chart.inner_text()
    chart.get_by_label("close-up").uncheck()
    assert "Above the close-up" not in chart.inner_text()


def test_only_keys_are_read_aloud(visit: Visit) -> None:
    page = visit("suite")
    spoken = page.locator("#spoken")
    page.locator("#chart-front .series[data-name=galore-torch] .marker").hover()
    assert page.locator("#tip").is_visible() and spoken.text_content() == ""
    page.locator("#chart-speed svg.plot").focus()
    page.keyboard.press("End")
    assert "tokens/s" in spoken.text_content()
    assert page.locator("#tip").get_attribute("role") is None


def test_levels_too_close_for_a_name_each_share_one(visit: Visit) -> None:
    page = visit("hostile runs")
    rules = page.locator("#chart-peak path.rule.planned")
    assert rules.count() == 6
    names = page.locator("#chart-peak text.tick.planned").all_text_contents()
    assert names == ["planned 440 MiB"]
