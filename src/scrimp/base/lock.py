"""One program at a time in a run's folder.

The lock belongs to an open file, so it goes when its process dies, however it dies. The file
itself stays: deleting it would let a third program lock another file of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from scrimp.base.errors import ScrimpError
from scrimp.base.files import explained


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep every other program out of `folder`, which must exist.

    Raises:
        ScrimpError: Another program has it, or the folder may not be written to.
    """
    path = folder / ".lock"
    lock = FileLock(path, timeout=0)
    with explained(path):
        try:
            lock.acquire()
        except Timeout as error:
            raise ScrimpError(
                f"another program is working in {folder}: wait for it or choose another --out"
            ) from error
    try:
        yield
    finally:
        lock.release()
