"""rms_norm: the reference and the C++ kernel against fp64, under compile, at awkward shapes."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import backend
from hyperllama.kernels.rms_norm import Launch, rms_norm
from tests.kernels.truth import DTYPES, check

EPS = 1e-5
SHAPES = [(7, 576), (3, 5, 1152), (5, 3), (64, 17), (2, 0, 32), (0, 64), (33, 4096), (300, 128)]


def plain(x, weight):
    return [functional.rms_norm(x, x.shape[-1:], weight, EPS)]


def plain_add(x, residual, weight):
    stream = x + residual
    return [functional.rms_norm(stream, x.shape[-1:], weight, EPS), stream]


@pytest.mark.parametrize("name", ["reference", "csrc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_plain_torchs(name, dtype, shape):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    with backend.use(name):
        check(lambda x, w: [rms_norm(x, w, EPS)], plain, [x, weight])
        if dtype == torch.float32:  # in bf16 the sum is rounded, which fp64 truth does not do: next test
            check(lambda x, r, w: rms_norm(x, w, EPS, r), plain_add, [x, residual, weight])


@pytest.mark.parametrize("name", ["reference", "csrc"])
def test_the_norm_reads_the_rounded_sum(name):
    x, residual = torch.randn(2, 9, 576).bfloat16()
    weight = torch.randn(576).bfloat16()
    with backend.use(name):
        y, stream = rms_norm(x, weight, EPS, residual)
        assert torch.equal(stream, x + residual)
        assert torch.equal(y, rms_norm(x + residual, weight, EPS))


@pytest.mark.parametrize("name", ["reference", "csrc"])
def test_non_contiguous_and_unaligned_inputs(name):
    base = torch.randn(576, 41)
    weight = torch.randn(577)[1:]
    with backend.use(name):
        check(lambda x, w: [rms_norm(x, w, EPS)], plain, [base.t(), weight])
        check(lambda x, w: [rms_norm(x, w, EPS)], plain, [torch.randn(41, 600)[:, 3:579], weight])


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_receives_what_the_functional_form_returns(dtype):
    x, weight = torch.randn(50, 96).to(dtype), torch.randn(96).to(dtype).requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    main_grad = torch.ones(96)
    rms_norm(x.requires_grad_(), weight, EPS, main_grad=main_grad).sum().backward()
    assert torch.equal((main_grad - 1).to(dtype), weight.grad) or dtype == torch.float32
    torch.testing.assert_close(
        main_grad - 1, weight.grad.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )


def test_the_weight_gradient_has_the_same_bits_every_time():
    x, weight = torch.randn(4000, 256), torch.randn(256)
    grads = []
    for _ in range(3):
        leaf = weight.clone().requires_grad_()
        rms_norm(x, leaf, EPS).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_fp64_is_exact_arithmetic():
    x, weight = (
        torch.randn(2, 8, 33, dtype=torch.float64, requires_grad=True),
        torch.randn(33, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, x * 2), (x, weight))


@pytest.mark.parametrize("residual", [None, torch.randn(6, 40)])
def test_opcheck(residual):
    x, weight = torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    opcheck(torch.ops.hyperllama.rms_norm.default, (x, residual, weight, EPS))
    rstd = torch.rand(6)
    opcheck(torch.ops.hyperllama.rms_norm_backward.default, (x.detach(), residual, x.detach(), weight.detach(), rstd))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    x, residual, weight = (
        torch.randn(9, 64, requires_grad=True),
        torch.randn(9, 64),
        torch.randn(64, requires_grad=True),
    )

    def loss(x, residual, weight):
        y, stream = rms_norm(x, weight, EPS, residual)
        return (y * stream).sum()

    eager = torch.autograd.grad(loss(x, residual, weight), (x, weight))
    compiled = torch.autograd.grad(
        torch.compile(loss, backend=compiler, fullgraph=True)(x, residual, weight), (x, weight)
    )
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_past_two_to_the_31_elements_are_reached():
    """2^31 + a bit bf16 elements: with 32-bit offsets the last rows would be somewhere else."""
    rows, cols = 2**20 + 3, 2048
    x = torch.empty(rows, cols, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, cols).bfloat16()
    x[:-3].fill_(1.0)
    weight = torch.ones(cols, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS)[-3:], rms_norm(x[-3:].clone(), weight, EPS))


def test_launches_cover_all_rows_and_columns():
    for n_cols in (1, 576, 1152, 2048, 4096, 8192, 16384):
        for n_rows in (1, 17, 131072):
            launch = Launch.of(n_rows, n_cols, 132)
            assert launch.cols >= n_cols and launch.cols & (launch.cols - 1) == 0
            assert 1 <= launch.programs <= 264 and launch.rows * launch.cols <= max(4096, launch.cols)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(torch.randn(2, 8), torch.randn(9), EPS)
    with pytest.raises(ValueError, match="residual is"):
        rms_norm(torch.randn(2, 8), torch.randn(8), EPS, torch.randn(2, 9))
    with pytest.raises(HyperLlamaError, match="not a backend"), backend.use("cuda"):
        pass


def test_a_missing_library_is_named_when_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "library", lambda: None)
    with pytest.raises(HyperLlamaError, match="without a C\\+\\+ compiler"), backend.use("csrc"):
        rms_norm(torch.randn(2, 8), torch.randn(8), EPS)
    assert rms_norm(torch.randn(2, 8), torch.randn(8), EPS).shape == (2, 8)


def test_missing_triton_is_named_when_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(HyperLlamaError, match="Triton is not installed"), backend.use("triton"):
        rms_norm(torch.randn(2, 8), torch.randn(8), EPS)
