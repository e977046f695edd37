"""The tensor hash against its definition, word by word, in Python's integers."""

import numpy as np
import pytest

from hyperllama.kernels.hashing import BLOCK, hash_bytes, hash_reference
from hyperllama.kernels.native import library

GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def definition(data: bytes) -> int:
    total = 0
    for number in range(-(-len(data) // BLOCK)):
        block = data[number * BLOCK : (number + 1) * BLOCK].ljust(BLOCK, b"\0")
        sums = [0] * 8
        for i in range(BLOCK // 8):
            word = int.from_bytes(block[8 * i : 8 * i + 8], "little")
            x = word ^ (GOLDEN * (i + 1) & MASK)
            sums[i % 8] += (x & 0xFFFFFFFF) * (x >> 32) + word
        value = mix(number + GOLDEN & MASK)
        for part in sums:
            value = mix(value ^ (part & MASK))
        total += value
    return total & MASK


def random_bytes(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 2047, 2048, 2049, 10 * BLOCK + 3])
def test_both_implementations_are_the_definition(n: int) -> None:
    data = random_bytes(n)
    assert hash_reference(data) == definition(data.tobytes())
    assert hash_bytes(data) == definition(data.tobytes())


def test_large_data_on_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is not None, "install the package: pip install -e ."
    monkeypatch.setattr("hyperllama.kernels.hashing.threads", lambda: 2)
    data = random_bytes(9_000_001)
    assert hash_bytes(data) == hash_reference(data)


def test_every_bit_and_every_place_counts() -> None:
    data = random_bytes(2 * BLOCK)
    seen = {hash_bytes(data)}
    for byte in (0, 5, 800, 2047, 2048, 4095):
        for bit in range(8):
            data[byte] ^= 1 << bit
            seen.add(hash_bytes(data))
            data[byte] ^= 1 << bit
    swapped = np.concatenate([data[BLOCK:], data[:BLOCK]])
    words = data.copy()
    words[:8], words[64:72] = data[64:72], data[:8]
    seen |= {hash_bytes(swapped), hash_bytes(words)}
    assert len(seen) == 1 + 6 * 8 + 2
