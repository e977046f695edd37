"""linear: torch's product, with the weight's gradient returned or accumulated."""

import pytest
import torch
from torch.nn import functional

from hyperllama.kernels.backend import use
from hyperllama.kernels.linear import accumulate_product, linear
from tests.kernels.truth import DTYPES, check, check_compiled


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4)])
def test_it_accumulates_what_autograd_returns(dtype, shape):
    x, weight = torch.randn(*shape, 24).to(dtype).requires_grad_(), torch.randn(40, 24).to(dtype).requires_grad_()
    upstream = torch.randn(*shape, 40).to(dtype)
    y = linear(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), upstream)
    main_grad = torch.ones(40, 24, dtype=torch.promote_types(dtype, torch.float32))
    for _ in range(2):
        again = linear(x, weight, main_grad=main_grad)
        assert torch.equal(again, y)
        again.backward(upstream)
    torch.testing.assert_close(x.grad, 2 * dx)
    torch.testing.assert_close(main_grad, 1 + 2 * dw.to(main_grad.dtype))
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


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5), (17, 15), (33, 65), (300, 257)])
@pytest.mark.parametrize("step", [1, 2])
def test_csrc_adds_a_bf16_product_as_torch_does(shape, step):
    """To the bit, from an odd address, also to a view with gaps; and nothing around it changes."""
    rows, columns = shape
    dy, x = torch.randn(7, rows).bfloat16(), torch.randn(7, columns).bfloat16()
    before = torch.randn(step * rows * columns + 2)

    def added(backend):
        memory = before.clone()
        with use(backend):
            accumulate_product(memory[1:-1:step].view(shape), dy, x)
        return memory

    truth = before.clone()
    truth[1:-1:step].view(shape).add_((dy.t() @ x).float())
    assert torch.equal(added("csrc"), truth) and torch.equal(added("reference"), truth)


def test_compiled_equals_eager():
    check_compiled(lambda x, w: [linear(x, w)], [torch.randn(3, 5, 24), torch.randn(40, 24)])
