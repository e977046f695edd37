"""Rotary position embedding, half-split form (Su et al. 2021, arXiv 2104.09864; GPT-NeoX's pairing of halves).

    head = [a, b], both h/2 wide;  angle_j = position * theta^(-2j/h)
    out  = [a cos - b sin, b cos + a sin]

qkv: (B, T, (n + 2k) h), rows [q heads; k heads; v heads]; q and k are rotated in one go, v is copied, or stays where it is when
the rotation is in place. cos, sin: (P, h/2) fp32. positions: (B, T) int64 rows of the tables, or None for 0..T-1. Arithmetic is
fp32 (fp64 for fp64), rounded once. The backward is the rotation by the opposite angle. GPU: Triton; CPU: C++.

The tables are part of a model's definition: fp32 angles, cosines and sines, computed as transformers does, whatever the dtype of
the weights (at position 2047 an fp32 angle is off by up to 1e-4, and trained weights have seen just that angle).
"""

from ctypes import byref, c_int, c_int64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyperllama.errors import WrongIndex
from hyperllama.kernels.backend import (
    Differentiable,
    choose,
    constexpr,
    csrc,
    define,
    floating,
    forced,
    jit,
    pointer,
    same_device,
    tl,
    use,
    wide,
    wrong_index_flag,
)


def rope_tables(
    length: int, head_dim: int, theta: float, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin of all angles of `length` positions, each (length, head_dim / 2) fp32.

    `dtype` bf16 rounds the values to bf16, as the paper's runs did; fp64 gives fp64 tables from fp64 angles.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=wide(dtype), device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=wide(dtype), device=device), 1.0 / theta**exponents)
    return angles.cos().to(dtype).to(angles.dtype), angles.sin().to(dtype).to(angles.dtype)


# ---- reference


def rope_reference(
    qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotated: int, inverse: bool
) -> None:
    """Rotate the first `rotated` heads of qkv, by the opposite angle when `inverse`, into `out`, which may be qkv itself."""
    half = cos.shape[1]
    if positions is None:
        cos, sin = cos[: qkv.shape[1]], sin[: qkv.shape[1]]
    else:
        cos, sin = cos[positions], sin[positions]
    cos, sin = (table[..., None, :].to(wide(qkv.dtype)) for table in (cos, -sin if inverse else sin))
    heads, turned = (t[..., : rotated * 2 * half].unflatten(-1, (rotated, 2, half)) for t in (qkv, out))
    a, b = heads.to(cos.dtype).unbind(-2)
    first, second = a * cos - b * sin, b * cos + a * sin
    turned[..., 0, :], turned[..., 1, :] = first, second
    if out is not qkv:
        out[..., rotated * 2 * half :] = qkv[..., rotated * 2 * half :]


# ---- Triton


@jit
def _rope_kernel(
    qkv_ptr, out_ptr, cos_ptr, sin_ptr, positions_ptr, flag_ptr, n_rows, width, seq_len, n_positions, rotated, n_heads,
    sign,
    HALF: constexpr, HAS_POSITIONS: constexpr, ROWS: constexpr, HEADS: constexpr, COLS: constexpr,
):  # fmt: skip
    """Block (i, j): ROWS tokens, HEADS heads. The tables' rows are read once for all its heads."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    exists = rows < n_rows
    if HAS_POSITIONS:
        places = tl.load(positions_ptr + rows, mask=exists, other=0)
        wrong = (places < 0) | (places >= n_positions)
        tl.atomic_or(flag_ptr + rows * 0, 4, mask=wrong)
        places = tl.where(wrong, n_positions - 1, places)
    else:
        places = rows % seq_len
    inside = exists[:, None] & (cols < HALF)[None, :]
    at = places[:, None] * HALF + cols[None, :]
    cosine = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sine = tl.load(sin_ptr + at, mask=inside, other=0.0) * sign
    # in place, no load may pass a store: each head's halves are asked for before the head ahead of it is stored
    head = tl.program_id(1) * HEADS + tl.zeros((1, 1), tl.int32)
    at = (rows * width)[:, None] + head * 2 * HALF + cols[None, :]
    valid = inside & (head < n_heads)
    a, b = tl.load(qkv_ptr + at, mask=valid, other=0.0), tl.load(qkv_ptr + at + HALF, mask=valid, other=0.0)
    for i in tl.static_range(HEADS):
        x, y = a.to(tl.float32), b.to(tl.float32)
        to, wanted = out_ptr + at, valid
        if i + 1 < HEADS:
            at += 2 * HALF
            valid = inside & (head + i + 1 < n_heads)
            a, b = tl.load(qkv_ptr + at, mask=valid, other=0.0), tl.load(qkv_ptr + at + HALF, mask=valid, other=0.0)
        turns = head + i < rotated  # the values of an out-of-place call are copied
        first, second = tl.where(turns, x * cosine - y * sine, x), tl.where(turns, y * cosine + x * sine, y)
        tl.store(to, first.to(out_ptr.dtype.element_ty), mask=wanted)
        tl.store(to + HALF, second.to(out_ptr.dtype.element_ty), mask=wanted)


@dataclass(frozen=True)
class Launch:
    """How the Triton kernel is launched; a pure function of the shape."""

    rows: int  # tokens of a block: with `cols` about 1024 pairs, so that a thread moves 128 bits of each half of a head
    heads: (
        int  # of a block, at most 8: enough loads in flight, tables read once; blocks enough for a few thousand tokens
    )
    cols: int  # half a head, rounded up to a power of two
    warps: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, n_rows: int, n_heads: int, half: int) -> "Launch":
        """The launch for `n_rows` tokens of `n_heads` heads, `half` pairs each."""
        cols = 1 << (half - 1).bit_length()
        rows = max(1, 1024 // cols)
        groups = -(-n_heads // 8)
        return cls(rows, -(-n_heads // groups), cols, 4, (-(-n_rows // rows), groups))


def _rope_triton(
    qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotated: int, inverse: bool
) -> None:
    n_rows, half = qkv.shape[0] * qkv.shape[1], cos.shape[1]
    n_heads = rotated if out is qkv else qkv.shape[2] // (2 * half)
    launch = Launch.of(n_rows, n_heads, half)
    _rope_kernel[launch.grid](
        qkv, out, cos, sin, cos if positions is None else positions, wrong_index_flag(qkv), n_rows, qkv.shape[2],
        qkv.shape[1], cos.shape[0], rotated, n_heads, -1.0 if inverse else 1.0,
        HALF=half, HAS_POSITIONS=positions is not None, ROWS=launch.rows, HEADS=launch.heads, COLS=launch.cols,
        num_warps=launch.warps,
    )  # fmt: skip


# ---- C++


def _rope_csrc(
    qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotated: int, inverse: bool
) -> None:
    (batch, seq_len, width), wrong = qkv.shape, c_int(0)
    csrc("rope")(
        int(qkv.dtype == torch.bfloat16), pointer(qkv), pointer(out), pointer(cos), pointer(sin), pointer(positions),
        c_int64(cos.shape[0]), c_int64(batch * seq_len), c_int64(seq_len), c_int64(width), c_int64(cos.shape[1]),
        c_int64(rotated), int(inverse), byref(wrong), torch.get_num_threads(),
    )  # fmt: skip
    if wrong.value:
        raise WrongIndex(f"rope: a position is outside the tables of {cos.shape[0]} positions")


# ---- the op


def _rotate(
    qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotated: int, inverse: bool
) -> None:
    if not qkv.numel():
        return
    implementations = {"reference": rope_reference}
    if cos.dtype == torch.float32:
        implementations |= {"triton": _rope_triton, "csrc": _rope_csrc}
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.to(torch.int64).contiguous()
    choose(implementations, qkv)(qkv, out, cos, sin, positions, rotated, inverse)


def _functional(qkv: Tensor, *options: Any) -> Tensor:
    qkv = qkv.contiguous()
    out = torch.empty_like(qkv)
    _rotate(qkv, out, *options)
    return out


def _in_place(qkv: Tensor, *options: Any) -> None:
    _rotate(qkv, qkv, *options)


_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? positions, int rotated, bool inverse"
_kernel = define(
    f"rope(Tensor qkv, {_ARGUMENTS}) -> Tensor",
    _functional,
    lambda qkv, *options: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)
_kernel_in_place = define(f"rope_(Tensor(a!) qkv, {_ARGUMENTS}) -> ()", _in_place, lambda *inputs: None)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.rotated, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    cos, sin, positions = ctx.saved_tensors
    return run(dy, cos, sin, positions, ctx.rotated, not ctx.inverse), None, None, None, None, None


_rope = Differentiable(_kernel, _kernel, _setup, _gradients)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *options: Any) -> Tensor:
        _kernel_in_place(qkv, *options)
        _setup(ctx, (qkv, *options), qkv)
        ctx.mark_dirty(qkv)
        ctx.forced = forced()
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        def run(dy: Tensor, *options: Any) -> Tensor:
            dy = dy.contiguous()
            with use(ctx.forced):
                _kernel_in_place(dy, *options)
            torch.autograd.graph.increment_version(dy)
            return dy

        return _gradients(run, ctx, dy)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, num_heads: int, num_kv_heads: int) -> Tensor:
    """Rotate the queries and keys of a packed qkv (B, T, (n + 2k) h) by their positions; values pass through.

    Raises ValueError when shapes, dtypes or devices do not fit, or the tables are shorter than the window. A position outside
    the tables raises WrongIndex: at once on a CPU, from `check_indices` on a GPU.
    """
    _check(qkv, cos, sin, positions, num_heads, num_kv_heads)
    return _rope(qkv, cos, sin, positions, num_heads + num_kv_heads, False)


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, num_heads: int, num_kv_heads: int) -> Tensor:
    """`rope` in place, where the values need not move: for a contiguous qkv, and a gradient of it, that nothing else reads.

    The backward turns the gradient it is given in place, too. torch.compile sees the functional form.
    """
    _check(qkv, cos, sin, positions, num_heads, num_kv_heads)
    if torch.compiler.is_compiling():
        return _rope(qkv, cos, sin, positions, num_heads + num_kv_heads, False)
    if not qkv.is_contiguous():
        raise ValueError(f"rope_: qkv of strides {qkv.stride()} is not contiguous")
    return _InPlace.apply(qkv, cos, sin, positions, num_heads + num_kv_heads, False)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, num_heads: int, num_kv_heads: int) -> None:
    floating("rope", qkv=qkv)
    if cos.dim() != 2:
        raise ValueError(f"rope: cos is {tuple(cos.shape)}, expected (positions, half a head)")
    width = (num_heads + 2 * num_kv_heads) * 2 * cos.shape[1]
    if qkv.dim() != 3 or qkv.shape[2] != width or (positions is None and qkv.shape[1] > cos.shape[0]):
        raise ValueError(f"rope: qkv is {tuple(qkv.shape)}, expected (B, T <= {cos.shape[0]}, {width})")
    if sin.shape != cos.shape or sin.dtype != cos.dtype or cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rope: cos is {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}; expected one shape, fp32 or fp64"
        )
    if positions is not None and (positions.shape != qkv.shape[:2] or positions.is_floating_point()):
        raise ValueError(
            f"rope: positions are {tuple(positions.shape)} {positions.dtype}, expected integers {tuple(qkv.shape[:2])}"
        )
    same_device("rope", qkv=qkv, cos=cos, sin=sin, positions=positions)
