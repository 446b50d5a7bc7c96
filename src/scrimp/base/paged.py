"""Tensors in files that the system pages: they count as a process's memory only while they are in use.

The file is mapped and shared, and has no name by the time the tensor exists: whatever ends the process, the
room on the disk is free again. Its pages lie in the system's cache as long as there is memory for them.
Calls of the system stand here and not in `base.platform`, as `scrimp.optim` needs torch alone.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.units import format_bytes

_PREFIX = "scrimp-paged-"
_MADV_DONTNEED = 4  # of Linux's and macOS' <sys/mman.h>


def paged_zeros(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """Return a tensor of zeros on the CPU whose memory is a file.

    Args:
        shape: Of one element at least.
        dtype: Any.
        folder: Where the file has its room; made where it is missing.

    Raises:
        ScrimpError: There is no room on that disk, it may not be written to, or this is Windows, where a
            file that is in use cannot lose its name.
    """
    if sys.platform == "win32":
        raise ScrimpError("state cannot be paged to files on Windows: leave --placement out")
    size = math.prod(shape) * dtype.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_PREFIX) as file:
            _reserve(file.fileno(), size)
            storage: Any = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=size)
    except OSError as error:
        raise ScrimpError(
            f"no file of {format_bytes(size)} can be made in {folder} to page state to "
            f"({error.strerror or error}): make room, or point XDG_CACHE_HOME at another disk"
        ) from error
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def is_paged(tensor: Tensor) -> bool:
    """Tell whether `paged_zeros` made a tensor."""
    if tensor.device.type != "cpu":
        return False
    name = tensor.untyped_storage().filename
    return name is not None and Path(name).name.startswith(_PREFIX)


def release(tensor: Tensor) -> None:
    """Let a tensor's pages leave the process, where it is a paged one; they come back when it is used."""
    if is_paged(tensor):
        storage = tensor.untyped_storage()
        _madvise()(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _MADV_DONTNEED)


def wait_for_host(optimizer: torch.optim.Optimizer) -> None:
    """Wait until state that lies on the host beside a GPU holds what the last update left."""
    for p, state in optimizer.state.items():
        tensors = (value for value in state.values() if isinstance(value, Tensor))
        if p.is_cuda and any(value.device.type == "cpu" for value in tensors):
            torch.cuda.synchronize(p.device)
            return


def _reserve(file: int, size: int) -> None:
    """Take room for a file: were there none when a page is written, the system would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.truncate(file, size)


@lru_cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise
