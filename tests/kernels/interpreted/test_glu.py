"""The Triton kernel of glu against fp64."""

import pytest
import torch

from hyperllama.kernels.glu import glu, glu_backward
from tests.kernels.test_glu import ACTIVATIONS
from tests.kernels.truth import DTYPES, check


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 2 * 1536), (3, 2, 2 * 33), (0, 6), (1, 2 * 1100)])
def test_error_is_at_most_twice_plain_torchs(dtype, activation, shape):
    def plain(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return [ACTIVATIONS[activation](gate) * up]

    wide_view = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 3:]
    check(lambda x: [glu(x, activation)], plain, [2 * wide_view])


def test_the_exact_gelu_is_exact_in_its_tails_too():
    gate = torch.linspace(-9, 9, 20001)
    y = glu(torch.stack([gate, torch.ones_like(gate)], 1), "gelu").flatten()
    truth = gate.double() * torch.special.erfc(-gate.double() / 2**0.5) / 2
    assert ((y - truth).abs() <= 2e-7 + 2e-7 * truth.abs()).all()
    far = gate > -5
    assert ((y - truth).abs() <= 2e-6 * truth.abs())[far].all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_stay_finite_and_nan_stays_visible(activation):
    x = torch.tensor([[-1e18, 1e4, -1e4, 88.0, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    y = glu(x, activation)
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([[0.0, 2e4, 0.0, 176.0]]))
    assert torch.isfinite(x.grad).all()
    assert glu(torch.tensor([[float("nan"), 1.0, 2.0, 1.0]]), activation).isnan().tolist() == [[True, False]]


def test_the_backward_over_its_own_input():
    gate_up, dy = torch.randn(5, 24), torch.randn(5, 12)
    expected = glu_backward(dy, gate_up, "gelu")
    assert torch.equal(glu_backward(dy, gate_up, "gelu", out=gate_up), expected)
