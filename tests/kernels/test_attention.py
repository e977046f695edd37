"""attention: every backend against each query worked out alone in fp64, with and without documents."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hyperllama.config import RunConfig
from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.attention import BACKENDS, attention, unmeasured
from hyperllama.kernels.backend import use
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


@pytest.mark.parametrize(("name", "plain"), [("reference", textbook), ("sdpa", torchs), ("csrc", torchs)])
@pytest.mark.parametrize("heads", [(3, 1, 16), (4, 2, 8), (2, 2, 32), (9, 3, 4), (4, 2, 48)])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_plain_torchs(name, plain, heads, documents, dtype):
    (n, k, h), borders = heads, DOCUMENTS[documents]
    if name == "csrc" and h % 16:
        with pytest.raises(HyperLlamaError, match="heads of a multiple of 16"):
            attention(torch.randn(1, 2, (n + 2 * k) * h).to(dtype), n, k, backend=name)
        return
    cu_seqlens = torch.tensor(borders, dtype=torch.int32) if documents else None
    qkv = torch.randn(BATCH, SEQ_LEN, (n + 2 * k) * h).to(dtype)
    check(
        lambda x: [attention(x, n, k, cu_seqlens=cu_seqlens, backend=name)],
        lambda x: [plain(x, n, k, borders)],
        [qkv],
        exact=lambda x: [one_by_one(x, n, k, borders)],
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("batch", "seq_len", "heads", "borders"),
    [
        (1, 64, (1, 1, 32), None),  # whole blocks, and one token more or less than blocks of queries and of keys
        (1, 65, (2, 1, 64), None),
        (2, 255, (2, 2, 32), None),
        (1, 257, (9, 3, 64), None),
        (1, 600, (2, 1, 128), None),
        (3, 130, (2, 1, 80), [0, 130, 130, 131, 259, 260, 390]),  # an empty document among them
        (1, 530, (4, 2, 32), [0, 1, 2, 520, 530]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_and_their_borders(batch, seq_len, heads, borders, dtype, threads, number_of_threads):
    number_of_threads(threads)
    n, k, h = heads
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    borders = borders or list(range(0, batch * seq_len + 1, seq_len))
    qkv = torch.randn(batch * seq_len * (n + 2 * k) * h + 1).to(dtype)[1:].view(batch, seq_len, -1)  # unaligned
    assert qkv.data_ptr() % 16
    check(
        lambda x: [attention(x, n, k, cu_seqlens=cu_seqlens, backend="csrc")],
        lambda x: [torchs(x, n, k, borders)],
        [qkv],
    )


def test_large_scores_neither_overflow_nor_vanish():
    qkv = torch.randn(1, 70, 4 * 32) * 10  # scores up to 2000
    check(lambda x: [attention(x, 2, 1, backend="csrc")], lambda x: [torchs(x, 2, 1, [0, 70])], [qkv])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_token_shows_in_whatever_sees_it(value, dtype):
    qkv = torch.randn(1, 90, 4 * 32).to(dtype)
    qkv[0, 40, 70] = value  # in the key
    out = attention(qkv, 2, 1, backend="csrc")
    assert torch.isfinite(out[:, :40]).all()
    assert out[:, 40].isnan().any()


def test_the_same_bits_for_the_same_number_of_threads(number_of_threads):
    number_of_threads(2)
    qkv, dy = torch.randn(1, 300, 5 * 32), torch.randn(1, 300, 3 * 32)
    out, lse = torch.ops.hyperllama.attention(qkv, 3, 1, None)
    grads = [torch.ops.hyperllama.attention_backward(dy, qkv, out, lse, 3, 1, None) for _ in range(20)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize("borders", [[0, 5], [1, 12], [0, 13], [0, 7, 5, 12], [0]])
def test_borders_that_do_not_fit_are_named(borders):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 12 tokens"):
        attention(torch.randn(2, 6, 64), 2, 1, cu_seqlens=torch.tensor(borders, dtype=torch.int32), backend="csrc")


@pytest.mark.parametrize(
    ("name", "shape"),  # torch's own op can't do windows of no tokens
    [(name, shape) for name in ("reference", "csrc") for shape in [(0, 5, 64), (2, 0, 64), (2, 1, 64)]]
    + [("sdpa", (0, 5, 64)), ("sdpa", (2, 1, 64))],
)
def test_empty_batches_and_single_tokens(name, shape):
    qkv = torch.randn(shape, requires_grad=True)
    out = attention(qkv, 2, 1, backend=name)
    out.sum().backward()
    assert out.shape == (*shape[:2], 32) and qkv.grad.shape == shape
    if shape[1] == 1:  # alone, a token sees itself
        torch.testing.assert_close(out, qkv[..., 48:].repeat(1, 1, 2))


@pytest.mark.parametrize("name", ["reference", "sdpa", "csrc"])
def test_non_contiguous_input(name):
    qkv = torch.randn(SEQ_LEN, BATCH, 4 * 16).transpose(0, 1)
    expected = attention(qkv.contiguous(), 2, 1, backend=name)
    torch.testing.assert_close(attention(qkv, 2, 1, backend=name), expected)


def test_auto_is_csrc_where_it_runs_and_torch_elsewhere():
    qkv, small = torch.randn(1, 20, 64), torch.randn(1, 20, 32)
    assert torch.equal(attention(qkv, 2, 1), attention(qkv, 2, 1, backend="csrc"))
    assert torch.equal(attention(small, 2, 1), attention(small, 2, 1, backend="sdpa"))
    assert torch.equal(attention(qkv.double(), 2, 1), attention(qkv.double(), 2, 1, backend="sdpa"))
    with use("reference"):
        assert torch.equal(attention(qkv, 2, 1), attention(qkv, 2, 1, backend="sdpa"))


def test_unmeasured_on_a_gpu_is_torch_for_windows_and_triton_for_documents():
    with torch._subclasses.FakeTensorMode():
        qkv, wide = (torch.empty(1, 20, 4 * h, dtype=torch.bfloat16, device="cuda") for h in (64, 192))
        borders = torch.empty(3, dtype=torch.int32, device="cuda")
        assert unmeasured(qkv, 2, 1, None) == "sdpa"  # no mask of T^2 is made for them
        assert unmeasured(qkv, 2, 1, borders) == "triton"
        assert unmeasured(wide, 2, 1, borders) == "sdpa"


def test_the_products_of_the_reference_are_counted():
    """2 FLOPs per multiply-add, T x T pairs, scores and values: what flops.py calls dense."""
    n, k, h = 3, 1, 16
    qkv = torch.randn(BATCH, SEQ_LEN, (n + 2 * k) * h, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(qkv, n, k, backend="reference").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * BATCH * n * h * SEQ_LEN**2


@pytest.mark.parametrize("heads", [(2, 1, 8), (4, 2, 8), (3, 3, 4)])  # which csrc leaves to the reference
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_registered_backward_recomputes_the_same_gradient(heads, documents, dtype):
    (n, k, h), borders = heads, DOCUMENTS[documents]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    qkv = torch.randn(BATCH, SEQ_LEN, (n + 2 * k) * h).to(dtype)
    registered = torch.ops.hyperllama.attention
    check(lambda x: [registered(x, n, k, cu_seqlens)[0]], lambda x: [textbook(x, n, k, borders)], [qkv])


@pytest.mark.parametrize("borders", [None, torch.tensor([0, 6, 9, 12], dtype=torch.int32)])
def test_opcheck_and_compile(borders):
    qkv, ops = torch.randn(2, 6, 64), torch.ops.hyperllama
    opcheck(ops.attention.default, (qkv.clone().requires_grad_(), 2, 1, borders))
    out, lse = ops.attention(qkv, 2, 1, borders)
    opcheck(ops.attention_backward.default, (torch.randn(2, 6, 32), qkv, out, lse, 2, 1, borders))
    for name in ("auto", "reference", "sdpa"):
        check_compiled(lambda x, name=name: [attention(x, 2, 1, cu_seqlens=borders, backend=name)], [qkv])


def test_backends_that_are_not_there_are_named():
    with pytest.raises(HyperLlamaError, match=r"nonsense.*available: auto, reference, sdpa, csrc, triton, sdpa_flash"):
        attention(torch.randn(1, 4, 12), 1, 1, backend="nonsense")


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("reference", "sdpa", "csrc", "sdpa_flash")])
def test_a_gpus_backend_does_not_take_tensors_of_a_cpu(name):
    with pytest.raises(HyperLlamaError, match=f"attention backend {name} needs CUDA tensors; these are on cpu"):
        attention(torch.randn(1, 4, 12), 1, 1, backend=name)


@pytest.mark.parametrize(
    ("borders", "problem"),
    [
        (torch.tensor([0.0, 4.0]), r"cu_seqlens is \(2,\) torch.float32"),
        (torch.tensor([[0, 4]]), r"cu_seqlens is \(1, 2\) torch.int64; \(documents \+ 1,\) int32 was expected"),
        (torch.empty(2, dtype=torch.int32, device="meta"), "attention: qkv is on cpu, cu_seqlens is on meta"),
    ],
)
def test_borders_of_another_kind_are_named(borders, problem):
    with pytest.raises(ValueError, match=problem):
        attention(torch.randn(1, 4, 64), 2, 1, cu_seqlens=borders)


def test_csrc_is_refused_where_it_can_not_run(monkeypatch):
    with pytest.raises(HyperLlamaError, match="attention backend csrc runs on CPU tensors; these are on meta"):
        attention(torch.empty(1, 4, 64, device="meta"), 2, 1, backend="csrc")
    monkeypatch.setattr("hyperllama.kernels.attention.library", lambda: None)
    with pytest.raises(HyperLlamaError, match=r"attention backend csrc needs a C\+\+ compiler"):
        attention(torch.randn(1, 4, 64), 2, 1, backend="csrc")


def test_shapes_that_do_not_fit_are_named():
    for shape, n, k in [((2, 3, 33), 2, 1), ((3, 32), 2, 1), ((2, 3, 56), 3, 2)]:
        with pytest.raises(ValueError, match=f"for {n} query and {k} kv heads"):
            attention(torch.randn(shape), n, k)


def test_a_run_can_name_every_backend():
    assert set(RunConfig.model_fields["attention"].annotation.__args__) == {"auto", *BACKENDS}
