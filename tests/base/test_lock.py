"""One program at a time in a run's folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.base.lock import run_lock

# A program of its own: that the lock dies with its process is the law.
HOLDER = """
import sys, pathlib
from scrimp.base.lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_held_by_another_program_is_named_and_is_free_once_that_program_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(ScrimpError, match="another program") as caught, run_lock(tmp_path):
            pass
        assert str(tmp_path) in str(caught.value)
        holder.kill()
        holder.wait()
        with run_lock(tmp_path):
            pass


def test_a_lock_is_released_after_an_error_and_is_not_given_twice(tmp_path):
    with pytest.raises(RuntimeError), run_lock(tmp_path):
        raise RuntimeError
    with run_lock(tmp_path), pytest.raises(ScrimpError, match="another program"), run_lock(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_said_so(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ScrimpError, match="may not be written"), run_lock(tmp_path):
        pass
