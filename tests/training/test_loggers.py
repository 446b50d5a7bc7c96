"""Metrics to other programs, where they are asked for and installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

import pytest

from scrimp.base.errors import MissingExtraError
from scrimp.training.loggers import open_loggers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.training.conftest import Lab


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_refused_with_its_install_line(
    lab: Lab, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what the import system itself does for "not there"
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else real(module))
    with pytest.raises(MissingExtraError, match=rf"--log {name} needs .*pip install 'scrimp\[{name}\]'"):
        lab.train(lab.recipe(log=name))
    assert not (lab.path / "run").exists()
    with pytest.raises(MissingExtraError):
        open_loggers((name,), lab.path, {})


def test_no_logger_is_the_default(tmp_path: Path) -> None:
    assert open_loggers((), tmp_path, {}) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra `tensorboard`")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|google|pkg_resources).*")
def test_tensorboard_holds_the_numbers_of_metrics_jsonl(lab: Lab) -> None:
    lab.train(lab.recipe(log="tensorboard", steps=4, evaluation__every=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(lab.path / "run" / "tensorboard"))
    events.Reload()
    for kind, names in (("train", ("loss", "lr", "grad_norm")), ("eval", ("eval_loss", "bits_per_byte"))):
        rows = lab.rows(kind=kind)
        for name in names:
            scalars = events.Scalars(name)
            assert [scalar.step for scalar in scalars] == [row["step"] for row in rows]
            # TensorBoard keeps fp32.
            assert [scalar.value for scalar in scalars] == pytest.approx(
                [row[name] for row in rows], rel=1e-6
            )


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra `tensorboard`")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|google|pkg_resources).*")
def test_a_logger_changes_no_number(lab: Lab) -> None:
    lab.train(lab.recipe(), "without")
    lab.train(lab.recipe(log="tensorboard"), "with")
    assert lab.rows("with") == lab.rows("without") and lab.weights("with") == lab.weights("without")
