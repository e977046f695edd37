"""The L2 norm of the whole gradient, in one deterministic reduction.

    norm = sqrt(sum w g^2)       fp64 partial sums, rounded once to the dtype of g

grad: flat fp32 (fp64). w = weights[groups[i / 128]] for element i, groups as in adamw.py, weights fp64; by default 1. GPU: Triton,
in an order that depends on the length alone, not on the GPU; CPU: C++.
"""

from ctypes import c_double, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperllama.kernels.adamw import LINE, scale_of_elements
from hyperllama.kernels.backend import choose, constexpr, csrc, define, floating, jit, pointer, same_device, tl

CHUNK = 1 << 20  # elements converted to fp64 at a time

# ---- reference


def grad_norm_reference(grad: Tensor, groups: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """The norm in plain torch: fixed chunks summed in order."""
    flat, parts = grad.flatten(), []
    for start in range(0, flat.numel(), CHUNK):
        squares = flat[start : start + CHUNK].to(torch.float64).square()
        if groups is not None and weights is not None:
            squares *= scale_of_elements(groups, weights[:, None], start, len(squares))[0]
        parts.append(squares.sum())
    total = torch.stack(parts).sum() if parts else flat.new_zeros((), dtype=torch.float64)
    return total.sqrt().to(grad.dtype)


# ---- Triton


@jit
def _partial_kernel(
    grad_ptr, partial_ptr, groups_ptr, weights_ptr, n, n_blocks,
    HAS_GROUPS: constexpr, PER_LINE: constexpr, COLS: constexpr,
):  # fmt: skip
    """Program p sums the squares of blocks p, p + programs, ..., lane by lane."""
    total = tl.zeros((COLS,), dtype=tl.float64)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * COLS + tl.arange(0, COLS)
        g = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float64)
        if HAS_GROUPS:
            g *= g * tl.load(weights_ptr + tl.load(groups_ptr + at // PER_LINE, mask=at < n, other=0).to(tl.int32))
        else:
            g *= g
        total += g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@jit
def _finish_kernel(partial_ptr, norm_ptr, n_partials, COLS: constexpr):
    cols = tl.arange(0, COLS)
    total = tl.sum(tl.load(partial_ptr + cols, mask=cols < n_partials, other=0.0), axis=0)
    tl.store(norm_ptr, tl.sqrt(total).to(norm_ptr.dtype.element_ty))


@dataclass(frozen=True)
class Launch:
    """How the Triton kernels are launched; a pure function of the length, so that all GPUs sum in one order."""

    cols: int  # 16 elements a thread: four 128-bit loads in flight, their fp64 sums in 32 registers
    warps: int
    programs: (
        int  # of the first kernel: 8 a multiprocessor on the GPUs at hand; and what the second adds up in one block
    )

    @classmethod
    def of(cls, n: int) -> "Launch":
        """The launch for n elements."""
        return cls(2048, 4, min(1024, -(-n // 2048)))


def _grad_norm_triton(grad: Tensor, groups: Tensor | None, weights: Tensor | None) -> Tensor:
    norm = grad.new_zeros(())
    if grad.numel():
        launch = Launch.of(grad.numel())
        partial = grad.new_empty(launch.programs, dtype=torch.float64)
        _partial_kernel[(launch.programs,)](
            grad, partial, grad if groups is None else groups, grad if weights is None else weights, grad.numel(),
            -(-grad.numel() // launch.cols), HAS_GROUPS=groups is not None, PER_LINE=LINE, COLS=launch.cols,
            num_warps=launch.warps,
        )  # fmt: skip
        _finish_kernel[(1,)](partial, norm, launch.programs, COLS=1024, num_warps=4)
    return norm


# ---- C++


def _grad_norm_csrc(grad: Tensor, groups: Tensor | None, weights: Tensor | None) -> Tensor:
    function = csrc("grad_norm")
    function.restype = c_double
    norm = function(pointer(grad), c_int64(grad.numel()), pointer(groups), pointer(weights), torch.get_num_threads())
    return torch.tensor(norm, dtype=grad.dtype)


# ---- the op


def _run(grad: Tensor, groups: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    if groups is not None and (
        groups.dtype != torch.uint8 or groups.shape != (-(-grad.numel() // LINE),) or not groups.is_contiguous()
        or weights is None or weights.dtype != torch.float64 or weights.dim() != 1 or not weights.is_contiguous()
    ):  # fmt: skip
        raise ValueError("grad_norm: groups is a uint8 for every 128 elements, weights a vector of fp64")
    floating("grad_norm", grad=grad)
    same_device("grad_norm", grad=grad, groups=groups, weights=weights)
    fits = grad.dtype == torch.float32 and grad.is_contiguous()
    kernels = {"triton": _grad_norm_triton, "csrc": _grad_norm_csrc} if fits else {}
    return choose({"reference": grad_norm_reference} | kernels, grad)(grad, groups, weights)


grad_norm = define(
    "grad_norm(Tensor grad, Tensor? groups=None, Tensor? weights=None) -> Tensor",
    _run,
    lambda grad, groups=None, weights=None: grad.new_empty(()),
)
