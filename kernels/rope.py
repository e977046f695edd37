"""Rotary position embedding, half-split form (Su et al. 2021, arXiv 2104.09864; GPT-NeoX's pairing of halves).

    head = [a, b], both h/2 wide;  angle_j = position * theta^(-2j/h)
    out  = [a cos - b sin, b cos + a sin]

qkv: (B, T, (n + 2k) h), rows [q heads; k heads; v heads]; q and k are rotated in one go, v is copied. cos, sin: (P, h/2) fp32.
positions: (B, T) int64 rows of the tables, or None for 0..T-1. Arithmetic is fp32 (fp64 for fp64), rounded once. The backward is
the rotation by the opposite angle. CPU: C++.

The tables are part of a model's definition: fp32 angles, cosines and sines, computed as transformers does, whatever the dtype of
the weights (at position 2047 an fp32 angle is off by up to 1e-4, and trained weights have seen just that angle).
"""

from ctypes import byref, c_int, c_int64
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels.backend import Differentiable, choose, csrc, define, pointer, wide


def rope_tables(
    length: int, head_dim: int, theta: float, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin of all angles of `length` positions, each (length, head_dim / 2) fp32.

    `dtype` bf16 rounds the values to bf16, as the paper's runs did; fp64 gives fp64 tables from fp64 angles.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=wide(dtype), device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=wide(dtype), device=device), 1.0 / theta**exponents)
    return angles.cos().to(dtype).to(angles.dtype), angles.sin().to(dtype).to(angles.dtype)


def rope_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotated: int, inverse: bool
) -> Tensor:
    """Rotate the first `rotated` heads of qkv, by the opposite angle when `inverse`; plain torch."""
    batch, seq_len, _width = qkv.shape
    half = cos.shape[1]
    if positions is None:
        cos, sin = cos[:seq_len], sin[:seq_len]
    else:
        cos, sin = cos[positions], sin[positions]
    cos, sin = (table[..., None, :].to(wide(qkv.dtype)) for table in (cos, -sin if inverse else sin))
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    split = rotated * 2 * half
    heads = qkv[..., :split].reshape(batch, seq_len, rotated, 2, half).to(cos.dtype)
    a, b = heads.unbind(-2)
    turned = out[..., :split].view(batch, seq_len, rotated, 2, half)
    turned[..., 0, :] = a * cos - b * sin
    turned[..., 1, :] = b * cos + a * sin
    out[..., split:] = qkv[..., split:]
    return out


def _rope_csrc(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotated: int, inverse: bool) -> Tensor:
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.to(torch.int64).contiguous()
    out, (batch, seq_len, width), wrong = torch.empty_like(qkv), qkv.shape, c_int(0)
    if out.numel():
        csrc("rope")(
            int(qkv.dtype == torch.bfloat16), pointer(qkv), pointer(out), pointer(cos), pointer(sin), pointer(positions),
            c_int64(cos.shape[0]), c_int64(batch * seq_len), c_int64(seq_len), c_int64(width), c_int64(cos.shape[1]),
            c_int64(rotated), int(inverse), byref(wrong), torch.get_num_threads(),
        )  # fmt: skip
    if wrong.value:
        raise IndexError(f"rope: a position is outside the tables of {cos.shape[0]} positions")
    return out


def _run(qkv: Tensor, cos: Tensor, *options: Any) -> Tensor:
    implementations = {"reference": rope_reference} | ({"csrc": _rope_csrc} if cos.dtype == torch.float32 else {})
    return choose(implementations, qkv)(qkv, cos, *options)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.rotated, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    cos, sin, positions = ctx.saved_tensors
    return run(dy, cos, sin, positions, ctx.rotated, not ctx.inverse), None, None, None, None, None


_kernel = define(
    "rope(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, int rotated, bool inverse) -> Tensor",
    _run,
    lambda qkv, cos, sin, positions, rotated, inverse: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)
_rope = Differentiable(_kernel, _kernel, _setup, _gradients)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, num_heads: int, num_kv_heads: int) -> Tensor:
    """Rotate the queries and keys of a packed qkv (B, T, (n + 2k) h) by their positions; values pass through.

    Raises ValueError when the width of qkv is not (n + 2k) h, or the tables are shorter than the window.
    """
    width = (num_heads + 2 * num_kv_heads) * 2 * cos.shape[1]
    if qkv.dim() != 3 or qkv.shape[2] != width or (positions is None and qkv.shape[1] > cos.shape[0]):
        raise ValueError(f"rope: qkv is {tuple(qkv.shape)}, expected (B, T <= {cos.shape[0]}, {width})")
    return _rope(qkv, cos, sin, positions, num_heads + num_kv_heads, False)
