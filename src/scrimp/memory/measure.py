"""What a run was seen to hold.

On a CPU that is the resident memory of the whole process, read from the kernel's high-water mark; on
a GPU it is what the allocator handed out. Neither read waits for the device.
"""

from __future__ import annotations

import torch

from scrimp.base import platform

FIXED_STEP = 64 * 2**20


class PeakMeter:
    """The highest memory use since it was made (or since the process started, where a mark stays).

    Args:
        device: Where the run trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            platform.reset_peak_resident()

    def read(self) -> int:
        """Return the peak in bytes."""
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        return platform.peak_resident_bytes()


def fixed_bytes(device: torch.device) -> int:
    """Return what counts against the budget before a model exists: on a CPU the process, on a GPU nothing.

    It is rounded up to whole steps of 64 MiB: the first steps load more of the libraries, and one recipe
    shall have one prediction.
    """
    if device.type == "cuda":
        return 0
    return -(-platform.resident_bytes() // FIXED_STEP) * FIXED_STEP


def free_bytes(device: torch.device) -> int:
    """Return the memory a run may take where no budget is given, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return platform.available_memory_bytes() + platform.resident_bytes()
