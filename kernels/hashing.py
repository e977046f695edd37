"""A 64-bit hash of a tensor's bytes, fast enough to be taken in passing, whose parts can be hashed in any order.

    hash(bytes) = sum_b h(b, block b) mod 2^64         blocks of 2048 bytes, the last one filled up with zeros
    h(b, block) = fold of mix over the eight sums S_l from mix(b + g):  h <- mix(h ^ S_l), l = 0..7
    S_l         = sum_s lo(x) hi(x) + w,               w = word 8 s + l of the block (little endian, 64 bits), s = 0..31,
                                                       x = w ^ (g (8 s + l + 1)), lo and hi its halves of 32 bits

with g = 0x9E3779B97F4A7C15 and mix the finalizer of SplitMix64 (counter.py). The sums are those of xxh3 (Collet), with one key per
word. It finds damage and tells models apart; against someone who looks for collisions SHA-256 is the tool. CPU: C++, inside the
passes of groups.h and target.h too. Nothing here needs torch.
"""

from ctypes import c_int64, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

from hyperllama.kernels.native import address, csrc, library, threads

if TYPE_CHECKING:  # numpy is imported by what computes with it: merging folders does not
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 2048


def _mix(z: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


def hash_reference(data: "Bytes | memoryview") -> int:
    """The hash in numpy, 4096 blocks at a time."""
    import numpy as np

    golden = np.uint64(0x9E3779B97F4A7C15)
    keys = (golden * np.arange(1, BLOCK // 8 + 1, dtype=np.uint64)).reshape(-1, 8)
    total, piece = np.uint64(0), 4096 * BLOCK
    with np.errstate(over="ignore"):
        for start in range(0, len(data), piece):
            part = np.frombuffer(data, np.uint8)[start : start + piece]
            words = np.pad(part, (0, -len(part) % BLOCK)).view("<u8").reshape(-1, BLOCK // 64, 8)
            x = words ^ keys
            sums = ((x & np.uint64(0xFFFFFFFF)) * (x >> np.uint64(32)) + words).sum(1, dtype=np.uint64)
            blocks = _mix(np.arange(start // BLOCK, start // BLOCK + len(words), dtype=np.uint64) + golden)
            for lane in range(8):
                blocks = _mix(blocks ^ sums[:, lane])
            total += blocks.sum(dtype=np.uint64)
    return int(total)


def hash_bytes(data: "Bytes | memoryview") -> int:
    """The hash of bytes in one piece."""
    if library() is None:
        return hash_reference(data)
    function = csrc("hash")
    function.restype = c_uint64
    return int(function(c_void_p(address(data)), c_int64(len(data)), threads()))
