"""A matrix product whose weight gradient accumulates in the arena.

    y = x W^T;   dx = dy W;   dW += dy^T x

x: (..., K), W: (N, K), y: (..., N). `main_grad` (N, K) is fp32 (fp64), and so are the sums added to it. y and dx are torch's
products. dW on a CPU is C++, which packs both sides once, and adds fp32 sums where torch would round a product to bf16 first; where
the CPU has AMX, bf16 stays torch's. On a GPU dW is accumulated by the GEMM itself (beta = 1, no further pass over it).
"""

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels.backend import choose, csrc, pointer

# dtypes whose dW is summed in C++; on other CPUs than have been measured it stays torch's
_MEASURED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SUMS = (torch.float32, *(() if torch.cpu._is_amx_tile_supported() else (torch.bfloat16,))) if _MEASURED else ()


def accumulate_product(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """main_grad (N, K) += dy^T x for dy (M, N) and x (M, K)."""
    fits = main_grad.dtype == torch.float32 and main_grad.is_contiguous()
    implementations = {"reference": _accumulate_reference} | ({"csrc": _accumulate_csrc} if fits else {})
    choose(implementations, x, SUMS)(main_grad, dy, x)


def _accumulate_reference(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    if main_grad.dtype == dy.dtype:
        main_grad.addmm_(dy.t(), x)
    elif main_grad.is_cuda and main_grad.dtype == torch.float32:
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)
    else:
        main_grad += dy.t() @ x


def _accumulate_csrc(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    dy, x = dy.contiguous(), x.contiguous()
    csrc("weight_gradient")(
        int(x.dtype == torch.bfloat16), pointer(main_grad), pointer(dy), pointer(x), c_int64(x.shape[0]),
        c_int64(dy.shape[1]), c_int64(x.shape[1]), torch.get_num_threads(),
    )  # fmt: skip


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


def linear(x: Tensor, weight: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K); `main_grad` (N, K) fp32 receives the weight's gradient in place."""
    return functional.linear(x, weight) if main_grad is None else _Accumulating.apply(x, weight, main_grad)
