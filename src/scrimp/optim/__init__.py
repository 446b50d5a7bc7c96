"""Optimizers: how a gradient becomes a step. This package needs torch alone."""

from __future__ import annotations

from scrimp.optim.named import adamw

__all__ = ["adamw"]
