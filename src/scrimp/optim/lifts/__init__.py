"""Lifts: how a step in the subspace becomes an update of the whole matrix."""
