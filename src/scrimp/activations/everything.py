"""Keep every activation that the backward pass asks for: autograd's own behaviour."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn


class Everything:
    """The identity among activation policies."""

    def apply(self, model: nn.Module) -> None:
        """Leave `model` as it is."""

    def context(self) -> AbstractContextManager[None]:
        """Change nothing about what autograd saves."""
        return nullcontext()


def everything() -> Everything:
    """Build the policy that keeps everything."""
    return Everything()
