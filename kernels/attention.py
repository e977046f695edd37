"""Causal attention with grouped queries (Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv 2305.13245).

    out_j = softmax(q_j k_g^T / sqrt(h) + mask) v_g        query head j reads kv head g = j div (n / k)

qkv: (B, T, (n + 2k) h), already rotated, rows [q heads; k heads; v heads]; out: (B, T, n h). A token sees itself and what is
before it in its window, or, with cu_seqlens, in its document. cu_seqlens: int32 borders of the documents in the B T flattened
tokens, 0 and B T and every window border included.

With P the softmax and g the gradient of out_j:   dv_g = sum_j P^T g;   dS = P (g v^T - rowsum(P g v^T)) / sqrt(h);
dq_j = dS k_g;   dk_g = sum_j dS^T q_j        sums over the query heads j of kv head g

Backends: `reference` spells the formulas out, `sdpa` is torch's own op; `auto` is sdpa. Reference only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.backend import Differentiable, define, wide

BACKENDS = ("reference", "sdpa")


def visible(qkv: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(T, T), or with documents (B, 1, T, T), bool: whether a query (row) sees a key (column). No host sync."""
    batch, seq_len, _ = qkv.shape
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=qkv.device).tril()
    if cu_seqlens is None:
        return causal
    flat = torch.arange(batch * seq_len, device=qkv.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, flat, right=True).view(batch, 1, seq_len)
    return (document[..., :, None] == document[..., None, :]) & causal


def split_heads(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:
    """q (B, n, T, h), k and v (B, k, T, h), as views."""
    heads = qkv.unflatten(2, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
    return heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)


def attention_sdpa(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> Tensor:
    """Attention by torch's fused op."""
    q, k, v = split_heads(qkv, num_heads, num_kv_heads)
    mask = None if cu_seqlens is None else visible(qkv, cu_seqlens)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=num_heads != num_kv_heads
    )
    return out.transpose(1, 2).flatten(2)


def attention_reference(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> Tensor:
    """Attention in plain torch: products in the dtype of qkv, softmax in fp32 (fp64)."""
    q, k, v = split_heads(qkv, num_heads, num_kv_heads)
    k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
    scores = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).to(wide(qkv.dtype))
    shares = scores.masked_fill(~visible(qkv, cu_seqlens), float("-inf")).softmax(-1)
    return (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def attention_backward_reference(
    dy: Tensor, qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None
) -> Tensor:
    """The gradient of qkv in plain torch, the softmax recomputed, all in fp32 (fp64)."""
    q, k, v = split_heads(qkv.to(wide(qkv.dtype)), num_heads, num_kv_heads)
    k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
    grad = dy.to(q.dtype).unflatten(2, (num_heads, -1)).transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible(qkv, cu_seqlens), float("-inf"))
    shares = scores.softmax(-1)
    dshares = grad @ v.transpose(-1, -2)
    dscores = shares * (dshares - (shares * dshares).sum(-1, keepdim=True)) * scale
    dk, dv = dscores.transpose(-1, -2) @ q, shares.transpose(-1, -2) @ grad
    dk, dv = (t.unflatten(1, (num_kv_heads, -1)).sum(2) for t in (dk, dv))
    return torch.cat([dscores @ k, dk, dv], dim=1).transpose(1, 2).flatten(2).to(qkv.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads, ctx.num_kv_heads, cu_seqlens = inputs
    ctx.save_for_backward(qkv, cu_seqlens)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    qkv, cu_seqlens = ctx.saved_tensors
    return run(dy, qkv, ctx.num_heads, ctx.num_kv_heads, cu_seqlens), None, None, None


_attention = Differentiable(
    define(
        "attention(Tensor qkv, int num_heads, int num_kv_heads, Tensor? cu_seqlens) -> Tensor",
        attention_reference,
        lambda qkv, num_heads, num_kv_heads, cu_seqlens: qkv.new_empty(
            *qkv.shape[:2], qkv.shape[2] // (num_heads + 2 * num_kv_heads) * num_heads
        ),
    ),
    define(
        "attention_backward(Tensor dy, Tensor qkv, int num_heads, int num_kv_heads, Tensor? cu_seqlens) -> Tensor",
        attention_backward_reference,
        lambda dy, qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
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
    if backend == "sdpa":  # torch's autograd and torch.compile know it: in an op of ours it would be hidden from them
        return attention_sdpa(qkv, num_heads, num_kv_heads, cu_seqlens)
    if torch.compiler.is_compiling():
        return _attention(qkv, num_heads, num_kv_heads, cu_seqlens)
    # torch's autograd, so that a FLOP counter sees the products of a backward that recomputes nothing
    return attention_reference(qkv, num_heads, num_kv_heads, cu_seqlens)
