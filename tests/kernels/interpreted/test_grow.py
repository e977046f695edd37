"""The Triton kernels of grow have the reference's bits."""

import pytest
import torch

from hyperllama.kernels.backend import jit, tl, use
from hyperllama.kernels.counter import signed, uniform, uniform_triton
from hyperllama.kernels.grow import grow, remap

ALL = [torch.float32, torch.bfloat16, torch.float16]


def same(run):
    with use("reference"):
        expected = run()
    got = run()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got, expected)


@jit
def _uniform_kernel(counter_ptr, out_ptr, key):
    at = tl.arange(0, 64)
    tl.store(out_ptr + at, uniform_triton(key, tl.load(counter_ptr + at)))


@pytest.mark.parametrize("key", [0, 1, 12345, 2**63 - 1, 2**63 + 17, 2**64 - 1])
def test_random_numbers_are_those_of_the_reference(key):
    counters = torch.cat([torch.arange(32), torch.randint(2**62, (32,))])
    out = torch.empty(64)
    _uniform_kernel[(1,)](counters, out, signed(key))
    assert torch.equal(out, uniform(signed(key), counters))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("noise_db", [None, 10.0, 4.78])
@pytest.mark.parametrize(("rows", "cols"), [(5, 576), (70, 33), (1, 1)])
def test_tiles(dtype, noise_db, rows, cols):
    source = torch.randn(rows, cols).to(dtype)
    for copies in [(1, 1), (2, 2), (3, 5)]:
        same(lambda copies=copies: grow(source, *copies, noise_db=noise_db, key=2**63 + 5))


@pytest.mark.parametrize("dtype", ALL)
def test_vectors_and_views(dtype):
    same(lambda: grow(torch.randn(577, generator=torch.Generator().manual_seed(1)).to(dtype)[1:], 3, 2))
    transposed = torch.randn(40, 24).to(dtype).t()
    same(lambda: grow(transposed, 2, 3, noise_db=20.0, key=7))
    same(lambda: grow(torch.empty(0, 8, dtype=dtype), 2, 2))


@pytest.mark.parametrize("dtype", ALL)
def test_remap(dtype):
    source = torch.randn(7, 40).to(dtype)
    rows, cols = torch.randint(7, (19,)), torch.randint(40, (130,))
    same(lambda: remap(source, rows, cols))
    scale = torch.rand(130)
    same(lambda: remap(source, rows, cols, scale))
