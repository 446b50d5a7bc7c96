"""Conditioners: what happens to the gradient before the moments see it."""
