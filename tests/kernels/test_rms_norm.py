"""rms_norm: the reference and the C++ kernel against fp64, under compile, at awkward shapes."""

import ctypes

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from hyperllama.kernels import backend
from hyperllama.kernels.rms_norm import Launch, rms_norm
from tests.kernels.truth import DTYPES, check, check_compiled

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
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    with backend.use(name):
        check(lambda x, w: [rms_norm(x, w, EPS)], plain, [x, weight])
        if dtype == torch.float32:  # in bf16 the sum is rounded, which fp64 truth does not do: next test
            check(lambda x, r, w: rms_norm(x, w, EPS, r), plain_add, [x, residual, weight])


@pytest.mark.parametrize("name", ["reference", "csrc"])
def test_the_norm_reads_the_rounded_sum_and_its_gradient_flows_to_both(name):
    x, residual = torch.randn(2, 9, 576).bfloat16().requires_grad_()
    weight = torch.randn(576).bfloat16()
    with backend.use(name):
        y, stream = rms_norm(x, weight, EPS, residual)
        alone = (x + residual).detach().requires_grad_()
        expected = rms_norm(alone, weight, EPS)
        assert torch.equal(stream, alone) and torch.equal(y, expected)
        dy = torch.randn(9, 576).bfloat16()
        dx, dresidual = torch.autograd.grad([y, stream], [x, residual], [dy, torch.zeros_like(dy)])
        assert torch.equal(dx, dresidual) and torch.equal(dx, torch.autograd.grad(expected, alone, dy)[0])


@pytest.mark.parametrize("name", ["reference", "csrc"])
def test_an_output_that_is_not_used_has_no_part_in_the_gradient(name):
    x, residual, weight = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8), torch.randn(8, requires_grad=True)
    with backend.use(name):
        y, stream = rms_norm(x, weight, EPS, residual)
        from_y = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
        from_stream = torch.autograd.grad(stream.sum(), (x, weight))
    expected = torch.autograd.grad(plain_add(x, residual, weight)[0].sum(), (x, weight))
    torch.testing.assert_close(from_y, expected)
    assert torch.equal(from_stream[0], torch.ones(5, 8)) and not from_stream[1].any()


@pytest.mark.parametrize("name", ["reference", "csrc"])
def test_a_single_column(name):
    """y = w x / sqrt(x^2 + eps): all but the sign of x cancels, so the error is measured against what cancels."""
    x, weight, dy = torch.randn(100, 1), torch.randn(1), torch.randn(100, 1)
    true = x.double().requires_grad_()
    (true * weight * (true.square() + EPS).rsqrt()).backward(dy.double())
    with backend.use(name):
        y = rms_norm(x.requires_grad_(), weight, EPS)
        y.backward(dy)
    torch.testing.assert_close(y, weight * x * (x.square() + EPS).rsqrt())
    cancels = (dy * weight / x).abs().double()
    assert ((x.grad - true.grad).abs() <= 4 * torch.finfo(torch.float32).eps * cancels).all()


@pytest.mark.parametrize("name", ["reference", "csrc"])
def test_non_contiguous_and_unaligned_inputs(name):
    base = torch.randn(576, 41)
    weight = torch.randn(577)[1:]
    with backend.use(name):
        check(lambda x, w: [rms_norm(x, w, EPS)], plain, [base.t(), weight])
        check(lambda x, w: [rms_norm(x, w, EPS)], plain, [torch.randn(41, 600)[:, 3:579], weight])


@pytest.mark.parametrize("name", ["reference", "csrc"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_receives_what_the_functional_form_returns(name, dtype):
    x, weight = torch.randn(50, 96).to(dtype).requires_grad_(), torch.randn(96).to(dtype).requires_grad_()
    main_grad = torch.zeros(96)
    with backend.use(name):
        dx, dweight = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), (x, weight))
        rms_norm(x, weight, EPS, main_grad=main_grad).sum().backward()
    assert torch.equal(x.grad, dx) and weight.grad is None
    assert torch.equal(main_grad.to(dtype), dweight)
    kept = main_grad.clone()
    with backend.use(name):
        rms_norm(x, weight, EPS, main_grad=main_grad).sum().backward()
    assert torch.equal(main_grad, 2 * kept)


def test_the_weight_gradient_has_the_same_bits_every_time():
    x, weight = torch.randn(4000, 256), torch.randn(256)
    grads = []
    for _ in range(3):
        leaf = weight.clone().requires_grad_()
        rms_norm(x, leaf, EPS).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_one_thread_and_many_give_the_same_rows():
    x, weight = torch.randn(4000, 64, requires_grad=True), torch.randn(64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y = rms_norm(x, weight, EPS)
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_fp64_is_exact_arithmetic():
    x, weight = torch.randn(2, 8, 33).double().requires_grad_(), torch.randn(33).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, x * 2), (x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_opcheck(dtype, add):
    x, weight = torch.randn(6, 40).to(dtype).requires_grad_(), torch.randn(40).to(dtype).requires_grad_()
    residual = torch.randn(6, 40).to(dtype) if add else None
    opcheck(torch.ops.hyperllama.rms_norm.default, (x, residual, weight, EPS))
    saved = (x.detach(), weight.detach(), torch.rand(6))
    opcheck(torch.ops.hyperllama.rms_norm_backward.default, (x.detach(), residual, *saved))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    inputs = [torch.randn(9, 64), torch.randn(9, 64), torch.randn(64)]
    check_compiled(lambda x, r, w: rms_norm(x, w, EPS, r), inputs, compiler)
    check_compiled(lambda x, r, w: [rms_norm(x, w, EPS), rms_norm(x, w, EPS, r)[0]], inputs, "aot_eager")


def test_rows_past_two_to_the_31_elements_are_reached():
    """C++, 2^31 + a bit bf16 elements: with 32-bit offsets the last rows would be somewhere else. In place: 4 GiB."""
    rows, cols = 2**20 + 3, 2048
    x, weight = torch.ones(rows, cols, dtype=torch.bfloat16), torch.ones(cols, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, cols).bfloat16()
    expected = rms_norm(x[-3:].clone(), weight, EPS)
    rstd, (px, pw) = torch.empty(rows), map(backend.pointer, (x, weight))
    forward = backend.library().hyperllama_rms_norm_forward
    n_rows, n_cols = ctypes.c_int64(rows), ctypes.c_int64(cols)
    forward(1, px, None, pw, px, None, backend.pointer(rstd), n_rows, n_cols, ctypes.c_float(EPS), 2)
    assert torch.equal(x[-3:], expected)


def test_launches_cover_all_rows_and_columns():
    for n_cols in (1, 576, 1152, 2048, 4096, 8192, 16384):
        for n_rows in (1, 17, 131072):
            launch = Launch.of(n_rows, n_cols, 132)
            assert launch.cols >= n_cols and launch.cols & (launch.cols - 1) == 0
            assert 1 <= launch.programs <= 3 * 132 and launch.rows * launch.cols <= max(4096, launch.cols)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(torch.randn(2, 8), torch.randn(9), EPS)
    with pytest.raises(ValueError, match="residual is"):
        rms_norm(torch.randn(2, 8), torch.randn(8), EPS, torch.randn(2, 9))
