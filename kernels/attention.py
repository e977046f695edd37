"""Causal attention with grouped queries (Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv 2305.13245).

    out_j = softmax(q_j k_g^T / sqrt(h) + mask) v_g        query head j reads kv head g = j div (n / k)

qkv: (B, T, (n + 2k) h), already rotated, rows [q heads; k heads; v heads]; out: (B, T, n h). A token sees itself and what is
before it in its window, or, with cu_seqlens, in its document. cu_seqlens: int32 borders of the documents in the B T flattened
tokens, 0 and B T and every window border included. Backends: `reference` spells the formula out, `sdpa` is torch's; `auto` is
sdpa. Kernels of our own, flash-attn and xformers plug in here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.backend import Differentiable, define

BACKENDS = ("reference", "sdpa")


def document_mask(cu_seqlens: Tensor, batch: int, seq_len: int) -> Tensor:
    """(B, 1, T, T) bool: whether a query (row) sees a key (column). No host sync."""
    flat = torch.arange(batch * seq_len, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, flat, right=True).view(batch, 1, seq_len)
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=cu_seqlens.device).tril()
    return ((document[..., :, None] == document[..., None, :]) & causal).view(batch, 1, seq_len, seq_len)


def attention_reference(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    """Attention by torch's own ops: `backend` reference or sdpa."""
    batch, seq_len, _ = qkv.shape
    heads = qkv.unflatten(2, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)  # (B, heads, T, h)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    mask = None if cu_seqlens is None else document_mask(cu_seqlens, batch, seq_len)
    if backend == "sdpa":
        grouped = num_heads != num_kv_heads
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    else:
        k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
        if mask is None:
            mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=qkv.device).tril()
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        wide = torch.promote_types(scores.dtype, torch.float32)
        shares = scores.to(wide).masked_fill(~mask, float("-inf")).softmax(-1)
        out = shares.to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def _backward(
    dy: Tensor, qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    """The gradient of qkv by recomputing the forward."""
    _, pull_back = torch.func.vjp(
        lambda qkv: attention_reference(qkv, num_heads, num_kv_heads, cu_seqlens, backend), qkv
    )
    return pull_back(dy)[0].contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads, ctx.num_kv_heads, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(qkv, cu_seqlens)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    qkv, cu_seqlens = ctx.saved_tensors
    return run(dy, qkv, ctx.num_heads, ctx.num_kv_heads, cu_seqlens, ctx.backend), None, None, None, None


def _out_shape(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    return (*qkv.shape[:2], qkv.shape[2] // (num_heads + 2 * num_kv_heads) * num_heads)


_attention = Differentiable(
    define(
        "attention(Tensor qkv, int num_heads, int num_kv_heads, Tensor? cu_seqlens, str backend) -> Tensor",
        attention_reference,
        lambda qkv, num_heads, num_kv_heads, cu_seqlens, backend: qkv.new_empty(
            _out_shape(qkv, num_heads, num_kv_heads)
        ),
    ),
    define(
        "attention_backward(Tensor dy, Tensor qkv, int num_heads, int num_kv_heads, Tensor? cu_seqlens, str backend) -> Tensor",
        _backward,
        lambda dy, qkv, num_heads, num_kv_heads, cu_seqlens, backend: torch.empty_like(
            qkv, memory_format=torch.contiguous_format
        ),
    ),
    _setup,
    _gradients,
)


def attention(
    qkv: Tensor, num_heads: int, num_kv_heads: int, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Causal attention of a packed, rotated qkv (B, T, (n + 2k) h): (B, T, n h).

    Raises HyperLlamaError for a backend that is not there, ValueError when the width of qkv does not fit the heads.
    """
    if backend == "auto":
        backend = "sdpa"
    if backend not in BACKENDS:
        raise HyperLlamaError(f"attention backend {backend!r} is not available; available: auto, {', '.join(BACKENDS)}")
    if qkv.dim() != 3 or num_heads % num_kv_heads or qkv.shape[2] % (num_heads + 2 * num_kv_heads):
        raise ValueError(f"attention: qkv is {tuple(qkv.shape)} for {num_heads} query and {num_kv_heads} kv heads")
    if torch.compiler.is_compiling():
        return _attention(qkv, num_heads, num_kv_heads, cu_seqlens, backend)
    # torch's own autograd keeps what its backward needs; the registered op would recompute the forward
    return attention_reference(qkv, num_heads, num_kv_heads, cu_seqlens, backend)
