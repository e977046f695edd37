"""AdamW with fp32 masters over a whole arena in one call (Loshchilov and Hutter 2019, arXiv 1711.05101).

    g = clip * grad;   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    master -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * master)
    weights = round(master)

With groups of parameters, element i is in group k = groups[i / 128], whose scales[k] = (a, b, d) make it

    master -= lr (a m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + b eps) + d decay * master)

Flat buffers of one length: master, grad, m, v fp32 (fp64), weights bf16 or None where the masters are the weights. lr, t (int64)
and clip are 0-dim tensors read on the device, so a CUDA graph of the step stays valid. A clip of 0 skips the step: nothing is
written, whatever the gradient holds. groups: uint8, one for every line of 128 elements (a buffer starts on a line); scales:
(groups, 3) in the moments' dtype. GPU: Triton, one launch; CPU: C++.

Masters may be bf16 too, the weights themselves, when they are rounded stochastically (Gupta et al. 2015, arXiv 1502.02551): up with
the probability of the share that is cut off, so that updates below half a step are kept on average. Element i draws position
t 2^40 + i of the stream with the key `rounding` (counter.py). CPU: plain torch.
"""

from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels.backend import choose, constexpr, csrc, define, jit, pointer, same_device, tl
from hyperllama.kernels.counter import signed, uniform, uniform_triton

LINE = 128  # elements that share a group
CHUNK = 1 << 18  # elements: five fp32 chunks and their temporaries stay in a CPU's L2 and L3


# ---- reference


@torch.no_grad()
def adamw_reference(
    master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor | None, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: Tensor, clip: Tensor, groups: Tensor | None = None, scales: Tensor | None = None,
    rounding: int | None = None,
) -> None:  # fmt: skip
    """The update in plain torch, chunk by chunk so that temporaries stay small."""
    t = step.to(torch.float64)
    correct1, correct2 = ((1 - beta**t).to(m.dtype) for beta in (beta1, beta2))
    lr = lr.to(m.dtype)
    taken = clip != 0
    for start in range(0, master.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        g, p = grad[part] * clip, master[part].to(m.dtype)
        first = m[part].mul(beta1).add_(g, alpha=1 - beta1)
        second = v[part].mul(beta2).addcmul_(g, g, value=1 - beta2)
        root = (second / correct2).sqrt_()
        if groups is None or scales is None:
            update = (first / correct1).div_(root.add_(eps)).add_(p, alpha=weight_decay)
        else:
            a, b, d = scale_of_elements(groups, scales, start, len(g))
            update = (first / correct1).mul_(a).div_(root.add_(b * eps)).add_(d * p, alpha=weight_decay)
        new = p - update.mul_(lr)
        if rounding is not None:
            new = rounded_stochastically(
                new, rounding, (step << 40) + torch.arange(start, start + len(g), device=new.device)
            )
        for old, value in ((m[part], first), (v[part], second), (master[part], new)):
            old.copy_(torch.where(taken, value, old))
        if weights is not None:
            weights[part].copy_(torch.where(taken, new.to(weights.dtype), weights[part]))


def rounded_stochastically(values: Tensor, key: int, counter: Tensor) -> Tensor:
    """fp32 values as bf16: neighbours in bf16, the upper one with the probability of the share that is cut off."""
    noise = (uniform(key, counter) * (1 << 16)).to(torch.int32)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def scale_of_elements(groups: Tensor, scales: Tensor, start: int, n: int) -> Sequence[Tensor]:
    """The columns of `scales` for elements start (on a line) to start + n."""
    lines = groups[start // LINE : -(-(start + n) // LINE)].long()
    return scales[lines].repeat_interleave(LINE, 0)[:n].unbind(1)


# ---- Triton


@jit
def _rest(log_high, log_low, step):
    """1 - beta^t to fp32's precision, from log(beta) in two parts: beta^t itself would lose a small rest to rounding."""
    x = step * log_high + step * log_low
    series = 1.0 + x / 9
    for i in tl.static_range(7):
        series = 1.0 + x / (8 - i) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@jit
def _adamw_kernel(
    master_ptr, grad_ptr, m_ptr, v_ptr, weights_ptr, lr_ptr, step_ptr, clip_ptr, n, log1_high, log1_low, log2_high, log2_low,
    beta1, beta2, rest1, rest2, eps, weight_decay, groups_ptr, scales_ptr, key,
    HAS_WEIGHTS: constexpr, HAS_GROUPS: constexpr, ROUNDS: constexpr, PER_LINE: constexpr, COLS: constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)  # an arena passes 2^31 elements at 2.1G parameters
    inside = at < n
    g = tl.load(grad_ptr + at, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    p = tl.load(master_ptr + at, mask=inside, other=0.0).to(tl.float32)
    lr = tl.load(lr_ptr)
    count = tl.load(step_ptr)
    step = count.to(tl.float32)
    correct1 = 1.0 / _rest(log1_high, log1_low, step)
    correct2 = 1.0 / _rest(log2_high, log2_low, step)
    clip = tl.load(clip_ptr)
    g *= clip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    if HAS_GROUPS:
        row = 3 * tl.load(groups_ptr + at // PER_LINE, mask=inside, other=0).to(tl.int32)
        correct1 *= tl.load(scales_ptr + row)
        eps *= tl.load(scales_ptr + row + 1)
        weight_decay *= tl.load(scales_ptr + row + 2)
    p -= lr * (m * correct1 / (tl.sqrt(v * correct2) + eps) + weight_decay * p)
    if ROUNDS:
        noise = (uniform_triton(key, (count << 40) + at) * 65536.0).to(tl.int32)
        p = ((p.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    if clip != 0:
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        tl.store(master_ptr + at, p.to(master_ptr.dtype.element_ty), mask=inside)
        if HAS_WEIGHTS:
            tl.store(weights_ptr + at, p.to(weights_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Launch:
    """How the Triton kernel is launched; a pure function of the length."""

    cols: int  # 8 elements a thread: two 128-bit loads of each of four buffers in flight, one 128-bit store of bf16
    warps: int
    programs: int

    @classmethod
    def of(cls, n: int) -> "Launch":
        """The launch for buffers of n elements."""
        return cls(1024, 4, -(-n // 1024))


def _log(beta: float) -> tuple[float, float]:
    """log(beta) as the sum of two fp32."""
    exact = log(beta) if beta > 0 else -1e30
    high = c_float(exact).value
    return high, exact - high


def _adamw_triton(
    master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor | None, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: Tensor, clip: Tensor, groups: Tensor | None = None, scales: Tensor | None = None,
    rounding: int | None = None,
) -> None:  # fmt: skip
    launch = Launch.of(master.numel())
    _adamw_kernel[(launch.programs,)](
        master, grad, m, v, master if weights is None else weights, lr.to(torch.float32), step.to(torch.int64),
        clip.to(torch.float32), master.numel(), *_log(beta1), *_log(beta2), beta1, beta2, 1 - beta1, 1 - beta2, eps,
        weight_decay, master if groups is None else groups, master if scales is None else scales, signed(rounding or 0),
        HAS_WEIGHTS=weights is not None, HAS_GROUPS=groups is not None, ROUNDS=rounding is not None, PER_LINE=LINE,
        COLS=launch.cols, num_warps=launch.warps,
    )  # fmt: skip


# ---- C++


def _adamw_csrc(
    master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor | None, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: Tensor, clip: Tensor, groups: Tensor | None = None, scales: Tensor | None = None,
) -> None:  # fmt: skip
    lr, step, clip = lr.to(torch.float32), step.to(torch.int64), clip.to(torch.float32)
    csrc("adamw")(
        pointer(master), pointer(grad), pointer(m), pointer(v), pointer(weights), c_int64(master.numel()), pointer(lr),
        c_double(beta1), c_double(beta2), c_double(eps), c_double(weight_decay), pointer(step), pointer(clip),
        pointer(groups), pointer(scales), torch.get_num_threads(),
    )  # fmt: skip


# ---- the op


def _update(*inputs: Any) -> None:
    master, *state, weights = inputs[:5]
    scales, rounding = (*inputs[13:], None, None)[:2]  # the dispatcher leaves out what is at its default
    wide = [*state, *([] if scales is None else [scales]), *([master] if rounding is None else [])]
    narrow = [t for t in (weights, None if rounding is None else master) if t is not None]
    fits = all(t.is_contiguous() and t.dtype == torch.float32 for t in wide)
    fits = fits and all(t.is_contiguous() and t.dtype == torch.bfloat16 for t in narrow)
    kernels: dict[str, Any] = {"triton": _adamw_triton} if fits else {}
    if fits and rounding is None:
        kernels["csrc"] = lambda *inputs: _adamw_csrc(*inputs[:14])
    if master.numel():
        choose({"reference": adamw_reference} | kernels, master)(*inputs)


_adamw = define(
    "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? weights, Tensor lr, float beta1, "
    "float beta2, float eps, float weight_decay, Tensor step, Tensor clip, Tensor? groups=None, Tensor? scales=None, "
    "int? rounding=None) -> ()",
    _update,
    lambda *inputs, **options: None,
)


def adamw(
    master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor | None, *, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: Tensor, clip: Tensor, groups: Tensor | None = None, scales: Tensor | None = None,
    rounding: int | None = None,
) -> None:  # fmt: skip
    """One optimizer step in place on flat buffers; `step` counts from 1.

    rounding: the 64-bit key of stochastic rounding, for masters in bf16.
    Raises ValueError when the buffers differ in length or dtype, groups and scales do not fit, or anything is on another device.
    """
    if len({t.numel() for t in (master, grad, m, v, *([] if weights is None else [weights]))}) != 1:
        raise ValueError("adamw: master, grad, m, v and weights must have one length")
    kinds = {t.dtype for t in (grad, m, v, *([master] if rounding is None else []))}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
        raise ValueError(
            "adamw: master, grad, m and v must be all fp32 (or all fp64); bf16 masters need the key `rounding`"
        )
    if rounding is not None and (master.dtype != torch.bfloat16 or m.dtype != torch.float32 or weights is not None):
        raise ValueError("adamw: rounding is for bf16 masters that are the weights, with fp32 grad, m and v")
    if groups is not None and (
        groups.dtype != torch.uint8 or groups.shape != (-(-master.numel() // LINE),) or not groups.is_contiguous()
        or scales is None or scales.dtype != m.dtype or scales.dim() != 2 or scales.shape[1] != 3
    ):  # fmt: skip
        raise ValueError("adamw: groups is a uint8 for every 128 elements, scales (groups, 3) in the moments' dtype")
    same_device(
        "adamw", master=master, grad=grad, m=m, v=v, weights=weights, lr=lr, step=step, clip=clip, groups=groups,
        scales=scales,
    )  # fmt: skip
    rounding = None if rounding is None else signed(rounding)
    _adamw(master, grad, m, v, weights, lr, beta1, beta2, eps, weight_decay, step, clip, groups, scales, rounding)
