"""attention: every backend against each query worked out alone in fp64, with and without documents."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.attention import attention
from tests.kernels.truth import DTYPES, check, check_compiled

BATCH, SEQ_LEN = 2, 41
DOCUMENTS = {False: [0, 41, 82], True: [0, 4, 5, 41, 50, 82]}


def one_by_one(qkv, n, k, borders):
    """Every document, head and query on its own."""
    batch, seq_len, _ = qkv.shape
    heads = qkv.unflatten(2, (n + 2 * k, -1))
    rows = []
    for b in range(batch):
        for t in range(seq_len):
            start = max(border for border in borders if border <= b * seq_len + t) - b * seq_len
            out = []
            for j in range(n):
                g = n + j // (n // k)
                scores = heads[b, start : t + 1, g] @ heads[b, t, j] / heads.shape[-1] ** 0.5
                out.append(scores.softmax(0) @ heads[b, start : t + 1, g + k])
            rows.append(torch.cat(out))
    return torch.stack(rows).view(batch, seq_len, -1)


def separate_heads(qkv, n, k):
    """q, k, v (B, n, T, h), keys and values repeated for their query heads."""
    q, keys, v = qkv.unflatten(2, (n + 2 * k, -1)).transpose(1, 2).split([n, k, k], 1)
    return q, *(t.repeat_interleave(n // k, 1) for t in (keys, v))


def seen(batch, seq_len, borders):
    at = torch.arange(batch * seq_len)
    document = sum((at >= border).long() for border in borders).view(batch, 1, seq_len)
    return (document[..., None] == document[..., None, :]) & (at[:seq_len, None] >= at[:seq_len])


def textbook(qkv, n, k, borders):
    """Full score matrices, masked."""
    q, keys, v = separate_heads(qkv, n, k)
    scores = (q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(
        ~seen(*qkv.shape[:2], borders), float("-inf")
    )
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def torchs(qkv, n, k, borders):
    """torch's fused op as anybody would call it: its rounding is what `sdpa` is measured by."""
    mask = seen(*qkv.shape[:2], borders)
    return functional.scaled_dot_product_attention(*separate_heads(qkv, n, k), mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("name", "plain"), [("reference", textbook), ("sdpa", torchs)])
@pytest.mark.parametrize("heads", [(3, 1, 16), (4, 2, 8), (2, 2, 32), (9, 3, 4)])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_plain_torchs(name, plain, heads, documents, dtype):
    (n, k, h), borders = heads, DOCUMENTS[documents]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32) if documents else None
    qkv = torch.randn(BATCH, SEQ_LEN, (n + 2 * k) * h).to(dtype)
    check(
        lambda x: [attention(x, n, k, cu_seqlens=cu_seqlens, backend=name)],
        lambda x: [plain(x, n, k, borders)],
        [qkv],
        exact=lambda x: [one_by_one(x, n, k, borders)],
    )


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 1, 16)])
def test_empty_batches_and_single_tokens(name, shape):
    qkv = torch.randn(shape)
    out = attention(qkv, 2, 1, backend=name)
    assert out.shape == (*shape[:2], 8)
    torch.testing.assert_close(
        out, qkv[..., 12:].repeat(1, 1, 2) if shape[1] == 1 else out
    )  # alone, a token sees itself


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_non_contiguous_input(name):
    qkv = torch.randn(SEQ_LEN, BATCH, 4 * 8).transpose(0, 1)
    expected = attention(qkv.contiguous(), 2, 1, backend=name)
    torch.testing.assert_close(attention(qkv, 2, 1, backend=name), expected)


def test_the_products_of_the_reference_are_counted():
    """2 FLOPs per multiply-add, T x T pairs, scores and values: what flops.py calls dense."""
    n, k, h = 3, 1, 16
    qkv = torch.randn(BATCH, SEQ_LEN, (n + 2 * k) * h, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(qkv, n, k, backend="reference").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * BATCH * n * h * SEQ_LEN**2


@pytest.mark.parametrize("heads", [(2, 1, 8), (4, 2, 8), (3, 3, 16)])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_registered_backward_recomputes_the_same_gradient(heads, documents, dtype):
    (n, k, h), borders = heads, DOCUMENTS[documents]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    qkv = torch.randn(BATCH, SEQ_LEN, (n + 2 * k) * h).to(dtype)
    registered = torch.ops.hyperllama.attention
    check(lambda x: [registered(x, n, k, cu_seqlens)], lambda x: [textbook(x, n, k, borders)], [qkv])


@pytest.mark.parametrize("borders", [None, torch.tensor([0, 6, 9, 12], dtype=torch.int32)])
def test_opcheck_and_compile(borders):
    qkv, ops = torch.randn(2, 6, 32), torch.ops.hyperllama
    opcheck(ops.attention.default, (qkv.clone().requires_grad_(), 2, 1, borders))
    opcheck(ops.attention_backward.default, (torch.randn(2, 6, 16), qkv, 2, 1, borders))
    for name in ("reference", "sdpa"):
        check_compiled(lambda x, name=name: [attention(x, 2, 1, cu_seqlens=borders, backend=name)], [qkv])


def test_backends_that_are_not_there_are_named():
    for name in ("flash_attn", "xformers", "triton", "nonsense"):
        with pytest.raises(HyperLlamaError, match=f"{name}.*available: auto, reference, sdpa"):
            attention(torch.randn(1, 4, 12), 1, 1, backend=name)


def test_shapes_that_do_not_fit_are_named():
    for shape, n, k in [((2, 3, 33), 2, 1), ((3, 32), 2, 1), ((2, 3, 56), 3, 2)]:
        with pytest.raises(ValueError, match=f"for {n} query and {k} kv heads"):
            attention(torch.randn(shape), n, k)
