"""rope: reference and C++, rotation by position against fp64, values untouched, tables as the models were trained with them."""

import pytest
import torch
from torch.library import opcheck

from hyperllama.kernels import backend
from hyperllama.kernels.rope import rope, rope_, rope_tables
from tests.kernels.truth import DTYPES, check, check_compiled


@pytest.fixture(params=["reference", "csrc"], autouse=True)
def implementation(request):
    with backend.use(request.param):
        yield request.param


def plain_rope(qkv, n, k, positions):
    half = qkv.shape[2] // (n + 2 * k) // 2
    cos, sin = (t.to(qkv.dtype) for t in rope_tables(64, 2 * half, 1e4))
    heads = qkv.unflatten(2, (n + 2 * k, 2 * half))
    c, s = cos[positions][:, :, None], sin[positions][:, :, None]
    a, b = heads[:, :, : n + k, :half], heads[:, :, : n + k, half:]
    return torch.cat([torch.cat([a * c - b * s, b * c + a * s], -1), heads[:, :, n + k :]], 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 9, 3, 1, 16), (1, 1, 1, 1, 2), (3, 7, 9, 3, 64), (0, 5, 2, 2, 8), (2, 0, 2, 1, 8)]
)
@pytest.mark.parametrize("documents", [False, True])
def test_error_is_at_most_twice_plain_torchs(dtype, shape, documents):
    batch, seq_len, n, k, h = shape
    qkv = torch.randn(batch, seq_len, (n + 2 * k) * h).to(dtype)
    ids = torch.randint(64, (batch, seq_len)) if documents else None
    at = ids if documents else torch.arange(seq_len).expand(batch, seq_len)
    tables = rope_tables(64, h, 1e4)
    check(lambda qkv: [rope(qkv, *tables, ids, n, k)], lambda qkv: [plain_rope(qkv, n, k, at)], [qkv])


def test_non_contiguous_input():
    qkv, tables = torch.randn(9, 2, 5 * 8).transpose(0, 1), rope_tables(64, 8, 1e4)
    at = torch.arange(9).expand(2, 9)
    check(lambda qkv: [rope(qkv, *tables, None, 3, 1)], lambda qkv: [plain_rope(qkv, 3, 1, at)], [qkv])


def test_values_pass_through_and_the_input_stays():
    qkv = torch.randn(2, 5, 4 * 8)
    before = qkv.clone()
    out = rope(qkv, *rope_tables(5, 8, 1e4), None, 2, 1)
    assert torch.equal(out[..., 24:], qkv[..., 24:]) and torch.equal(qkv, before)
    assert torch.equal(out[:, 0], qkv[:, 0])  # position 0 turns nothing


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_in_place_turns_the_buffer_and_its_gradient_where_they_lie(dtype):
    qkv, dy, tables = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 5, 32).to(dtype), rope_tables(5, 8, 1e4)
    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rope(leaf, *tables, None, 2, 1), leaf, dy)
    buffer = leaf * 1
    out = rope_(buffer, *tables, None, 2, 1)
    assert out.data_ptr() == buffer.data_ptr() and torch.equal(out, rope(qkv, *tables, None, 2, 1))
    out.backward(dy)
    assert torch.equal(leaf.grad, expected) and torch.equal(dy, expected)
    with pytest.raises(ValueError, match="not contiguous"):
        rope_(torch.randn(5, 2, 32).transpose(0, 1), *tables, None, 2, 1)


def test_scores_depend_on_the_distance_only():
    h, tables = 16, rope_tables(64, 16, 1e4, dtype=torch.float64)
    q, k = torch.randn(2, h, dtype=torch.float64)

    def score(i, j):
        rotated = rope(torch.cat([q, k, k]).view(1, 1, -1).expand(1, 2, -1), *tables, torch.tensor([[i, j]]), 1, 1)
        return rotated[0, 0, :h] @ rotated[0, 1, h : 2 * h]

    torch.testing.assert_close(score(40, 33), score(7, 0), rtol=1e-12, atol=1e-12)


def test_tables_in_fp32_bf16_and_fp64():
    cos, sin = rope_tables(128, 64, 1e4)
    rounded, exact = rope_tables(128, 64, 1e4, dtype=torch.bfloat16), rope_tables(128, 64, 1e4, dtype=torch.float64)
    assert cos.dtype == rounded[0].dtype == torch.float32 and exact[0].dtype == torch.float64
    assert torch.equal(rounded[0], cos.bfloat16().float()) and torch.equal(rounded[1], sin.bfloat16().float())
    angles = torch.arange(128.0).double()[:, None] * 1e4 ** (-torch.arange(0, 64, 2).double() / 64)
    torch.testing.assert_close(exact, (angles.cos(), angles.sin()), rtol=0, atol=1e-12)
    torch.testing.assert_close(cos.double(), exact[0], rtol=0, atol=1e-5)


def test_fp64_gradients_are_exact():
    qkv, tables = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True), rope_tables(4, 4, 1e4)
    assert torch.autograd.gradcheck(lambda x: rope(x, *tables, None, 2, 1), (qkv,))


@pytest.mark.parametrize("positions", [None, torch.randint(8, (2, 6))])
def test_opcheck_and_compile(positions):
    qkv, tables = torch.randn(2, 6, 32), rope_tables(8, 8, 1e4)
    opcheck(torch.ops.hyperllama.rope.default, (qkv.clone().requires_grad_(), *tables, positions, 3, positions is None))
    opcheck(torch.ops.hyperllama.rope_.default, (qkv.clone(), *tables, positions, 3, False))
    for op in (rope, rope_):
        check_compiled(lambda qkv, op=op: [op(qkv * 1, *tables, positions, 2, 1) * 1], [qkv])


def test_a_position_outside_the_tables_is_an_error():
    with pytest.raises(IndexError):
        rope(torch.randn(1, 3, 24), *rope_tables(4, 8, 1e4), torch.tensor([[0, 4, 1]]), 1, 1)


def test_shapes_that_do_not_fit_are_named():
    tables = rope_tables(4, 8, 1e4)
    for shape in [(2, 3, 33), (2, 5, 32), (6, 32)]:
        with pytest.raises(ValueError, match=r"rope: qkv is .*expected \(B, T <= 4, 32\)"):
            rope(torch.randn(shape), *tables, None, 2, 1)
    qkv, (cos, sin) = torch.randn(2, 3, 32), tables
    with pytest.raises(ValueError, match=r"positions are \(3,\) torch.int64, expected integers \(2, 3\)"):
        rope(qkv, cos, sin, torch.arange(3), 2, 1)
    with pytest.raises(ValueError, match=r"cos is .*bfloat16, sin .*float32; expected one shape, fp32 or fp64"):
        rope(qkv, cos.bfloat16(), sin, None, 2, 1)
    with pytest.raises(ValueError, match="rope: qkv is on cpu, cos is on meta, sin is on meta"):
        rope(qkv, cos.to("meta"), sin.to("meta"), None, 2, 1)
