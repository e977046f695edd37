"""linear: products, with the weight's gradient returned or accumulated."""

import pytest
import torch
from torch.nn import functional

from hyperllama.kernels import linear as module
from hyperllama.kernels.backend import use
from hyperllama.kernels.linear import SUMS, accumulate_product, linear
from tests.kernels.truth import DTYPES, check, check_compiled


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4)])
def test_it_accumulates_what_autograd_returns(dtype, shape):
    x, weight = torch.randn(*shape, 24).to(dtype).requires_grad_(), torch.randn(40, 24).to(dtype).requires_grad_()
    upstream = torch.randn(*shape, 40).to(dtype)
    y = linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, upstream)
    main_grad = torch.ones(40, 24, dtype=torch.promote_types(dtype, torch.float32))
    for _ in range(2):
        again = linear(x, weight, main_grad=main_grad)
        assert torch.equal(again, y)
        again.backward(upstream)
    torch.testing.assert_close(x.grad, 2 * dx)
    sides = [t.detach().flatten(0, -2) for t in (upstream, x)]
    # what is accumulated is not rounded to bf16, but where the product is torch's
    if dtype in SUMS or dtype == torch.float64:
        sides = [t.to(main_grad.dtype) for t in sides]
    torch.testing.assert_close(main_grad, 1 + 2 * (sides[0].t() @ sides[1]).to(main_grad), rtol=1e-5, atol=2e-5)
    assert weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulating_gradients_of_a_transposed_upstream(dtype):
    """A gradient that comes from a transpose is not contiguous."""
    x, weight = torch.randn(6, 4).to(dtype).requires_grad_(), torch.randn(3, 4).to(dtype).requires_grad_()
    main_grad = torch.zeros(3, 4)
    (linear(x, weight, main_grad=main_grad).t() @ torch.randn(6, 2).to(dtype)).sum().backward()
    assert torch.isfinite(main_grad).all() and main_grad.any()

    def accumulating(x, weight):
        return [linear(x, weight)]

    check(accumulating, lambda x, w: [functional.linear(x, w)], [x.detach().t().contiguous().t(), weight.detach()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (64, 8, 32), (77, 33, 65), (1100, 9, 40), (600, 300, 1050)])
def test_error_is_at_most_twice_plain_torchs(dtype, shape):
    tokens, n, k = shape
    x, weight, upstream = (
        torch.randn(tokens, k).to(dtype),
        torch.randn(n, k).to(dtype),
        torch.randn(tokens, n).to(dtype),
    )

    def accumulating(x, weight, upstream):
        main_grad = torch.zeros(n, k, dtype=torch.promote_types(x.dtype, torch.float32))
        leaf = x.detach().requires_grad_()
        y = linear(leaf, weight.detach().requires_grad_(), main_grad=main_grad)
        return [y.detach(), *torch.autograd.grad(y, leaf, upstream), main_grad]

    def plain(x, weight, upstream):
        return [functional.linear(x, weight), upstream @ weight, upstream.t() @ x]

    with torch.no_grad():
        truth = plain(x.double(), weight.double(), upstream.double())
        torchs = plain(x, weight, upstream)
    for exact, theirs, ours in zip(truth, torchs, accumulating(x, weight, upstream), strict=True):
        # where torch happens to be exact, one rounding of the largest value is allowed, as everywhere (truth.py)
        rounding = torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= max(2 * (theirs - exact).abs().max(), rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 5), (7, 1, 1), (7, 17, 15), (9, 300, 257), (9, 33, 600)])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_csrc_accumulates_in_place(dtype, shape, step, threads):
    """What was there is kept, also at an odd address or in a view with gaps, and nothing around it changes."""
    tokens, n, k = shape
    dy, x = torch.randn(tokens, n).to(dtype), torch.randn(tokens, k).to(dtype)
    before = torch.randn(step * n * k + 2)
    memory, truth = before.clone(), before.double()
    truth[1:-1:step].view(n, k).addmm_(dy.double().t(), x.double())
    wanted = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with use("csrc"):
            accumulate_product(memory[1:-1:step].view(n, k), dy, x)
    finally:
        torch.set_num_threads(wanted)
    torchs = step == 2 or dtype not in SUMS  # a view with gaps gets torch's product
    rounding = 0.05 if torchs and dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(memory.double(), truth, rtol=rounding, atol=rounding)
    assert memory[0] == before[0] and memory[-1] == before[-1]
    assert torch.equal(memory[2:-1:2], before[2:-1:2]) or step == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2100, 40, 24), (700, 24, 100)])
def test_threads_change_no_bit(dtype, shape):
    tokens, n, k = shape
    dy, x = torch.randn(tokens, n).to(dtype), torch.randn(tokens, k).to(dtype)
    results, wanted = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ones(n, k))
            accumulate_product(results[-1], dy, x)
    finally:
        torch.set_num_threads(wanted)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "shape", [(128, 1, 1), (129, 33, 65), (130, 520, 200), (135, 96, 1050), (1100, 40, 40), (600, 2048, 128)]
)
def test_products_of_csrc_on_every_cpu(shape, transposed):
    """Also where `linear` would take torch's: error, an odd address, neighbours that keep their values, any number of threads."""
    rows, n, k = shape
    x, weight = torch.randn(rows * k + 1)[1:].view(rows, k), torch.randn(n, k) if transposed else torch.randn(k, n)
    reference = module._product_reference
    truth, theirs = reference(x.double(), weight.double(), transposed), reference(x, weight, transposed)
    found, wanted = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(module._product_csrc(x, weight, transposed))
    finally:
        torch.set_num_threads(wanted)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    rounding = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (found[0] - truth).abs().max() <= max(2 * (theirs - truth).abs().max(), rounding)
    strided = torch.randn(k, rows).t()
    one, other = (module._product_csrc(each, weight, transposed) for each in (strided, strided.contiguous()))
    assert torch.equal(one, other)


def test_a_product_that_is_not_finite_stays_so():
    x, weight = torch.randn(200, 40), torch.randn(50, 40)
    x[7, 3], x[9, 1] = float("nan"), float("inf")
    y = module._product_csrc(x, weight, True)
    assert y[7].isnan().all() and not y[9].isfinite().any()
    assert torch.isfinite(y[torch.arange(200).ne(7) & torch.arange(200).ne(9)]).all()


def test_compiled_equals_eager():
    check_compiled(lambda x, w: [linear(x, w)], [torch.randn(3, 5, 24), torch.randn(40, 24)])
