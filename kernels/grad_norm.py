"""The L2 norm of the whole gradient, in one deterministic reduction.

    norm = sqrt(sum g^2)         fp64 partial sums, rounded once to the dtype of g

grad: flat fp32 (fp64). Reference only.
"""

import torch
from torch import Tensor

from hyperllama.kernels.backend import define

CHUNK = 1 << 20  # elements converted to fp64 at a time


def grad_norm_reference(grad: Tensor) -> Tensor:
    """The norm in plain torch: fixed chunks summed in order."""
    flat = grad.flatten()
    parts = [flat[i : i + CHUNK].to(torch.float64).square().sum() for i in range(0, flat.numel(), CHUNK)]
    total = torch.stack(parts).sum() if parts else flat.new_zeros((), dtype=torch.float64)
    return total.sqrt().to(grad.dtype)


grad_norm = define("grad_norm(Tensor grad) -> Tensor", grad_norm_reference, lambda grad: grad.new_empty(()))
