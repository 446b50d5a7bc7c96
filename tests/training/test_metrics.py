"""`metrics.jsonl`: whole lines, the named keys, and what a kill or a full disk leaves of them."""

from __future__ import annotations

import json
import math
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.training.evaluate import Evaluation
from scrimp.training.metrics import Metrics, MetricsFile, read_metrics
from scrimp.training.progress import Progress

if TYPE_CHECKING:
    from tests.training.conftest import Lab

LINE = Metrics(
    step=3,
    tokens=192,
    loss=2.5,
    lr=1e-3,
    grad_norm=0.7,
    tokens_per_s=1e3,
    peak_bytes=10**9,
    predicted_bytes=9 * 10**8,
)
KEYS = ["kind", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_bytes", "predicted_bytes"]
EVALUATION_KEYS = ["eval_loss", "perplexity", "bits_per_byte", "eval_tokens", "eval_bytes"]


def test_a_runs_lines_have_the_promised_kinds_and_keys(lab: Lab) -> None:
    lab.train(lab.recipe(steps=3, checkpoint__every=2, evaluation__every=2))
    lines = (lab.path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kinds = ["train", "train", "eval", "checkpoint", "train", "eval", "checkpoint", "end"]
    assert [row["kind"] for row in rows] == kinds
    assert [row["step"] for row in rows] == [
        1,
        2,
        2,
        2,
        3,
        3,
        3,
        3,
    ]  # the last step has all, whatever the cadence
    for row in rows:
        more = {"eval": EVALUATION_KEYS, "end": [*EVALUATION_KEYS, "skipped"]}.get(row["kind"], [])
        assert list(row) == KEYS + more
        assert row["predicted_bytes"] > 0 and math.isfinite(row["loss"])


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        first = file.write("train", LINE)
        second = file.write("eval", LINE, {"eval_loss": 2.0})
    assert read_metrics(path) == [first, second]
    assert second["eval_loss"] == 2.0 and first["loss"] == 2.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write("train", replace(LINE, loss=value), {"perplexity": value})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row["loss"] is None and row["perplexity"] is None and row["grad_norm"] == 0.7


def test_a_line_is_in_the_file_once_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for count in (1, 2, 3):
            file.write("train", LINE)
            assert len(read_metrics(path)) == count
            assert file.synced_length() == path.stat().st_size


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        row = file.write("train", LINE)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-10])
    assert read_metrics(path) == [row]


@pytest.mark.parametrize(
    "damage", [b"\0" * 40, b"\xff", b"{", b"[1]", b"{}", b'{"kind": "train"}', b'{"kind": "tarin"}', b""]
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write("train", LINE)
    path.write_bytes(path.read_bytes() + damage + b"\n")
    with pytest.raises(ScrimpError, match=rf"^{re.escape(str(path))}:2: this line is damaged"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScrimpError, match=r"metrics\.jsonl: the metrics cannot be read \(No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_resumed_file_is_cut_back_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        first = file.write("train", LINE)
        length = file.synced_length()
        file.write("train", replace(LINE, step=4))
    with MetricsFile(path, length=length) as file:
        second = file.write("train", replace(LINE, step=5))
    assert read_metrics(path) == [first, second]


def test_a_file_shorter_than_its_checkpoint_says_is_not_filled_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, length=10_000) as file:
        assert file.synced_length() == 0
        row = file.write("train", LINE)
    assert read_metrics(path) == [row]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """The system itself refuses the write: a limit on file size is the nearest thing to a full disk."""
    path = tmp_path / "metrics.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(ScrimpError, match=r"no space left to write .*metrics\.jsonl"),
        MetricsFile(path) as file,
    ):
        first = file.write("train", LINE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        try:
            file.write("train", LINE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(path) == [first]


def test_progress_survives_json_whatever_its_numbers_are() -> None:
    found = Evaluation(
        eval_loss=math.nan, perplexity=math.inf, bits_per_byte=0.1 + 0.2, eval_tokens=5, eval_bytes=4
    )
    progress = Progress(
        step=3, tokens=192, skipped=1, last=replace(LINE, loss=-math.inf), evaluation=found, evaluated_step=3
    )
    again = Progress.from_plain(json.loads(json.dumps(progress.to_plain(), allow_nan=False)))
    assert repr(again) == repr(progress)  # repr, for NaN is not equal to itself
    assert Progress.from_plain(Progress().to_plain()) == Progress()
