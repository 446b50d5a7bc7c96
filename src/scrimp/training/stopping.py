"""Ctrl-C and SIGTERM: finish the step, save, say how to go on.

Before the first step a signal stops at once, since there is nothing to save. During the steps the
first one is remembered and the loop asks for it between steps; a second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from scrimp.base import platform
from scrimp.base.errors import Interrupted


class Stopper:
    """What the loop asks between two steps.

    Attributes:
        requested: The signal that asked the run to stop, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._training = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the stop signals, and give them back at the end.

        Only the main thread can; elsewhere the caller's own handling stays.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in platform.stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # None: it was not set by Python, and cannot be set by it either
                    signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Remember a signal instead of stopping at once."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._training and self.requested is None:
            self.requested = number
            return
        again = "stopped at once" if self._training else "interrupted outside the steps"
        raise Interrupted(again, signal_number=number, out=None)
