"""Tuning: which parameters train, and when."""
