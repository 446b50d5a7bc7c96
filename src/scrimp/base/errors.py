"""What goes wrong by the user's hand, and what a run says when it is interrupted."""

from __future__ import annotations

from pathlib import Path


class ScrimpError(ValueError):
    """A mistake the user can mend: one sentence saying what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2. It is a
    `ValueError` so that a recipe's validators can raise it.
    """


class MissingExtraError(ScrimpError):
    """An optional package is needed and not installed; the message holds the install line."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs an optional package: pip install 'scrimp[{extra}]'")
        self.extra = extra


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal after it finished its step and saved a checkpoint.

    It derives from `KeyboardInterrupt` so that a notebook shows it as the interruption it is.
    """

    def __init__(self, message: str, *, signal_number: int, out: Path | None) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.out = out
