"""Keys of random numbers: what kernels/counter.py hashes a position with. Without torch, for plans."""

import hashlib


def key_of(*parts: str | int) -> int:
    """A 64-bit key from names and seeds."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
