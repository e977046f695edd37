"""glu: reference and C++, every activation against torch's own in fp64, packed halves, awkward widths."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from hyperllama.kernels import backend
from hyperllama.kernels.glu import glu, glu_backward
from tests.kernels.truth import DTYPES, check, check_compiled

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.fixture(params=["reference", "csrc"], autouse=True)
def implementation(request):
    with backend.use(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 7, 64), (9, 2), (0, 6), (3, 3072), (257, 4 * 33)])
def test_error_is_at_most_twice_plain_torchs(dtype, activation, shape):
    def plain(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return [ACTIVATIONS[activation](gate) * up]

    check(lambda x: [glu(x, activation)], plain, [torch.randn(shape).to(dtype)])
    wide_view = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 3:]
    check(lambda x: [glu(x, activation)], plain, [wide_view])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fp64_gradients_are_exact(activation):
    x = (torch.randn(4, 12, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: glu(x, activation), (x,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_stay_finite(activation):
    x = torch.tensor([[-1e18, 1e4, -1e4, 88.0, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    y = glu(x, activation)
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([[0.0, 2e4, 0.0, 176.0]]))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [1e-3, 3.0, 30.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_and_large_inputs(activation, scale):
    def plain(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return [ACTIVATIONS[activation](gate) * up]

    check(lambda x: [glu(x, activation)], plain, [torch.randn(40, 600) * scale])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_visible(activation):
    y = glu(torch.tensor([[float("nan"), 1.0, 2.0, 1.0, float("nan"), 1.0]]), activation)
    assert y.isnan().tolist() == [[True, True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_into_a_named_buffer_or_over_its_input(dtype):
    gate_up, dy = torch.randn(5, 24).to(dtype), torch.randn(5, 12).to(dtype)
    expected, buffer = glu_backward(dy, gate_up, "gelu"), torch.empty_like(gate_up)
    assert glu_backward(dy, gate_up, "gelu", out=buffer) is buffer and torch.equal(buffer, expected)
    glu_backward(dy, gate_up, "gelu", out=gate_up)
    assert torch.equal(gate_up, expected)
    with pytest.raises(ValueError, match=r"dy is \(5, 11\)"):
        glu_backward(dy[:, 1:], gate_up, "gelu")
    with pytest.raises(ValueError, match="must be contiguous"):
        glu_backward(dy, gate_up, "gelu", out=torch.empty(24, 5, dtype=dtype).t())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_and_compile(activation):
    gate_up = torch.randn(2, 6, 32)
    opcheck(torch.ops.hyperllama.glu.default, (gate_up.clone().requires_grad_(), activation))
    opcheck(torch.ops.hyperllama.glu_backward.default, (torch.randn(2, 6, 16), gate_up, activation))
    buffer = torch.empty_like(gate_up)
    opcheck(torch.ops.hyperllama.glu_backward_.default, (torch.randn(2, 6, 16), gate_up, activation, buffer))
    check_compiled(lambda x: [glu(x, activation)], [gate_up])


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="activation 'relu'"):
        glu(torch.randn(2, 4), "relu")
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        glu(torch.randn(2, 5), "silu")
