"""embedding: torch's look-up, with the gradient returned or accumulated, repeated tokens included."""

import pytest
import torch
from torch.library import opcheck

from hyperllama.kernels.backend import use
from hyperllama.kernels.embedding import embedding, embedding_backward_
from tests.kernels.truth import DTYPES, check_compiled

IDS = torch.tensor([[0, 1, 1], [9, 0, 1]])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_it_accumulates_repeated_tokens_in_fp32(dtype):
    weight = torch.randn(10, 4).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, 4).to(dtype)
    main_grad = torch.ones(10, 4, dtype=torch.promote_types(dtype, torch.float32))
    y = embedding(IDS, weight, main_grad=main_grad)
    assert torch.equal(y, weight[IDS])
    y.backward(dy)
    onehot = torch.nn.functional.one_hot(IDS, 10).double().flatten(0, 1)
    expected = 1 + onehot.t() @ dy.double().flatten(0, 1)
    torch.testing.assert_close(main_grad, expected.to(main_grad.dtype), rtol=1e-6, atol=1e-6)
    assert weight.grad is None


def test_the_functional_form_returns_the_gradient():
    weight = torch.randn(10, 4, requires_grad=True)
    dy, main_grad = torch.randn(2, 3, 4), torch.zeros(10, 4)
    (dweight,) = torch.autograd.grad(embedding(IDS, weight), weight, dy)
    embedding(IDS, weight, main_grad=main_grad).backward(dy)
    torch.testing.assert_close(main_grad, dweight)


def test_the_gradient_has_the_same_bits_every_time():
    ids, dy = torch.randint(5, (4, 500)), torch.randn(4, 500, 16)
    grads = []
    for _ in range(3):
        grads.append(torch.zeros(5, 16))
        embedding(ids, torch.randn(5, 16, requires_grad=True), main_grad=grads[-1]).backward(dy)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("shape", [(7, 1), (300, 17), (50, 576), (1, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_csrc_adds_in_the_order_of_the_reference(shape, dtype, number_of_threads):
    (vocab, cols), count = shape, 400
    ids, dy = torch.randint(vocab, (1, count)), torch.randn(1, count, cols + 1).to(dtype)[..., 1:]
    start, results = torch.randn(vocab * cols + 1)[1:].view(vocab, cols), []  # unaligned
    for backend, threads in (("reference", 1), ("csrc", 1), ("csrc", 2), ("csrc", 3)):
        number_of_threads(threads)
        results.append(start.clone())
        with use(backend):
            embedding_backward_(results[-1], ids, dy)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("wrong", [-1, 10])
def test_an_id_outside_the_vocabulary_is_named_and_nothing_is_written(wrong):
    grad = torch.zeros(10, 4)
    with pytest.raises(IndexError, match="outside the vocabulary of 10 tokens"), use("csrc"):
        embedding_backward_(grad, torch.tensor([[1, wrong]]), torch.ones(1, 2, 4))
    assert not grad.any()


def test_no_tokens_no_gradient():
    main_grad = torch.zeros(10, 4)
    empty = embedding(torch.empty(2, 0, dtype=torch.int64), torch.randn(10, 4, requires_grad=True), main_grad=main_grad)
    empty.sum().backward()
    assert empty.shape == (2, 0, 4) and not main_grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_and_compile(dtype):
    opcheck(torch.ops.hyperllama.embedding_backward_.default, (torch.zeros(10, 4), IDS, torch.randn(2, 3, 4).to(dtype)))
    check_compiled(lambda w: [embedding(IDS, w)], [torch.randn(10, 4).to(dtype)])
