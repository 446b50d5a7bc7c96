"""Weights: how a matrix is stored and parametrised."""
