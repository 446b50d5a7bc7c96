"""Files and folders are wholly there or not at all, also for a program killed at any instant."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil

import pytest

from scrimp.base import files
from scrimp.base.errors import ScrimpError


class Killed(BaseException):
    """Stands for SIGKILL: no code may run after it, so every later operation raises it again."""


def die_at(monkeypatch, number):
    """Let the process die in its `number`-th operation on the disk; 0 only counts.

    A write that dies has written half. Returns the list of operations begun.
    """
    done = []

    def mortal(name, real):
        def operation(*arguments):
            done.append(name)
            if number and len(done) >= number:
                if len(done) == number and name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Killed
            return real(*arguments)

        return operation

    for name in files.PRIMITIVES:
        monkeypatch.setattr(files, name, mortal(name, getattr(files, name)))
    return done


def fail_in(monkeypatch, name, code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, name, refuse)


def write_folder(final, text):
    with files.atomic_directory(final) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "deep.txt").write_text(text)
        with files.hashed_file(partial / "text.txt") as file:
            file.write(text.encode())


def content(folder):
    return {(folder / name).read_text() for name in ("text.txt", "inner/deep.txt")}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_written_file_replaces_the_earlier_one_and_leaves_nothing_else(tmp_path):
    files.write_atomic(tmp_path / "a", "first")
    files.write_atomic(tmp_path / "a", b"\xff second")
    files.write_atomic(tmp_path / "b", "grün")
    assert (tmp_path / "a").read_bytes() == b"\xff second"
    assert (tmp_path / "b").read_bytes() == "grün".encode()
    assert names(tmp_path) == {"a", "b"}


def test_a_file_is_the_old_or_the_new_one_wherever_the_program_dies(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        operations = die_at(patch, 0)
        files.write_atomic(tmp_path / "x", "count")
        total = len(operations)
    assert total == 5  # create, write, fsync, rename, fsync of the folder
    seen = set()
    for number in range(1, total + 1):
        files.write_atomic(tmp_path / "a", "old")
        with monkeypatch.context() as patch:
            die_at(patch, number)
            with pytest.raises(Killed):
                files.write_atomic(tmp_path / "a", "new content")
        seen.add((tmp_path / "a").read_text())
        files.recover(tmp_path)
        assert names(tmp_path) == {"a", "x"}
    assert seen == {"old", "new content"}


def test_json_holds_no_word_for_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"third": 1 / 3, "none": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"third": 1 / 3, "none": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("size", [0, 1, files._CHUNK_BYTES, 2 * files._CHUNK_BYTES + 17])
def test_the_hash_and_size_are_those_of_what_lies_on_the_disk(tmp_path, size):
    data = bytes(range(251)) * (size // 251 + 1)
    with files.hashed_file(tmp_path / "a") as file:
        file.write(data[:size])
        file.write(memoryview(b"tail"))
    stored = (tmp_path / "a").read_bytes()
    assert stored == data[:size] + b"tail"
    assert (file.size, file.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
    assert files.hash_file(tmp_path / "a") == file.sha256


def test_a_short_write_is_continued(tmp_path):
    class OneByteAtATime:
        data = b""

        def write(self, data):
            self.data += bytes(data[:1])
            return 1

    file = OneByteAtATime()
    files.write(file, b"whole")
    assert file.data == b"whole"


def test_everything_in_a_folder_is_synced_before_it_gets_its_name_and_its_parent_after(tmp_path, monkeypatch):
    calls = []

    def recorded(name, real):
        def operation(*paths):
            calls.append((name, paths[0].name))
            real(*paths)

        return operation

    for name in ("fsync", "fsync_directory", "rename"):
        monkeypatch.setattr(files, name, recorded(name, getattr(files, name)))
    write_folder(tmp_path / "model", "x")
    assert sorted(calls[:-2]) == [
        ("fsync", "deep.txt"),
        ("fsync", "text.txt"),
        ("fsync_directory", ".partial-model"),
        ("fsync_directory", "inner"),
    ]
    assert calls[-2:] == [("rename", ".partial-model"), ("fsync_directory", tmp_path.name)]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_only_its_writer_could_read_gets_the_usual_permissions(tmp_path):
    with files.atomic_directory(tmp_path / "model") as folder:
        (folder / "closed").touch(mode=0o600)
        (folder / "inner").mkdir()
        (folder / "inner" / "closed").touch(mode=0o600)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "model").rglob("closed")} == {usual}


@pytest.mark.parametrize("earlier", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path, earlier):
    if earlier:
        write_folder(tmp_path / "model", "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_directory(tmp_path / "model") as partial:
        (partial / "text.txt").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ({"model"} if earlier else set())
    assert not earlier or content(tmp_path / "model") == {"old"}


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_is_absent_old_or_new_wherever_the_program_dies(tmp_path, monkeypatch, earlier):
    final = tmp_path / "model"
    number, seen = 0, []
    while True:
        number += 1
        shutil.rmtree(final, ignore_errors=True)
        if earlier:
            write_folder(final, "old")
        with monkeypatch.context() as patch:
            operations = die_at(patch, number)
            try:
                write_folder(final, "new")
            except Killed:
                pass
            else:
                break
        # Before anything is mended, a complete folder is there under one of two names.
        there = final if final.exists() else files.set_aside(final)
        assert there.exists() or not earlier
        assert not there.exists() or content(there) in ({"old"}, {"new"})
        files.recover(tmp_path)
        assert names(tmp_path) <= {"model"}
        seen.append(content(final).pop() if final.exists() else None)
    assert number == len(operations) + 1 > 8
    before = "old" if earlier else None
    switch = seen.index("new")
    assert seen == [before] * switch + ["new"] * (len(seen) - switch)
    assert switch > 0


def test_what_is_discarded_is_never_found_half_deleted(tmp_path, monkeypatch):
    number = 0
    while True:
        number += 1
        write_folder(tmp_path / "model", "old")
        with monkeypatch.context() as patch:
            die_at(patch, number)
            try:
                files.discard(tmp_path / "model")
            except Killed:
                pass
            else:
                break
        assert not (tmp_path / "model").exists() or content(tmp_path / "model") == {"old"}
        if number > 3:  # the next discard clears away what this one left
            continue
        files.recover(tmp_path)
        assert names(tmp_path) <= {"model"}
    assert number > 6
    assert names(tmp_path) == set()


def test_recovering_does_not_follow_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    run = tmp_path / "run"
    (run / ".partial-step").mkdir(parents=True)
    (run / ".partial-step" / "link").symlink_to(outside)
    files.recover(run)
    assert names(run) == set()
    assert names(outside) == {"precious"}


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "no space left to write .*model.* free"),
        (errno.EDQUOT, "no space left to write .*model"),
        (errno.EACCES, r"model\S* may not be written .Permission denied.: change its permissions"),
        (errno.EROFS, r"model\S* may not be written .Read-only file system.: change its permissions"),
        (errno.EIO, r"model\S* could not be written .Input/output error.: check the disk"),
    ],
)
@pytest.mark.parametrize("operation", [name for name in files.PRIMITIVES if not name.startswith("remove")])
def test_what_the_disk_refuses_is_said_in_a_sentence_and_nothing_is_lost(
    tmp_path, monkeypatch, operation, code, sentence
):
    write_folder(tmp_path / "model", "old")
    with monkeypatch.context() as patch:
        fail_in(patch, operation, code)
        with pytest.raises(ScrimpError, match=sentence):
            write_folder(tmp_path / "model", "new")
    assert content(tmp_path / "model") <= {"old", "new"}
    files.recover(tmp_path)
    assert names(tmp_path) == {"model"}


def test_a_refused_file_leaves_the_earlier_one(tmp_path, monkeypatch):
    files.write_atomic(tmp_path / "a", "old")
    fail_in(monkeypatch, "write", errno.ENOSPC)
    with pytest.raises(ScrimpError, match="no space left"):
        files.write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}
