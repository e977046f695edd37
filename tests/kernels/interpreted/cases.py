"""Run by test_interpreted.py with TRITON_INTERPRET=1: Triton kernels on CPU tensors, against fp64.

The interpreter keeps bf16 as raw uint16. Loading, widening to fp32 and storing are right, but its narrowing from fp32 cuts the
low bits off where hardware rounds to nearest even; `round_like_hardware` mends that for these tests.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.nn import functional
from triton.runtime import interpreter

from hyperllama.kernels import backend
from hyperllama.kernels.rms_norm import rms_norm
from tests.kernels.truth import check

EPS = 1e-5


@pytest.fixture(autouse=True)
def round_like_hardware(monkeypatch):
    """Narrow fp32 to bf16 by rounding to nearest even, through torch, which does it right."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).bfloat16()
            return interpreter.TensorHandle(values.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return original(self, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    with backend.use("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 576), (5, 3), (33, 17), (3, 5, 1152), (0, 64), (4, 5000)])
def test_rms_norm(dtype, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    check(lambda x, w: [rms_norm(x, w, EPS)], lambda x, w: [functional.rms_norm(x, x.shape[-1:], w, EPS)], [x, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_residual(dtype):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(37, 576).to(dtype), torch.randn(37, 576).to(dtype), torch.randn(576).to(dtype)
    y, stream = rms_norm(x, weight, EPS, residual)
    assert torch.equal(stream, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, EPS))
    if dtype == torch.float32:

        def plain(x, r, w):
            return [functional.rms_norm(x + r, (576,), w, EPS), x + r]

        check(lambda x, r, w: rms_norm(x, w, EPS, r), plain, [x, residual, weight])


def test_the_weight_gradient_sums_every_row_block():
    """More rows than programs: each program walks several blocks."""
    x, weight = torch.randn(400, 64), torch.randn(64, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    expected = functional.rms_norm(x, (64,), None, EPS).sum(0)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)
