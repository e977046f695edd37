"""The Triton kernels of rms_norm against fp64."""

import pytest
import torch
from torch.nn import functional

from hyperllama.kernels.rms_norm import Launch, rms_norm
from tests.kernels.truth import DTYPES, check

EPS = 1e-5


def plain(x, weight):
    return [functional.rms_norm(x, x.shape[-1:], weight, EPS)]


def test_narrowing_rounds_like_hardware():
    x = torch.randn(64, 32)
    y, _ = rms_norm(torch.zeros_like(x).bfloat16(), torch.ones(32).bfloat16(), EPS, x.bfloat16())
    exact = x.bfloat16().float() * (x.bfloat16().float().square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert (y == exact.bfloat16()).float().mean() > 0.99  # fp32 sums differ in order; cut off, half would be different


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(7, 576), (5, 3), (33, 17), (3, 5, 1152), (0, 64), (4, 5000)])
def test_error_is_at_most_twice_plain_torchs(dtype, shape):
    check(lambda x, w: [rms_norm(x, w, EPS)], plain, [torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)])


def test_non_contiguous_and_unaligned_inputs():
    weight = torch.randn(577)[1:]
    check(lambda x, w: [rms_norm(x, w, EPS)], plain, [torch.randn(576, 41).t(), weight])
    check(lambda x, w: [rms_norm(x, w, EPS)], plain, [torch.randn(41, 600)[:, 3:579], weight])


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_residual(dtype):
    x, residual, weight = torch.randn(37, 576).to(dtype), torch.randn(37, 576).to(dtype), torch.randn(576).to(dtype)
    y, stream = rms_norm(x, weight, EPS, residual)
    assert torch.equal(stream, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, EPS))
    if dtype == torch.float32:  # in bf16 the sum is rounded, which fp64 truth does not do

        def plain_add(x, r, w):
            return [functional.rms_norm(x + r, (576,), w, EPS), x + r]

        check(lambda x, r, w: rms_norm(x, w, EPS, r), plain_add, [x, residual, weight])


def test_the_weight_gradient_sums_every_row_block():
    """More row blocks than programs: each program walks several."""
    x, weight, main_grad = torch.randn(700, 64), torch.randn(64, requires_grad=True), torch.zeros(64)
    launch = Launch.of(700, 64, 4)
    assert launch.rows * launch.programs < len(x)
    rms_norm(x, weight, EPS, main_grad=main_grad).sum().backward()
    expected = functional.rms_norm(x, (64,), None, EPS).double().sum(0).float()
    torch.testing.assert_close(main_grad, expected, rtol=1e-4, atol=1e-4)
