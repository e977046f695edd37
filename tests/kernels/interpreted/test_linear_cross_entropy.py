"""The Triton pass over the logits against fp64: one block and several, padding masked, rows left out, wrong targets."""

from dataclasses import replace

import pytest
import torch

from hyperllama.kernels import linear_cross_entropy as module
from hyperllama.kernels.backend import INTERPRETER, check_indices, pretend
from hyperllama.kernels.linear_cross_entropy import Launch, linear_cross_entropy, softmax_gradient_reference
from tests.kernels.test_linear_cross_entropy import plain, problem
from tests.kernels.truth import DTYPES, check


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("valid", [None, 150])
def test_error_is_at_most_twice_plain_torchs(dtype, valid):
    x, weight, targets = problem(23, 16, 200, dtype)
    targets = targets.clamp(max=149)
    options = {"logit_scale": 0.5, "z_loss": 1e-3, "valid_vocab": valid}
    check(
        lambda x, w: [linear_cross_entropy(x, w, targets, loss_weight=1 / 23, **options)],
        lambda x, w: [plain(x, w, targets, 0.5, valid, 1e-3) / 23],
        [x.detach(), weight.detach()],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "valid"), [(128256, 128001), (70001, None), (128256, 32768)])
def test_rows_of_several_blocks(dtype, vocab, valid):
    """Against the reference in fp64: the last block stays in registers, the others are read again from behind."""
    assert Launch.of(4, vocab, 4).cols < vocab
    logits, targets = (3 * torch.randn(4, vocab)).to(dtype), torch.tensor([0, 32767, -100, 32766 if valid else 69999])
    options = (0.25, 0.5, valid, -100, 1e-3, True)
    losses, correct, dz = module._softmax_gradient(logits.clone(), targets, *options)
    truth_losses, truth_correct, truth = softmax_gradient_reference(logits.double(), targets, *options)
    torch.testing.assert_close(losses.double(), truth_losses, rtol=1e-6, atol=0)
    assert torch.equal(correct, truth_correct)
    error, unit = (dz.double() - truth).abs(), torch.finfo(dtype).eps
    assert (error <= unit * truth.abs() + 1e-9).all() and not dz[2].any() and not dz[:, valid or vocab :].any()


def test_more_rows_than_programs_and_the_targets_that_were_most_likely():
    assert Launch.of(40, 30, 1).programs < 40
    x, weight, targets = torch.randn(40, 8), torch.nn.functional.normalize(torch.randn(30, 8)), torch.randint(30, (40,))
    x[33], targets[5] = 100 * weight[targets[33]], -100
    losses, correct = torch.empty(40), torch.empty(40, dtype=torch.bool)
    with pretend(replace(INTERPRETER, multiprocessors=1)):
        loss = linear_cross_entropy(x, weight, targets, losses=losses, correct=correct)
    assert torch.equal(correct, (x @ weight.t()).argmax(1) == targets) and correct[33]
    expected = torch.nn.functional.cross_entropy(x @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(losses.sum(), loss)


@pytest.mark.parametrize("targets", [torch.full((4,), -100), torch.empty(0, dtype=torch.int64)])
def test_nothing_to_predict_costs_nothing(targets):
    x, weight, main_grad = torch.randn(len(targets), 8, requires_grad=True), torch.randn(16, 8), torch.zeros(16, 8)
    loss = linear_cross_entropy(x, weight, targets, main_grad=main_grad)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not main_grad.any()


@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_outside_the_vocabulary_is_left_out_and_told_when_asked(target):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    loss = linear_cross_entropy(x, weight, torch.tensor([1, target, 2]))
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, torch.tensor([1, -100, 2])))
    with pytest.raises(IndexError, match="linear_cross_entropy: a target is outside the vocabulary"):
        check_indices(x.device)
    check_indices(x.device)
