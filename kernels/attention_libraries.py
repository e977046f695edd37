"""Attention by other people's kernels, each through its public interface and its own autograd; imported when one is asked for.

They take q (N, n, h), k and v (N, k, h) of N = B T tokens, here as views of the packed qkv, and the borders of the documents on
the device, int32; without documents, those of the windows. torch's own take (B, heads, T, h) and, with documents, a mask of T^2
or nothing.

A library that has a deterministic backward uses it when torch.use_deterministic_algorithms is on.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from hyperllama.errors import HyperLlamaError


def _varlen(function: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int) -> Tensor:
    """flash_attn_varlen_func as flash-attn 2, 3 and 4 have it; `longest` is a bound, so that nothing is read back."""
    out = function(
        q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=True, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # early releases of 3 and 4 always return lse as well


def _torch_varlen(function: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int) -> Tensor:
    return function(
        q, k, v, borders, borders, longest, longest, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1]
    )


def _xformers(function: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int) -> Tensor:
    """Wants lengths on the host, and has grouped heads in the forward only."""
    if borders.numel() - 1 == len(q) // longest:  # whole windows: their lengths are known here
        lengths = [longest] * (len(q) // longest)
    else:
        lengths = [n for n in borders.diff().tolist() if n]
    mask = import_module("xformers.ops.fmha.attn_bias").BlockDiagonalCausalMask.from_seqlens(lengths)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return function(q[None], k[None], v[None], attn_bias=mask)[0]


@dataclass(frozen=True)
class Library:
    """A package with a function for ragged documents."""

    modules: tuple[str, ...]  # the first that has the function
    function: str
    install: str
    call: Callable[..., Tensor]
    deterministic: bool
    needs: tuple[str, ...] = ()  # keywords that early releases of the function do not have


LIBRARIES = {
    "flash_attn_2": Library(("flash_attn",), "flash_attn_varlen_func", "pip install flash-attn", _varlen, True),
    "flash_attn_3": Library(
        ("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash_attn_varlen_func",
        "build the folder hopper of flash-attention", _varlen, True,
    ),
    "flash_attn_4": Library(("flash_attn.cute",), "flash_attn_varlen_func", "pip install flash-attn-4", _varlen, True),
    "xformers": Library(("xformers.ops",), "memory_efficient_attention", "pip install xformers", _xformers, False),
    "torch_varlen": Library(
        ("torch.nn.attention.varlen",), "varlen_attn", "a newer torch has it", _torch_varlen, False,
        ("window_size", "enable_gqa"),
    ),
}  # fmt: skip
KERNELS_OF_TORCH = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256  # of flash-attn and of torch's flash kernels


@cache
def load(name: str) -> Any:
    """The function of a library.

    Raises HyperLlamaError when it is not installed, can't be imported, or is too old.
    """
    library, problem = LIBRARIES[name], ""
    for module in library.modules:
        try:
            function = getattr(import_module(module), library.function)
        except (ImportError, OSError, AttributeError) as error:  # OSError: a shared library that does not load
            problem = problem or str(error)
            continue
        if missing := set(library.needs) - set(inspect.signature(function).parameters):
            raise HyperLlamaError(
                f"attention backend {name}: {module}.{library.function} has no {', '.join(sorted(missing))}: "
                f"{library.install}"
            )
        return function
    raise HyperLlamaError(
        f"attention backend {name} needs {' or '.join(library.modules)}, which can't be imported ({problem}): "
        f"{library.install}"
    )


def obstacle(name: str, qkv: Tensor, head: int, cu_seqlens: Tensor | None) -> str | None:
    """Why a library, or a kernel of torch's, can't do this; None when it can."""
    if name == "sdpa_flash" and cu_seqlens is not None:
        return "takes no documents"
    if not qkv.is_cuda and name != "sdpa_flash":
        return f"needs CUDA tensors; these are on {qkv.device}"
    if qkv.is_cuda and qkv.dtype not in HALF and name not in ("sdpa_efficient", "xformers"):
        return f"takes bf16 and fp16; this is {str(qkv.dtype).removeprefix('torch.')}"
    if qkv.is_cuda and head > LARGEST_HEAD and name not in ("sdpa_efficient", "xformers"):
        return f"takes heads up to {LARGEST_HEAD}; this is {head}"
    return None


def attention_library(name: str, qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> Tensor:
    """Attention of the packed qkv (B, T, (n + 2k) h) by a library: (B, T, n h)."""
    batch, seq_len, _ = qkv.shape
    heads = qkv.reshape(batch * seq_len, num_heads + 2 * num_kv_heads, -1)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if cu_seqlens is None:
        borders = torch.arange(0, batch * seq_len + 1, seq_len, dtype=torch.int32, device=qkv.device)
    else:
        borders = cu_seqlens.to(torch.int32)
    return LIBRARIES[name].call(load(name), q, k, v, borders, seq_len).reshape(batch, seq_len, -1)
