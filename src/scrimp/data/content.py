"""What the files of a corpus hold: one hash over all of it, and which of them are text.

The token cache is named by content, so every byte is read once to hash it; on the way each text
file is checked to be text. The result is remembered under the listing (path, size, time of
change), so that the next run with untouched files reads nothing. A listing with a file changed
less than two seconds ago is not remembered: a second change could hide behind the same time.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import time
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scrimp.base.errors import ScrimpError
from scrimp.base.files import explained
from scrimp.data.sources import Source, Sources, not_text

Progress = Callable[[str, float | None], None]

_BLOCK_BYTES = 1 << 20
_RACY_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Content:
    """The files to read, in order, hashes of what they hold and of their listing; how many were no text."""

    files: tuple[Source, ...]
    hash: str
    listing: str
    skipped: int
    bytes: int


def listing(sources: Sources) -> str:
    """Hash the paths, sizes and times of change of all files.

    Raises:
        ScrimpError: A file is gone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for source in sources.files:
        try:
            state = source.path.stat()
        except OSError as error:
            raise ScrimpError(f"{source.path} cannot be read: {error.strerror or error}") from error
        entry = [str(source.path.absolute()), source.format, source.named, state.st_size, state.st_mtime_ns]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def inspect(sources: Sources, *, cache: Path, progress: Progress) -> Content:
    """Hash the corpus and leave out what is not text, or recall both for untouched files.

    Args:
        sources: What `find_sources` returned.
        cache: The cache folder; what was found is remembered in its folder `listings`.
        progress: Called with a message and the share done.

    Raises:
        ScrimpError: A named file is not text, a file cannot be read, or nothing is text.
    """
    before = listing(sources)
    remembered = cache / "listings" / f"{before}.json"
    if (known := _recall(remembered)) is None:
        known = _read_all(sources, progress)
        if time.time_ns() - max(source.path.stat().st_mtime_ns for source in sources.files) > _RACY_NS:
            _remember(remembered, known)
    skipped = set(known["skipped"])
    files = tuple(source for index, source in enumerate(sources.files) if index not in skipped)
    size = sum(source.path.stat().st_size for source in files)
    if not size:
        raise ScrimpError(f"{sources.description} holds no text: name files that do with --data")
    return Content(files, known["hash"], before, len(skipped), size)


def _recall(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text("utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):  # never written, or cut short by a crash: read the files again
        return None


def _remember(path: Path, known: dict[str, Any]) -> None:
    draft = path.with_suffix(f".{os.getpid()}")  # its own: another run may be writing the same listing
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known), "utf-8")
        draft.replace(path)


def _read_all(sources: Sources, progress: Progress) -> dict[str, Any]:
    total = sum(source.path.stat().st_size for source in sources.files) or 1
    digest, skipped, done = hashlib.blake2b(digest_size=16), [], 0

    def show(read: int) -> None:
        progress("reading the data", (done + read) / total)

    for index, source in enumerate(sources.files):
        show(0)
        file_hash = _hash_text(source, show)
        if file_hash is not None:
            digest.update(source.format.encode() + file_hash)
        elif source.named:
            raise not_text(source.path)
        else:
            skipped.append(index)
        done += source.path.stat().st_size
    return {"hash": digest.hexdigest(), "skipped": skipped}


def encoding_of(source: Source) -> str:
    """Return the encoding to read a text with: UTF-8, or what a Python file's coding line says.

    Raises:
        SyntaxError: The coding line of a Python file names no encoding, or contradicts its start.
    """
    if source.format != "python":
        return "utf-8-sig"  # which is UTF-8 with or without the mark at its start
    with source.path.open("rb") as file:
        return tokenize.detect_encoding(file.readline)[0]


def _hash_text(source: Source, progress: Callable[[int], None]) -> bytes | None:
    """Return the hash of a file's bytes, or None if it should be text and is not."""
    check = source.format in ("text", "python")
    digest, read = hashlib.blake2b(digest_size=16), 0
    try:
        decoder = codecs.getincrementaldecoder(encoding_of(source) if check else "utf-8")()
        with source.path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                if check and "\0" in decoder.decode(block):
                    return None
                digest.update(block)
                read += len(block)
                progress(read)
        if check:
            decoder.decode(b"", final=True)
    except (UnicodeDecodeError, SyntaxError, LookupError):
        return None
    except OSError as error:
        raise ScrimpError(f"{source.path} cannot be read: {error.strerror or error}") from error
    return digest.digest()
