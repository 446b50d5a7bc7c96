"""An answer in time, or none: for questions to a network that may swallow them.

A library's own timeout counts for each address that a name stands for, and not for the look-up of
the name, so that a firewall which drops packets can hold a program for a minute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, ask: Callable[[], T]) -> T:
    """Return what `ask` returns, in a thread of its own.

    Raises:
        TimeoutError: It took longer; the thread goes on, and ends with the program at the latest.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]
