"""`scrimp report`: one page and one table from the folders of runs, and nothing in its way overwritten."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scrimp.report.run_document import run_document

Cli = Callable[..., Any]
Refused = Callable[..., str]


def _embedded(page: Path) -> dict[str, Any]:
    """Return the document inside a page."""
    found = re.search(r'<script id="document" type="application/json">(.*?)</script>', page.read_text(), re.S)
    assert found
    document: dict[str, Any] = json.loads(found[1])
    return document


@pytest.fixture
def other(run: Path) -> Path:
    """Return a second run beside the first, at another learning rate."""
    folder = Path(shutil.copytree(run, run.with_name("other")))
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["optimizer"]["lr"] = 0.125
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture
def suite(here: Path) -> Path:
    """Return a folder as `scrimp bench` leaves it."""
    made = runpy.run_path(str(Path(__file__).parents[1] / "report" / "suite_document.py"))
    (here / "suite").mkdir()
    (here / "suite" / "bench.json").write_text(json.dumps(made["suite_document"]()))
    return here / "suite"


# What it writes


def test_a_run_s_page_lies_in_its_folder_and_the_table_has_its_last_numbers(cli: Cli, run: Path) -> None:
    outcome = cli("report", "run")
    assert outcome.code == 0, outcome.err
    assert _embedded(run / "report.html")["runs"][0]["name"] == "run"
    assert outcome.out.splitlines()[-1] == f"report: {Path('run') / 'report.html'}"
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    error = (end["predicted_bytes"] - end["peak_bytes"]) / end["peak_bytes"]
    for shown in (end["loss"], end["eval_loss"], end["bits_per_byte"]):
        assert f" {shown:.4f} " in outcome.out
    assert f"{error:+.1%}" in outcome.out
    assert "what differs" not in outcome.out


def test_several_runs_share_a_page_here_and_what_differs_is_named(cli: Cli, run: Path, other: Path) -> None:
    outcome = cli("report", run, other)
    assert outcome.code == 0, outcome.err
    assert not (run / "report.html").exists() and not (other / "report.html").exists()
    document = _embedded(Path("report.html"))
    assert [found["name"] for found in document["runs"]] == ["run", "other"]
    (change,) = document["changes"]
    assert (change["field"], change["values"][1]) == ("optimizer.lr", 0.125)
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["what", "differs", "run", "other"] in lines
    assert any(line[:1] == ["optimizer.lr"] and line[-1] == "0.125" for line in lines)


def test_json_is_the_document_and_the_page_is_written_all_the_same(cli: Cli, run: Path) -> None:
    document = cli("report", run, "--out", "page.html", "--json").document
    made = run_document([run])
    assert document | {"made": ""} == json.loads(json.dumps(made)) | {"made": ""}
    assert Path("page.html").is_file()


def test_an_unfinished_run_is_shown_and_says_so(cli: Cli, run: Path) -> None:
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in whole[:2] if '"train"' in line))
    (run / "memory.json").unlink()
    shutil.rmtree(run / "model")
    outcome = cli("report", run)
    assert outcome.code == 0, outcome.err
    assert "(not finished)" in outcome.out
    assert "run: this run is not finished: 1 of 4 steps are done" in outcome.out


def test_a_report_replaces_a_report(cli: Cli, run: Path) -> None:
    assert cli("report", run).code == 0
    (run / "sample.txt").write_text("something else")
    assert cli("report", run).code == 0
    assert _embedded(run / "report.html")["runs"][0]["sample"] == "something else"


def test_a_report_in_a_run_s_folder_belongs_to_the_run(cli: Cli, run: Path, small: tuple[str, ...]) -> None:
    """It hinders neither going on nor starting anew, and a new run does not keep the old one's."""
    assert cli("report", run).code == 0
    assert cli("train", "--out", "run", "--resume", *small[4:6]).code == 0
    assert (run / "report.html").is_file()
    assert cli("train", *small, "--out", "run", "--overwrite").code == 0
    assert not (run / "report.html").exists()


def test_a_suite_has_a_page_too(cli: Cli, suite: Path) -> None:
    outcome = cli("report", suite)
    assert outcome.code == 0, outcome.err
    assert _embedded(suite / "report.html")["suite"] == "optimizers"
    assert "galore-torch" in outcome.out
    stored = json.loads((suite / "bench.json").read_text())
    assert cli("report", suite, "--json").document == stored


def test_a_report_needs_no_torch(run: Path) -> None:
    """What a command imports can be seen only where nothing was imported before: a process of its own."""
    code = "import sys\nfrom scrimp.cli import main\nsys.argv = ['scrimp', 'report', 'run']\n"
    code += "try:\n    main()\nfinally:\n    print(*({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run.parent, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert (run / "report.html").is_file()


# What it refuses


def test_what_is_no_report_is_replaced_only_when_told_to(cli: Cli, refused: Refused, run: Path) -> None:
    mine = run / "report.html"
    mine.write_text("<p>my own page</p>")
    assert "this file is no report; choose another --out, or replace it by --overwrite" in refused(
        "report", run
    )
    assert cli("report", run, "--overwrite").code == 0
    assert _embedded(mine)


@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_no_run_is_refused(refused: Refused, here: Path, as_json: bool) -> None:
    (here / "empty").mkdir()
    assert "nowhere: there is no such folder; name a run's folder" in refused(
        "report", "nowhere", as_json=as_json
    )
    assert "empty: this folder holds no run" in refused("report", "empty", as_json=as_json)


def test_a_run_without_a_step_is_refused(refused: Refused, run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    assert "no step of this run is written there yet" in refused("report", run)


def test_a_run_named_twice_is_refused(refused: Refused, run: Path) -> None:
    assert "is the same run as run" in refused("report", "run", f"..{'/'}{run.parent.name}/run")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("missing/report.html", "there is no folder missing; make it first"),
        ("report.pdf", "its name must end in .html"),
        ("folder.html", "this is a folder; name a file in it"),
    ],
)
def test_a_place_for_no_page_is_refused(refused: Refused, run: Path, out: str, said: str) -> None:
    (run.parent / "folder.html").mkdir()
    assert f"--out {Path(out)}: " in (found := refused("report", run, "--out", out))
    assert said in found


def test_a_suite_stands_alone_and_must_be_whole(refused: Refused, run: Path, suite: Path) -> None:
    assert "which has a page of its own: name it alone" in refused("report", run, suite)
    for damage in ("{", "[]", '{"kind": "runs"}'):
        (suite / "bench.json").write_text(damage)
        assert "bench.json: this is no suite" in refused("report", suite)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.pop("job"),
        lambda document: document.pop("contestants"),
        lambda document: document["contestants"].append(1),
        lambda document: document["contestants"][0].pop("status"),
        lambda document: document["contestants"][0].update(loss="low"),
        lambda document: document["protocol"].pop("trials"),
        lambda document: document["environment"].pop("device_name"),
    ],
)
def test_a_damaged_suite_is_a_sentence_and_no_page(
    refused: Refused, suite: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    document = json.loads((suite / "bench.json").read_text())
    damage(document)
    (suite / "bench.json").write_text(json.dumps(document))
    assert "bench.json: this file is damaged" in refused("report", suite)
    assert not (suite / "report.html").exists()


def test_no_run_at_all_is_refused(refused: Refused) -> None:
    assert "Missing argument 'RUN...'" in refused("report")
