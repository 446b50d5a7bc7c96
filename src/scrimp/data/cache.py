"""The cache folder: where it is, and how a folder gets into it whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from scrimp.base.files import explained
from scrimp.base.platform import fsync_directory

_ABANDONED_S = 6 * 3600


def cache_folder(platform: str = sys.platform) -> Path:
    """Return this platform's folder for scrimp's caches; it need not exist yet.

    `XDG_CACHE_HOME` decides where it is set. Otherwise it lies in `%LOCALAPPDATA%` on Windows,
    `~/Library/Caches` on macOS and `~/.cache` elsewhere.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "scrimp"
    if platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "scrimp" / "Cache"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "scrimp"
    return Path.home() / ".cache" / "scrimp"


def cache_bytes(cache: Path) -> int:
    """Add up the sizes of all files in the cache."""
    return sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` at the end, at one stroke.

    Safe against other writers of the same folder: the first one to finish wins and the others
    throw theirs away. After an exception nothing is left. What a killed program left behind is
    removed once nobody has written to it for hours.

    Raises:
        ScrimpError: The disk is full, or the cache folder may not be written to.
    """
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        draft = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            yield draft
            _adopt(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _adopt(draft: Path, target: Path) -> None:
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():  # no other writer was faster: the system's own reason
            raise
    fsync_directory(target.parent)


def _sweep(folder: Path) -> None:
    for draft in folder.glob(".*-*"):
        with contextlib.suppress(OSError):  # another program may be removing it right now
            written = max(entry.stat().st_mtime for entry in (draft, *draft.iterdir()))
            if time.time() - written > _ABANDONED_S:
                shutil.rmtree(draft, ignore_errors=True)
