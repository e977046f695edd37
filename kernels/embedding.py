"""Table look-up whose gradient is added to the fp32 gradient that a tied head shares.

    y[i] = W[ids[i]];   dW[ids[i]] += dy[i], in the order of i

ids: (B, T) int64, W: (V, D), y: (B, T, D); dW: (V, D) fp32 (fp64). Deterministic on a CPU, which
has it in C++.
"""

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels.backend import choose, csrc, define, pointer


def embedding_backward_reference(grad: Tensor, ids: Tensor, dy: Tensor) -> None:
    """grad[ids] += dy in place, in plain torch."""
    grad.index_add_(0, ids.flatten(), dy.flatten(0, -2).to(grad.dtype))


def _embedding_backward_csrc(grad: Tensor, ids: Tensor, dy: Tensor) -> None:
    ids, dy = ids.contiguous(), dy.contiguous()
    if not csrc("embedding_backward")(
        int(dy.dtype == torch.bfloat16), pointer(grad), pointer(ids), pointer(dy), c_int64(ids.numel()),
        c_int64(grad.shape[0]), c_int64(grad.shape[1]), torch.get_num_threads(),
    ):  # fmt: skip
        raise IndexError(f"embedding: an id is outside the vocabulary of {grad.shape[0]} tokens")


def _run(grad: Tensor, ids: Tensor, dy: Tensor) -> None:
    fits = grad.dtype == torch.float32 and grad.is_contiguous() and ids.dtype == torch.int64
    implementations = {"reference": embedding_backward_reference} | ({"csrc": _embedding_backward_csrc} if fits else {})
    choose(implementations, dy)(grad, ids, dy)


embedding_backward_ = define(
    "embedding_backward_(Tensor(a!) grad, Tensor ids, Tensor dy) -> ()",
    _run,
    lambda grad, ids, dy: None,
)


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.main_grad = main_grad
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        embedding_backward_(ctx.main_grad, ctx.saved_tensors[0], dy)
        return None, None, None


def embedding(ids: Tensor, weight: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """Rows of weight (V, D) for ids (B, T): (B, T, D); `main_grad` (V, D) fp32 receives the weight's gradient in place."""
    return functional.embedding(ids, weight) if main_grad is None else _Accumulating.apply(ids, weight, main_grad)
