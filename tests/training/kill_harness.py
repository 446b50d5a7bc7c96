"""Run scrimp and kill it inside a save.

    python kill_harness.py N -- train --steps 60 --out DIR

The process sends itself SIGKILL in the N-th operation on a file or folder below one called
`checkpoints`: before the operation, or halfway through it where it is a write. With N = 0 nothing
is killed, and the last line on standard error says how many operations there were.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scrimp.base import files


def install(fatal: int) -> Callable[[], int]:
    """Put the killer in front of every primitive of `scrimp.base.files`.

    Args:
        fatal: The operation to die in, from 1; 0 for none.

    Returns:
        A function that tells how many operations there have been.
    """
    count = 0

    def mortal(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def operation(*arguments: Any) -> Any:
            nonlocal count
            first = arguments[0]
            path = first if isinstance(first, Path) else Path(first.name)
            if "checkpoints" not in path.parts:
                return real(*arguments)
            count += 1
            if count == fatal:
                if name == "write":
                    real(first, arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return operation

    for name in files.PRIMITIVES:
        setattr(files, name, mortal(name, getattr(files, name)))
    return lambda: count


def main() -> None:
    fatal, separator, *arguments = sys.argv[1:]
    if separator != "--":
        raise SystemExit("usage: python kill_harness.py N -- SCRIMP_ARGUMENT...")
    operations = install(int(fatal))
    from scrimp.cli import main as scrimp_main  # late: whatever it imports finds the killer in place

    sys.argv = ["scrimp", *arguments]
    try:
        scrimp_main()
    finally:
        print(f"operations: {operations()}", file=sys.stderr)


if __name__ == "__main__":
    main()
