"""The CPU allocator's own events: the truth that predictions are held against.

torch's profiler records every block that torch's CPU allocator hands out and takes back, what kernels
allocate inside included, and disturbs nothing that a dispatch mode would. It is slow and keeps every event,
so it is for tests and benchmarks, not for runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Events:
    """What the allocator did.

    Attributes:
        peak: Most bytes held at once, above those held at the start.
        left: Bytes held at the end, above those held at the start.
        changes: Every change in bytes, in order.
    """

    peak: int = 0
    left: int = 0
    changes: list[int] = field(default_factory=list)


@contextmanager
def allocator_events() -> Iterator[Events]:
    """Record the CPU allocator's events; they are there when the context has closed."""
    events = Events()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        yield events
    results = profiler.profiler.kineto_results
    found = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch._C._autograd.DeviceType.CPU
    ]
    for _, change in sorted(found, key=lambda entry: entry[0]):
        events.changes.append(change)
        events.left += change
        events.peak = max(events.peak, events.left)


def peak_of(program: Callable[[], object]) -> int:
    """Return the most bytes that a program held above what was held when it began."""
    with allocator_events() as events:
        program()
    return events.peak
