"""Placement: where tensors live."""
