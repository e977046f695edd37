"""linear_cross_entropy: reference and C++, loss and gradients against fp64, chunked, masked, functional and accumulating."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from hyperllama.kernels import backend
from hyperllama.kernels.linear_cross_entropy import chunks, linear_cross_entropy, token_losses
from tests.kernels.truth import DTYPES, check, check_compiled


@pytest.fixture(params=["reference", "csrc"], autouse=True)
def implementation(request):
    with backend.use(request.param):
        yield request.param


def plain(x, weight, targets, scale=1.0, valid=None, z_loss=0.0):
    """Logits in the dtype of the model, the rest in fp32 (fp64): what a plain trainer does."""
    logits = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))[:, :valid] * scale
    losses = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return losses + z_loss * logits.logsumexp(-1)[targets != -100].square().sum()


def problem(n, d, vocab, dtype=torch.float32):
    x, weight, targets = torch.randn(n, d).to(dtype), torch.randn(vocab, d).to(dtype), torch.randint(vocab, (n,))
    targets[::5] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 16, 200), (2, 8, 3), (2500, 8, 50)])
def test_error_is_at_most_twice_plain_torchs(dtype, shape):
    x, weight, targets = problem(*shape, dtype)
    n = len(targets)
    options = {"logit_scale": 0.5, "z_loss": 1e-3, "chunk_bytes": 1}  # 1: three chunks of the fewest rows at n = 2500
    check(
        lambda x, w: [linear_cross_entropy(x, w, targets, loss_weight=1 / n, **options)],
        lambda x, w: [plain(x, w, targets, 0.5, None, 1e-3) / n],
        [x.detach(), weight.detach()],
    )


def test_the_papers_vocabulary_with_padding_masked():
    x, weight, targets = torch.randn(6, 32), torch.randn(128256, 32) * 0.1, torch.tensor([0, 5, -100, 128000, 77, 1])
    check(
        lambda x, w: [linear_cross_entropy(x, w, targets, valid_vocab=128001)],
        lambda x, w: [plain(x, w, targets, valid=128001)],
        [x, weight],
    )
    (dweight,) = torch.autograd.grad(
        linear_cross_entropy(x, weight.requires_grad_(), targets, valid_vocab=128001), weight
    )
    assert not dweight[128001:].any()


def test_non_contiguous_input():
    x, weight, targets = torch.randn(16, 300).t(), torch.randn(16, 50).t(), torch.randint(50, (300,))
    check(lambda x, w: [linear_cross_entropy(x, w, targets)], lambda x, w: [plain(x, w, targets)], [x, weight])


@pytest.mark.parametrize("options", [{}, {"loss_weight": 0.1, "logit_scale": 0.3, "valid_vocab": 5, "z_loss": 0.01}])
def test_fp64_gradients_are_exact(options):
    x, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.tensor([0, 4, -100, 2])
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, **options), inputs)
    dx, dweight = torch.autograd.grad(linear_cross_entropy(*inputs, targets, **options), inputs)
    main_grad = torch.zeros_like(weight)
    linear_cross_entropy(*inputs, targets, main_grad=main_grad, **options).backward()
    assert torch.equal(x.grad, dx) and torch.equal(main_grad, dweight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulating", [False, True])
@pytest.mark.parametrize("targets", [torch.full((4,), -100), torch.empty(0, dtype=torch.int64)])
def test_nothing_to_predict_costs_nothing(dtype, accumulating, targets):
    x, weight = torch.randn(len(targets), 8).to(dtype).requires_grad_(), torch.randn(16, 8).to(dtype).requires_grad_()
    main_grad = torch.zeros(16, 8) if accumulating else None
    loss = linear_cross_entropy(x, weight, targets, main_grad=main_grad)
    loss.backward()
    dweight = main_grad if accumulating else weight.grad
    assert loss == 0 and not x.grad.any() and not dweight.any()


def test_an_ignored_row_that_overflows_harms_nothing():
    x, weight, targets = problem(6, 4, 9)
    with torch.no_grad():
        x[0], weight[:] = 1e38, 10.0 * weight.sign()
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert torch.isfinite(loss) and not x.grad[0].any()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_accumulating_form_adds_the_functional_gradient_once(dtype):
    x, weight, targets = problem(30, 8, 16, dtype)
    functional_loss = linear_cross_entropy(x, weight, targets, loss_weight=0.25)
    dx, dweight = torch.autograd.grad(functional_loss, (x, weight))
    main_grad = torch.zeros(16, 8)
    loss = linear_cross_entropy(x, weight, targets, loss_weight=0.25, main_grad=main_grad)
    loss.backward(retain_graph=True)
    assert torch.equal(loss, functional_loss) and torch.equal(x.grad, dx)
    assert torch.equal(main_grad.to(dtype), dweight) and weight.grad is None
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_the_functional_form_takes_any_upstream_gradient():
    x, weight, targets = problem(30, 8, 16)
    dx, dweight = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    scaled = torch.autograd.grad(linear_cross_entropy(x, weight, targets) * 3, (x, weight))
    torch.testing.assert_close(scaled, (3 * dx, 3 * dweight))


def test_token_losses_sum_to_the_loss():
    x, weight, targets = problem(2100, 8, 16)
    losses = token_losses(x, weight, targets, chunk_bytes=1)
    assert not losses[::5].any() and not losses.requires_grad and losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), plain(x, weight, targets).detach())
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, loss_weight=2.0), 2 * losses.sum())


@pytest.mark.parametrize("training", ["functional", "accumulating", "no gradient"])
def test_losses_and_hits_of_every_token_in_named_buffers(training):
    x, weight, targets = problem(2100, 8, 16)
    losses, correct = torch.empty(2100), torch.empty(2100, dtype=torch.bool)
    main_grad = torch.zeros(16, 8) if training == "accumulating" else None
    with torch.set_grad_enabled(training != "no gradient"):
        loss = linear_cross_entropy(
            x, weight, targets, loss_weight=0.5, main_grad=main_grad, losses=losses, correct=correct, chunk_bytes=1
        )
    logits = (x @ weight.t()).detach()
    torch.testing.assert_close(losses, functional.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(correct, logits.argmax(1) == targets) and correct.any() and not losses.requires_grad
    torch.testing.assert_close(loss.detach(), losses.sum() / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_and_compile(dtype):
    x, weight, targets = problem(9, 8, 16, dtype)
    ops, options = torch.ops.hyperllama, (0.5, 1.0, 15, -100, 1e-3, 1, "pass")
    opcheck(ops.linear_cross_entropy.default, (x, weight, targets.clamp(max=14), *options))
    opcheck(ops.linear_cross_entropy_.default, (x.detach(), weight.detach(), targets, torch.zeros(16, 8), *options))
    check_compiled(lambda x, w: [linear_cross_entropy(x, w, targets)], [x.detach(), weight.detach()])


@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    x, weight = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises((IndexError, RuntimeError), match=r"out of|outside|index"):
        linear_cross_entropy(x.requires_grad_(), weight, torch.tensor([1, target, 2]))


def test_what_does_not_fit_is_named():
    x, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x \(2, 3\)"):
        linear_cross_entropy(x[:, 1:], weight, targets)
    with pytest.raises(ValueError, match=r"x is torch.float32, weight torch.bfloat16"):
        linear_cross_entropy(x, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match="int64 targets"):
        linear_cross_entropy(x, weight, targets.int())
    with pytest.raises(ValueError, match=r"main_grad is \(5, 3\) torch.float32, expected \(5, 4\)"):
        linear_cross_entropy(x, weight, targets, main_grad=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"correct is .* expected .* torch.bool"):
        linear_cross_entropy(x, weight, targets, correct=torch.zeros(2))
    with pytest.raises(ValueError, match="targets is on meta"):
        linear_cross_entropy(x, weight, targets.to("meta"))


def test_a_gpus_chunks_are_whole_tiles_of_like_size():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(128256, 576, dtype=torch.bfloat16, device="cuda")
        for count, expected in [(16384, [8192] * 2), (9000, [4608, 4392]), (100, [100]), (65536, [8192] * 8)]:
            x = torch.empty(count, 576, dtype=torch.bfloat16, device="cuda")
            assert [rows for _, rows in chunks(x, weight, None)] == expected
            assert max(expected) * 128256 * 2 <= 1 << 31
