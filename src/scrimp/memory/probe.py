"""Which kernels allocate inside, found by machine.

Each operation of a program runs inside a profile of its own, and what the allocator held beyond the
outputs is compared with what `scrimp.memory.scratch` says. CI runs this over small models of several
families, so that a new version of torch that changes a kernel is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from scrimp.memory.allocator import allocator_events
from scrimp.memory.scratch import is_known, scratch_bytes
from scrimp.memory.tracker import tensors_in


@dataclass(frozen=True, slots=True)
class Finding:
    """What an operation held inside.

    Attributes:
        operation: Its name.
        inputs: Shapes and dtypes of its tensors.
        measured: Bytes at its peak beyond those left after it, by the allocator's events.
        declared: What `scratch_bytes` says.
        known: Whether it claims to know.
    """

    operation: str
    inputs: str
    measured: int
    declared: int
    known: bool


class Probe(TorchDispatchMode):
    """Profiles every operation by itself (some 3 ms each).

    Attributes:
        findings: Operations that held something inside, or were said to; one for each set of shapes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[tuple[str, str], Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        """Return what was found, the largest first."""
        return sorted(self._found.values(), key=lambda finding: -finding.measured)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation inside a profile."""
        kwargs = kwargs or {}
        inputs = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_in((args, kwargs)))
        with allocator_events() as events:
            out = func(*args, **kwargs)
        measured = events.peak - max(0, events.left)
        declared = scratch_bytes(func, args, out)
        if measured or declared:
            name = func._schema.name
            self._found[name, inputs] = Finding(name, inputs, measured, declared, is_known(func, args))
        return out


def unexplained(findings: Iterable[Finding], *, peak: int) -> list[Finding]:
    """Return the findings whose rule is missing or wrong.

    That is, off by more than a tenth of what was measured and by more than a thousandth of the peak.

    Args:
        findings: What a probe found.
        peak: The most bytes that the program held.
    """
    return [
        finding
        for finding in findings
        if finding.known
        and abs(finding.measured - finding.declared) > max(0.1 * finding.measured, 0.001 * peak)
    ]


def probe(program: Callable[[], object]) -> list[Finding]:
    """Run a program with every operation probed.

    Args:
        program: Runs a step on real CPU tensors, small ones: it takes some 3 ms an operation.
    """
    found = Probe()
    with found:
        program()
    return found.findings
