"""RMSNorm, with the residual addition that feeds it (Zhang and Sennrich 2019, arXiv 1910.07467).

    s = x + residual                      rounded to the dtype of x: what the residual stream keeps
    r = 1 / sqrt(mean(s^2) + eps)         one per row
    y = s r w

    n = s r;  g = dy w;  ds = r (g - n mean(g n)) + ds';  dx = dresidual = ds;  dw = sum over rows of dy n

x, residual, y, s: (..., D) fp32, bf16, fp16 or fp64; w: (D,) of the same dtype; r: one fp32 (fp64) per row. Arithmetic is fp32
(fp64 for fp64), each output rounded once. dw is summed in a fixed order: the same bits every time.
"""

from ctypes import c_float, c_int64
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from hyperllama.kernels.backend import (
    Differentiable,
    choose,
    constexpr,
    csrc,
    define,
    floating,
    gpu_of,
    jit,
    pointer,
    same_device,
    tl,
    wide,
)

# ---- reference


def forward_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, r) in plain torch; any dtype and device. s is empty without a residual: there it is x."""
    stream = x if residual is None else x + residual
    values = stream.to(wide(x.dtype))
    rstd = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    y = (values * rstd * weight.to(values.dtype)).to(x.dtype)
    return y, x.new_empty(0) if residual is None else stream, rstd.squeeze(-1)


def backward_reference(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(ds, dw) in plain torch; dw in fp32 (fp64)."""
    dtype = wide(stream.dtype)
    normed = stream.to(dtype) * rstd[..., None]
    grad = dy.to(dtype) * weight.to(dtype)
    ds = rstd[..., None] * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    if dstream is not None:
        ds = ds + dstream.to(dtype)
    return ds.to(stream.dtype), (dy.to(dtype) * normed).flatten(0, -2).sum(0)


# ---- Triton


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, stream_ptr, rstd_ptr, n_rows, n_cols, eps,
    HAS_RESIDUAL: constexpr, ROWS: constexpr, COLS: constexpr,
):  # fmt: skip
    # 64-bit offsets: rows x columns passes 2^31 at 131072 tokens of a hidden size of 16384
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    at = rows[:, None] * n_cols + cols[None, :]
    values = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = values + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    y = values * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dy_ptr, dstream_ptr, stream_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, n_rows, n_cols, n_blocks,
    HAS_DSTREAM: constexpr, ROWS: constexpr, COLS: constexpr,
):  # fmt: skip
    """Program p takes row blocks p, p + programs, ... and leaves its part of dw in row p of `partial`."""
    cols = tl.arange(0, COLS)
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLS), dtype=tl.float32)  # summed over rows once: that needs all warps, a row's sums one
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        at = rows[:, None] * n_cols + cols[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        normed = tl.load(stream_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dweight += dy * normed
        grad = dy * weight[None, :]
        ds = rstd[:, None] * (grad - normed * (tl.sum(grad * normed, axis=1) / n_cols)[:, None])
        if HAS_DSTREAM:
            ds += tl.load(dstream_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * n_cols + cols, tl.sum(dweight, axis=0), mask=cols < n_cols)


@dataclass(frozen=True)
class Launch:
    """How the Triton kernels are launched; a pure function of shape and number of multiprocessors."""

    rows: int  # per block: small D shares a program, so that each has about 4096 elements to keep 128-bit loads busy
    cols: int  # D rounded up to a power of two, as Triton's blocks are
    warps: int  # 4 hold 4096 fp32 values in 32 registers a thread; wider rows need more threads to stay out of spills
    programs: int  # of the backward: three per multiprocessor, as many as its 168 registers a thread let run at once; fewer where
    # each would have less than four blocks, beside which its partial row of dw, fp32 and read again, is no longer little

    @classmethod
    def of(cls, n_rows: int, n_cols: int, multiprocessors: int) -> "Launch":
        """The launch for (n_rows, n_cols)."""
        cols = max(16, 1 << (n_cols - 1).bit_length())
        rows = max(1, 4096 // cols)
        warps = 4 if rows * cols <= 4096 else 8 if cols <= 8192 else 16
        blocks = -(-n_rows // rows)
        return cls(rows, cols, warps, min(blocks, max(multiprocessors, min(3 * multiprocessors, blocks // 4))))


def _launch(x: Tensor) -> Launch:
    return Launch.of(x.numel() // x.shape[-1], x.shape[-1], gpu_of(x).multiprocessors)


def forward_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The forward on a GPU (or in Triton's interpreter)."""
    y, stream, rstd = _empty_forward(x, residual)
    if x.numel() == 0:
        return y, stream, rstd
    launch, n_rows = _launch(x), rstd.numel()
    _forward_kernel[(-(-n_rows // launch.rows),)](
        x, x if residual is None else residual, weight, y, y if residual is None else stream, rstd, n_rows, x.shape[-1], eps,
        HAS_RESIDUAL=residual is not None, ROWS=launch.rows, COLS=launch.cols, num_warps=launch.warps,
    )  # fmt: skip
    return y, stream, rstd


def backward_triton(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward on a GPU (or in Triton's interpreter)."""
    dx, n_cols = torch.empty_like(stream), stream.shape[-1]
    if stream.numel() == 0:
        return dx, rstd.new_zeros(n_cols)
    launch, n_rows = _launch(stream), rstd.numel()
    partial = rstd.new_empty(launch.programs, n_cols)
    _backward_kernel[(launch.programs,)](
        dy, dy if dstream is None else dstream, stream, weight, rstd, dx, partial, n_rows, n_cols, -(-n_rows // launch.rows),
        HAS_DSTREAM=dstream is not None, ROWS=launch.rows, COLS=launch.cols, num_warps=launch.warps,
    )  # fmt: skip
    return dx, partial.sum(0)


# ---- C++


def forward_csrc(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The forward on a CPU."""
    y, stream, rstd = _empty_forward(x, residual)
    if x.numel():
        csrc("rms_norm_forward")(
            int(x.dtype == torch.bfloat16), pointer(x), pointer(residual), pointer(weight), pointer(y),
            pointer(None if residual is None else stream), pointer(rstd), *_size(x), c_float(eps), torch.get_num_threads(),
        )  # fmt: skip
    return y, stream, rstd


def backward_csrc(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward on a CPU."""
    dx, threads = torch.empty_like(stream), torch.get_num_threads()
    dweight = rstd.new_zeros(stream.shape[-1])
    partial = rstd.new_zeros(threads, stream.shape[-1], dtype=torch.float64)
    if stream.numel():
        csrc("rms_norm_backward")(
            int(stream.dtype == torch.bfloat16), pointer(dy), pointer(dstream), pointer(stream), pointer(weight), pointer(rstd),
            pointer(dx), pointer(partial), pointer(dweight), *_size(stream), threads,
        )  # fmt: skip
    return dx, dweight


def _size(x: Tensor) -> tuple[c_int64, c_int64]:
    return c_int64(x.numel() // x.shape[-1]), c_int64(x.shape[-1])


# ---- the op


def _empty_forward(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[:-1], dtype=wide(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), stream, rstd


_FORWARD = {"reference": forward_reference, "triton": forward_triton, "csrc": forward_csrc}
_BACKWARD = {"reference": backward_reference, "triton": backward_triton, "csrc": backward_csrc}


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    return choose(_FORWARD, x)(x, None if residual is None else residual.contiguous(), weight, eps)


def _backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dstream = None if dstream is None else dstream.contiguous()
    return choose(_BACKWARD, stream)(dy.contiguous(), dstream, stream.contiguous(), weight.contiguous(), rstd)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _ = inputs
    _, stream, rstd = output
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)  # the last norm of a model leaves its stream unused: no zeros for that
    ctx.save_for_backward(x if residual is None else stream, weight, rstd)


def _gradients(run: Any, ctx: Any, dy: Tensor | None, dstream: Tensor | None, _: Any) -> tuple[Any, ...]:
    stream, weight, rstd = ctx.saved_tensors
    dx, dweight = run(torch.zeros_like(stream) if dy is None else dy, dstream, stream, weight, rstd)
    return dx, dx if ctx.has_residual else None, dweight, None


_rms_norm = Differentiable(
    define(
        "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
        _forward, lambda x, residual, weight, eps: _empty_forward(x, residual),
    ),
    define(
        "rms_norm_backward(Tensor dy, Tensor? dstream, Tensor stream, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
        _backward, lambda dy, dstream, stream, weight, rstd: (
            torch.empty_like(stream, memory_format=torch.contiguous_format), rstd.new_empty(weight.shape),
        ),
    ),
    _setup, _gradients, weight=2,
)  # fmt: skip


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: None = None, *, main_grad: Tensor | None = None
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, main_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, main_grad: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm x (..., D), or x + residual, by its root mean square and scale it by weight (D,).

    Returns y, or (y, x + residual) when a residual is given. `main_grad` (D,) fp32 receives the weight's gradient in
    place. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    floating("rms_norm", x=x)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)} {weight.dtype}, x is {tuple(x.shape)} {x.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}"
        )
    if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != wide(weight.dtype)):
        raise ValueError(
            f"rms_norm: main_grad is {tuple(main_grad.shape)} {main_grad.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
        )
    same_device("rms_norm", x=x, weight=weight, residual=residual, main_grad=main_grad)
    y, stream, _ = _rms_norm(x, residual, weight, eps, main_grad=main_grad)
    return y if residual is None else (y, stream)
