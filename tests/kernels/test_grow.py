"""Growth kernels: the C++ has the reference's bits; remap is indexing and a product. See tests/grow for what growth preserves."""

import pytest
import torch
from torch.library import opcheck

from hyperllama.kernels import backend
from hyperllama.kernels.grow import grow, remap

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 3), (3, 0), (1, 1), (5, 3), (17, 64), (3, 2049), (70, 1000)]


def both(function, *inputs, **options):
    results = []
    for name in ("reference", "csrc"):
        with backend.use(name):
            results.append(function(*inputs, **options))
    return results


@pytest.fixture(params=["reference", "csrc"])
def implementation(request):
    with backend.use(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("copies", [(1, 1), (2, 2), (3, 3), (1, 4), (2, 5)])
@pytest.mark.parametrize("noise_db", [None, 4.78, 20.0])
def test_csrc_has_the_references_bits(dtype, shape, copies, noise_db):
    source = torch.randn(shape).to(dtype)
    expected, got = both(grow, source, *copies, noise_db=noise_db, key=2**63 + 9)
    assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_vectors_views_and_other_dtypes(dtype):
    for source in (torch.randn(70).to(dtype), torch.randn(71).to(dtype)[1:], torch.randn(9, 7).to(dtype).t()):
        expected, got = both(grow, source, 3, 3, noise_db=10.0, key=1)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_beyond_the_caches_is_the_same(dtype):
    source = torch.randn(701, 1003).to(dtype)
    for noise_db in (None, 10.0):
        expected, got = both(grow, source, 2, 2, noise_db=noise_db, key=1)
        assert torch.equal(got, expected)


def test_threads_do_not_change_a_bit():
    source, results, before = torch.randn(300, 500), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with backend.use("csrc"):
                results.append(grow(source, 2, 2, noise_db=10.0, key=1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (1, 1), (300, 257)])
def test_remap_is_indexing_and_a_rounded_product(implementation, dtype, size):
    source = torch.randn(40, 50).to(dtype)
    rows, cols = torch.randint(40, size[:1]), torch.randint(50, size[1:])
    assert torch.equal(remap(source, rows, cols), source[rows][:, cols])
    scale = torch.rand(size[1])
    exact = source.double()[rows][:, cols] * scale.double()
    if dtype == torch.float64:
        assert torch.equal(remap(source, rows, cols, scale), exact)
        third = torch.full(size[1:], 1 / 3, dtype=dtype)  # no fp32 number
        assert torch.equal(remap(source, rows, cols, third), source[rows][:, cols] * third)
    else:  # the exact product of 24 by 24 bits or less, rounded to fp32, then to the dtype
        assert torch.equal(remap(source, rows, cols, scale), exact.float().to(dtype))


def test_remap_of_the_tiles_is_growing(implementation):
    source = torch.randn(12, 10)
    rows, cols = torch.arange(12).repeat(2), torch.arange(10).repeat(2)
    assert torch.equal(remap(source, rows, cols, torch.full((20,), 0.5)), grow(source, 2, 2))


def test_remap_takes_views(implementation):
    source, index = torch.randn(20, 30).t(), torch.arange(20).flip(0)[::2]
    assert torch.equal(remap(source, index, index), source[index][:, index])


@pytest.mark.parametrize(
    ("rows", "cols", "message"), [([4], [0], "row 4"), ([-1], [0], "row -1"), ([0], [5, 1], "column 5")]
)
def test_an_index_outside_is_named(implementation, rows, cols, message):
    with pytest.raises(IndexError, match=message):
        remap(torch.ones(4, 5), torch.tensor(rows), torch.tensor(cols))


def test_wrong_inputs_are_refused():
    index = torch.tensor([0])
    with pytest.raises(ValueError, match="int64"):
        remap(torch.ones(2, 2), index.int(), index)
    with pytest.raises(ValueError, match="matrix"):
        remap(torch.ones(2), index, index)
    with pytest.raises(ValueError, match="scale"):
        remap(torch.ones(2, 2), index, index, torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    source, index = torch.randn(4, 3).to(dtype), torch.tensor([2, 0])
    opcheck(torch.ops.hyperllama.grow.default, (source, 2, 3, 10.0, -5))
    opcheck(torch.ops.hyperllama.remap.default, (source, index, index, None))
    opcheck(torch.ops.hyperllama.remap.default, (source, index, index, torch.rand(2)))
