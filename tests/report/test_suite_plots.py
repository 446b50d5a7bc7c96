"""A suite's pictures: one file each, the same bytes for the same document, and only who has a result."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from tests.report.suite_document import TOKENS, suite_document

from scrimp.base.errors import MissingExtraError
from scrimp.report.labels import front, place_names, spread_out
from scrimp.report.suite_draw import draw_loss, over_seeds
from scrimp.report.suite_plots import fingerprint, names, write_plots

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs the extra `plots`"
)


def _svg(document: dict[str, Any], folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return {path.stem: path.read_text("utf-8") for path in write_plots(document, folder, kinds=("svg",))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the pictures of the document as it is."""
    return _svg(suite_document(), tmp_path_factory.mktemp("drawn"))


def _contestant(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in document["contestants"] if one["name"] == name)


@needs_matplotlib
def test_every_picture_is_written_as_png_and_svg(tmp_path: Path) -> None:
    document = suite_document() | {"suite": "memory"}
    written = write_plots(document, tmp_path, prefix="bench-")
    assert [path.name for path in written] == ["bench-memory.png", "bench-memory.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_the_same_document_gives_the_same_bytes(tmp_path: Path, drawn: dict[str, str]) -> None:
    assert list(drawn) == ["loss", "memory-loss", "memory", "speed"]
    assert _svg(suite_document(), tmp_path) == drawn
    assert not any(re.search(r"20\d\d-\d\d-\d\d|Matplotlib v", text) for text in drawn.values())


@needs_matplotlib
def test_another_document_gives_other_pictures(tmp_path: Path, drawn: dict[str, str]) -> None:
    other = _svg(suite_document(seed=1) | {"busy": True}, tmp_path)
    assert all(other[name] != text for name, text in drawn.items())
    assert all("the machine was busy" in text for text in other.values())
    assert not any("the machine was busy" in text for text in drawn.values())


@needs_matplotlib
def test_a_picture_names_its_document_and_those_who_have_a_result(drawn: dict[str, str]) -> None:
    document = suite_document()
    for name, text in drawn.items():
        assert fingerprint(document) in text, name
        for one in document["contestants"]:
            assert (f">{one['name']}" in text) == (one["status"] in ("done", "partial")), (name, one["name"])
        # A browser fetches nothing for it.
        assert re.findall(r'(?:href|src)="(?!#)|@import|url\((?!#)', text) == [], name


@needs_matplotlib
def test_a_diverged_or_broken_run_does_not_spoil_the_others(tmp_path: Path) -> None:
    document = suite_document()
    for curve in _contestant(document, "fira")["curves"]:
        curve["eval"][-1] = None
    lion = _contestant(document, "lion-pytorch")
    lion["loss"] = {"median": 9.5, "lowest": 9.4, "highest": 9.6, "all": [9.4, 9.5, 9.6]}
    for curve in lion["curves"]:
        curve["eval"] = [9.5] * len(curve["eval"])
    pictures = _svg(document, tmp_path)
    assert ">lion-pytorch  9.500<" in pictures["loss"]
    assert ">fira  1.8" in pictures["loss"]
    assert ">lion-pytorch  9.5<" in pictures["memory-loss"]
    ticks = {float(text) for text in re.findall(r">(\d\.\d+)<", pictures["memory-loss"])}
    assert ticks and max(ticks) < 2.2


@needs_matplotlib
def test_a_line_ends_where_its_median_seed_diverged_and_has_no_loss(tmp_path: Path) -> None:
    document = suite_document()
    lion, fira = (_contestant(document, name) for name in ("lion-pytorch", "fira"))
    lion["loss"] = None
    for curve in lion["curves"][1:]:
        curve |= {"loss": None, "eval": [*curve["eval"][:8], *[None] * (len(curve["eval"]) - 8)]}
    fira["curves"][0] |= {"loss": None, "eval": [fira["curves"][0]["eval"][0], *[None] * 20]}
    assert len(over_seeds(lion["curves"])[0]) == 8
    assert len(over_seeds(fira["curves"])[0]) == len(fira["curves"][0]["eval"])
    rest = [curve["eval"][-1] for curve in fira["curves"][1:]]
    assert over_seeds(fira["curves"])[2][-1] == max(rest)  # the middle of two and one above them
    pictures = _svg(document, tmp_path)
    assert ">lion-pytorch  diverged<" in pictures["loss"]
    assert ">lion-pytorch" not in pictures["memory-loss"]


@needs_matplotlib
def test_pictures_are_drawn_where_everyone_diverged(tmp_path: Path) -> None:
    document = suite_document()
    for one in document["contestants"]:
        one["loss"] = None
        for curve in one["curves"]:
            curve |= {"loss": None, "eval": [*curve["eval"][:3], *[None] * (len(curve["eval"]) - 3)]}
    assert _svg(document, tmp_path)["loss"].count("  diverged<") == 10


@needs_matplotlib
def test_a_line_that_ends_early_since_its_seconds_were_over_is_named_at_its_end(tmp_path: Path) -> None:
    document = suite_document()
    document["protocol"]["seconds"] = 60.0
    lion = _contestant(document, "lion-pytorch")
    for curve in lion["curves"]:
        curve |= {"eval_tokens": curve["eval_tokens"][:6], "eval": [*curve["eval"][:5], 1.955]}
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 5))
    draw_loss(figure, document, [one for one in document["contestants"] if one["curves"]])
    tail = figure.axes[1]
    spots = {text.get_text().split()[0]: text.xy for text in tail.texts if "target" not in text.get_text()}
    assert spots["lion-pytorch"] == (lion["curves"][0]["eval_tokens"][-1], 1.955)
    assert spots["fira"][0] == TOKENS
    (left, right), (low, high) = tail.get_xlim(), tail.get_ylim()
    assert all(left <= x <= right and low <= y <= high for x, y in spots.values())
    assert "tokens," not in _svg(document, tmp_path)["loss"]  # they are not the same for all


@needs_matplotlib
def test_a_suite_of_speed_alone_has_one_picture_that_names_no_tokens(tmp_path: Path) -> None:
    document = suite_document() | {"suite": "speed"}
    document["job"] |= {"tokens": None, "steps": None}
    (text,) = _svg(document, tmp_path).values()
    assert ">llama-1m, fp32, Abacus 9000<" in text


def test_a_picture_that_nobody_has_anything_for_is_not_drawn() -> None:
    document = suite_document()
    assert names(document) == ["loss", "memory-loss", "memory", "speed"]
    for one in document["contestants"]:
        one |= {"curves": [], "loss": None, "memory": None}
    assert names(document) == ["speed"]
    assert names(suite_document() | {"suite": "memory"}) == ["memory"]


def test_without_matplotlib_the_install_line_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: None if module == "matplotlib" else real(module)
    )
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'scrimp[plots]'")):
        write_plots(suite_document(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_depends_on_values_alone() -> None:
    document = suite_document()
    assert fingerprint(dict(reversed(document.items()))) == fingerprint(document)
    assert fingerprint(document | {"seconds": 1.0}) != fingerprint(document)


def test_the_front_holds_those_whom_nobody_matches_in_both() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.0), (2.0, 4.0), (4.0, 1.0)]
    assert front(points) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]


def test_names_are_pushed_apart_in_their_order_and_stay_within_bounds() -> None:
    values = [1.0, 0.5, 0.52, 0.51, 0.0, 0.99]
    places = spread_out(values, 0.1, 0.0, 1.0)
    ordered = [place for _, place in sorted(zip(values, places, strict=True))]
    assert all(b - a >= 0.1 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert min(places) >= 0.0 and max(places) <= 1.0 + 1e-9
    assert spread_out([0.2, 0.8], 0.1, 0.0, 1.0) == [0.2, 0.8]  # where there is room nothing moves


def test_names_of_crowded_points_do_not_overlap() -> None:
    spots = [(200.0 + 12 * n, 200.0 + 7 * (n % 3)) for n in range(6)]
    boxes = place_names(
        spots, [(60.0, 12.0)] * 6, around=[], inside=(0, 0, 500, 400), reaches=(12, 25, 45, 70)
    )
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
