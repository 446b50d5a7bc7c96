"""Metrics to TensorBoard, Weights & Biases or trackio, where asked and installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from scrimp.base import extras


class Logger(Protocol):
    """Takes named numbers at a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at optimizer step `step`."""

    def close(self) -> None:
        """Write what is still held."""


class _TensorBoard:
    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        extras.require("tensorboard", extra="tensorboard", purpose="--log tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """Weights & Biases and trackio, which share one interface."""

    def __init__(self, module: str, out: Path, recipe: Mapping[str, Any]) -> None:
        tracker = extras.load(module, extra=module, purpose=f"--log {module}")
        settings = {"dir": str(out)} if module == "wandb" else {}
        self._run = tracker.init(project="scrimp", name=out.name, config=dict(recipe), **settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_MAKERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": lambda out, recipe: _Tracker("wandb", out, recipe),
    "trackio": lambda out, recipe: _Tracker("trackio", out, recipe),
}


def open_loggers(names: tuple[str, ...], out: Path, recipe: Mapping[str, Any]) -> list[Logger]:
    """Open the loggers of a run.

    Args:
        names: Those of `recipe.log`.
        out: The run's folder; its name is the run's.
        recipe: The recipe's values by dotted name, recorded with the run.

    Raises:
        MissingExtraError: One is not installed.
    """
    return [_MAKERS[name](out, recipe) for name in names]
