"""Where text comes from: files, patterns, folders, a dataset of the hub, or Python's own sources.

What is odd here:

- A folder or pattern is taken for what it holds: files in it that are not text are skipped and
  counted later, when the content is read. A file the user named must be text, and its first
  block is looked at right away, so that the mistake shows before anything heavy is imported.
- With no path at all, the corpus is the Python standard library: every machine has it.
- A dataset of the hub is downloaded by the package `datasets` and then read like local files:
  its Arrow files are the sources.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scrimp.base.deadline import within
from scrimp.base.errors import ScrimpError
from scrimp.base.extras import load
from scrimp.base.suggest import did_you_mean

Format = Literal["text", "python", "jsonl", "parquet", "arrow"]

_FORMATS: dict[str, Format] = {".py": "python", ".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_SNIFFED_BYTES = 8192
_HUB_SECONDS = 5.0  # of silence before the hub counts as unreachable


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the corpus; `named` if the user named this very file, so that it must be text."""

    path: Path
    format: Format
    named: bool


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a corpus in their fixed order, and what to call them in a sentence."""

    files: tuple[Source, ...]
    description: str


def find_sources(paths: Sequence[str] = ()) -> Sources:
    """List the files that `paths` stand for.

    Args:
        paths: Files, patterns such as `books/**/*.txt`, folders (searched to the bottom, hidden
            names left out, sorted by relative path) or a dataset of the hub (`owner/name`, or
            `owner/name:config`). None of them: the Python standard library's own sources.

    Raises:
        ScrimpError: A path stands for nothing, a named file is not text, or all of it is empty.
        MissingExtraError: A dataset of the hub is asked for without the package `datasets`.
    """
    if not paths:
        return _standard_library()
    found = dict.fromkeys(source for path in paths for source in _expand(path))
    description = ", ".join(paths)
    if not found:
        raise ScrimpError(f"no file in {description}: name files or folders that hold text with --data")
    if not any(source.path.stat().st_size for source in found):
        raise ScrimpError(f"{description} is empty: name files that hold text with --data")
    return Sources(tuple(found), description)


def _expand(path: str) -> Iterable[Source]:
    where = Path(path).expanduser()
    if where.is_dir():
        return [_source(file, named=False) for file in _files_below(where)]
    if where.exists():
        return [_named_file(where)]
    if glob.has_magic(path):
        return _pattern(str(where))
    return _hub_dataset(path)


def _source(path: Path, *, named: bool) -> Source:
    return Source(path, _FORMATS.get(path.suffix.lower(), "text"), named)


def _named_file(path: Path) -> Source:
    source = _source(path, named=True)
    try:
        with path.open("rb") as file:
            head = file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise ScrimpError(f"{path} cannot be read: {error.strerror or error}") from error
    if source.format in ("text", "jsonl") and b"\0" in head:
        raise not_text(path)
    return source


def not_text(path: Path) -> ScrimpError:
    """Build the error for a file that should have been text."""
    return ScrimpError(
        f"{path} is not text: --data takes UTF-8 text, source code, .jsonl and .parquet; convert or remove it"
    )


def _pattern(pattern: str) -> Iterator[Source]:
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise ScrimpError(f"no file matches {pattern}: check the pattern given to --data")
    for match in map(Path, matches):
        if match.is_file():
            yield _source(match, named=False)


def _files_below(folder: Path, *, suffix: str = "", leave_out: Container[str] = ()) -> list[Path]:
    """Return the files below `folder`, hidden ones and folders in `leave_out` apart, by relative path."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out]
        files += [Path(parent, name) for name in names if not name.startswith(".") and name.endswith(suffix)]
    files = [file for file in files if file.is_file()]  # a dangling link or a socket is none
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _standard_library() -> Sources:
    root = Path(sysconfig.get_path("stdlib"))
    files = _files_below(root, suffix=".py", leave_out=_NOT_LIBRARY)
    if not files:
        raise ScrimpError("this Python carries no sources of its own to train on: name a text with --data")
    sources = tuple(Source(file, "python", named=False) for file in files)
    return Sources(sources, "the Python standard library's own sources")


def _hub_dataset(path: str) -> list[Source]:
    name = _HUB_ID.fullmatch(path)
    parent = Path(path).expanduser().parent
    known = os.listdir(parent) if parent.is_dir() else []
    hint = did_you_mean(Path(path).name, known)
    if name is None or Path(path).suffix.lower() in (".txt", *_FORMATS):
        raise ScrimpError(f"no file, folder or dataset is called {path}{hint}: check what --data names")
    purpose = f"{path} is no file or folder here{hint}, and to read it as a dataset of the hub"
    load("datasets", extra="hub", purpose=purpose)
    return hub_files(name["id"], name["config"])


def hub_files(identifier: str, config: str | None = None) -> list[Source]:
    """Return the Arrow files of a dataset's `train` split, downloaded if they are not here yet.

    Raises:
        ScrimpError: The hub has no such dataset, cannot be reached, or the dataset cannot be read.
    """
    datasets = load("datasets", extra="hub", purpose="a dataset of the hub")
    reachable = Path(identifier).exists() or _hub_answers(identifier)
    offline = datasets.config.HF_HUB_OFFLINE
    # Without this `datasets` tries for half a minute before it looks at what was downloaded earlier.
    datasets.config.HF_HUB_OFFLINE = offline or not reachable
    try:
        rows = datasets.load_dataset(identifier, config, split="train")
    except Exception as error:  # datasets raises a dozen kinds, of its own, fsspec's and the hub's
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" :")
        raise ScrimpError(f"the dataset {identifier} could not be loaded: {reason}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return [Source(Path(file["filename"]), "arrow", named=True) for file in rows.cache_files]


def _hub_answers(identifier: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        within(_HUB_SECONDS, lambda: HfApi().dataset_info(identifier, timeout=_HUB_SECONDS))
    except RepositoryNotFoundError as error:
        raise ScrimpError(
            f"{identifier} is no file or folder here, nor a dataset the hub shows you"
        ) from error
    except Exception:  # no name server, no route, no answer, switched off: each layer has its own kinds
        return False
    return True
