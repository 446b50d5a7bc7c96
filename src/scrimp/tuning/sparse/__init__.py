"""Sparse changes."""
