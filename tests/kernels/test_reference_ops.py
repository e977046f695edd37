"""Ops that have only their reference so far: against fp64 and plain torch, functional and accumulating, opcheck, compile."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.attention import attention
from hyperllama.kernels.embedding import embedding
from hyperllama.kernels.glu import glu
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.kernels.linear import linear
from hyperllama.kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from hyperllama.kernels.rope import rope, rope_tables
from tests.kernels.truth import DTYPES, check

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def ops():
    return torch.ops.hyperllama


# ---- rope


def plain_rope(qkv, n, k, positions):
    half = qkv.shape[2] // (n + 2 * k) // 2
    cos, sin = (t.to(qkv.dtype) for t in rope_tables(64, 2 * half, 1e4))
    heads = qkv.unflatten(2, (n + 2 * k, 2 * half))
    c, s = cos[positions][:, :, None], sin[positions][:, :, None]
    a, b = heads[:, :, : n + k, :half], heads[:, :, : n + k, half:]
    return torch.cat([torch.cat([a * c - b * s, b * c + a * s], -1), heads[:, :, n + k :]], 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 3, 1, 16), (1, 1, 1, 1, 2), (3, 7, 9, 3, 64), (0, 5, 2, 2, 8)])
@pytest.mark.parametrize("documents", [False, True])
def test_rope(dtype, shape, documents):
    batch, seq_len, n, k, h = shape
    qkv = torch.randn(batch, seq_len, (n + 2 * k) * h).to(dtype)
    ids = torch.randint(64, (batch, seq_len)) if documents else None
    at = ids if documents else torch.arange(seq_len).expand(batch, seq_len)

    check(lambda qkv: [rope(qkv, *rope_tables(64, h, 1e4), ids, n, k)], lambda qkv: [plain_rope(qkv, n, k, at)], [qkv])


def test_rope_tables_round_to_bf16_as_the_papers_runs_did():
    cos, sin = rope_tables(128, 64, 1e4, dtype=torch.bfloat16)
    exact = rope_tables(128, 64, 1e4)
    assert cos.dtype == torch.float32
    assert torch.equal(cos, exact[0].bfloat16().float()) and torch.equal(sin, exact[1].bfloat16().float())


# ---- glu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 7, 64), (9, 2), (0, 6), (3, 3072)])
def test_glu(dtype, activation, shape):
    def plain(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return [ACTIVATIONS[activation](gate) * up]

    check(lambda x: [glu(x, activation)], plain, [torch.randn(shape).to(dtype)])
    wide_view = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 3:]
    check(lambda x: [glu(x, activation)], plain, [wide_view])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_gradients_are_exact_in_fp64(activation):
    x = (torch.randn(4, 12, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: glu(x, activation), (x,))


# ---- attention


def one_by_one(qkv, n, k, borders):
    """Every document, head and query on its own."""
    batch, seq_len, _width = qkv.shape
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
    return torch.stack(rows).view(batch, seq_len, -1) if rows else qkv.new_empty(batch, seq_len, n * heads.shape[-1])


def all_at_once(qkv, n, k, borders):
    """The textbook form: full score matrices, masked."""
    batch, seq_len, _ = qkv.shape
    q, keys, v = qkv.unflatten(2, (n + 2 * k, -1)).transpose(1, 2).split([n, k, k], 1)
    keys, v = (t.repeat_interleave(n // k, 1) for t in (keys, v))
    at = torch.arange(batch * seq_len)
    document = sum((at >= border).long() for border in borders).view(batch, 1, seq_len)
    seen = (document[..., None] == document[..., None, :]) & (at[:seq_len, None] >= at[:seq_len])
    scores = (q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("heads", [(3, 1, 16), (4, 2, 8), (2, 2, 32), (9, 3, 4)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(name, heads, documents, dtype):
    n, k, h = heads
    batch, seq_len = 2, 41
    borders = [0, 4, 5, 41, 50, 82] if documents else [0, 41, 82]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32) if documents else None
    qkv = torch.randn(batch, seq_len, (n + 2 * k) * h).to(dtype)
    check(
        lambda x: [attention(x, n, k, cu_seqlens=cu_seqlens, backend=name)],
        lambda x: [all_at_once(x, n, k, borders)],
        [qkv],
        exact=lambda x: [one_by_one(x, n, k, borders)],
    )


def test_attention_backends_that_are_not_there_are_named():
    for name in ("flash_attn", "xformers", "triton", "nonsense"):
        with pytest.raises(HyperLlamaError, match=f"{name}.*available: auto, reference, sdpa"):
            attention(torch.randn(1, 4, 12), 1, 1, backend=name)


# ---- linear and embedding


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_linear_accumulates_what_autograd_returns(dtype):
    x, weight = torch.randn(3, 5, 24).to(dtype).requires_grad_(), torch.randn(40, 24).to(dtype).requires_grad_()
    upstream = torch.randn(3, 5, 40).to(dtype)
    dx, dw = torch.autograd.grad(linear(x, weight), (x, weight), upstream)
    main_grad = torch.ones(40, 24, dtype=torch.promote_types(dtype, torch.float32))
    for _ in range(2):
        linear(x, weight, main_grad=main_grad).backward(upstream)
    torch.testing.assert_close(x.grad, 2 * dx)
    torch.testing.assert_close(main_grad, 1 + 2 * dw.to(main_grad.dtype))
    assert weight.grad is None


def test_embedding_accumulates_repeated_ids_in_fp32():
    ids, weight = torch.tensor([[1, 1, 3], [1, 0, 3]]), torch.randn(5, 4).bfloat16().requires_grad_()
    main_grad = torch.zeros(5, 4)
    embedding(ids, weight, main_grad=main_grad).backward(torch.full((2, 3, 4), 0.125).bfloat16())
    assert torch.equal(main_grad, torch.tensor([0.125, 0.375, 0, 0.25, 0])[:, None].expand(5, 4))
    opcheck(ops().embedding_backward_.default, (torch.zeros(5, 4), ids, torch.randn(2, 3, 4)))


# ---- head and cross-entropy


def plain_loss(x, weight, targets, scale=1.0, valid=None, z=0.0):
    logits = (x @ weight.t()) * scale
    logits = logits[:, :valid]
    kept = targets != -100
    losses = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return losses + z * logits.logsumexp(-1)[kept].square().sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 16, 200), (1, 8, 3), (2500, 8, 50)])
def test_linear_cross_entropy(dtype, shape):
    n, d, vocab = shape
    x, weight, targets = torch.randn(n, d).to(dtype), torch.randn(vocab, d).to(dtype), torch.randint(vocab, (n,))
    targets[::5] = -100
    options = {"logit_scale": 0.5, "z_loss": 1e-3}
    check(
        lambda x, w: [linear_cross_entropy(x, w, targets, loss_weight=1 / n, **options)],
        lambda x, w: (
            [
                plain_loss(
                    x.to(torch.promote_types(x.dtype, torch.float32)),
                    w.to(torch.promote_types(x.dtype, torch.float32)),
                    targets,
                    0.5,
                    None,
                    1e-3,
                )
                / n
            ]
            if dtype == torch.float32
            else [(plain_bf16(x, w, targets, 0.5, 1e-3) / n)]
        ),
        [x, weight],
    )


def plain_bf16(x, weight, targets, scale, z):
    """Logits in the dtype of the model, then fp32: what a plain trainer does."""
    logits = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32)) * scale
    losses = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return losses + z * logits.logsumexp(-1)[targets != -100].square().sum()


def test_the_papers_vocabulary_with_padding_masked():
    x, weight, targets = torch.randn(6, 32), torch.randn(128256, 32) * 0.1, torch.tensor([0, 5, -100, 128000, 77, 1])
    check(
        lambda x, w: [linear_cross_entropy(x, w, targets, valid_vocab=128001)],
        lambda x, w: [plain_loss(x, w, targets, valid=128001)],
        [x, weight],
    )


@pytest.mark.parametrize("targets", [torch.full((4,), -100), torch.empty(0, dtype=torch.int64)])
def test_nothing_to_predict_costs_nothing(targets):
    x, weight = torch.randn(len(targets), 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_the_accumulating_head_adds_the_functional_gradient_once():
    x, weight, targets = (
        torch.randn(30, 8, requires_grad=True),
        torch.randn(16, 8, requires_grad=True),
        torch.randint(16, (30,)),
    )
    functional_loss = linear_cross_entropy(x, weight, targets, loss_weight=0.25)
    dx, dw = torch.autograd.grad(functional_loss, (x, weight))
    main_grad = torch.ones(16, 8)
    loss = linear_cross_entropy(x, weight, targets, loss_weight=0.25, main_grad=main_grad)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(main_grad, 1 + dw)
    assert torch.equal(x.grad, dx) and torch.equal(loss, functional_loss)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_token_losses_sum_to_the_loss():
    x, weight, targets = torch.randn(2100, 8), torch.randn(16, 8), torch.randint(16, (2100,))
    targets[3] = -100
    losses = token_losses(x, weight, targets)
    assert losses[3] == 0
    torch.testing.assert_close(losses.sum(), plain_loss(x, weight, targets))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, loss_weight=2.0), 2 * losses.sum())


def test_head_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x \(2, 3\)"):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 4), torch.zeros(2, dtype=torch.int64))


# ---- optimizer


@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_adamw_follows_torchs(size):
    torch.manual_seed(0)
    master, weights = torch.randn(size), torch.empty(size, dtype=torch.bfloat16)
    m, v, other = torch.zeros(size), torch.zeros(size), master.clone().requires_grad_()
    optimizer = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = torch.randn(size)
        adamw(
            master,
            grad,
            m,
            v,
            weights,
            lr=torch.tensor(0.01),
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            step=torch.tensor(step),
            clip=torch.tensor(0.5),
        )
        other.grad = grad * 0.5
        optimizer.step()
    torch.testing.assert_close(master, other.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(weights, master.bfloat16())


def test_adamw_in_fp64_equals_its_formula():
    master, grad = torch.randn(2, 50, dtype=torch.float64)
    expected = master.clone()
    m, v = torch.zeros(2, 50, dtype=torch.float64)
    em, ev = m.clone(), v.clone()
    for t in range(1, 4):
        adamw(
            master,
            grad,
            m,
            v,
            None,
            lr=torch.tensor(0.1, dtype=torch.float64),
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decay=0.01,
            step=torch.tensor(t),
            clip=torch.tensor(1.0, dtype=torch.float64),
        )
        em, ev = 0.9 * em + 0.1 * grad, 0.99 * ev + 0.01 * grad**2
        expected -= 0.1 * (em / (1 - 0.9**t) / ((ev / (1 - 0.99**t)).sqrt() + 1e-8) + 0.01 * expected)
    torch.testing.assert_close(master, expected, rtol=1e-13, atol=1e-15)


def test_adamw_buffers_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one length"):
        adamw(
            *(torch.zeros(n) for n in (4, 4, 4, 5)),
            None,
            lr=torch.tensor(0.1),
            beta1=0.9,
            beta2=0.9,
            eps=1e-8,
            weight_decay=0.0,
            step=torch.tensor(1),
            clip=torch.tensor(1.0),
        )


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_grad_norm_is_exact_to_rounding(size):
    grad = torch.randn(size)
    torch.testing.assert_close(grad_norm(grad), grad.double().norm().float(), rtol=1e-7, atol=0)


# ---- what torch sees


def test_opcheck_of_every_op():
    qkv, (cos, sin) = torch.randn(2, 6, 32, requires_grad=True), rope_tables(8, 8, 1e4)
    cu_seqlens = torch.tensor([0, 6, 9, 12], dtype=torch.int32)
    opcheck(ops().rope.default, (qkv, cos, sin, None, 3, False))
    opcheck(ops().rope.default, (qkv, cos, sin, torch.randint(8, (2, 6)), 3, True))
    opcheck(ops().glu.default, (qkv, "gelu"))
    opcheck(ops().glu_backward.default, (torch.randn(2, 6, 16), qkv.detach(), "silu"))
    for borders in (None, cu_seqlens):
        for name in ("reference", "sdpa"):
            opcheck(ops().attention.default, (qkv, 2, 1, borders, name))
    x, weight, targets = (
        torch.randn(9, 8, requires_grad=True),
        torch.randn(16, 8, requires_grad=True),
        torch.randint(16, (9,)),
    )
    opcheck(ops().linear_cross_entropy.default, (x, weight, targets, 0.5, 1.0, 15, -100, 0.0))
    opcheck(
        ops().linear_cross_entropy_.default,
        (x.detach(), weight.detach(), targets, torch.zeros(16, 8), 1.0, 1.0, None, -100, 0.0),
    )
    opcheck(ops().grad_norm.default, (torch.randn(100),))
    flat, scalar = [torch.rand(100) for _ in range(4)], torch.tensor(0.1)
    opcheck(
        ops().adamw_.default,
        (*flat, torch.zeros(100, dtype=torch.bfloat16), scalar, 0.9, 0.95, 1e-8, 0.1, torch.tensor(1), scalar),
    )


def test_a_whole_block_of_ops_compiles_to_the_eager_values():
    qkv, (cos, sin) = torch.randn(2, 6, 32, requires_grad=True), rope_tables(8, 8, 1e4)
    weight, head, targets = (
        torch.randn(32, 16, requires_grad=True),
        torch.randn(11, 16, requires_grad=True),
        torch.randint(11, (12,)),
    )

    def loss(qkv, weight, head):
        out = attention(rope(qkv, cos, sin, None, 2, 1), 2, 1)
        return linear_cross_entropy(glu(linear(out, weight), "gelu").flatten(0, 1), head, targets)

    eager = torch.autograd.grad(loss(qkv, weight, head), (qkv, weight, head))
    compiled = torch.autograd.grad(
        torch.compile(loss, backend="aot_eager", fullgraph=True)(qkv, weight, head), (qkv, weight, head)
    )
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
