"""Files and folders that are either wholly there or not there at all.

Everything is written under a temporary name beside its place, synced, renamed, and the folder
synced. A program killed at any instant, or a machine that loses power, leaves the earlier state
or the new one. The temporary names:

    .partial-NAME   being written; worthless after a kill
    .old-NAME       a folder set aside while its successor takes its name: no system can swap two
                    folders everywhere, so for one instant this is the complete one
    .trash-NAME     on its way out

`recover` puts right what a killed program left. Every operation on the disk goes through the
functions in `PRIMITIVES`, looked up at each call, so that a test can stop a program at any one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from scrimp.base import platform
from scrimp.base.errors import ScrimpError
from scrimp.base.units import format_bytes

PRIMITIVES = (
    "make_directory",
    "create",
    "write",
    "fsync",
    "rename",
    "fsync_directory",
    "remove",
    "remove_directory",
)
_PARTIAL, _OLD, _TRASH = ".partial-", ".old-", ".trash-"
# Small enough to be still in the cache when it is hashed and then written.
_CHUNK_BYTES = 4 * 1024**2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def make_directory(path: Path) -> None:
    """Make one folder that does not exist yet."""
    path.mkdir()


def create(path: Path) -> BinaryIO:
    """Open a new or emptied file for writing, unbuffered: what `write` returns from is written."""
    return path.open("wb", buffering=0)


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data`; a raw file may take only part of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def fsync(path: Path) -> None:
    """Bring a file's content to the disk."""
    platform.fsync_file(path)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name, in place of a file that may have it."""
    source.replace(target)


def fsync_directory(path: Path) -> None:
    """Bring a folder's names to the disk."""
    platform.fsync_directory(path)


def remove(path: Path) -> None:
    """Delete one file."""
    path.unlink()


def remove_directory(path: Path) -> None:
    """Delete one empty folder."""
    path.rmdir()


class HashedFile:
    """A new file that knows the SHA-256 and the size of what was written to it.

    Made by `hashed_file`. It is not synced: `atomic_directory` syncs all that it holds.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        rest = memoryview(data).cast("B")
        for start in range(0, len(rest), _CHUNK_BYTES):
            chunk = rest[start : start + _CHUNK_BYTES]
            self._hash.update(chunk)
            write(self._file, chunk)
        self.size += len(rest)

    @property
    def sha256(self) -> str:
        """The hash of everything so far, in hexadecimal."""
        return self._hash.hexdigest()


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Open a new file for writing and hashing in one pass.

    Raises:
        ScrimpError: The disk is full, or the folder may not be written to.
    """
    with explained(path), create(path) as file:
        yield HashedFile(file)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading a little at a time."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file, replacing one of that name; text is written as UTF-8.

    Raises:
        ScrimpError: The disk is full, or the folder may not be written to; the earlier file stays.
    """
    partial = _beside(path, _PARTIAL)
    with explained(path):
        try:
            with create(partial) as file:
                write(file, data.encode() if isinstance(data, str) else data)
            fsync(partial)
            rename(partial, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                remove(partial)
            raise
        fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON, as `write_atomic` does.

    Raises:
        ValueError: `value` holds an infinity or NaN, for which JSON has no word.
        ScrimpError: As for `write_atomic`.
    """
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes `final` when the block ends without an error.

    Whatever `final` was before is replaced. The folder that holds it must exist, and only one
    writer may be at it: the temporary name is always the same.

    Yields:
        The temporary folder, beside `final`. Nothing in it need be synced by hand.

    Raises:
        ScrimpError: The disk is full, or the folder may not be written to. As after any other
            exception, the temporary folder is deleted and what was there before is still there.
    """
    partial = _beside(final, _PARTIAL)
    with explained(final):
        if partial.exists():
            remove_tree(partial)
        try:
            make_directory(partial)
            yield partial
            _let_read(partial)
            _fsync_tree(partial)
            _replace_directory(partial, final)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                remove_tree(partial)
            raise


def discard(path: Path) -> None:
    """Delete a folder such that no half of it is ever found under its own name.

    Raises:
        ScrimpError: It may not be deleted.
    """
    trash = _beside(path, _TRASH)
    with explained(path):
        if trash.exists():
            remove_tree(trash)
        rename(path, trash)
        fsync_directory(path.parent)
        remove_tree(trash)


def recover(folder: Path) -> None:
    """Put right what a killed program left in `folder`. No other program may be writing there.

    A folder that was set aside and whose successor did not arrive gets its name back; everything
    else under a temporary name is deleted.

    Raises:
        ScrimpError: The folder may not be written to.
    """
    with explained(folder):
        for path in sorted(folder.glob(f"{_OLD}*")):
            final = path.with_name(path.name.removeprefix(_OLD))
            if not final.exists():
                rename(path, final)
                fsync_directory(folder)
        for prefix in (_OLD, _PARTIAL, _TRASH):
            for path in sorted(folder.glob(f"{prefix}*")):
                remove_tree(path)


def set_aside(final: Path) -> Path:
    """Return the name `final` bears in the instant in which its successor takes its place."""
    return _beside(final, _OLD)


def remove_tree(path: Path) -> None:
    """Delete a file, or a folder and all in it, through the primitives; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    for child in sorted(path.iterdir()):
        remove_tree(child)
    remove_directory(path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into a sentence that says what to do.

    Raises:
        ScrimpError: An `OSError` left the block.
    """
    try:
        yield
    except OSError as error:
        raise ScrimpError(_explanation(path, error)) from error


def _explanation(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        free = _free_space(path.parent)
        return f"no space left to write {path}{free}: free some, or choose a folder on another disk"
    if error.errno in _NO_PERMISSION:
        return f"{path} may not be written ({reason}): change its permissions, or choose another folder"
    return f"{path} could not be written ({reason}): check the disk, or choose another folder"


def _free_space(folder: Path) -> str:
    try:
        return f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
    except OSError:
        return ""


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(prefix + path.name)


def _let_read(folder: Path) -> None:
    """Give every file the permissions that a new one has: safetensors lets only its writer read."""
    usual = stat.S_IMODE(folder.stat().st_mode) & 0o666  # the folder was made anew, by the same mask
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(usual)


def _fsync_tree(folder: Path) -> None:
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            _fsync_tree(child)
        else:
            fsync(child)
    fsync_directory(folder)


def _replace_directory(partial: Path, final: Path) -> None:
    old = set_aside(final)
    if final.exists():
        if old.exists():
            remove_tree(old)
        rename(final, old)
    rename(partial, final)
    # Only once the new name is on the disk may the old content go.
    fsync_directory(final.parent)
    if old.exists():
        remove_tree(old)
