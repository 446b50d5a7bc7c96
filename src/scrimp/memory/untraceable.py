"""What is raised where a step cannot be simulated."""

from __future__ import annotations


class Untraceable(Exception):  # noqa: N818 - it is no error of anybody: the formula answers instead
    """A model or a piece that cannot be simulated; the message says which and why."""
