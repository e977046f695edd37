"""adamw: reference and C++ follow torch's own step by step, its formula in fp64; weights are the masters, rounded."""

import pytest
import torch
from torch.library import opcheck

from hyperllama.kernels import backend
from hyperllama.kernels.adamw import CHUNK, LINE, adamw, rounded_stochastically

OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=["reference", "csrc"], autouse=True)
def implementation(request):
    with backend.use(request.param):
        yield request.param


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_its_error_is_at_most_twice_the_references(implementation, offset):
    """Ten steps in fp32 against the same in fp64, from buffers that need not be aligned."""
    size = 100_003
    start = [torch.randn(size), torch.zeros(size), torch.zeros(size)]
    grads = [torch.randn(size) * 10.0 ** (i % 3 - 3) for i in range(10)]

    def steps(name, dtype):
        master, m, v = (torch.cat([torch.zeros(offset), t]).to(dtype)[offset:] for t in start)
        with backend.use(name):
            for i, grad in enumerate(grads):
                scalars = {"lr": torch.tensor(0.01), "step": torch.tensor(i + 1), "clip": torch.tensor(0.7)}
                adamw(master, grad.to(dtype), m, v, None, **OPTIONS, **scalars)
        return [t.double() for t in (master, m, v)]

    truth, plain, got = (
        steps("reference", torch.float64),
        steps("reference", torch.float32),
        steps(implementation, torch.float32),
    )
    for true, expected, value in zip(truth, plain, got, strict=True):
        assert (value - true).abs().max() <= 2 * (expected - true).abs().max()


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK + 37])
def test_it_follows_torchs(size):
    master, weights = torch.randn(size), torch.empty(size, dtype=torch.bfloat16)
    m, v, other = torch.zeros(size), torch.zeros(size), master.clone().requires_grad_()
    optimizer = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = torch.randn(size)
        scalars = {"lr": torch.tensor(0.01), "step": torch.tensor(step), "clip": torch.tensor(0.5)}
        adamw(master, grad, m, v, weights, **OPTIONS, **scalars)
        other.grad = grad * 0.5
        optimizer.step()
    torch.testing.assert_close(master, other.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(weights, master.bfloat16())


def test_fp64_equals_the_formula():
    master, grad = torch.randn(2, 50, dtype=torch.float64)
    expected = master.clone()
    (m, v), (em, ev) = torch.zeros(2, 50, dtype=torch.float64), torch.zeros(2, 50, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for t in range(1, 4):
        adamw(master, grad, m, v, None, lr=0.1 * one, step=torch.tensor(t), clip=0.7 * one, **OPTIONS)
        em, ev = 0.9 * em + 0.1 * 0.7 * grad, 0.95 * ev + 0.05 * (0.7 * grad) ** 2
        expected -= 0.1 * (em / (1 - 0.9**t) / ((ev / (1 - 0.95**t)).sqrt() + 1e-8) + 0.1 * expected)
    torch.testing.assert_close(master, expected, rtol=1e-13, atol=1e-15)


def test_a_late_step_has_exact_bias_corrections():
    """0.999^t in fp32 would be off in the fifth digit at t = 10000."""
    master, grad, m, v = torch.zeros(1), torch.ones(1), torch.zeros(1), torch.full((1,), 0.5)
    adamw(
        master, grad, m, v, None, lr=torch.tensor(1.0), beta1=0.0, beta2=0.999, eps=0.0, weight_decay=0.0,
        step=torch.tensor(1000), clip=torch.tensor(1.0),
    )  # fmt: skip
    expected = -(((0.999 * 0.5 + 0.001) / (1 - 0.999**1000)) ** -0.5)
    torch.testing.assert_close(master.item(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_clip_of_zero_leaves_every_bit(bad, step):
    size = CHUNK + 37
    buffers = [torch.randn(size), torch.randn(size), torch.rand(size), torch.randn(size).bfloat16()]
    before, grad = [t.clone() for t in buffers], torch.randn(size)
    grad[::3] = bad
    master, m, v, weights = buffers
    adamw(master, grad, m, v, weights, lr=torch.tensor(0.1), step=torch.tensor(step), clip=torch.tensor(0.0), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


def test_buffers_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one length"):
        one = torch.tensor(1)
        adamw(*(torch.zeros(n) for n in (4, 4, 4, 5)), None, lr=one.float(), step=one, clip=one.float(), **OPTIONS)


@pytest.mark.parametrize("weights", [None, torch.zeros(100, dtype=torch.bfloat16)])
def test_opcheck(weights):
    flat, scalar = [torch.rand(100) for _ in range(4)], torch.tensor(0.1)
    opcheck(
        torch.ops.hyperllama.adamw_.default, (*flat, weights, scalar, 0.9, 0.95, 1e-8, 0.1, torch.tensor(1), scalar)
    )


def test_compiled_equals_eager():
    def step(master, grad, m, v):
        scalar = torch.tensor(0.1)
        adamw(master, grad, m, v, None, lr=scalar, step=torch.tensor(3), clip=scalar, **OPTIONS)
        return master * 1

    eager = [torch.rand(100) for _ in range(4)]
    compiled = [t.clone() for t in eager]
    step(*eager)
    torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    for expected, got in zip(eager, compiled, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [5, 128, 3000, CHUNK + 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_groups_scale_the_update_eps_and_decay(size, dtype, implementation):
    """The same as plain calls, group by group, with lr, eps and decay of their own."""
    groups = torch.randint(3, (-(-size // LINE),), dtype=torch.uint8)
    scales = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.25, 0.0], [2.0, 8.0, 3.0]])
    start = [torch.randn(size), torch.randn(size), torch.zeros(size), torch.zeros(size)]
    weights = None if dtype is None else torch.zeros(size, dtype=dtype)
    scalars = {"lr": torch.tensor(0.01), "clip": torch.tensor(0.7)}
    options = {**OPTIONS, "eps": 0.1}
    whole = [t.clone() for t in start]
    for step in (1, 2):
        adamw(*whole, weights, **options, **scalars, step=torch.tensor(step), groups=groups, scales=scales)
    of_element = groups.long().repeat_interleave(LINE)[:size]
    for group, (a, b, d) in enumerate(scales.tolist()):
        part = [t[of_element == group].double() for t in start]
        for step in (1, 2):
            adamw(
                *part, None, lr=0.01 * a * torch.ones((), dtype=torch.float64), step=torch.tensor(step),
                clip=torch.tensor(0.7, dtype=torch.float64), beta1=0.9, beta2=0.95, eps=0.1 * b, weight_decay=0.1 * d / a,
            )  # fmt: skip
        for got, expected in zip(whole, part, strict=True):
            torch.testing.assert_close(got[of_element == group].double(), expected, rtol=1e-5, atol=1e-6)
    assert weights is None or torch.equal(weights, whole[0].to(dtype))


def test_a_group_of_ones_changes_no_bit():
    start = [torch.randn(1000), torch.randn(1000), torch.rand(1000), torch.rand(1000)]
    plain, grouped = ([t.clone() for t in start] for _ in range(2))
    scalars = {"lr": torch.tensor(0.01), "clip": torch.tensor(0.7), "step": torch.tensor(3)}
    adamw(*plain, None, **OPTIONS, **scalars)
    adamw(*grouped, None, **OPTIONS, **scalars, groups=torch.zeros(8, dtype=torch.uint8), scales=torch.ones(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(plain, grouped, strict=True))


@pytest.mark.parametrize("lines, columns", [(7, 3), (8, 2)])
def test_groups_that_do_not_fit_are_refused(lines, columns):
    one = torch.tensor(1)
    with pytest.raises(ValueError, match="for every 128 elements"):
        adamw(
            *(torch.zeros(1000) for _ in range(4)), None, lr=one.float(), step=one, clip=one.float(), **OPTIONS,
            groups=torch.zeros(lines, dtype=torch.uint8), scales=torch.ones(1, columns),
        )  # fmt: skip


STEPS = 400


def bf16_training(rounding, size=2000, update=2**-12):
    """STEPS updates of 2^-12 each (beta1 = 0 and a constant gradient make them so) of bf16 masters of 1, whose step is 2^-7."""
    master, one = torch.ones(size, dtype=torch.bfloat16), torch.ones(())
    m, v = torch.zeros(2, size)
    for step in range(1, STEPS + 1):
        adamw(
            master, -torch.ones(size), m, v, None, lr=update * one, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0,
            step=torch.tensor(step), clip=one, rounding=rounding,
        )  # fmt: skip
    return master


def test_stochastic_rounding_keeps_small_updates_on_average():
    """An element is a sum of STEPS draws of 2^-7 with probability 1/32: rounded to nearest, it would never move."""
    master = bf16_training(rounding=3).double()
    share = 2**-5
    deviation = 2**-7 * (STEPS * share * (1 - share)) ** 0.5
    assert abs(master.mean() - (1 + STEPS * 2**-12)) < 5 * deviation / len(master) ** 0.5
    assert 0.9 < master.std() / deviation < 1.1
    assert torch.equal(bf16_training(rounding=3).double(), master)
    assert not torch.equal(bf16_training(rounding=4).double(), master)


def test_stochastic_rounding_is_to_a_neighbour():
    values = torch.cat([torch.randn(5000) * 10.0 ** torch.randint(-20, 20, (5000,)), torch.zeros(3)])
    rounded = rounded_stochastically(values, 7, torch.arange(len(values)))
    down = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    assert ((rounded.float() == down) | (rounded.float().view(torch.int32) == down.view(torch.int32) + (1 << 16))).all()
    exact = values.bfloat16().float()
    assert torch.equal(rounded_stochastically(exact, 7, torch.arange(len(values))).float(), exact)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"master": torch.zeros(4, dtype=torch.bfloat16)}, "need the key `rounding`"),
        ({"grad": torch.zeros(4, dtype=torch.float16)}, "must be all fp32"),
        ({"rounding": 1}, "rounding is for bf16 masters"),
        ({"rounding": 1, "master": torch.zeros(4, dtype=torch.bfloat16), "weights": torch.zeros(4)}, "rounding is for"),
    ],
)
def test_dtypes_that_do_not_fit_are_refused(changes, sentence):
    buffers = {name: torch.zeros(4) for name in ("master", "grad", "m", "v")} | {"weights": None}
    scalars = {"lr": torch.tensor(0.1), "step": torch.tensor(1), "clip": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=sentence):
        adamw(**(buffers | changes), **scalars, **OPTIONS)
