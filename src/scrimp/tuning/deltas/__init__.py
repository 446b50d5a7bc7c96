"""Deltas: what an adapter adds to a frozen linear layer, one file a parametrisation."""
