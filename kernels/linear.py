"""A matrix product whose weight gradient accumulates in the arena.

    y = x W^T;   dx = dy W;   dW += dy^T x

x: (..., K), W: (N, K), y: (..., N). `main_grad` (N, K) is fp32 (fp64), and so are the sums added to it.

On a CPU dW is C++, which packs both sides once, and adds fp32 sums where torch would round a product to bf16 first; where the CPU
has AMX, bf16 stays torch's. y and dx are torch's products, but with a main_grad C++ in fp32 on an AMD CPU: torch's come from MKL,
which has an AVX2 kernel for those. On a GPU dW is accumulated by the GEMM itself (beta = 1, no further pass over it).
"""

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels.backend import choose, csrc, pointer, wide
from hyperllama.kernels.native import cpu_vendor

# dtypes whose dW is summed in C++; on other CPUs than have been measured it stays torch's
_MEASURED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SUMS = (torch.float32, *(() if torch.cpu._is_amx_tile_supported() else (torch.bfloat16,))) if _MEASURED else ()
# and those of y and dx, from this many rows on, because the weight is packed in every call, and this wide
PRODUCTS = (torch.float32,) if _MEASURED and cpu_vendor() == "AuthenticAMD" else ()
LEAST_ROWS, LEAST_WIDTH = 128, 32


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times the transpose of weight (N, K): (..., N)."""
    return _choose_product(x, weight)(x, weight, True)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (..., N) times weight (N, K): (..., K)."""
    return _choose_product(dy, weight)(dy, weight, False)


def _choose_product(x: Tensor, weight: Tensor) -> Any:
    rows, width = x.numel() // max(1, x.shape[-1]), min(weight.shape)
    fits = rows >= LEAST_ROWS and width >= LEAST_WIDTH and weight.is_contiguous() and weight.dtype == x.dtype
    return choose({"reference": _product_reference} | ({"csrc": _product_csrc} if fits else {}), x, PRODUCTS)


def _product_reference(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return functional.linear(x, weight) if transposed else x @ weight


def _product_csrc(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    n, k = weight.shape if transposed else reversed(weight.shape)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
    csrc("product")(
        pointer(y), pointer(x), pointer(weight), c_int64(x.numel() // k), c_int64(n), c_int64(k), int(transposed),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


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
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        accumulate_product(ctx.main_grad, dy.flatten(0, -2), x.flatten(0, -2))
        return input_gradient(dy, weight), None, None


def linear(x: Tensor, weight: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K); `main_grad` (N, K) fp32 receives the weight's gradient in place.

    Raises ValueError when main_grad does not fit.
    """
    if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != wide(weight.dtype)):
        raise ValueError(
            f"linear: main_grad is {tuple(main_grad.shape)} {main_grad.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
        )
    return functional.linear(x, weight) if main_grad is None else _Accumulating.apply(x, weight, main_grad)
