"""Random numbers as a pure function of (key, counter): the same on every device, in any order, under any sharding.

    z = key + (counter // 2 + 1) * 0x9E3779B97F4A7C15      (mod 2^64; all shifts logical)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    z = z ^ z >> 31
    bits = the low 32 bits of z for an even counter, the high ones for an odd one, >> 8        24 bits: exact in fp32

This is the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), both halves of it: products of 64 bits are what
a draw costs. Integer arithmetic only, so Triton and C++ give the same bits.
"""

import torch
from torch import Tensor

from hyperllama.kernels.backend import jit, tl

_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """The int64 with the bits of a uint64: torch's integers are int64, and multiply modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(key: int, counter: Tensor) -> Tensor:
    """Uniform fp32 in [0, 1), multiples of 2^-24, for every int64 in `counter`."""
    z = (_shift(counter, 1) + 1) * signed(_GAMMA) + signed(key)
    z = (z ^ _shift(z, 30)) * signed(_MIX1)
    z = (z ^ _shift(z, 27)) * signed(_MIX2)
    z = z ^ _shift(z, 31)
    return ((z >> (8 + 32 * (counter & 1))) & 0xFFFFFF).to(torch.float32) * 2**-24


@jit
def _mixed_triton(key, pair):
    """z of two counters, int64. Products wrap, and masks make the shifts logical."""
    z = (pair + 1) * -0x61C8864680B583EB + key
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@jit
def uniform_triton(key, counter):
    """`uniform` inside a Triton kernel: fp32 for int64 counters from 0 on."""
    z = _mixed_triton(key, counter >> 1)
    half = (z >> ((counter.to(tl.int32) & 1) * 32).to(tl.int64)).to(tl.int32)
    return ((half >> 8) & 0xFFFFFF).to(tl.float32) * 5.960464477539063e-08  # 2^-24


@jit
def uniform_pair_triton(key, pair):
    """`uniform` of counters 2 pair and 2 pair + 1."""
    z = _mixed_triton(key, pair)
    first, second = (z >> 8) & 0xFFFFFF, (z >> 40) & 0xFFFFFF
    return first.to(tl.float32) * 5.960464477539063e-08, second.to(tl.float32) * 5.960464477539063e-08
