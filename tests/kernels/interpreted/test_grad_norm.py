"""The Triton kernels of grad_norm: to one rounding, every block counted once."""

import pytest
import torch

from hyperllama.kernels.adamw import LINE
from hyperllama.kernels.grad_norm import Launch, grad_norm


@pytest.mark.parametrize("size", [0, 1, 2049, 1024 * 2048 + 5000])
def test_it_is_exact_to_rounding(size):
    grad = torch.randn(size + 1)[1:]  # unaligned
    norm = grad_norm(grad)
    assert norm.shape == () and norm.dtype == torch.float32
    torch.testing.assert_close(norm, grad.double().norm().float(), rtol=1e-7, atol=0)
    assert Launch.of(size).programs <= 1024  # the last size has programs with two blocks


def test_gradients_whose_squares_leave_fp32_keep_their_norm_and_broken_ones_show():
    torch.testing.assert_close(grad_norm(torch.full((4,), 1e30)).item(), 2e30, rtol=1e-7, atol=0)
    assert not torch.isfinite(grad_norm(torch.tensor([1.0, float("nan")])))


@pytest.mark.parametrize("size", [1, 5000])
def test_squares_are_weighted_by_group(size):
    grad, weights = torch.randn(size), torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    groups = torch.randint(3, (-(-size // LINE),), dtype=torch.uint8)
    expected = (grad.double().square() * weights[groups.long()].repeat_interleave(LINE)[:size]).sum().sqrt()
    torch.testing.assert_close(grad_norm(grad, groups, weights), expected.float(), rtol=1e-7, atol=0)
