"""Bench: methods and peers on the same job, compared so that anyone can repeat it."""

from __future__ import annotations
