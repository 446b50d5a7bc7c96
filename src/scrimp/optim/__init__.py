"""Optimizers: how a gradient becomes a step. This package needs torch alone."""

from scrimp.optim.named import adamw

__all__ = ["adamw"]
