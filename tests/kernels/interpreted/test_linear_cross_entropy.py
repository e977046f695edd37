"""Triton's softmax, in a pass over the logits and in the epilogue of their product, against fp64.

One block and several, padding masked, rows left out, wrong targets; for the epilogue targets far from the largest logit.
"""

import math
from dataclasses import replace

import pytest
import torch

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import linear_cross_entropy as module
from hyperllama.kernels import linear_cross_entropy_epilogue as epilogue
from hyperllama.kernels.backend import INTERPRETER, check_indices, pretend, use
from hyperllama.kernels.linear_cross_entropy import (
    SOFTMAX,
    Launch,
    linear_cross_entropy,
    softmax_gradient_reference,
    token_losses,
)
from tests.kernels.test_linear_cross_entropy import plain, problem
from tests.kernels.truth import DTYPES, check


@pytest.mark.parametrize("valid", [None, 150])
@pytest.mark.parametrize(
    ("dtype", "softmax"), [*((dtype, softmax) for softmax in SOFTMAX for dtype in DTYPES), (torch.float16, "pass")]
)
def test_error_is_at_most_twice_plain_torchs(dtype, valid, softmax):
    x, weight, targets = problem(23, 16, 200, dtype)
    targets = targets.clamp(max=149)
    options = {"logit_scale": 0.5, "z_loss": 1e-3, "valid_vocab": valid, "softmax": softmax}
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


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_more_rows_than_programs_and_the_targets_that_were_most_likely(softmax):
    assert Launch.of(40, 30, 1).programs < 40
    x, weight, targets = torch.randn(40, 8), torch.nn.functional.normalize(torch.randn(30, 8)), torch.randint(30, (40,))
    x[33], targets[5] = 100 * weight[targets[33]], -100
    losses, correct = torch.empty(40), torch.empty(40, dtype=torch.bool)
    with pretend(replace(INTERPRETER, multiprocessors=1)):
        loss = linear_cross_entropy(x, weight, targets, losses=losses, correct=correct, softmax=softmax)
    assert torch.equal(correct, (x @ weight.t()).argmax(1) == targets) and correct[33]
    expected = torch.nn.functional.cross_entropy(x @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(losses.sum(), loss)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("targets", [torch.full((4,), -100), torch.empty(0, dtype=torch.int64)])
def test_nothing_to_predict_costs_nothing(targets, softmax):
    x, weight, main_grad = torch.randn(len(targets), 8, requires_grad=True), torch.randn(16, 8), torch.zeros(16, 8)
    loss = linear_cross_entropy(x, weight, targets, main_grad=main_grad, softmax=softmax)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not main_grad.any()


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_outside_the_vocabulary_is_left_out_and_told_when_asked(target, softmax):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    loss = linear_cross_entropy(x, weight, torch.tensor([1, target, 2]), softmax=softmax)
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, torch.tensor([1, -100, 2])))
    with pytest.raises(IndexError, match="linear_cross_entropy: a target is outside the vocabulary"):
        check_indices(x.device)
    check_indices(x.device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_far_from_the_largest_logit(dtype):
    """Rows that the epilogue had to bring to one k, beside rows that are sure of their target, in tiles with and without either."""
    x, weight, targets = problem(40, 48, 150, dtype)  # blocks of 32 rows, tiles of 64 columns, products of 32 and 16
    with torch.no_grad():
        x *= torch.linspace(1, 8, 40)[:, None]
    logits = (x @ weight.t()).detach().float()
    targets[1::5], targets[2::5] = logits[1::5].argmax(1), logits[2::5].argmin(1)
    far = (logits.amax(1) - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0])[targets >= 0] / math.log(2)
    assert (far > epilogue.REACH.value).sum() >= 4 and (far == 0).any()
    check(
        lambda x, w: [linear_cross_entropy(x, w, targets, softmax="epilogue")],
        lambda x, w: [plain(x, w, targets)],
        [x.detach(), weight.detach()],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_epilogue_of_several_chunks_and_groups_is_the_pass(dtype, monkeypatch):
    """Into a gradient that holds something; and the losses alone, for which no logits are kept."""
    monkeypatch.setattr(module, "LEAST_ROWS", 100)
    monkeypatch.setattr(epilogue.Launch, "of", lambda *_: epilogue.Launch(32, 64, 32, 4, 1, group=2))
    x, weight, targets = problem(170, 40, 130, dtype)
    found = []
    for softmax in SOFTMAX:
        losses, correct = torch.empty(170), torch.empty(170, dtype=torch.bool)
        main_grad, options = (
            torch.ones(130, 40),
            {"logit_scale": 0.3, "z_loss": 1e-2, "softmax": softmax, "chunk_bytes": 1},
        )
        x.grad = None
        loss = linear_cross_entropy(
            x, weight, targets, loss_weight=1 / 8, losses=losses, correct=correct, main_grad=main_grad, **options
        )
        loss.backward()
        torch.testing.assert_close(token_losses(x, weight, targets, **options), losses, rtol=0, atol=0)
        found.append((loss.detach(), losses, x.grad, main_grad, correct.float()))
    for one, other in zip(*found, strict=True):
        unit = 1e-5 if dtype == torch.float32 else 2e-2
        assert (one - other).abs().max() <= unit * other.abs().max(), dtype


def test_an_ignored_row_that_overflows_harms_nothing_in_the_epilogue():
    x, weight, targets = problem(6, 4, 9)
    with torch.no_grad():
        x[0], weight[:] = 1e38, 10.0 * weight.sign()
    loss = linear_cross_entropy(x, weight, targets, softmax="epilogue")
    loss.backward()
    assert torch.isfinite(loss) and not x.grad[0].any()
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


def test_an_epilogue_that_is_not_there_is_named():
    x, weight, targets = problem(3, 4, 7)
    with pytest.raises(HyperLlamaError, match=r"softmax='epilogue' is a Triton kernel .* x is torch.float16 on cpu"):
        linear_cross_entropy(x.half(), weight.half(), targets, softmax="epilogue")
    with use("reference"), pytest.raises(HyperLlamaError, match="for bf16 and fp32 on a GPU"):
        token_losses(x, weight, targets, softmax="epilogue")
    with pytest.raises(ValueError, match="softmax is 'online', expected one of pass, epilogue"):
        linear_cross_entropy(x, weight, targets, softmax="online")
