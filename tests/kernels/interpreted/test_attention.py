"""The Triton kernels of attention against fp64: documents of every kind, groups, head sizes, borders of blocks."""

import pytest
import torch
from torch.library import opcheck

from hyperllama.kernels.attention import attention
from hyperllama.kernels.attention_triton import _forward_kernel
from tests.kernels.truth import DTYPES, check, check_compiled


def plain(n, k, cu_seqlens):
    """torch's fused op, which like ours makes the scores again from lse: in the textbook's order some gradients are exactly 0."""
    return lambda x: [attention(x, n, k, cu_seqlens=cu_seqlens, backend="sdpa")]


def ours(n, k, cu_seqlens):
    return lambda x: [attention(x, n, k, cu_seqlens=cu_seqlens, backend="triton")]


CASES = {  # windows, tokens, (n, k, h), borders of documents; blocks are of 32
    "one token": (1, 1, (2, 1, 64), None),
    "whole blocks": (1, 64, (1, 1, 64), None),
    "ragged, windows across blocks": (3, 37, (3, 1, 32), None),
    "three to one, 64": (1, 40, (9, 3, 64), None),
    "multi-query, 128": (1, 45, (4, 1, 128), [0, 20, 45]),
    "padded heads": (2, 40, (2, 2, 48), [0, 13, 40, 80]),
    "tiny heads": (1, 33, (2, 1, 4), None),
    "documents of one token": (1, 40, (2, 1, 32), list(range(41))),
    "empty documents": (2, 35, (2, 1, 32), [0, 0, 35, 35, 35, 36, 50, 70, 70]),
    "many in one block, one long": (1, 100, (2, 1, 64), [0, 1, 3, 6, 10, 11, 95, 100]),
    "one long document": (1, 100, (2, 1, 64), [0, 100]),
    "a document that begins with a block": (1, 96, (2, 2, 32), [0, 32, 33, 64, 96]),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_plain_torchs(case, dtype):
    batch, seq_len, (n, k, h), borders = CASES[case]
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    qkv = torch.randn(batch, seq_len, (n + 2 * k) * h).to(dtype)
    check(ours(n, k, cu_seqlens), plain(n, k, cu_seqlens), [qkv])


def test_large_scores_neither_overflow_nor_vanish():
    check(ours(2, 1, None), plain(2, 1, None), [torch.randn(1, 70, 4 * 32) * 10])  # scores up to 2000


def test_non_contiguous_and_unaligned_input():
    qkv = torch.randn(2, 33, 4 * 32 + 1)[..., 1:]
    check(ours(2, 1, None), plain(2, 1, None), [qkv])


@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64)])
def test_empty_batches(shape):
    qkv = torch.randn(shape, requires_grad=True)
    out = attention(qkv, 2, 1, backend="triton")
    out.sum().backward()
    assert out.shape == (*shape[:2], 32) and qkv.grad.shape == shape


def test_the_same_bits_every_time():
    qkv, dy = torch.randn(1, 90, 5 * 32).bfloat16(), torch.randn(1, 90, 3 * 32).bfloat16()
    borders = torch.tensor([0, 7, 64, 90], dtype=torch.int32)
    runs = []
    for _ in range(2):
        out, lse = torch.ops.hyperllama.attention(qkv, 3, 1, borders)
        runs.append((out, lse, torch.ops.hyperllama.attention_backward(dy, qkv, out, lse, 3, 1, borders)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("borders", [[0, 5], [3, 12], [0, 13], [0, 7, 5, 12], [0], [-9, 100]])
def test_borders_that_do_not_fit_stay_inside_the_tensors(borders):
    """Checking them would wait for the GPU: the result is then arbitrary, but nothing outside is read or written."""
    qkv = torch.randn(1, 12, 64, requires_grad=True)
    attention(qkv, 2, 1, cu_seqlens=torch.tensor(borders, dtype=torch.int32), backend="triton").sum().backward()
    assert torch.isfinite(qkv.grad).all()


@pytest.mark.parametrize("borders", [None, torch.tensor([0, 6, 9, 12], dtype=torch.int32)])
def test_opcheck_and_compile(borders):
    qkv, ops = torch.randn(2, 6, 64), torch.ops.hyperllama
    opcheck(ops.attention.default, (qkv.clone().requires_grad_(), 2, 1, borders))
    out, lse = ops.attention(qkv, 2, 1, borders)
    opcheck(ops.attention_backward.default, (torch.randn(2, 6, 32), qkv, out, lse, 2, 1, borders))
    check_compiled(lambda x: [attention(x, 2, 1, cu_seqlens=borders, backend="triton")], [qkv])


def test_places_past_2_to_the_31():
    """The forward's first program has the last block: of a buffer of 2^31 elements only the end is ever touched."""
    seq_len, (n, k, h) = 32, (1, 1, 16)
    tokens = 2**31 // (3 * h) // seq_len * seq_len + 2 * seq_len
    qkv = torch.empty(tokens, 3 * h, dtype=torch.bfloat16)
    out, lse = torch.empty(tokens, h, dtype=torch.bfloat16), torch.empty(tokens)
    assert (tokens - seq_len) * 3 * h > 2**31
    qkv[-seq_len:] = torch.randn(seq_len, 3 * h)
    constants = {"HEADS": n, "KV_HEADS": k, "WIDTH": h, "DEPTH": h, "DOCUMENTS": False, "PRECISION": "ieee"}
    _forward_kernel[(1,)](qkv, out, lse, qkv, tokens, seq_len, h**-0.5, ROWS=32, COLS=32, **constants)
    expected = attention(qkv[None, -seq_len:], n, k, backend="triton")
    assert torch.equal(out[-seq_len:], expected[0])
