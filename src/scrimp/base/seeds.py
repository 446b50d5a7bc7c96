"""Every random stream is derived from the run's seed and its own name.

No stream depends on how much another one drew, so a run that stops at step 500 and goes on
draws what the uninterrupted run drew, and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream called `names` (for example `"dropout", step`)."""
    text = "/".join([str(seed), *map(str, names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
