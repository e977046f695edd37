"""linear: torch's product, with the weight's gradient returned or accumulated."""

import pytest
import torch
from torch.nn import functional

from hyperllama.kernels.linear import linear
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


def test_compiled_equals_eager():
    check_compiled(lambda x, w: [linear(x, w)], [torch.randn(3, 5, 24), torch.randn(40, 24)])
