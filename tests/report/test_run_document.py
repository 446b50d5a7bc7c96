"""Runs as data: what the files of a run say, nothing else, whatever state a run was left in."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from scrimp.base.errors import ScrimpError
from scrimp.build import inspect
from scrimp.data import byte_tokenizer
from scrimp.recipe import fields, parse
from scrimp.report.lines import LineReporter
from scrimp.report.page import page
from scrimp.report.run_document import (
    AVERAGED,
    LEAST_POINTS,
    POINTS,
    WATCHED,
    averaged,
    run_document,
    thinned,
)
from scrimp.training.metrics import Metrics, MetricsFile
from scrimp.training.run import execute
from scrimp.training.start import choose_start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run; it is to be copied, not changed."""
    root = tmp_path_factory.mktemp("runs")
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=264, max_position_embeddings=64, **widths).save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    (root / "text.txt").write_text("a text to learn from, again and again\n" * 60)
    numbers = {"steps": 4, "batch": 2, "micro_batch": 1, "seq": 16, "threads": 1, "memory": "8GiB"}
    recipe = parse({"model": str(root / "tiny"), "data": str(root / "text.txt"), **numbers})
    start = choose_start(recipe, out=root / "run", resume=False)
    with (root / "log").open("w") as log:
        return execute(start, inspect(recipe, cache=root / "cache"), LineReporter(log)).out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the finished run, with fields of its recipe changed."""

    def make(name: str = "run", **changes: Any) -> Path:
        run = Path(shutil.copytree(finished, tmp_path / name))
        tree = yaml.safe_load((run / "recipe.yaml").read_text())
        for path, value in changes.items():
            *sections, last = path.split("__")
            place = tree
            for section in sections:
                place = place[section]
            place[last] = value
        (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
        return run

    return make


def _rows(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def _lengthen(run: Path, count: int) -> list[dict[str, Any]]:
    """Write metrics of many steps in a run's folder, one of them not finite, and return the rows."""
    draw = random.Random(0)
    (run / "metrics.jsonl").unlink()
    rows = []
    with MetricsFile(run / "metrics.jsonl") as file:
        for step in range(1, count + 1):
            metrics = Metrics(
                step=step,
                tokens=step * 32,
                loss=float("nan") if step == 3 else draw.gauss(3, 1),
                lr=1e-3,
                grad_norm=draw.expovariate(1),
                tokens_per_s=draw.lognormvariate(8, 1),
                peak_bytes=10**9 + step,
                predicted_bytes=10**9,
            )
            rows.append(file.write("train", metrics))
    return rows


# What is in it


def test_a_document_says_what_the_files_of_a_run_say(finished: Path) -> None:
    document = run_document([finished])
    (run,) = document["runs"]
    train, found = _rows(finished, "train"), _rows(finished, "eval")
    averages = {f"{name}_average" for name in AVERAGED}
    kept = {name: values for name, values in run["train"].items() if name not in averages}
    assert kept == {name: [row[name] for row in train] for name in kept}
    assert run["eval"] == {name: [row[name] for row in found] for name in run["eval"]}
    assert run["train"]["step"] == [1, 2, 3, 4] and len(found) > 0
    assert {*kept} == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_bytes"}
    assert {*run["train"]} == {*kept, *averages}
    assert run["peak_bytes"] == max(row["peak_bytes"] for row in train)
    assert {*run["eval"]} == {"step", "tokens", "eval_loss", "perplexity", "bits_per_byte"}
    assert run["tokens_per_s"] == median(row["tokens_per_s"] for row in train)
    assert run["predicted_bytes"] == train[-1]["predicted_bytes"]
    assert run["budget_bytes"] == 8 * 2**30
    assert (run["finished"], run["steps"], run["notes"]) == (True, 4, [])
    assert run["recipe"].keys() == fields().keys()
    assert run["sample"] == (finished / "sample.txt").read_text() != ""
    stored = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert run["recorded"] == stored["recorded"]
    assert run["recipe"]["optimizer.betas"] == stored["optimizer"]["betas"]
    assert (document["kind"], document["title"], document["changes"]) == ("runs", "Run run", [])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["made"])


def test_the_moments_are_those_of_the_ledgers(finished: Path) -> None:
    (run,) = run_document([finished])["runs"]
    stored = json.loads((finished / "memory.json").read_text())
    for basis in ("predicted", "measured"):
        totals = [(moment["name"], sum(moment["terms"].values())) for moment in run["memory"][basis]]
        assert totals == [(moment["name"], moment["total"]) for moment in stored[basis]["moments"]]
        assert len(totals) > 3


def test_the_parameters_are_those_of_the_model(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    (run,) = run_document([finished])["runs"]
    assert run["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_document_is_plain_json_without_nan(copy: Callable[..., Path]) -> None:
    run = copy()
    _lengthen(run, 5)
    document = run_document([run])
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["runs"][0]["train"]["loss"][2] is None


# States of a run


def test_a_killed_run_shows_what_it_did(copy: Callable[..., Path]) -> None:
    """A kill leaves half a line, and neither memory.json nor a sample nor a model."""
    run = copy()
    for name in ("checkpoints", "model"):
        shutil.rmtree(run / name)
    for name in ("memory.json", "sample.txt"):
        (run / name).unlink()
    whole = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    second = next(number for number, line in enumerate(whole) if b'"step": 2' in line)
    (run / "metrics.jsonl").write_bytes(b"".join(whole[: second + 1]) + whole[-1][:30])
    (found,) = run_document([run])["runs"]
    assert found["train"]["step"] == [1, 2]
    assert (found["finished"], found["steps"]) == (False, 2)
    assert found["notes"] == ["this run is not finished: 2 of 4 steps are done"]
    assert [found[name] for name in ("memory", "sample", "parameters")] == [None, None, None]


@pytest.mark.parametrize("metrics", [None, b"", b'{"kind": "tra'])
def test_a_run_without_a_step_has_nothing_to_show(copy: Callable[..., Path], metrics: bytes | None) -> None:
    run = copy()
    (run / "metrics.jsonl").unlink()
    if metrics is not None:
        (run / "metrics.jsonl").write_bytes(metrics)
    with pytest.raises(ScrimpError, match=r"metrics\.jsonl: no step of this run is written there yet"):
        run_document([run])


@pytest.mark.parametrize("there", [True, False])
def test_what_is_no_run_is_told_what_a_run_holds(tmp_path: Path, there: bool) -> None:
    said = "this folder holds no run" if there else "there is no such folder"
    path = tmp_path if there else tmp_path / "nowhere"
    with pytest.raises(
        ScrimpError, match=f"{re.escape(str(path))}: {said}; .*recipe.yaml and a metrics.json"
    ):
        run_document([path])


def test_skipped_steps_are_noted(copy: Callable[..., Path]) -> None:
    run = copy()
    text = (run / "metrics.jsonl").read_text().replace('"skipped": 0', '"skipped": 2')
    (run / "metrics.jsonl").write_text(text)
    assert run_document([run])["runs"][0]["notes"] == ["2 steps with a non-finite gradient were skipped"]


HUGE = (2**62).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("recipe.yaml", b"{"),
        ("recipe.yaml", b"optimizer: {lrr: 1}"),
        ("metrics.jsonl", b"{}\n"),
        ("memory.json", b"{"),
        ("memory.json", b"[]"),
        ("memory.json", b'{"predicted": {}, "measured": {}}'),
        ("sample.txt", b"\xff"),
        ("model/model.safetensors", b""),
        ("model/model.safetensors", HUGE),
        ("model/model.safetensors", b"\x02\0\0\0\0\0\0\0[]"),
    ],
)
def test_a_damaged_file_is_named(copy: Callable[..., Path], name: str, damage: bytes) -> None:
    run = copy()
    (run / name).write_bytes(damage)
    with pytest.raises(ScrimpError, match=rf"^{re.escape(str(run / name))}\b") as caught:
        run_document([run])
    assert "\n" not in str(caught.value)


# Several runs


def test_changes_are_the_fields_that_differ_and_no_others(copy: Callable[..., Path]) -> None:
    runs = [
        copy("a", optimizer__lr=0.5, recorded__torch="1.0", recorded__fixed_bytes=1),
        copy("b", optimizer__lr=0.25, recorded__torch="1.0", recorded__fixed_bytes=2),
        copy("c", optimizer__lr=0.5, recorded__torch="2.0", recorded__gpu="Abacus"),
    ]
    assert run_document(runs)["changes"] == [
        {"field": "optimizer.lr", "values": [0.5, 0.25, 0.5]},
        {"field": "recorded.torch", "values": ["1.0", "1.0", "2.0"]},
        {"field": "recorded.gpu", "values": [None, None, "Abacus"]},
    ]


def test_runs_of_one_name_are_told_apart(copy: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    document = run_document([copy("a/run"), copy("b/run"), copy("c")])
    assert [run["name"] for run in document["runs"]] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert document["title"] == f"Runs a/run, b/run and {tmp_path.name}/c"


def test_one_run_under_two_names_is_refused(copy: Callable[..., Path], tmp_path: Path) -> None:
    run = copy()
    (tmp_path / "link").symlink_to(run)
    for other in (run, tmp_path / "x" / ".." / "run", tmp_path / "link"):
        with pytest.raises(ScrimpError, match=re.escape(f"{other} is the same run as {run}")):
            run_document([run, other])


# Thinning


def test_a_thinned_curve_keeps_its_ends_and_the_extremes_of_every_stretch() -> None:
    draw = random.Random(1)
    count, limit = 1003, 80
    columns: dict[str, list[Any]] = {
        name: [None if draw.random() < 0.02 else draw.gauss(0, 1) for _ in range(count)] for name in WATCHED
    }
    columns["step"] = list(range(count))
    found = thinned(columns, limit)
    kept = found["step"]
    assert len(kept) <= limit
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert kept == sorted(set(kept))
    for name, values in found.items():  # what is kept are points, not averages
        assert values == [columns[name][step] for step in kept]
    stretches = (limit - 2) // (3 * len(WATCHED))
    assert stretches > 5
    lost = 0
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        for name in WATCHED:
            inside = [columns[name][step] for step in stretch]
            shown = [columns[name][step] for step in kept if step in stretch]
            ends = [(min(finite), max(finite)) for some in (shown, inside) if (finite := _finite(some))]
            assert ends[0] == ends[1]
            first = next((step for step in stretch if columns[name][step] is None), None)
            assert first is None or first in kept
            lost += first is not None
    assert lost > 10  # so that a stretch with a null was looked at


def _finite(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def test_a_stretch_of_nulls_alone_keeps_its_first() -> None:
    columns: dict[str, list[Any]] = {"step": list(range(100)), "loss": [1.0] * 40 + [None] * 60}
    found = thinned(columns, 14)
    assert 40 in found["step"] and found["step"][-1] == 99 and len(found["step"]) <= 14


def test_an_average_is_of_all_steps_to_both_sides() -> None:
    """Against the definition: weights fall with the distance; a null neither counts nor is filled."""
    draw = random.Random(2)
    steps = list(range(1, 301))
    values: list[float | None] = [5 - step / 100 + draw.gauss(0, 1) for step in steps]
    values[7] = None
    found = averaged(steps, values)
    reach = 0.01 * 299
    for at in (0, 6, 150, 299):
        pairs = [
            (math.exp(-abs(step - steps[at]) / reach), value)
            for step, value in zip(steps, values, strict=True)
            if value is not None
        ]
        wanted = sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)
        assert found[at] == pytest.approx(wanted, rel=1e-9)
    assert found[7] is None
    assert averaged([], []) == [] and averaged([1], [None]) == [None]


def test_the_average_of_a_thinned_run_is_that_of_all_its_steps(copy: Callable[..., Path]) -> None:
    run = copy()
    rows = _lengthen(run, 3 * POINTS)
    (found,) = run_document([run])["runs"]
    whole = averaged([row["step"] for row in rows], [row["loss"] for row in rows])
    shown = found["train"]["step"]
    assert len(shown) < len(rows)
    assert found["train"]["loss_average"] == [whole[step - 1] for step in shown]


def test_the_peak_is_of_all_rows_of_a_run_that_was_resumed(copy: Callable[..., Path]) -> None:
    run = copy()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0]["peak_bytes"] = 7 * max(row["peak_bytes"] for row in rows)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = run_document([run])["runs"]
    assert found["peak_bytes"] == rows[0]["peak_bytes"] > found["train"]["peak_bytes"][-1]


def test_on_cuda_a_prediction_is_without_the_context(copy: Callable[..., Path]) -> None:
    here = copy("here", recorded__fixed_bytes=1000)
    there = copy("there", recorded__fixed_bytes=1000, device="cuda")
    cpu, cuda = run_document([here, there])["runs"]
    assert cuda["predicted_bytes"] == cpu["predicted_bytes"] - 1000
    assert (cpu["peak_of"], cuda["peak_of"]) == ("process", "allocator")


def test_many_long_runs_make_a_page_of_less_than_two_megabytes(copy: Callable[..., Path]) -> None:
    first = copy("run-0")
    _lengthen(first, 2 * POINTS)
    text = (first / "metrics.jsonl").read_text()
    other = json.dumps({"eval_loss": 1.2345678, "perplexity": 3.4567891, "bits_per_byte": 2.3456789})[1:]
    evaluations = text.replace('"kind": "train"', '"kind": "eval"').replace("}\n", f", {other}\n")
    (first / "metrics.jsonl").write_text(text + evaluations)
    for name in ("checkpoints", "model"):
        shutil.rmtree(first / name)
    runs = [first, *(Path(shutil.copytree(first, first.with_name(f"run-{n}"))) for n in range(1, 20))]
    document = run_document(runs)
    lengths = {len(run[part]["step"]) for run in document["runs"] for part in ("train", "eval")}
    assert min(lengths) > LEAST_POINTS
    size = len(page(document).encode())
    assert 500_000 < size < 2_000_000


def test_a_short_curve_is_whole() -> None:
    columns: dict[str, list[Any]] = {"step": [1, 2, 3], "loss": [1.0, 1.0, 1.0]}
    assert thinned(columns, 3) == columns
    assert thinned({"step": [], "loss": []}) == {"step": [], "loss": []}


def test_a_long_run_is_thinned_and_says_so_but_not_its_median(copy: Callable[..., Path]) -> None:
    run = copy()
    rows = _lengthen(run, 3 * POINTS)
    (found,) = run_document([run])["runs"]
    shown = found["train"]["step"]
    assert POINTS / 2 < len(shown) <= POINTS
    assert 3 in shown  # where the loss was not finite
    assert found["tokens_per_s"] == median(row["tokens_per_s"] for row in rows)
    assert f"the curves show {len(shown):,} of 6,000 steps" in found["notes"][-1]
    for name in ("loss", "grad_norm", "tokens_per_s"):
        values = [row[name] for row in rows if row[name] is not None]
        kept = [value for value in found["train"][name] if value is not None]
        assert (min(kept), max(kept)) == (min(values), max(values))
