"""The L2 norm of the whole gradient, in one deterministic reduction.

    norm = sqrt(sum g^2)         fp64 partial sums, rounded once to the dtype of g

grad: flat fp32 (fp64). CPU: C++.
"""

from ctypes import c_double, c_int64

import torch
from torch import Tensor

from hyperllama.kernels.backend import choose, csrc, define, pointer

CHUNK = 1 << 20  # elements converted to fp64 at a time


def grad_norm_reference(grad: Tensor) -> Tensor:
    """The norm in plain torch: fixed chunks summed in order."""
    flat = grad.flatten()
    parts = [flat[i : i + CHUNK].to(torch.float64).square().sum() for i in range(0, flat.numel(), CHUNK)]
    total = torch.stack(parts).sum() if parts else flat.new_zeros((), dtype=torch.float64)
    return total.sqrt().to(grad.dtype)


def _grad_norm_csrc(grad: Tensor) -> Tensor:
    function = csrc("grad_norm")
    function.restype = c_double
    return torch.tensor(function(pointer(grad), c_int64(grad.numel()), torch.get_num_threads()), dtype=grad.dtype)


def _run(grad: Tensor) -> Tensor:
    fits = grad.dtype == torch.float32 and grad.is_contiguous()
    return choose({"reference": grad_norm_reference} | ({"csrc": _grad_norm_csrc} if fits else {}), grad)(grad)


grad_norm = define("grad_norm(Tensor grad) -> Tensor", _run, lambda grad: grad.new_empty(()))
