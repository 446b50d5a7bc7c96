"""Projectors: the part of the gradient that keeps state."""
