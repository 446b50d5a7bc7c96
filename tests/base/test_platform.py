"""What differs between systems: the Linux forms are run, the others are switched on."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scrimp.base import platform

MIB = 1024**2


def test_the_peak_stays_after_the_memory_is_gone_until_it_is_reset():
    block = mmap.mmap(-1, 96 * MIB)  # the heap of a test process may have a hole for it, and keep it
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    while_held = platform.resident_bytes()
    block.close()
    # The kernel counts pages per core and adds them up now and then: the two may be a little apart.
    assert platform.peak_resident_bytes() > while_held - MIB
    if not platform.reset_peak_resident():
        pytest.skip("this container does not let a process reset its peak")
    assert platform.peak_resident_bytes() < while_held - 64 * MIB


# Programs of their own: what is inherited through exec and fork is the question.
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no mark of their own per program")
def test_a_program_started_by_a_large_one_does_not_inherit_its_peak():
    child = "from scrimp.base import platform as p; print(p.peak_resident_bytes())"
    parent = (
        f"import os, sys; block = bytes([1]) * {256 * MIB}; "
        f"os.execv(sys.executable, [sys.executable, '-c', {child!r}])"
    )
    peak = int(subprocess.run([sys.executable, "-c", parent], capture_output=True, check=True).stdout)
    assert MIB < peak < 128 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_child_reads_its_own_peak_and_not_its_parents():
    program = f"""
import os
from scrimp.base import platform as p
before = p.peak_resident_bytes()
if os.fork() == 0:
    block = bytes([1]) * {128 * MIB}
    os._exit(0 if p.peak_resident_bytes() > before + {100 * MIB} else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_peak_is_read_in_each_systems_own_unit(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(
        platform, "_process", lambda pid: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=77))
    )
    assert platform.peak_resident_bytes(system="darwin") == 5000
    assert platform.peak_resident_bytes(system="freebsd14") == 5000 * 1024
    assert platform.peak_resident_bytes(system="win32") == 77


def test_a_status_without_a_high_water_mark_falls_back(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(os, "pread", lambda *where: b"Name:\tpython\nVmRSS:\t 12 kB\n")
    assert platform.peak_resident_bytes(system="linux") == 5000 * 1024


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_only_linux_resets_the_peak(system):
    assert platform.reset_peak_resident(system=system) is False


def test_a_folder_is_synced_except_on_windows(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    platform.fsync_directory(tmp_path, system="linux")
    assert len(synced) == 1
    platform.fsync_directory(tmp_path / "absent", system="win32")
    assert len(synced) == 1


@pytest.mark.parametrize(
    ("code", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_only_a_file_system_that_cannot_sync_folders_is_excused(tmp_path, monkeypatch, code, passes):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if passes:
        platform.fsync_directory(tmp_path, system="linux")
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            platform.fsync_directory(tmp_path, system="linux")


@pytest.mark.parametrize("known", [True, False])
def test_macos_empties_the_drives_cache_where_the_file_system_knows_how(tmp_path, monkeypatch, known):
    fcntl = pytest.importorskip("fcntl")
    calls = []

    def full_fsync(descriptor, command):
        calls.append(("fcntl", command))
        if not known:
            raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "fcntl", full_fsync)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(("fsync", None)))
    (tmp_path / "a").touch()
    platform.fsync_file(tmp_path / "a", system="darwin")
    assert calls == [("fcntl", 51)] + ([] if known else [("fsync", None)])


@pytest.mark.parametrize(("system", "writable"), [("win32", True), ("linux", False)])
def test_a_file_is_synced_once_and_open_for_writing_only_where_that_is_needed(
    tmp_path, monkeypatch, system, writable
):
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL)))
    (tmp_path / "a").write_text("kept")
    platform.fsync_file(tmp_path / "a", system=system)
    assert [mode & os.O_ACCMODE for mode in modes] == [os.O_RDWR if writable else os.O_RDONLY]
    assert (tmp_path / "a").read_text() == "kept"


def test_windows_also_stops_at_ctrl_break(monkeypatch):
    monkeypatch.delattr(signal, "SIGBREAK", raising=False)
    assert platform.stop_signals() == (signal.SIGINT, signal.SIGTERM)
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    assert platform.stop_signals() == (signal.SIGINT, signal.SIGTERM, 21)


def fake_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "9:name=systemd:/\n4:memory:/box/a\n3:cpu,cpuacct:/box/a\n0::/\n"
CPU_FILES = {
    "none": {},
    "v2 quota on the parent": {
        "proc/self/cgroup": "0::/box/a\n",
        "sys/fs/cgroup/box/cpu.max": "100000 100000\n",
        "sys/fs/cgroup/box/a/cpu.max": "max 100000\n",
    },
    "v2 inside a container": {"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
    "v1": {
        "proc/self/cgroup": V1,
        "sys/fs/cgroup/cpu/box/a/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu/box/a/cpu.cfs_period_us": "100000\n",
    },
    "v1 without a limit": {
        "proc/self/cgroup": V1,
        "sys/fs/cgroup/cpu/box/a/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/box/a/cpu.cfs_period_us": "100000\n",
    },
}


@pytest.mark.parametrize("case", CPU_FILES)
def test_usable_cores_are_the_affinity_or_the_quota_and_never_none(tmp_path, monkeypatch, case):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    expected = 12 if case in ("none", "v1 without a limit") else 1
    # "cpu,cpuacct" is one controller's folder under either name.
    assert platform.usable_cores(root=fake_root(tmp_path, CPU_FILES[case])) == expected


def test_usable_cores_without_affinity_are_the_machines(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert platform.usable_cores(root=tmp_path) == 7


MEMORY_FILES = {
    "v2": {
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/memory.max": "1000\n",
        "sys/fs/cgroup/box/memory.current": "700\n",
        "sys/fs/cgroup/box/memory.stat": "anon 500\ninactive_file 150\n",
    },
    "v1": {
        "proc/self/cgroup": V1,
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1000\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "700\n",
        "sys/fs/cgroup/memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 150\n",
    },
}


@pytest.mark.parametrize("case", MEMORY_FILES)
def test_available_memory_is_what_the_container_leaves_with_its_page_cache(tmp_path, case):
    assert platform.available_memory_bytes(root=fake_root(tmp_path, MEMORY_FILES[case])) == 450


def test_available_memory_without_a_limit_is_the_machines(tmp_path):
    files = {**MEMORY_FILES["v2"], "sys/fs/cgroup/box/memory.max": "max\n"}
    available = platform.available_memory_bytes(root=fake_root(tmp_path, files))
    assert available > 16 * MIB


@pytest.mark.parametrize("case", MEMORY_FILES)
def test_total_memory_is_the_containers_limit(tmp_path, case):
    assert platform.total_memory_bytes(root=fake_root(tmp_path, MEMORY_FILES[case])) == 1000


def test_total_memory_without_a_limit_is_the_machines(tmp_path):
    assert platform.total_memory_bytes(root=tmp_path) > platform.available_memory_bytes(root=tmp_path)


def test_the_processor_is_named_by_the_system_or_else_by_its_architecture(tmp_path):
    assert platform.processor_name(root=tmp_path)
    text = "processor : 0\nmodel name\t: A Fast One\n\nprocessor : 1\nmodel name\t: A Fast One\n"
    assert platform.processor_name(root=fake_root(tmp_path, {"proc/cpuinfo": text})) == "A Fast One"


def test_gpus_are_those_that_the_driver_shows(tmp_path):
    assert platform.nvidia_gpus(root=tmp_path) == []
    files = {
        f"proc/driver/nvidia/gpus/0000:{place}:00.0/information": f"Model: \t\t {name}\nIRQ:   \t\t 5\n"
        for place, name in (("41", "NVIDIA B"), ("01", "NVIDIA A"))
    }
    assert platform.nvidia_gpus(root=fake_root(tmp_path, files)) == ["NVIDIA A", "NVIDIA B"]


# A program of its own: what its heap has room for already is the question.
@pytest.mark.parametrize(("setting", "kept"), [("2**25", True), ("2**16", False)])
def test_freed_blocks_above_the_threshold_go_back_to_the_system(setting, kept):
    if not platform.set_mmap_threshold(2**25):
        pytest.skip("this malloc is not glibc's")
    program = f"""
from scrimp.base import platform as p
assert p.set_mmap_threshold({setting})
blocks = [bytes([1]) * {MIB} for _ in range(96)]
held = p.resident_bytes()
del blocks[::2]  # every other one, so that the heap cannot shrink
print(held - p.resident_bytes())
p.trim_heap()
print(held - p.resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    freed, trimmed = map(int, done.stdout.split())
    assert freed < 8 * MIB if kept else freed > 40 * MIB
    assert trimmed > 40 * MIB


def test_a_malloc_that_is_not_glibcs_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "_c_function", lambda name: None)
    assert platform.set_mmap_threshold(2**16) is False
    assert platform.trim_heap() is False


@pytest.mark.parametrize("setting", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_openmp_waits_passively_unless_the_user_chose_and_nothing_stays_behind(monkeypatch, setting):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    if setting:
        monkeypatch.setenv(setting, "ACTIVE")
    before = dict(os.environ)
    with pytest.raises(RuntimeError), platform.passive_openmp():
        inside = os.environ.get("OMP_WAIT_POLICY")
        raise RuntimeError
    assert inside == {None: "PASSIVE", "OMP_WAIT_POLICY": "ACTIVE"}.get(setting)
    assert dict(os.environ) == before
