"""A matrix product whose weight gradient accumulates in the arena. The GEMMs are torch's.

    y = x W^T;   dx = dy W;   dW += dy^T x

x: (..., K), W: (N, K), y: (..., N). `main_grad` (N, K) is fp32: where the dtypes agree, and on a GPU, the product is accumulated by
the GEMM itself (beta = 1, no further pass over dW); elsewhere a bf16 product is rounded once and then added, by C++ on a CPU.
"""

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels.backend import choose, csrc, pointer


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = main_grad
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        accumulate_product(ctx.main_grad, dy.flatten(0, -2), x.flatten(0, -2))
        return dy @ weight, None, None


def accumulate_product(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """main_grad (N, K) += dy^T x for dy (M, N) and x (M, K)."""
    if main_grad.dtype == dy.dtype:
        main_grad.addmm_(dy.t(), x)
    elif main_grad.is_cuda and main_grad.dtype == torch.float32:
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)
    else:
        product = dy.t() @ x
        fits = (main_grad.dtype, product.dtype) == (torch.float32, torch.bfloat16)
        fits = fits and main_grad.is_contiguous() and product.is_contiguous()
        choose({"reference": Tensor.add_} | ({"csrc": _add_csrc} if fits else {}), product)(main_grad, product)


def _add_csrc(main_grad: Tensor, product: Tensor) -> None:
    csrc("accumulate")(pointer(main_grad), pointer(product), c_int64(product.numel()), torch.get_num_threads())


def linear(x: Tensor, weight: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K); `main_grad` (N, K) fp32 receives the weight's gradient in place."""
    return functional.linear(x, weight) if main_grad is None else _Accumulating.apply(x, weight, main_grad)
