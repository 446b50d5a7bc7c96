from __future__ import annotations

import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scrimp.base.errors import MissingExtraError, ScrimpError
from scrimp.data import find_sources
from scrimp.data.content import inspect
from scrimp.data.documents import read_documents
from scrimp.data.sources import hub_files

Write = Callable[[str, str | bytes], Path]


def quiet(message: str, done: float | None) -> None:
    assert done is None or 0 <= done <= 1


def names(paths: list[str]) -> list[str]:
    return [source.path.name for source in find_sources(paths).files]


def test_a_folder_is_read_to_the_bottom_in_the_order_of_relative_paths(tmp_path: Path, write: Write) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.py", "a.txt", ".git/config", "a/.hidden"):
        write(f"corpus/{name}", "x")
    folder = tmp_path / "corpus"
    relative = [source.path.relative_to(folder).as_posix() for source in find_sources([str(folder)]).files]
    assert relative == ["a.txt", "a/b/c.py", "a/z.md", "b.txt"]


def test_the_suffix_decides_how_a_file_is_read(write: Write) -> None:
    paths = [str(write(name, "x")) for name in ("a.txt", "b.py", "c.JSONL", "d.parquet", "e")]
    formats = [source.format for source in find_sources(paths).files]
    assert formats == ["text", "python", "jsonl", "parquet", "text"]


def test_a_pattern_matches_files_in_sorted_order(tmp_path: Path, write: Write) -> None:
    for name in ("2.txt", "1.txt", "sub/0.txt", "3.md"):
        write(name, "x")
    assert names([str(tmp_path / "**" / "*.txt")]) == ["1.txt", "2.txt", "0.txt"]


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, write: Write) -> None:
    path = write("a.txt", "x")
    assert names([str(path), str(tmp_path / "*.txt")])[:1] == ["a.txt"]
    assert len(names([str(path), str(path)])) == 1


def test_no_path_means_the_standard_library_without_its_tests() -> None:
    sources = find_sources()
    root = Path(sysconfig.get_path("stdlib"))
    relative = [source.path.relative_to(root).as_posix() for source in sources.files]
    assert "json/decoder.py" in relative
    assert relative == sorted(relative)
    assert {source.format for source in sources.files} == {"python"}
    assert not [name for name in relative if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_a_python_without_sources_says_so_and_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ScrimpError, match=r"no sources of its own .* --data"):
        find_sources()


@pytest.mark.parametrize("name", ["missing.txt", "no/such/folder/", "a b"])
def test_a_path_that_stands_for_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ScrimpError, match="no file, folder or dataset is called"):
        find_sources([str(tmp_path / name)])


def test_a_mistyped_name_is_met_with_the_nearest(tmp_path: Path, write: Write) -> None:
    write("corpus.txt", "x")
    with pytest.raises(ScrimpError, match=r"did you mean 'corpus\.txt'"):
        find_sources([str(tmp_path / "corpsu.txt")])


def test_a_pattern_without_a_match_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ScrimpError, match="no file matches"):
        find_sources([str(tmp_path / "*.txt")])


def test_a_dataset_id_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"owner/name is no file or folder .*scrimp\[hub\]"):
        find_sources(["owner/name"])


def test_a_dataset_becomes_files_that_are_read_like_others(tmp_path: Path, write: Write) -> None:
    """The package takes a local folder where it takes an id, so the real thing runs without a network."""
    pytest.importorskip("datasets")
    for number in range(3):
        write(f"rows/train-{number}.jsonl", f'{{"text": "row {number}"}}\n')
    sources = hub_files(str(tmp_path / "rows"))
    assert {source.format for source in sources} == {"arrow"}
    documents = read_documents(sources, "text", "text")
    assert [document.content for document in documents] == [b"row 0", b"row 1", b"row 2"]


def test_a_dataset_that_cannot_be_reached_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(ScrimpError, match="the dataset nobody/nothing could not be loaded"):
        find_sources(["nobody/nothing"])
    assert time.monotonic() - start < 10


def test_a_named_file_that_is_not_text_is_an_error(write: Write) -> None:
    path = write("picture.png", b"\x89PNG\r\n\0\0")
    with pytest.raises(ScrimpError, match=r"picture\.png is not text"):
        find_sources([str(path)])


def test_a_named_file_that_turns_out_not_to_be_text_is_an_error(write: Write, cache: Path) -> None:
    path = write("latin.txt", b"a" * 100_000 + "café".encode("latin-1") + b"\n")
    sources = find_sources([str(path)])
    with pytest.raises(ScrimpError, match=r"latin\.txt is not text"):
        inspect(sources, cache=cache, progress=quiet)


def test_what_is_not_text_in_a_folder_is_skipped_and_counted(
    tmp_path: Path, write: Write, cache: Path
) -> None:
    write("corpus/a.txt", "text")
    write("corpus/b.bin", b"\0\1\2")
    write("corpus/c.txt", b"caf\xe9 au lait")
    write("corpus/d.py", b"# -*- coding: no-such-encoding -*-\n")
    content = inspect(find_sources([str(tmp_path / "corpus")]), cache=cache, progress=quiet)
    assert [source.path.name for source in content.files] == ["a.txt"]
    assert content.skipped == 3


@pytest.mark.parametrize("content", ["", None])
def test_empty_data_is_an_error(tmp_path: Path, write: Write, content: str | None) -> None:
    (tmp_path / "corpus").mkdir()
    if content is not None:
        write("corpus/a.txt", content)
    with pytest.raises(ScrimpError, match=r"is empty|no file in"):
        find_sources([str(tmp_path / "corpus")])


def test_a_folder_without_any_text_is_an_error(tmp_path: Path, write: Write, cache: Path) -> None:
    write("corpus/a.bin", b"\0")
    with pytest.raises(ScrimpError, match="holds no text"):
        inspect(find_sources([str(tmp_path / "corpus")]), cache=cache, progress=quiet)


def test_the_hash_is_of_the_content_whatever_the_files_are_called(write: Write, cache: Path) -> None:
    one, two, three = write("a.txt", "same"), write("b.txt", "same"), write("c.txt", "other")
    hashes = [
        inspect(find_sources([str(path)]), cache=cache, progress=quiet).hash for path in (one, two, three)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_untouched_files_are_not_read_again_and_touched_ones_are(write: Write, cache: Path) -> None:
    path = write("a.txt", "before")
    os.utime(path, ns=(10**18, 10**18))  # long ago: a fresh file could still change within the same tick
    sources = find_sources([str(path)])
    before = inspect(sources, cache=cache, progress=quiet)

    def never(message: str, done: float | None) -> None:
        raise AssertionError("read again")

    assert inspect(sources, cache=cache, progress=never) == before
    path.write_text("after!")
    assert inspect(sources, cache=cache, progress=quiet).hash != before.hash


def test_a_file_changed_a_moment_ago_is_always_read_again(write: Write, cache: Path) -> None:
    path = write("a.txt", "before")
    state = path.stat()
    before = inspect(find_sources([str(path)]), cache=cache, progress=quiet)
    path.write_text("after!")  # the same size, and below the same time
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert inspect(find_sources([str(path)]), cache=cache, progress=quiet).hash != before.hash
