"""AdamW with fp32 masters over a whole arena in one call (Loshchilov and Hutter 2019, arXiv 1711.05101).

    g = clip * grad;   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    master -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * master)
    weights = round(master)

Flat buffers of one length: master, grad, m, v fp32 (fp64), weights bf16 or None where the masters are the weights. lr, t (int64)
and clip are 0-dim tensors read on the device, so a CUDA graph of the step stays valid. A clip of 0 skips the step: nothing is
written, whatever the gradient holds. CPU: C++.
"""

from ctypes import c_double, c_int64
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels.backend import choose, csrc, define, pointer

CHUNK = 1 << 18  # elements: five fp32 chunks and their temporaries stay in a CPU's L2 and L3


@torch.no_grad()
def adamw_reference(
    master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor | None, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: Tensor, clip: Tensor,
) -> None:  # fmt: skip
    """The update in plain torch, chunk by chunk so that temporaries stay small."""
    t = step.to(torch.float64)
    correct1, correct2 = ((1 - beta**t).to(master.dtype) for beta in (beta1, beta2))
    lr = lr.to(master.dtype)
    taken = clip != 0
    for start in range(0, master.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        g, p = grad[part] * clip, master[part]
        first = m[part].mul(beta1).add_(g, alpha=1 - beta1)
        second = v[part].mul(beta2).addcmul_(g, g, value=1 - beta2)
        update = (first / correct1).div_((second / correct2).sqrt_().add_(eps))
        new = p - update.add_(p, alpha=weight_decay).mul_(lr)
        for old, value in ((m[part], first), (v[part], second), (p, new)):
            old.copy_(torch.where(taken, value, old))
        if weights is not None:
            weights[part].copy_(torch.where(taken, new.to(weights.dtype), weights[part]))


def _adamw_csrc(
    master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor | None, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: Tensor, clip: Tensor,
) -> None:  # fmt: skip
    lr, step, clip = lr.to(torch.float32), step.to(torch.int64), clip.to(torch.float32)
    csrc("adamw")(
        pointer(master), pointer(grad), pointer(m), pointer(v), pointer(weights), c_int64(master.numel()), pointer(lr),
        c_double(beta1), c_double(beta2), c_double(eps), c_double(weight_decay), pointer(step), pointer(clip),
        torch.get_num_threads(),
    )  # fmt: skip


def _update(*inputs: Any) -> None:
    master, grad, m, v, weights = inputs[:5]
    fits = all(t.is_contiguous() and t.dtype == torch.float32 for t in (master, grad, m, v)) and (
        weights is None or (weights.is_contiguous() and weights.dtype == torch.bfloat16)
    )
    implementations = {"reference": adamw_reference} | ({"csrc": _adamw_csrc} if fits else {})
    choose(implementations, master)(*inputs)


_adamw = define(
    "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? weights, Tensor lr, float beta1, "
    "float beta2, float eps, float weight_decay, Tensor step, Tensor clip) -> ()",
    _update,
    lambda *inputs: None,
)


def adamw(
    master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor | None, *, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: Tensor, clip: Tensor,
) -> None:  # fmt: skip
    """One optimizer step in place on flat buffers; `step` counts from 1.

    Raises ValueError when the buffers differ in length.
    """
    if len({t.numel() for t in (master, grad, m, v, *([] if weights is None else [weights]))}) != 1:
        raise ValueError("adamw: master, grad, m, v and weights must have one length")
    _adamw(master, grad, m, v, weights, lr, beta1, beta2, eps, weight_decay, step, clip)
