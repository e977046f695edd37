"""Gated linear unit on a packed buffer (Shazeer 2020, arXiv 2002.05202).

    out = act(gate) * up        gate, up = the halves of gate_up (..., 2F)

act: silu, g / (1 + e^-g); gelu, g (1 + erf(g / sqrt 2)) / 2; gelu_tanh, its tanh approximation. Arithmetic is fp32 (fp64 for
fp64), rounded once. The backward recomputes the activation from gate_up, all that is saved, out of place or into a named buffer,
which may be gate_up itself. GPU: Triton; CPU: C++.
"""

from ctypes import c_int64
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels.backend import (
    Differentiable,
    choose,
    constexpr,
    csrc,
    define,
    floating,
    jit,
    pointer,
    same_device,
    tl,
    wide,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# ---- reference


def glu_reference(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, in plain torch."""
    gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=-1)
    if activation == "silu":
        out = functional.silu(gate) * up
    else:
        out = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    return out.to(gate_up.dtype)


def glu_backward_reference(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up, packed like it, in plain torch."""
    gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=-1)
    dy = dy.to(gate.dtype)
    if activation == "silu":
        share = torch.sigmoid(gate)
        slope = share * (1 + gate * (1 - share))
    elif activation == "gelu":
        share = 0.5 * (1 + torch.erf(gate / sqrt(2)))
        slope = share + gate * torch.exp(-0.5 * gate * gate) / sqrt(2 * pi)
    else:
        inner = sqrt(2 / pi) * (gate + 0.044715 * gate**3)
        share = 0.5 * (1 + torch.tanh(inner))
        slope = share + 0.5 * gate * (1 - torch.tanh(inner) ** 2) * sqrt(2 / pi) * (1 + 3 * 0.044715 * gate * gate)
    return torch.cat([dy * up * slope, dy * gate * share], dim=-1).to(gate_up.dtype)


# ---- Triton


@jit
def _activated(gate, ACTIVATION: constexpr):
    """(act(gate), its slope), in few instructions: an H200 has time for 41 an element while it moves the 6 bytes of the forward.

    tl.erf alone takes 34. Here the tail of the normal distribution beyond |x| is e^(-x^2/2) t P(t), t = 1 / (1 + 0.35 |x|), with P
    a minimax fit of degree 8, within 4.5e-8 of it (1.3e-7 with fp32 arithmetic, relative 2e-6 down to x = -5), and the
    exponential is the density that the backward needs.
    """
    if ACTIVATION == 1:
        density = tl.exp2(gate * gate * -0.7213475204444817)
        root = tl.rsqrt(1.0 + 0.35 * tl.abs(gate))  # squared: a division takes six instructions more
        t = root * root
        p = ((-0.0285700951 * t + 0.141444907) * t - 0.251058102) * t + 0.154490903
        p = (((p * t - 0.0203128047) * t + 0.104498342) * t + 0.120046623) * t + 0.139837757
        tail = (p * t + 0.139622509) * t * density
        share = tl.where(gate > 0, 1.0 - tail, tail)
        return tl.maximum(gate, 0.0) - tl.abs(gate) * tail, share + gate * density * 0.3989422804014327
    # (1 + tanh u) / 2 is the sigmoid of 2 u; 2 sqrt(2 / pi) = 1.59577, times log2(e) = 2.30221
    square = gate * gate
    exponent = gate * -1.4426950408889634 if ACTIVATION == 0 else gate * (-2.302208198 - 0.1029432396 * square)
    inverse = tl.exp2(exponent)
    share = 1.0 / (1.0 + inverse)
    change = gate * share * tl.where(gate > 0, inverse * share, 1.0 - share)  # 1 - share, exact at both ends
    if ACTIVATION == 2:
        change *= 1.5957691216057308 + 0.2140644488 * square
    return gate * share, share + change


@jit
def _glu_kernel(
    dy_ptr, gate_up_ptr, out_ptr, n_rows, n_cols, col_blocks,
    ACTIVATION: constexpr, BACKWARD: constexpr, ROWS: constexpr, COLS: constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    # 64-bit offsets: rows x columns passes 2^31 at 131072 tokens of a width of 16384
    rows = (block // col_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (block % col_blocks) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    at = (rows * n_cols)[:, None] + cols[None, :]
    packed = (rows * (2 * n_cols))[:, None] + cols[None, :]
    gate = tl.load(gate_up_ptr + packed, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + packed + n_cols, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activated(gate, ACTIVATION)
    if BACKWARD:
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + packed, (dy * up * slope).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + packed + n_cols, (dy * activated).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + at, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Launch:
    """How the Triton kernel is launched; a pure function of the shape."""

    rows: int
    cols: int  # the largest power of two up to 1024 that divides the width, so that no lane idles
    warps: int  # 4 for 2048 elements: two 128-bit loads of each half a thread in flight, few enough registers for 12 blocks
    col_blocks: int
    programs: int

    @classmethod
    def of(cls, n_rows: int, n_cols: int) -> "Launch":
        """The launch for an output of (n_rows, n_cols)."""
        cols = min(1024, n_cols & -n_cols)
        if cols < 128:  # an odd width: masked lanes cost less than short rows
            cols = min(1024, max(16, 1 << (n_cols - 1).bit_length()))
        rows, col_blocks = max(1, 2048 // cols), -(-n_cols // cols)
        return cls(rows, cols, 4, col_blocks, -(-n_rows // rows) * col_blocks)


def _glu_triton(dy: Tensor | None, gate_up: Tensor, out: Tensor, activation: str) -> None:
    width = gate_up.shape[-1] // 2
    n_rows = gate_up.numel() // (2 * width)
    launch = Launch.of(n_rows, width)
    _glu_kernel[(launch.programs,)](
        gate_up if dy is None else dy, gate_up, out, n_rows, width, launch.col_blocks,
        ACTIVATION=ACTIVATIONS.index(activation), BACKWARD=dy is not None, ROWS=launch.rows, COLS=launch.cols,
        num_warps=launch.warps,
    )  # fmt: skip


# ---- C++


def _glu_csrc(dy: Tensor | None, gate_up: Tensor, out: Tensor, activation: str) -> None:
    width = gate_up.shape[-1] // 2
    csrc("glu")(
        int(out.dtype == torch.bfloat16), ACTIVATIONS.index(activation), pointer(dy), pointer(gate_up), pointer(out),
        c_int64(gate_up.numel() // (2 * width)), c_int64(width), torch.get_num_threads(),
    )  # fmt: skip


# ---- the op


def _reference(dy: Tensor | None, gate_up: Tensor, out: Tensor, activation: str) -> None:
    out.copy_(glu_reference(gate_up, activation) if dy is None else glu_backward_reference(dy, gate_up, activation))


def _launch(dy: Tensor | None, gate_up: Tensor, out: Tensor, activation: str) -> None:
    if out.numel():
        choose({"reference": _reference, "triton": _glu_triton, "csrc": _glu_csrc}, gate_up)(
            dy, gate_up, out, activation
        )


def _forward(gate_up: Tensor, activation: str) -> Tensor:
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _launch(None, gate_up.contiguous(), out, activation)
    return out


def _backward(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    _launch(dy.contiguous(), gate_up.contiguous(), out, activation)
    return out


def _backward_into(dy: Tensor, gate_up: Tensor, activation: str, out: Tensor) -> None:
    _launch(dy.contiguous(), gate_up, out, activation)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.activation = inputs
    ctx.save_for_backward(gate_up)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return run(dy, ctx.saved_tensors[0], ctx.activation), None


_backward_kernel = define(
    "glu_backward(Tensor dy, Tensor gate_up, str activation) -> Tensor",
    _backward,
    lambda dy, gate_up, activation: torch.empty_like(gate_up, memory_format=torch.contiguous_format),
)
_backward_into_kernel = define(
    "glu_backward_(Tensor dy, Tensor gate_up, str activation, Tensor(a!) out) -> ()",
    _backward_into,
    lambda dy, gate_up, activation, out: None,
)
_glu = Differentiable(
    define(
        "glu(Tensor gate_up, str activation) -> Tensor",
        _forward,
        lambda gate_up, activation: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    ),
    _backward_kernel,
    _setup,
    _gradients,
)


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up of a packed gate_up (..., 2F): (..., F).

    Raises ValueError for an unknown activation or an odd width.
    """
    _check(gate_up, activation)
    return _glu(gate_up, activation)


def glu_backward(dy: Tensor, gate_up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """The gradient of gate_up (..., 2F), packed like it, for dy (..., F); into `out` where given, which may be gate_up itself.

    Raises ValueError as glu does, and when dy or out does not fit.
    """
    _check(gate_up, activation)
    if dy.shape != (*gate_up.shape[:-1], gate_up.shape[-1] // 2) or dy.dtype != gate_up.dtype:
        raise ValueError(
            f"glu_backward: dy is {tuple(dy.shape)} {dy.dtype}, gate_up {tuple(gate_up.shape)} {gate_up.dtype}"
        )
    same_device("glu_backward", dy=dy, gate_up=gate_up, out=out)
    if out is None:
        return _backward_kernel(dy, gate_up, activation)
    if (
        out.shape != gate_up.shape
        or out.dtype != gate_up.dtype
        or not (out.is_contiguous() and gate_up.is_contiguous())
    ):
        raise ValueError("glu_backward: out and gate_up must be contiguous and have one shape and dtype")
    _backward_into_kernel(dy, gate_up, activation, out)
    return out


def _check(gate_up: Tensor, activation: str) -> None:
    floating("glu", gate_up=gate_up)
    if activation not in ACTIVATIONS or gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"glu: activation {activation!r} on {tuple(gate_up.shape)}; one of {', '.join(ACTIVATIONS)}, even width"
        )
