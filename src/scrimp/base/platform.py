"""The one place where operating systems differ.

Each function holds the Linux form and what stands in for it elsewhere. Those that choose by
system take its name as an argument, so that a test on Linux can run what macOS and Windows run.

The peak of resident memory is the oddity. `ru_maxrss` survives `exec`: a program started by a
large one reports its parent's peak. On Linux the kernel's own mark, `VmHWM`, starts afresh with
the program and can be reset, so it is read instead (3 microseconds, through an open descriptor).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform as host
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path("/")
_WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHORT_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
_M_MMAP_THRESHOLD = -3  # of glibc's <malloc.h>


def fsync_file(file: int | Path, *, system: str = sys.platform) -> None:
    """Make a file's content survive a power cut.

    Args:
        file: The descriptor of an open file, or the path of a closed one.
        system: As in `sys.platform`.
    """
    if isinstance(file, Path):
        # Windows syncs only what is open for writing; elsewhere a read-only file can be synced too.
        with file.open("r+b" if system == "win32" else "rb") as opened:
            fsync_file(opened.fileno(), system=system)
    elif system != "darwin" or not _empty_drive_cache(file):
        os.fsync(file)


def fsync_directory(path: Path, *, system: str = sys.platform) -> None:
    """Make the names in a folder survive a power cut; Windows does so by itself and cannot be asked."""
    if system == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so with one of these.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def resident_bytes() -> int:
    """Return the bytes of main memory that this process holds now."""
    return int(_process(os.getpid()).memory_info().rss)


def peak_resident_bytes(*, system: str = sys.platform) -> int:
    """Return the most bytes of main memory this process has held, or held since the last reset."""
    if system == "linux":
        return _linux_peak()
    if system == "win32":
        windows_memory: Any = _process(os.getpid()).memory_info()  # its fields differ by system
        return int(windows_memory.peak_wset)
    return _rusage_peak(unit=1 if system == "darwin" else 1024)


def reset_peak_resident(*, system: str = sys.platform) -> bool:
    """Start the peak afresh from what is held now.

    Returns:
        Whether the system can do that; only Linux can, and not in every container.
    """
    if system != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: the high-water mark alone
    except OSError:
        return False
    return True


def has_data_limit(*, system: str = sys.platform) -> bool:
    """Tell whether the system refuses this process memory beyond a limit of its own (`ulimit -d`)."""
    if system == "win32":
        return False
    import resource  # absent on Windows

    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals by which people and schedulers ask a program to stop."""
    names = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last is Ctrl-Break, on Windows alone
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def usable_cores(*, root: Path = _ROOT) -> int:
    """Return how many cores this process may keep busy: its affinity, or its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup_cores(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def available_memory_bytes(*, root: Path = _ROOT) -> int:
    """Return the bytes this process could still take: the machine's, or what its container leaves."""
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *_cgroup_memory_left(root)]))


def total_memory_bytes(*, root: Path = _ROOT) -> int:
    """Return the bytes of main memory there are: the machine's, or its container's limit."""
    limits = [limit for limit, _, _ in _cgroup_memory(root)]
    return min([int(psutil.virtual_memory().total), *limits])


def processor_name(*, root: Path = _ROOT) -> str:
    """Return what the processor calls itself, or else its architecture."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, host.processor() or host.machine())


def nvidia_gpus(*, root: Path = _ROOT) -> list[str]:
    """Return the names of the GPUs that NVIDIA's driver shows on Linux, in milliseconds and without CUDA."""
    names = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        lines = file.read_text(encoding="utf-8").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return names


def set_mmap_threshold(size: int) -> bool:
    """Let malloc take every block of `size` bytes or more from the kernel, and give it back when it is freed.

    Glibc raises the threshold by itself, up to 32 MiB, as soon as a large block is freed: from then on
    tensors lie in a heap that fragments. Set once, it stays. Room that the heap has is still used first.

    Returns:
        Whether this system's malloc can do that; only glibc's can.
    """
    mallopt = _c_function("mallopt")
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, size) == 1


def trim_heap() -> bool:
    """Give the pages of freed blocks back to the kernel.

    Returns:
        Whether there was anything to give back; never where malloc is not glibc's.
    """
    malloc_trim = _c_function("malloc_trim")
    return malloc_trim is not None and malloc_trim(ctypes.c_size_t(0)) == 1


@contextmanager
def passive_openmp() -> Iterator[None]:
    """Import torch inside this context to let idle OpenMP threads sleep soon instead of spin.

    GNU's runtime spins for milliseconds by default, which beside one busy program slows a step of two
    threads many times over; with no spin at all, each of a small model's thousands of parallel loops pays
    for a sleep and a wake-up. A spin of some 50 microseconds costs little in either case
    (`benchmarks/openmp_wait.py`). The runtime reads the environment once, when torch loads it. A user's own
    setting wins, and the environment is left as it was found.
    """
    if any(name in os.environ for name in _WAIT_SETTINGS):
        yield
        return
    os.environ.update(SHORT_WAIT)
    try:
        yield
    finally:
        for name in SHORT_WAIT:
            os.environ.pop(name, None)


@lru_cache
def _c_function(name: str) -> Any:
    """Return a function of the C library that this process runs on; None where it has none of that name."""
    if sys.platform == "win32":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def _empty_drive_cache(descriptor: int) -> bool:
    """On macOS, where fsync leaves the data in the drive's own cache; tell whether it worked."""
    import fcntl  # absent on Windows

    try:
        fcntl.fcntl(descriptor, getattr(fcntl, "F_FULLFSYNC", 51))
    except OSError:  # not every file system knows it, and fsync is then the best there is
        return False
    return True


@lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


# Keyed by process: after a fork the parent's descriptor would still show the parent.
@lru_cache(maxsize=1)
def _status_descriptor(pid: int) -> int:
    return os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)


def _linux_peak() -> int:
    status = os.pread(_status_descriptor(os.getpid()), 8192, 0)
    start = status.find(b"VmHWM:")
    if start < 0:  # some sandboxes leave the line out
        return _rusage_peak(unit=1024)
    return int(status[start + 6 : status.index(b"kB", start)]) * 1024


def _rusage_peak(*, unit: int) -> int:
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return the control-group folders of this process, innermost first, that exist below `root`."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, names, place = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if names else "")
        inner = base / place.strip("/")
        # A limit may stand on any ancestor. Inside a container the path may be the host's, while
        # what the container sees starts at `base`: folders that do not exist are skipped.
        chain = [inner, *inner.parents]
        folders += [folder for folder in chain[: chain.index(base) + 1] if folder.is_dir()]
    return folders


def _read_numbers(path: Path) -> list[int] | None:
    """Return the whole numbers of a control file; None where it is absent or says `max`."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return None


def _cgroup_cores(root: Path) -> float | None:
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        pair = _read_numbers(folder / "cpu.max")
        if pair is None:  # version 1 has two files, and -1 for no limit
            quota, period = (_read_numbers(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            pair = [*(quota or [-1]), *(period or [1])]
        if pair[0] > 0:
            quotas.append(pair[0] / pair[1])
    return min(quotas, default=None)


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield the limit, the use and the folder of every control group that limits this process's memory."""
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _read_numbers(folder / limit_name), _read_numbers(folder / used_name)
            if limit and used:
                yield limit[0], used[0], folder


def _cgroup_memory_left(root: Path) -> list[int]:
    return [limit - used + _reclaimable(folder) for limit, used, folder in _cgroup_memory(root)]


def _reclaimable(folder: Path) -> int:
    """Return the bytes of page cache that the kernel drops before it runs out of memory."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
