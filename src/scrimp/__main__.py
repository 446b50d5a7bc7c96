"""`python -m scrimp`."""

from __future__ import annotations

from scrimp.cli import main

if __name__ == "__main__":
    main()
