"""Tokenise a corpus once, into files that every later run maps.

The folder is named by what decides its content: tokenizer, text, kind of rows, held-out
fraction and format. Everything streams: documents are read, given their side, tokenised in
batches of about a mebibyte and appended to files, so that memory is the same for a megabyte
and a terabyte. The folder appears at one stroke; two runs that want the same one at once both
write, and the second adopts the first one's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.base.errors import ScrimpError
from scrimp.base.files import write_json
from scrimp.data.cache import cache_folder, new_folder
from scrimp.data.content import Content, Progress, inspect, listing
from scrimp.data.corpus import Shape, Split, SplitWriter
from scrimp.data.documents import Document, Kind, detect_kind, read_documents
from scrimp.data.encode import encode
from scrimp.data.held_out import check_fraction, divide
from scrimp.data.sources import Sources
from scrimp.data.tokenizer import fingerprint, separator, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
_SIDES = ("train", "held_out")
_PROGRESS_STEP = 0.001


@dataclass(frozen=True, slots=True)
class Report:
    """What a corpus is made of, in numbers and sentences.

    Attributes:
        description: The data, as the user named them.
        files: How many files were read.
        skipped: How many files in folders were no text.
        documents: How many documents there are on both sides.
        tokens: How many tokens.
        notes: Sentences the user should see.
        cached: Whether it was tokenised in an earlier run.
    """

    description: str
    files: int
    skipped: int
    documents: int
    tokens: int
    notes: tuple[str, ...]
    cached: bool


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
        train: What to train on.
        held_out: What was held out, with no document at all where nothing could be.
        fingerprint: A hash of text, tokenizer, split and format; equal fingerprints, equal tokens.
        kind: Whether it is text or conversations.
        report: What it is made of.
    """

    train: Split
    held_out: Split
    fingerprint: str
    kind: Kind
    report: Report


def _silent(message: str, done: float | None) -> None:
    """Show nothing."""


def prepare(
    sources: Sources,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: Kind | None = None,
    text_key: str = "text",
    held_out: float = 0.02,
    cache: Path | None = None,
    progress: Progress = _silent,
) -> Corpus:
    """Tokenise the sources, or open what an earlier run tokenised.

    Args:
        sources: What `find_sources` returned.
        tokenizer: A fast tokenizer with an eos or a bos.
        kind: Whether rows hold `text` or `chat`; None looks at the first row.
        text_key: The column of a row that holds its text.
        held_out: The share of documents held out, by a hash of their content; 0 for none.
        cache: Where to keep tokens; the platform's cache folder if None.
        progress: Called often with a message and the share done, from 0 to 1.

    Raises:
        ScrimpError: The data are empty, not text or not rows of that kind (naming file and
            line); the tokenizer cannot serve; the cache cannot be written.

    Memory:
        Some hundred bytes per file of the corpus, and a batch's tokens: the same for any size.
    """
    check_fraction(held_out)
    cache = cache_folder() if cache is None else cache
    content = inspect(sources, cache=cache, progress=progress)
    kind = kind or detect_kind(content.files, text_key)
    encoder = fingerprint(tokenizer, chat=kind == "chat")
    parts = [FORMAT, encoder, content.hash, kind, text_key, held_out]
    identity = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    folder = cache / "tokens" / f"{encoder[:16]}-{identity[:16]}"
    cached = folder.exists()
    if cached and not _is_whole(folder):  # it came whole, so it was damaged since
        shutil.rmtree(folder)
        cached = False
    if not cached:
        with new_folder(folder) as draft:
            documents = _watched(read_documents(content.files, kind, text_key), content, progress)
            _write(draft, documents, tokenizer, kind, held_out)
            if listing(sources) != content.listing:
                raise ScrimpError(f"{sources.description} changed while being read: start again")
    return _open(folder, identity, kind, sources.description, content, cached)


def _write(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    kind: Kind,
    held_out: float,
) -> None:
    notes: list[str] = []
    shape = _shape(tokenizer, kind)
    with SplitWriter(folder, "train", shape) as train, SplitWriter(folder, "held_out", shape) as held:
        for placed, row in encode(divide(documents, held_out, notes.append), tokenizer, kind):
            side = held if placed.held_out else train
            side.append(row.tokens, content_bytes=row.bytes, content_hash=placed.hash, targets=row.targets)
    if not train.documents:
        raise ScrimpError("the data hold no document with any text: name files that do with --data")
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    meta = {"format": FORMAT, "shape": dataclasses.asdict(shape), "notes": notes, "sizes": sizes}
    write_json(folder / "meta.json", meta)


def _shape(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> Shape:
    dtype = "uint16" if vocabulary_size(tokenizer) <= 1 << 16 else "uint32"
    if kind == "chat":
        return Shape(dtype, shared=None, start=None, chat=True)
    around = separator(tokenizer)
    if around.shared:
        return Shape(dtype, shared=around.end, start=None, chat=False)
    return Shape(dtype, shared=None, start=around.start, chat=False)


def _watched(documents: Iterable[Document], content: Content, progress: Progress) -> Iterator[Document]:
    """Pass documents on, reporting how far into the files they are."""
    before, starts = 0, dict[Path, int]()
    for source in content.files:
        starts[source.path] = before
        before += source.path.stat().st_size
    shown = -1.0
    for document in documents:
        share = min(1.0, (starts[document.path] + document.read) / content.bytes)
        if share >= shown + _PROGRESS_STEP:  # rows may be short, and millions
            progress("tokenising", shown := share)
        yield document


def _meta(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "meta.json").read_text("utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):  # not there, or damaged: either way it has to be made
        return None


def _is_whole(folder: Path) -> bool:
    meta = _meta(folder)
    if meta is None:
        return False
    files = {name: folder / name for name in meta["sizes"]}
    return all(file.is_file() and file.stat().st_size == meta["sizes"][name] for name, file in files.items())


def _open(
    folder: Path,
    identity: str,
    kind: Kind,
    description: str,
    content: Content,
    cached: bool,
) -> Corpus:
    meta = _meta(folder)
    if meta is None:
        raise ScrimpError(f"the token cache {folder} vanished while it was opened: start again")
    shape = Shape(**meta["shape"])
    train, held_out = (Split(folder, side, shape) for side in _SIDES)
    report = Report(
        description=description,
        files=len(content.files),
        skipped=content.skipped,
        documents=train.documents + held_out.documents,
        tokens=len(train.tokens) + len(held_out.tokens),
        notes=tuple(meta["notes"]),
        cached=cached,
    )
    return Corpus(train, held_out, identity, kind, report)
