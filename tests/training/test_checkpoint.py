"""Checkpoints that can be trusted: complete or absent, checked before use, exact when resumed."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch

from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.training import checkpoint
from scrimp.training.safetensors_stream import read_header, read_tensors_into


class Killed(BaseException):
    """Stands for SIGKILL: no code may run after it, so every later operation raises it again."""


class MortalDisk:
    """Lets the process die in its n-th operation on the disk, and the power with it.

    A write that dies has written half; with the power go the second halves of all files that were
    written and not synced, whatever they have been renamed to since.
    """

    def __init__(self, patch, number):
        self.number = number
        self.done = 0
        self.unsynced = set()
        for name in files.PRIMITIVES:
            patch.setattr(files, name, self._mortal(name, getattr(files, name)))

    def _mortal(self, name, real):
        def operation(*arguments):
            self.done += 1
            dies = 0 < self.number <= self.done
            if name == "write":
                self.unsynced.add(os.fstat(arguments[0].fileno()).st_ino)
                if self.done == self.number:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if dies:
                raise Killed
            if name == "fsync":
                self.unsynced.discard(arguments[0].stat().st_ino)
            return real(*arguments)

        return operation

    def cut_power(self, folder):
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unsynced:
                os.truncate(path, path.stat().st_size // 2)


def model_tensors(value):
    return {
        "embed": torch.full((5, 3), float(value)),
        "norm": torch.full((3,), float(value), dtype=torch.bfloat16),
    }


def save(folder, step, *, value=None, identity="llama a"):
    value = step if value is None else value
    return checkpoint.save(
        folder,
        step=step,
        model=model_tensors(value),
        optimizer={"embed/exp_avg": torch.full((5, 3), float(value))},
        state={"step": step, "value": value},
        identity=identity,
    )


def saved_value(path):
    """Return the value a checkpoint was saved with, the same in every one of its files."""
    model = model_tensors(0)
    checkpoint.read_model_into(path, model)
    optimizer = {"embed/exp_avg": torch.zeros(5, 3)}
    read_tensors_into(path / checkpoint.OPTIMIZER, optimizer)
    values = {t.unique().item() for t in (*model.values(), *optimizer.values())}
    values.add(checkpoint.read_state(path)["value"])
    assert len(values) == 1
    return values.pop()


# --- killed at any instant ---


def save_the_next(folder):
    save(folder, 2)


def save_the_same_step_again(folder):
    save(folder, 1, value=2)


def save_and_prune(folder):
    save(folder, 2)
    checkpoint.prune(folder, step=2, keep=1)


@pytest.mark.parametrize("power", ["stays", "is cut"])
@pytest.mark.parametrize("work", [save_the_next, save_the_same_step_again, save_and_prune])
def test_a_complete_checkpoint_is_there_wherever_the_program_dies(tmp_path, monkeypatch, work, power):
    folder = tmp_path / "checkpoints"
    number, seen = 0, []
    while True:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1)
        with monkeypatch.context() as patch:
            disk = MortalDisk(patch, number)
            try:
                work(folder)
            except Killed:
                pass
            else:
                break
        if power == "is cut":
            disk.cut_power(folder)
        found = checkpoint.find_usable(folder)
        assert found.damaged == []
        seen.append(saved_value(found.path))

        files.recover(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert saved_value(checkpoint.find_usable(folder).path) == seen[-1]
        work(folder)  # and the run can go on
        assert saved_value(checkpoint.find_usable(folder).path) == 2
    assert number == disk.done + 1 > 15
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_the_first_save_is_absent_or_complete_wherever_the_program_dies(tmp_path, monkeypatch):
    number, seen = 0, []
    while True:
        number += 1
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            MortalDisk(patch, number)
            try:
                save(folder, 1)
            except Killed:
                pass
            else:
                break
        seen.append(checkpoint.find_usable(folder).path is not None)
    assert seen == sorted(seen)
    assert seen[0] is False
    assert seen[-1] is True


@pytest.mark.parametrize("operation", ["make_directory", "create", "write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_or_a_lost_permission_keeps_the_earlier_checkpoint(
    tmp_path, monkeypatch, operation, code
):
    save(tmp_path, 1)

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, operation, refuse)
    with pytest.raises(ScrimpError, match=r"no space left|may not be written"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert saved_value(checkpoint.find_usable(tmp_path).path) == 1


def test_a_disk_that_fills_up_halfway_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real, calls = files.write, []

    def fill_up(file, data):
        calls.append(len(data))
        if len(calls) == 4:
            real(file, data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    monkeypatch.setattr(files, "write", fill_up)
    with pytest.raises(ScrimpError, match="no space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# --- damage, and what is not damage ---

ALL_FILES = [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST]


def flip_a_bit(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "a bit flipped at the start": lambda path: flip_a_bit(path, 0),
    "a bit flipped in the middle": lambda path: flip_a_bit(path, 0.5),
    "a bit flipped at the end": lambda path: flip_a_bit(path, 1),
    "a byte cut off": lambda path: os.truncate(path, path.stat().st_size - 2),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 9)
    earlier, newest = save(tmp_path, 10), save(tmp_path, 11)
    DAMAGE[damage](newest / name)
    found = checkpoint.find_usable(tmp_path, identity="llama a")
    assert found.path == earlier
    [(path, reason)] = found.damaged
    assert path == newest
    assert name in reason
    if damage in ("a byte cut off", "grown") and name != checkpoint.MANIFEST:
        assert "bytes instead of" in reason  # seen without reading the file
    with pytest.raises(
        checkpoint.DamagedCheckpointError, match=r"step-00000011 is damaged: .*; use an earlier"
    ):
        checkpoint.verify(newest)


def test_every_flipped_bit_of_a_manifest_is_damage_and_never_another_model_or_format(tmp_path):
    path = save(tmp_path, 1) / checkpoint.MANIFEST
    whole = path.read_bytes()
    checked = 0
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        found = checkpoint.find_usable(tmp_path, identity="llama a")
        if found.path is None:
            assert len(found.damaged) == 1
            checked += 1
        else:  # white space between the values says nothing
            assert whole[index : index + 1] in b" \n"
    assert checked > 500


def test_without_a_whole_checkpoint_there_is_none_and_all_damaged_ones_are_named(tmp_path):
    assert checkpoint.find_usable(tmp_path / "absent") == checkpoint.Found(None, [])
    for step in (1, 2):
        (save(tmp_path, step) / checkpoint.STATE).unlink()
    found = checkpoint.find_usable(tmp_path)
    assert found.path is None
    assert [checkpoint.step_of(path) for path, _ in found.damaged] == [2, 1]


def test_steps_are_ordered_as_numbers_and_other_names_are_ignored(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        save(tmp_path, step)
    (tmp_path / "step-final").mkdir()
    (tmp_path / "my-step-900000000").mkdir()
    assert checkpoint.step_of(checkpoint.find_usable(tmp_path).path) == 100_000_000


def test_another_model_is_an_error_that_names_both(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ScrimpError, match=r"another model \(llama a, not gpt b\)") as caught:
        checkpoint.find_usable(tmp_path, identity="gpt b")
    assert not isinstance(caught.value, checkpoint.DamagedCheckpointError)


def test_a_newer_format_is_an_error_and_not_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(ScrimpError, match=r"has format 2.*install a newer scrimp") as caught:
        checkpoint.find_usable(tmp_path)
    assert not isinstance(caught.value, checkpoint.DamagedCheckpointError)


# --- which are kept ---


def steps(folder):
    return sorted(checkpoint.step_of(path) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("step", "keep", "best", "left"),
    [
        (5, 2, None, [4, 5]),
        (5, 2, 1, [1, 4, 5]),
        (5, 2, 5, [4, 5]),
        (5, 9, None, [1, 2, 3, 4, 5]),
        (5, 1, 77, [5]),
        # Saved at step 3 after 4 and 5 were found damaged: they must not push the whole ones out.
        (3, 2, None, [2, 3]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, step, keep, best, left):
    for done in range(1, 6):
        save(tmp_path, done)
    checkpoint.prune(tmp_path, step=step, keep=keep, best=best)
    assert steps(tmp_path) == left


# --- tied tensors ---


def test_tied_tensors_are_saved_once_and_loaded_into_both(tmp_path):
    embedding = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    model = {"embed": embedding, "lm_head": embedding.view(6, 4)}
    path = checkpoint.save(tmp_path, step=1, model=model, optimizer={}, state={}, identity="a")
    assert set(read_header(path / checkpoint.MODEL).tensors) == {"embed"}

    fresh = torch.zeros(6, 4)
    targets = {"embed": fresh, "lm_head": fresh.view(6, 4)}
    checkpoint.read_model_into(path, targets)
    assert torch.equal(targets["lm_head"], embedding)
    with pytest.raises(ScrimpError, match="no tensor 'lm_head'"):
        checkpoint.read_model_into(path, {"embed": fresh, "lm_head": torch.zeros(6, 4)})
