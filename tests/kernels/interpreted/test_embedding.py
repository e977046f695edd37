"""The Triton kernels of embedding: look-up, and the gradient of ids that come once, often, and across chunks."""

import pytest
import torch

from hyperllama.kernels.backend import check_indices
from hyperllama.kernels.embedding import PIECE, embedding, embedding_backward_
from tests.kernels.truth import DTYPES


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(2, 19, 50, 96), (1, 5, 3, 33), (0, 4, 7, 8)])
def test_the_look_up(dtype, shape):
    batch, seq_len, vocab, cols = shape
    ids, weight = torch.randint(vocab, (batch, seq_len)), torch.randn(vocab, cols).to(dtype)
    assert torch.equal(embedding(ids, weight), weight[ids])


def some_ids(kind):
    if kind == "spread":
        return torch.randint(300, (1, 90))
    if kind == "one id":
        return torch.full((1, 11 * PIECE + 3), 7)  # more chunks than are joined at a time
    counts = torch.tensor(
        [1, PIECE - 1, PIECE, PIECE + 1, 1, 3 * PIECE, 2, 40]
    )  # borders of ids and chunks fall together, and don't
    ids = torch.repeat_interleave(torch.tensor([299, 3, 4, 0, 17, 18, 19, 200]), counts)
    return ids[torch.randperm(len(ids))][None]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", ["spread", "one id", "runs"])
@pytest.mark.parametrize(("dtype", "cols"), [(torch.float32, 33), (torch.bfloat16, 64)])
def test_the_gradient_is_added_once(deterministic, kind, dtype, cols):
    ids = some_ids(kind)
    dy, grad = torch.randn(*ids.shape, cols).to(dtype), torch.randn(300, cols)
    expected = grad.double().index_add_(0, ids.flatten(), dy.flatten(0, 1).double())
    embedding_backward_(grad, ids, dy, deterministic)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("deterministic", [True, False])
def test_forward_and_backward_skip_an_id_outside_the_vocabulary_and_tell_when_asked(deterministic):
    ids, weight, main_grad = torch.tensor([[1, -1, 10, 2]]), torch.randn(10, 4, requires_grad=True), torch.zeros(10, 4)
    y = embedding(ids, weight, main_grad=main_grad, deterministic=deterministic)
    y.backward(torch.ones(1, 4, 4))
    assert torch.equal(y[0, [0, 3]], weight[[1, 2]]) and not y[0, 1:3].any()
    assert main_grad.sum() == 8 and (main_grad[1:3] == 1).all()
    with pytest.raises(IndexError, match="embedding: a token id is outside the vocabulary"):
        check_indices(ids.device)


def test_the_functional_form():
    ids, weight, dy = torch.randint(9, (2, 30)), torch.randn(9, 16, requires_grad=True), torch.randn(2, 30, 16)
    (dweight,) = torch.autograd.grad(embedding(ids, weight), weight, dy)
    torch.testing.assert_close(dweight, torch.zeros(9, 16).index_add_(0, ids.flatten(), dy.flatten(0, 1)))
