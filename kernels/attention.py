"""Causal attention with grouped queries (Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv 2305.13245).

    out_j = softmax(q_j k_g^T / sqrt(h) + mask) v_g        query head j reads kv head g = j div (n / k)

qkv: (B, T, (n + 2k) h), already rotated, rows [q heads; k heads; v heads]; out: (B, T, n h). A token sees itself and what is
before it in its window, or, with cu_seqlens, in its document. cu_seqlens: int32 borders of the documents in the B T flattened
tokens, 0 and B T and every window border included.

With P the softmax and g the gradient of out_j:   dv_g = sum_j P^T g;   dS = P (g v^T - rowsum(P g v^T)) / sqrt(h);
dq_j = dS k_g;   dk_g = sum_j dS^T q_j        sums over the query heads j of kv head g

The forward also gives lse (B, n, T), fp32 (fp64): log(sum(exp(scores))), from which the backward makes P again.

Backends: `reference` spells the formulas out, `sdpa` is torch's own op, `csrc` is C++ for CPUs and head sizes that are multiples
of 16 (bf16: products of bf16 pairs where the CPU has them), `triton` is attention_triton.py, the others are attention_libraries.py.
`auto` measures nothing here (attention_choice.py does): csrc where that runs, else sdpa, on a GPU with documents triton.
"""

import os
from contextlib import nullcontext
from ctypes import c_float, c_int64
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import attention_libraries as libraries
from hyperllama.kernels import attention_triton
from hyperllama.kernels.backend import (
    DTYPES,
    Differentiable,
    choose,
    csrc,
    define,
    floating,
    library,
    pointer,
    same_device,
    triton,
    use,
    wide,
)

BACKENDS = ("reference", "sdpa", "csrc", "triton", *libraries.KERNELS_OF_TORCH, *libraries.LIBRARIES)
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


def attention_sdpa(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None, kernel: str = "sdpa"
) -> Tensor:
    """Attention by torch's fused op, by the kernel that it chooses or by one of attention_libraries.KERNELS_OF_TORCH."""
    q, k, v = split_heads(qkv, num_heads, num_kv_heads)
    mask = None if cu_seqlens is None else visible(qkv, cu_seqlens)
    if kernel == "sdpa_efficient":  # which knows no groups
        k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
    with nullcontext() if kernel == "sdpa" else sdpa_kernel(libraries.KERNELS_OF_TORCH[kernel]):
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
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


def _forward(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    implementations = _implementations(
        _head(qkv, num_heads, num_kv_heads), forward_reference, forward_csrc, attention_triton.forward_triton
    )
    return choose(implementations, qkv)(qkv.contiguous(), num_heads, num_kv_heads, cu_seqlens)


def _backward(
    dy: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None
) -> Tensor:
    implementations = _implementations(
        _head(qkv, num_heads, num_kv_heads), backward_reference, backward_csrc, attention_triton.backward_triton
    )
    inputs = (t.contiguous() for t in (dy, qkv, out, lse))
    return choose(implementations, qkv)(*inputs, num_heads, num_kv_heads, cu_seqlens)


def _head(qkv: Tensor, num_heads: int, num_kv_heads: int) -> int:
    return qkv.shape[2] // (num_heads + 2 * num_kv_heads)


def _implementations(head: int, reference: Any, csrc: Any, triton: Any) -> dict[str, Any]:
    """Those that take heads of `head` elements."""
    found = {"reference": reference}
    if _fits_csrc(head):
        found["csrc"] = csrc
    if head <= attention_triton.LARGEST_HEAD:
        found["triton"] = triton
    return found


def _fits_csrc(head: int) -> bool:
    return head % 16 == 0 and head <= LARGEST_HEAD


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


@torch.compiler.assume_constant_result
def _has_csrc() -> bool:
    return library() is not None


def obstacle(backend: str, qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> str | None:
    """Why `backend` can't do this, as the end of a sentence; None when it can. Whether a library is there is not asked."""
    head, dtype = _head(qkv, num_heads, num_kv_heads), str(qkv.dtype).removeprefix("torch.")
    if backend in ("reference", "sdpa"):
        return None
    if backend == "csrc":
        if qkv.device.type != "cpu":
            return f"runs on CPU tensors; these are on {qkv.device}"
        if not _has_csrc():
            return "needs a C++ compiler when hyperllama is installed, and there was none"
        if qkv.dtype in DTYPES["csrc"] and _fits_csrc(head):
            return None
        return f"takes bf16 and fp32 and heads of a multiple of 16 up to {LARGEST_HEAD}; this is {dtype}, {head}"
    if backend == "triton":
        if triton is None:
            return "needs Triton, which is not installed: pip install triton"
        if not qkv.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            return f"needs CUDA tensors; these are on {qkv.device}"
        if qkv.dtype in DTYPES["triton"] and head <= attention_triton.LARGEST_HEAD:
            return None
        return f"takes bf16, fp16 and fp32 and heads up to {attention_triton.LARGEST_HEAD}; this is {dtype}, {head}"
    return libraries.obstacle(backend, qkv, head, cu_seqlens)


def unmeasured(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> str:
    """What `auto` is where nothing has been measured."""
    if qkv.device.type == "cpu":
        head = _head(qkv, num_heads, num_kv_heads)
        fits = qkv.dtype in DTYPES["csrc"] and _fits_csrc(head)
        return "csrc" if fits and _runs_csrc(qkv.device.type, qkv.dtype) else "sdpa"
    if cu_seqlens is not None and obstacle("triton", qkv, num_heads, num_kv_heads, cu_seqlens) is None:
        return "triton"  # sdpa would need a mask of T^2
    return "sdpa"


def attention(
    qkv: Tensor, num_heads: int, num_kv_heads: int, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Causal attention of a packed, rotated qkv (B, T, (n + 2k) h): (B, T, n h).

    Raises HyperLlamaError for a backend that is not there or can't run this, ValueError when the width of qkv does not fit the
    heads, or when cu_seqlens are not integers on the device of qkv. Whether they fit the tokens only csrc checks: a GPU would
    have to be waited for.
    """
    if backend not in ("auto", *BACKENDS):
        raise HyperLlamaError(f"attention backend {backend!r} is not available; available: auto, {', '.join(BACKENDS)}")
    floating("attention", qkv=qkv)
    heads = min(num_heads, num_kv_heads) > 0 and num_heads % num_kv_heads == 0
    if not heads or qkv.dim() != 3 or qkv.shape[2] % (num_heads + 2 * num_kv_heads):
        raise ValueError(f"attention: qkv is {tuple(qkv.shape)} for {num_heads} query and {num_kv_heads} kv heads")
    if cu_seqlens is not None:
        same_device("attention", qkv=qkv, cu_seqlens=cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"attention: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; (documents + 1,) int32 was expected"
            )
    if backend == "auto":
        backend = unmeasured(qkv, num_heads, num_kv_heads, cu_seqlens)
    elif problem := obstacle(backend, qkv, num_heads, num_kv_heads, cu_seqlens):
        raise HyperLlamaError(f"attention backend {backend} {problem}")
    if backend in ("csrc", "triton"):
        # compiled, the registered op chooses by device when it runs, which comes to the same
        with nullcontext() if torch.compiler.is_compiling() else use(backend):
            return _attention(qkv, num_heads, num_kv_heads, cu_seqlens)[0]
    if backend == "reference":
        # torch's autograd, so that a FLOP counter sees the products of a backward that recomputes nothing
        return forward_reference(qkv, num_heads, num_kv_heads, cu_seqlens)[0]
    if backend in libraries.LIBRARIES:
        return libraries.attention_library(backend, qkv, num_heads, num_kv_heads, cu_seqlens)
    return attention_sdpa(qkv, num_heads, num_kv_heads, cu_seqlens, backend)
