"""The Triton kernels of merge have the reference's bits: any mix of dtypes, adversarial ties, NaN and infinity."""

import pytest
import torch

from hyperllama.kernels import merge, merge_triton
from hyperllama.kernels.backend import use

MIXES = {
    "bf16": [torch.bfloat16], "fp16": [torch.float16], "fp32": [torch.float32],
    "mixed": [torch.bfloat16, torch.float16, torch.float32],
}  # fmt: skip
DENSITIES, WEIGHTS, KEYS = [0.3, 1.0, 0.0], [0.7, -0.4, 1.3], [5, 2**63 + 11, 1]


def same(run, **tolerance):
    with use("reference"):
        expected = run()
    got = run()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks at sizes that the interpreter can do."""
    monkeypatch.setattr(merge_triton, "BLOCK", 256)
    monkeypatch.setattr(merge_triton, "LARGE_BLOCK", 512)


def tensors(mix, n=1500, step=0.02):
    generator = torch.Generator().manual_seed(0)
    base, dtypes = torch.randn(n, generator=generator) * 0.05, MIXES[mix]
    moved = [base + step * torch.randn(n, generator=generator) for _ in range(3)]
    return base.to(dtypes[0]), [x.to(dtypes[(i + 1) % len(dtypes)]) for i, x in enumerate(moved)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_up_to_the_fused_products_the_interpreter_lacks(mix, normalize):
    _, models = tensors(mix)
    same(lambda: merge.linear(models, WEIGHTS, normalize, torch.float32), rtol=1e-6, atol=1e-7)
    same(lambda: merge.linear(models[:1], [1.0], normalize))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("trim", ["all", "top", "random"])
@pytest.mark.parametrize("normalize", [False, True])
def test_task_vectors(mix, trim, normalize):
    base, models = tensors(mix)
    chosen = {} if trim == "all" else {"densities": DENSITIES} | ({"keys": KEYS} if trim == "random" else {})
    same(lambda: merge.task_arithmetic(base, models, WEIGHTS, 0.9, normalize, **chosen))
    if chosen:
        same(lambda: merge.ties(base, models, WEIGHTS, lam=0.9, normalize=normalize, **chosen))


@pytest.mark.parametrize("rescale", ["density", "norm"])
@pytest.mark.parametrize("keys", [[], KEYS])
def test_rescaling(rescale, keys):
    """The factor of "norm" comes from fp64 sums in another order."""
    base, models = tensors("mixed")
    tolerance = {"rtol": 0, "atol": 0} if rescale == "density" else {"rtol": 2e-7, "atol": 1e-9}
    same(
        lambda: merge.ties(base, models, WEIGHTS, DENSITIES, rescale=rescale, out_dtype=torch.float32, keys=keys),
        **tolerance,
    )


def selected(base, models, keep):
    """Masks of what the state of the selection keeps, and the reference's."""
    state = merge_triton.largest_triton(base, models, keep)
    for (limit, _, _, last), model, k in zip(state.tolist(), models, keep, strict=True):
        delta = model.float() - base.float()
        key, at = delta.view(torch.int32) & 0x7FFFFFFF, torch.arange(delta.numel())
        yield (key > limit) | ((key == limit) & (at <= last)), merge.largest(delta, k)


def equals(generator, n):
    return torch.tensor([1.0, -1.0, 0.5, 0.0])[torch.randint(4, (n,), generator=generator)]


ADVERSARIAL = {
    "all zero": lambda g, n: torch.zeros(n),
    "all equal": lambda g, n: torch.full((n,), -3.0),
    "few values": equals,
    "neighbours": lambda g, n: (torch.randint(3, (n,), generator=g) + 0x3F800000).to(torch.int32).view(torch.float32),
    "every exponent": lambda g, n: torch.randint(0x7F800000, (n,), generator=g).to(torch.int32).view(torch.float32),
    "subnormal": lambda g, n: torch.randint(100, (n,), generator=g).to(torch.int32).view(torch.float32),
    "infinite": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.3, float("inf"), 1.0),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("n", [1, 513, 1500])
def test_the_largest_are_exact_and_ties_go_to_the_lowest_index(kind, n):
    generator = torch.Generator().manual_seed(n)
    models = [ADVERSARIAL[kind](generator, n) for _ in range(4)]
    keep = [0, n // 3, max(1, n - 1), n]
    for kept, expected in selected(torch.zeros(n), models, keep):
        assert torch.equal(kept, expected)


def test_nan_and_infinity_stay_visible():
    base, models = tensors("fp32")
    models[0][3], models[1][700], models[2][1400] = float("nan"), float("inf"), float("-inf")
    same(lambda: merge.ties(base, models, WEIGHTS, DENSITIES))
    same(lambda: merge.task_arithmetic(base, models, WEIGHTS, densities=DENSITIES, keys=KEYS))


def test_views_and_empty_tensors():
    base, models = torch.randn(6, 40).t(), [torch.randn(6, 41)[:, 1:].t() for _ in range(2)]
    same(lambda: merge.ties(base, models, [1.0, 2.0], [0.5, 0.5]))
    empty = torch.empty(0, 4)
    same(lambda: merge.ties(empty, [empty], [1.0], [0.5]))
    same(lambda: merge.gram(None, [empty]))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("with_base", [False, True])
def test_gram(mix, with_base):
    base, models = tensors(mix)
    same(lambda: merge.gram(base if with_base else None, models), rtol=1e-12, atol=1e-12)
