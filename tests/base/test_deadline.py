"""An answer in time, or none."""

from __future__ import annotations

import threading
import time

import pytest

from scrimp.base.deadline import within


def test_an_answer_in_time_is_returned_and_an_error_raised() -> None:
    assert within(5, lambda: None) is None
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


def test_a_silent_question_is_given_up() -> None:
    released = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        within(0.1, lambda: released.wait(20))
    assert time.monotonic() - began < 5
    released.set()
