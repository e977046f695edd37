"""grad_norm: the L2 norm to one rounding, the same bits every time."""

import pytest
import torch
from torch.library import opcheck

from hyperllama.kernels.adamw import LINE
from hyperllama.kernels.backend import use
from hyperllama.kernels.grad_norm import CHUNK, grad_norm


@pytest.mark.parametrize("backend", ["reference", "csrc"])
@pytest.mark.parametrize("size", [0, 1, 3 * CHUNK + 1])
def test_it_is_exact_to_rounding(size, backend, number_of_threads):
    grad = torch.randn(size + 1)[1:]  # unaligned
    with use(backend):
        norm = grad_norm(grad)
        number_of_threads(3)
        assert torch.equal(norm, grad_norm(grad))
    assert norm.shape == () and norm.dtype == torch.float32
    torch.testing.assert_close(norm, grad.double().norm().float(), rtol=1e-7, atol=0)


def test_gradients_whose_squares_leave_fp32_keep_their_norm():
    torch.testing.assert_close(grad_norm(torch.full((4,), 1e30)).item(), 2e30, rtol=1e-7, atol=0)
    torch.testing.assert_close(grad_norm(torch.full((4,), 1e-30)).item(), 2e-30, rtol=1e-7, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_shows(value):
    grad = torch.ones(10)
    grad[3] = value
    assert not torch.isfinite(grad_norm(grad))


def test_opcheck_and_compile():
    grad = torch.randn(100)
    opcheck(torch.ops.hyperllama.grad_norm.default, (grad,))
    assert torch.equal(torch.compile(grad_norm, backend="aot_eager", fullgraph=True)(grad), grad_norm(grad))


@pytest.mark.parametrize("backend", ["reference", "csrc"])
@pytest.mark.parametrize("size", [1, 200, 3 * CHUNK + 1])
def test_squares_are_weighted_by_group(size, backend):
    grad, weights = torch.randn(size), torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    groups = torch.randint(3, (-(-size // LINE),), dtype=torch.uint8)
    expected = (grad.double().square() * weights[groups.long()].repeat_interleave(LINE)[:size]).sum().sqrt()
    with use(backend):
        torch.testing.assert_close(grad_norm(grad, groups, weights), expected.float(), rtol=1e-7, atol=0)
