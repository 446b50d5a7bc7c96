"""Gradient: where the gradient comes from."""
