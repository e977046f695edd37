"""The Triton kernel of adamw against fp64 and the reference."""

import pytest
import torch

from hyperllama.kernels.adamw import LINE, adamw, adamw_reference
from tests.kernels.test_adamw import OPTIONS


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("size", "offset"), [(3000, 0), (5, 0), (1500, 3), (0, 0)])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_its_error_is_at_most_twice_the_references(dtype, size, offset, step):
    buffers = [torch.rand(size + offset)[offset:] - 0.5 for _ in range(4)]
    buffers[3].abs_()
    scalars = {"lr": torch.tensor(0.01), "step": torch.tensor(step), "clip": torch.tensor(0.7)}
    weights = None if dtype is None else torch.empty(size, dtype=dtype)
    results, before = [], [t.clone() for t in buffers]
    for kind in (torch.float64, torch.float32):
        results.append([t.to(kind, copy=True) for t in buffers])
        values = {name: t.to(kind) if t.is_floating_point() else t for name, t in scalars.items()}
        adamw_reference(*results[-1], None, **values, **OPTIONS)
    adamw(*buffers, weights, **scalars, **OPTIONS)
    for true, plain, got, old in zip(*results, buffers, before, strict=True):
        if size:  # where the reference happens to be exact, one rounding of the largest term is still allowed
            largest = max(true.abs().max(), old.abs().max(), (true - old).abs().max())
            assert (got - true).abs().max() <= 2 * max((plain - true).abs().max(), 2**-24 * largest)
    if weights is not None:
        assert torch.equal(weights, buffers[0].to(dtype))


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.999, 0.99999])
@pytest.mark.parametrize("step", [1, 7, 600, 10000, 1000000])
def test_bias_corrections_are_exact_at_every_step(beta, step):
    """m = v = 0 before: the update is the ratio of the two rests and the two corrections."""
    master, m, v = torch.zeros(3)[:, None]
    one = torch.ones(())
    adamw(
        master, one[None].clone(), m, v, None, lr=one, beta1=beta, beta2=0.0, eps=0.0, weight_decay=0.0,
        step=torch.tensor(step), clip=one,
    )  # fmt: skip
    torch.testing.assert_close(master.item(), -(1 - beta) / (1 - beta**step), rtol=4e-7, atol=0)


@pytest.mark.parametrize("size", [5, 1500])
def test_groups_are_those_of_the_reference(size):
    buffers = [torch.rand(size) - 0.5 for _ in range(4)]
    buffers[3].abs_()
    groups = torch.randint(3, (-(-size // LINE),), dtype=torch.uint8)
    scales = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.25, 0.0], [2.0, 8.0, 3.0]])
    scalars = {"lr": torch.tensor(0.01), "step": torch.tensor(3), "clip": torch.tensor(0.7)}
    expected = [t.clone() for t in buffers]
    adamw_reference(*expected, None, **scalars, **OPTIONS, groups=groups, scales=scales)
    adamw(*buffers, None, **scalars, **OPTIONS, groups=groups, scales=scales)
    for want, got in zip(expected, buffers, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_a_clip_of_zero_writes_nothing():
    buffers = [torch.rand(9), torch.full((9,), float("nan")), torch.rand(9), torch.rand(9)]
    before, weights = [t.clone() for t in buffers], torch.full((9,), 3.0, dtype=torch.bfloat16)
    adamw(*buffers, weights, lr=torch.tensor(0.1), step=torch.tensor(2), clip=torch.tensor(0.0), **OPTIONS)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(buffers, before, strict=True))
    assert (weights == 3).all()


@pytest.mark.parametrize("key", [0, 5, -(1 << 62)])
def test_stochastic_rounding_draws_as_the_reference(key):
    """The same draws; an update may differ in its last bit of fp32, and then rarely in bf16."""
    size = 3000
    buffers = [(torch.rand(size) + 1).bfloat16(), *(torch.rand(3, size) - 0.5)]
    buffers[3].abs_()
    scalars = {"lr": torch.tensor(0.01), "step": torch.tensor(1 << 21), "clip": torch.tensor(0.7)}
    expected = [t.clone() for t in buffers]
    adamw_reference(*expected, None, **scalars, **OPTIONS, rounding=key)
    adamw(*buffers, None, **scalars, **OPTIONS, rounding=key)
    assert (buffers[0] == expected[0]).float().mean() > 0.995
    torch.testing.assert_close(buffers[0], expected[0], rtol=2**-7, atol=0)
