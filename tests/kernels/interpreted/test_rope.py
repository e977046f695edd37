"""The Triton kernel of rope against fp64."""

import pytest
import torch

from hyperllama.kernels.backend import check_indices
from hyperllama.kernels.rope import rope, rope_, rope_tables
from tests.kernels.test_rope import plain_rope
from tests.kernels.truth import DTYPES, check


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("shape", "documents"),
    [((2, 19, 9, 3, 64), True), ((2, 3, 1, 1, 2), False), ((3, 5, 3, 1, 12), False), ((0, 5, 2, 2, 8), False)],
)
def test_error_is_at_most_twice_plain_torchs(dtype, shape, documents):
    batch, seq_len, n, k, h = shape
    qkv = torch.randn(batch, seq_len, (n + 2 * k) * h).to(dtype)
    ids = torch.randint(64, (batch, seq_len)) if documents else None
    at = ids if documents else torch.arange(seq_len).expand(batch, seq_len)
    tables = rope_tables(64, h, 1e4)

    def in_place(qkv):
        return [rope_(qkv * 1, *tables, ids, n, k) * 1]

    check(lambda qkv: [rope(qkv, *tables, ids, n, k)], lambda qkv: [plain_rope(qkv, n, k, at)], [qkv])
    check(in_place, lambda qkv: [plain_rope(qkv, n, k, at)], [qkv])


def test_rounded_tables():
    """As the paper's runs had them: the kernel takes whatever the tables hold."""
    tables, qkv = rope_tables(64, 16, 1e4, dtype=torch.bfloat16), torch.randn(1, 7, 48)
    a, b, v = (
        qkv.unflatten(2, (3, 2, 8)).unbind(3)[0][:, :, :2],
        qkv.unflatten(2, (3, 2, 8))[:, :, :2, 1],
        qkv[..., 32:],
    )
    cos, sin = (t[:7, None] for t in tables)
    expected = torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(2), v], -1)
    torch.testing.assert_close(rope(qkv, *tables, None, 1, 1), expected)


def test_a_position_outside_the_tables_is_told_when_asked():
    tables = rope_tables(4, 8, 1e4)
    for wrong in (4, -1):
        qkv = torch.randn(1, 3, 24)
        out = rope(qkv, *tables, torch.tensor([[0, wrong, 1]]), 1, 1)
        assert torch.equal(out[:, 0], qkv[:, 0]) and torch.isfinite(out).all()
        with pytest.raises(IndexError, match="rope: a position is outside the tables"):
            check_indices(qkv.device)
        check_indices(qkv.device)  # told once
