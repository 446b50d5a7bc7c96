"""Everything lives on the training device but the optimizer's state, which comes there to be used.

Beside a GPU it lies in pinned host memory, on a CPU in files that the system pages; see the optimizer's
`page_state`.
"""

from __future__ import annotations

from pathlib import Path

from scrimp.base.protocols import PagesState
from scrimp.placement.device import OneDevice


class PagedState(OneDevice):
    """Keep weights, gradients and activations on one device, and there of the state what is in use."""

    def place_state(self, optimizer: PagesState, folder: Path) -> None:
        """Keep the state off the device between the updates of its parameter."""
        optimizer.page_state(folder)


def paged_state() -> PagedState:
    """Build the placement that pages optimizer state."""
    return PagedState()
