"""Causal attention with grouped queries (Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv 2305.13245).

    out_j = softmax(q_j k_g^T / sqrt(h) + mask) v_g        query head j reads kv head g = j div (n / k)

qkv: (B, T, (n + 2k) h), already rotated, rows [q heads; k heads; v heads]; out: (B, T, n h). A token sees itself and what is
before it in its window, or, with cu_seqlens, in its document. cu_seqlens: int32 borders of the documents in the B T flattened
tokens, 0 and B T and every window border included.

With P the softmax and g the gradient of out_j:   dv_g = sum_j P^T g;   dS = P (g v^T - rowsum(P g v^T)) / sqrt(h);
dq_j = dS k_g;   dk_g = sum_j dS^T q_j        sums over the query heads j of kv head g

The forward also gives lse (B, n, T), fp32 (fp64): log(sum(exp(scores))), from which the backward makes P again.

Backends: `reference` spells the formulas out, `sdpa` is torch's own op, `csrc` is C++ for CPUs and head sizes that are multiples
of 16 (bf16: products of bf16 pairs where the CPU has them). `auto` is csrc where that runs, else sdpa.
"""

from ctypes import c_float, c_int64
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.backend import DTYPES, Differentiable, choose, csrc, define, pointer, use, wide

BACKENDS = ("reference", "sdpa", "csrc")
LARGEST_HEAD = 1024  # of csrc


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


def forward_reference(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in plain torch: products in the dtype of qkv, softmax in fp32 (fp64)."""
    q, k, v = split_heads(qkv, num_heads, num_kv_heads)
    k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
    scores = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).to(wide(qkv.dtype))
    scores = scores.masked_fill(~visible(qkv, cu_seqlens), float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1)


def backward_reference(
    dy: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None
) -> Tensor:
    """The gradient of qkv in plain torch, all in fp32 (fp64)."""
    q, k, v = split_heads(qkv.to(wide(qkv.dtype)), num_heads, num_kv_heads)
    k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
    grad, mixed = (t.to(q.dtype).unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (dy, out))
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible(qkv, cu_seqlens), float("-inf"))
    shares = (scores - lse[..., None]).exp()
    dscores = shares * (grad @ v.transpose(-1, -2) - (grad * mixed).sum(-1, keepdim=True)) * scale
    dk, dv = dscores.transpose(-1, -2) @ q, shares.transpose(-1, -2) @ grad
    dk, dv = (t.unflatten(1, (num_kv_heads, -1)).sum(2) for t in (dk, dv))
    return torch.cat([dscores @ k, dk, dv], dim=1).transpose(1, 2).flatten(2).to(qkv.dtype)


def _empty_forward(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    batch, seq_len, width = qkv.shape
    out = qkv.new_empty(batch, seq_len, width // (num_heads + 2 * num_kv_heads) * num_heads)
    return out, qkv.new_empty(batch, num_heads, seq_len, dtype=wide(qkv.dtype))


def _problem(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> tuple[Any, ...]:
    """The arguments that both directions of csrc share."""
    batch, seq_len, width = qkv.shape
    head = width // (num_heads + 2 * num_kv_heads)
    documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    return (
        *map(c_int64, (batch, seq_len, num_heads, num_kv_heads, head)), c_float(head**-0.5), pointer(cu_seqlens),
        c_int64(documents), torch.get_num_threads(),
    )  # fmt: skip


def forward_csrc(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp on a CPU."""
    out, lse = _empty_forward(qkv, num_heads, num_kv_heads)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    if qkv.numel() and not csrc("attention")(
        int(qkv.dtype == torch.bfloat16), pointer(qkv), pointer(out), pointer(lse),
        *_problem(qkv, num_heads, num_kv_heads, cu_seqlens),
    ):  # fmt: skip
        raise ValueError(
            f"attention: cu_seqlens must rise from 0 to the {qkv.shape[0] * qkv.shape[1]} tokens there are"
        )
    return out, lse


def backward_csrc(
    dy: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None
) -> Tensor:
    """The gradient of qkv on a CPU."""
    dqkv = torch.empty_like(qkv)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    if qkv.numel():
        csrc("attention_backward")(
            int(qkv.dtype == torch.bfloat16), pointer(dy), pointer(qkv), pointer(out), pointer(lse), pointer(dqkv),
            *_problem(qkv, num_heads, num_kv_heads, cu_seqlens),
        )  # fmt: skip
    return dqkv


# ---- the op


def _fits_csrc(qkv: Tensor, num_heads: int, num_kv_heads: int) -> bool:
    head = qkv.shape[2] // (num_heads + 2 * num_kv_heads)
    return head % 16 == 0 and head <= LARGEST_HEAD


def _forward(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    implementations: dict[str, Any] = {"reference": forward_reference}
    if _fits_csrc(qkv, num_heads, num_kv_heads):
        implementations["csrc"] = forward_csrc
    return choose(implementations, qkv)(qkv.contiguous(), num_heads, num_kv_heads, cu_seqlens)


def _backward(
    dy: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None
) -> Tensor:
    implementations: dict[str, Any] = {"reference": backward_reference}
    if _fits_csrc(qkv, num_heads, num_kv_heads):
        implementations["csrc"] = backward_csrc
    inputs = (t.contiguous() for t in (dy, qkv, out, lse))
    return choose(implementations, qkv)(*inputs, num_heads, num_kv_heads, cu_seqlens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.num_kv_heads, cu_seqlens = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, cu_seqlens, *output)


def _gradients(run: Any, ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    qkv, cu_seqlens, out, lse = ctx.saved_tensors
    return run(dy, qkv, out, lse, ctx.num_heads, ctx.num_kv_heads, cu_seqlens), None, None, None


_attention = Differentiable(
    define(
        "attention(Tensor qkv, int num_heads, int num_kv_heads, Tensor? cu_seqlens) -> (Tensor, Tensor)",
        _forward,
        lambda qkv, num_heads, num_kv_heads, cu_seqlens: _empty_forward(qkv, num_heads, num_kv_heads),
    ),
    define(
        "attention_backward(Tensor dy, Tensor qkv, Tensor out, Tensor lse, int num_heads, int num_kv_heads, "
        "Tensor? cu_seqlens) -> Tensor",
        _backward,
        lambda dy, qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
    ),
    _setup,
    _gradients,
)


@torch.compiler.assume_constant_result
def _runs_csrc(device: str, dtype: torch.dtype) -> bool:
    """Whether tensors of this kind, where a head fits, would go to csrc."""
    like = torch.empty(0, dtype=dtype, device=device)
    return choose({"reference": forward_reference, "csrc": forward_csrc}, like) is forward_csrc


def attention(
    qkv: Tensor, num_heads: int, num_kv_heads: int, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Causal attention of a packed, rotated qkv (B, T, (n + 2k) h): (B, T, n h).

    Raises HyperLlamaError for a backend that is not there or can't run this, ValueError when the width of qkv does not fit the
    heads.
    """
    if backend not in ("auto", *BACKENDS):
        raise HyperLlamaError(f"attention backend {backend!r} is not available; available: auto, {', '.join(BACKENDS)}")
    if qkv.dim() != 3 or num_heads % num_kv_heads or qkv.shape[2] % (num_heads + 2 * num_kv_heads):
        raise ValueError(f"attention: qkv is {tuple(qkv.shape)} for {num_heads} query and {num_kv_heads} kv heads")
    fits = qkv.dtype in DTYPES["csrc"] and _fits_csrc(qkv, num_heads, num_kv_heads)
    if backend == "csrc":
        if not fits:
            head = qkv.shape[2] // (num_heads + 2 * num_kv_heads)
            raise HyperLlamaError(
                f"attention backend csrc takes bf16 and fp32 and heads of a multiple of 16 up to {LARGEST_HEAD}; "
                f"this is {str(qkv.dtype).removeprefix('torch.')}, {head}"
            )
        with use("csrc"):
            return _attention(qkv, num_heads, num_kv_heads, cu_seqlens)[0]
    if backend == "auto" and fits and _runs_csrc(qkv.device.type, qkv.dtype):
        return _attention(qkv, num_heads, num_kv_heads, cu_seqlens)[0]
    if backend == "reference":
        # torch's autograd, so that a FLOP counter sees the products of a backward that recomputes nothing
        return forward_reference(qkv, num_heads, num_kv_heads, cu_seqlens)[0]
    return attention_sdpa(qkv, num_heads, num_kv_heads, cu_seqlens)
