"""Merge kernels, reference and C++: each against a loop over elements in fp64, and the definitions that only an edge case shows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperllama.kernels import backend, merge
from hyperllama.kernels.counter import uniform

F32_ULP, BF16_ULP = 2.0**-23, 2.0**-7
BLOCK, GROUP = 1024, 64  # of csrc/groups.h
STORED = [torch.bfloat16, torch.float32, torch.float16]


@pytest.fixture(params=["reference", "csrc"], autouse=True)
def implementation(request):
    with backend.use(request.param):
        yield request.param


COMPARES = pytest.mark.parametrize("implementation", ["csrc"], indirect=True)  # a test that itself runs both: once


def both(function, *inputs, **options) -> list[Tensor]:
    """The result of the reference and that of the C++."""
    results = []
    for name in ("reference", "csrc"):
        with backend.use(name):
            results.append(function(*inputs, **options))
    return results


def assert_same_bits(function, *inputs, **options) -> None:
    expected, got = both(function, *inputs, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def models(count: int, n: int, dtypes: list[torch.dtype], step: float, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base like a trained matrix, and `count` models that moved by about `step` from it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator) * 0.02
    moved = [base + step * torch.randn(n, generator=generator) for _ in range(count)]
    return base.to(dtypes[0]), [x.to(dtypes[(i + 1) % len(dtypes)]) for i, x in enumerate(moved)]


def random_tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def loop_linear(xs: list[np.ndarray], weights: list[float], normalize: bool) -> np.ndarray:
    out = np.zeros_like(xs[0])
    for j in np.ndindex(out.shape):
        out[j] = math.fsum(w * x[j] for w, x in zip(weights, xs, strict=True)) / (
            math.fsum(weights) if normalize else 1
        )
    return out


def loop_top(delta: np.ndarray, density: float) -> np.ndarray:
    order = sorted(range(delta.size), key=lambda j: (-abs(delta[j]), j))
    kept = np.zeros_like(delta)
    for j in order[: math.floor(density * delta.size)]:
        kept[j] = delta[j]
    return kept


def loop_ties(
    base: np.ndarray,
    xs: list[np.ndarray],
    ws: list[float],
    densities: list[float],
    lam: float,
    normalize: bool,
    rescale: bool,
) -> np.ndarray:
    products = []
    for x, w, density in zip(xs, ws, densities, strict=True):
        delta = (x - base).ravel()
        kept = loop_top(delta, density)
        if rescale and np.abs(kept).sum() >= 1e-7:
            kept = kept * (np.abs(delta).sum() / np.abs(kept).sum())
        products.append(w * kept)
    out = base.astype(np.float64).ravel().copy()
    for j in range(out.size):
        vote = 1 if sum(p[j] for p in products) >= 0 else -1
        agreeing = [i for i, p in enumerate(products) if p[j] * vote > 0]
        divisor = sum(ws[i] for i in agreeing) if normalize else 1
        out[j] += lam * sum(products[i][j] for i in agreeing) / (divisor if abs(divisor) >= 1e-8 else 1)
    return out.reshape(base.shape)


def f64(tensors: list[Tensor]) -> list[np.ndarray]:
    return [tensor.to(torch.float64).numpy() for tensor in tensors]


@pytest.mark.parametrize(
    ("dtype", "ulp"), [(torch.float64, 1e-15), (torch.float32, F32_ULP), (torch.bfloat16, BF16_ULP)]
)
@pytest.mark.parametrize("normalize", [False, True])
class TestAgainstLoops:
    """One rounding to the output dtype; before it, fp32 sums of a few terms of size 1."""

    def test_linear(self, dtype: torch.dtype, ulp: float, normalize: bool) -> None:
        xs, weights = random_tensors(4, (13, 7), dtype), [0.1, 0.5, -0.3, 1.2]
        truth = loop_linear(f64(xs), weights, normalize)
        out = merge.linear(xs, weights, normalize)
        assert out.dtype == dtype
        np.testing.assert_allclose(f64([out])[0], truth, rtol=ulp, atol=4 * min(ulp, F32_ULP))

    def test_task_arithmetic(self, dtype: torch.dtype, ulp: float, normalize: bool) -> None:
        (base, *xs), weights = random_tensors(4, (13, 7), dtype), [0.9, -0.2, 0.4]
        numpy_base = f64([base])[0]
        differences = [x - numpy_base for x in f64(xs)]
        truth = numpy_base + 0.7 * loop_linear(differences, weights, normalize)
        out = merge.task_arithmetic(base, xs, weights, 0.7, normalize)
        np.testing.assert_allclose(f64([out])[0], truth, rtol=ulp, atol=8 * min(ulp, F32_ULP))

    @pytest.mark.parametrize("rescale", [False, True])
    def test_ties(self, dtype: torch.dtype, ulp: float, normalize: bool, rescale: bool) -> None:
        (base, *xs), weights, densities = random_tensors(4, (13, 7), dtype), [0.9, -0.2, 0.4], [0.2, 0.5, 1.0]
        truth = loop_ties(f64([base])[0], f64(xs), weights, densities, 0.7, normalize, rescale)
        out = merge.ties(base, xs, weights, densities, 0.7, normalize, "norm" if rescale else "none")
        np.testing.assert_allclose(f64([out])[0], truth, rtol=ulp, atol=16 * min(ulp, F32_ULP))


def test_the_result_is_the_fp32_result_rounded_once() -> None:
    base, *xs = random_tensors(4, (50, 40), torch.bfloat16)
    for out_dtype in (torch.float16, torch.bfloat16):
        exact = merge.ties(base, xs, [1, 1, 1], [0.5, 0.5, 0.5], out_dtype=torch.float32)
        assert torch.equal(merge.ties(base, xs, [1, 1, 1], [0.5, 0.5, 0.5], out_dtype=out_dtype), exact.to(out_dtype))
        exact = merge.linear(xs, [1, 1, 1], out_dtype=torch.float32)
        assert torch.equal(merge.linear(xs, [1, 1, 1], out_dtype=out_dtype), exact.to(out_dtype))


def test_sums_of_16_bit_models_do_not_lose_small_terms() -> None:
    ones = torch.ones(8, dtype=torch.bfloat16)
    out = merge.linear([ones] + [ones / 512] * 256, [1.0] * 257, normalize=False)
    assert torch.equal(out, torch.full_like(ones, 1.5))  # in bf16 every addition of 1/512 to 1 would be lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_among_equal_magnitudes_the_lowest_flat_index_is_kept(dtype: torch.dtype) -> None:
    delta = torch.tensor([[1.0, -2.0, 2.0], [2.0, -1.0, 3.0]], dtype=dtype)
    for k, kept in [
        (0, []),
        (1, [5]),
        (2, [1, 5]),
        (3, [1, 2, 5]),
        (4, [1, 2, 3, 5]),
        (5, [0, 1, 2, 3, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
    ]:
        assert merge.largest(delta, k).flatten().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("density", [0.0, 0.1, 0.29, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_largest_equals_a_stable_sort(density: float, levels: int) -> None:
    delta = torch.randint(-levels, levels + 1, (997,), generator=torch.Generator().manual_seed(levels)).to(
        torch.float32
    )
    kept = loop_top(delta.numpy(), density)
    assert torch.equal(delta * merge.largest(delta, int(density * delta.numel())), torch.from_numpy(kept))


def test_a_density_below_one_element_keeps_nothing() -> None:
    base, x = torch.zeros(9), torch.arange(9.0)
    assert torch.equal(merge.ties(base, [x], [1.0], [0.1]), base)


def test_a_vote_of_zero_is_plus() -> None:
    base = torch.zeros(1)
    assert merge.ties(base, [torch.tensor([2.0]), torch.tensor([-2.0])], [1.0, 1.0], [1.0, 1.0]).item() == 2.0


def test_unchanged_elements_do_not_dilute_the_average() -> None:
    base, moved = torch.zeros(2), torch.tensor([4.0, 0.0])
    assert torch.equal(merge.ties(base, [moved, base, base], [1.0] * 3, [1.0] * 3), moved)


def test_opposite_weights_leave_a_divisor_of_one() -> None:
    base, x = torch.zeros(1), torch.ones(1)
    assert merge.task_arithmetic(base, [x, 3 * x], [1.0, -1.0], normalize=True).item() == -2.0
    assert merge.ties(base, [x, -3 * x], [1.0, -1.0], [1.0, 1.0]).item() == 4.0  # both products are positive, 1 - 1 = 0


def test_task_arithmetic_with_a_mean_is_linear() -> None:
    base, *xs = random_tensors(5, (30,), torch.float64)
    torch.testing.assert_close(merge.task_arithmetic(base, xs, [1.0] * 4, normalize=True), merge.linear(xs, [1.0] * 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_a_non_finite_input_is_never_hidden(bad: float, density: float) -> None:
    base, x, y = random_tensors(3, (20,), torch.float32)
    x[7] = bad
    for tensors in ([x, y], [y, x]):
        assert not merge.linear(tensors, [1.0, 1.0])[7].isfinite()
        assert not merge.task_arithmetic(base, tensors, [1.0, 1.0])[7].isfinite()
        assert not merge.ties(base, tensors, [1.0, 1.0], [density, density])[7].isfinite()
    assert not merge.ties(x, [y], [1.0], [density])[7].isfinite()


def test_inputs_are_left_alone_and_may_be_views() -> None:
    base, x, y = (tensor.t() for tensor in random_tensors(3, (6, 5), torch.float32))
    before = [tensor.clone() for tensor in (base, x, y)]
    expected = merge.ties(base.contiguous(), [x.contiguous(), y.contiguous()], [1.0, 0.5], [0.5, 0.5])
    assert torch.equal(merge.ties(base, [x, y], [1.0, 0.5], [0.5, 0.5]), expected)
    merge.linear([x, y], [1.0, 0.5])
    merge.task_arithmetic(base, [x, y], [1.0, 0.5])
    assert all(torch.equal(tensor, kept) for tensor, kept in zip((base, x, y), before, strict=True))


def test_the_default_output_dtype_holds_all_inputs() -> None:
    half, brain = torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.bfloat16)
    assert merge.linear([half, brain], [1.0, 1.0]).dtype == torch.float32
    assert merge.linear([half, half], [1.0, 1.0]).dtype == torch.float16


def test_unequal_shapes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        merge.linear([torch.ones(2), torch.ones(1)], [1.0, 1.0])
    with pytest.raises(ValueError, match="one shape"):
        merge.ties(torch.ones(1), [torch.ones(2)], [1.0], [1.0])
    with pytest.raises(ValueError, match="one number per tensor"):
        merge.task_arithmetic(torch.ones(2), [torch.ones(2)], [1.0, 2.0])
    with pytest.raises(ValueError, match="one number per tensor"):
        merge.linear([], [])


def test_random_masks_are_the_hash_of_key_and_element() -> None:
    base, x = torch.zeros(5000), torch.ones(5000)
    for key in (3, 2**64 - 1):
        out = merge.task_arithmetic(base, [x], [2.0], densities=[0.3], keys=[key])
        assert torch.equal(out, torch.where(uniform(key, torch.arange(5000)) < 0.3, 2.0, 0.0))
        assert torch.equal(merge.ties(base, [x], [2.0], [0.3], normalize=False, keys=[key]), out)
        assert 0.25 < float((out > 0).double().mean()) < 0.35
    other = merge.task_arithmetic(base, [x], [2.0], densities=[0.3], keys=[4])
    assert not torch.equal(out, other)


def test_random_masks_of_one_model_do_not_depend_on_the_others() -> None:
    base, (x, y) = models(2, 3000, [torch.float32], 0.01)
    alone = merge.task_arithmetic(base, [x], [1.0], densities=[0.5], keys=[7])
    pair = merge.task_arithmetic(base, [y, x], [0.0, 1.0], densities=[0.5, 0.5], keys=[8, 7])
    assert torch.equal(alone, pair)


@pytest.mark.parametrize("keys", [(), (5,)])
def test_rescale_by_density_and_by_norm(keys: tuple[int, ...]) -> None:
    base, (x,) = models(1, 4000, [torch.float32], 0.01)
    plain, density, norm = (
        (merge.task_arithmetic(base, [x], [1.0], densities=[0.4], keys=keys, rescale=rescale) - base).double()
        for rescale in merge.RESCALE
    )
    torch.testing.assert_close(density, plain / 0.4, rtol=1e-4, atol=1e-7)
    assert float(norm.abs().sum()) == pytest.approx(float((x - base).double().abs().sum()), rel=1e-5)


def test_wrong_trims_are_refused() -> None:
    base, x = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        merge.ties(base, [x], [1.0], [1.5])
    with pytest.raises(ValueError, match="none, density, norm"):
        merge.ties(base, [x], [1.0], [0.5], rescale="L1")
    with pytest.raises(ValueError, match="one number per tensor"):
        merge.task_arithmetic(base, [x], [1.0], keys=[1])


@COMPARES
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, GROUP - 1, GROUP + 1, BLOCK - 1, BLOCK, BLOCK + 1, 70_001])
@pytest.mark.parametrize("dtypes", [*[[d] for d in STORED], STORED], ids=lambda d: "+".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("step", [2e-3, 1e-4, 0.0])  # free, mostly tied and all equal magnitudes
def test_csrc_has_the_references_bits(n: int, dtypes: list[torch.dtype], step: float) -> None:
    base, xs = models(3, n, dtypes, step)
    weights = [1.0, -0.5, 0.7]
    for out_dtype in STORED:
        assert_same_bits(merge.linear, xs, weights, True, out_dtype)
        assert_same_bits(merge.task_arithmetic, base, xs, weights, 0.7, True, out_dtype)
        for densities in ([0.5, 0.2, 0.9], [0.0, 1.0, 1e-3]):
            for keys in ([], [1, 2**63 + 5, 77]):
                options = {"densities": densities, "keys": keys, "rescale": "density"}
                assert_same_bits(merge.task_arithmetic, base, xs, weights, 0.7, False, out_dtype, **options)
                for rescale in ("none", "density"):
                    assert_same_bits(merge.ties, base, xs, weights, densities, 0.7, True, rescale, out_dtype, keys=keys)
    for keys in ([], [1, 2, 3]):  # the fp64 norms may differ in their last bits
        expected, got = both(merge.ties, base, xs, weights, [0.5] * 3, 1.0, True, "norm", torch.float32, keys=keys)
        torch.testing.assert_close(got, expected, rtol=3e-7, atol=1e-9)


def adversaries(n: int) -> dict[str, Tensor]:
    """Differences that mislead a sample, or that leave most elements inside any bracket."""
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(n, generator=generator)
    near = 1 + torch.randint(64, (n,), generator=generator) * F32_ULP  # thousands of each
    rare = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, 1 + values * 1e-3)
    return {
        "sorted": values.sort().values,
        "constant": torch.full((n,), 0.25),
        "two values": torch.where(values < 0.5, 1.0, -2.0),
        "two values, one rare": torch.where(values < 1e-4, 3.0, 1.0),
        "outliers": torch.where(values < 1e-3, 1e30, values),
        "neighbours": near,
        "half equal": rare,
        "equal in one place": torch.cat([torch.full((n // 2,), 0.5), values[n // 2 :]]),
        "subnormal": values * 1e-39,
    }


@COMPARES
@pytest.mark.parametrize("density", [1e-5, 0.01, 0.5, 0.5001, 0.99])
@pytest.mark.parametrize("name", adversaries(1))
def test_the_threshold_is_exact_whatever_the_sample_says(name: str, density: float) -> None:
    n = 100_003
    assert_same_bits(merge.ties, torch.zeros(n), [adversaries(n)[name]], [1.0], [density])


def unsampled(n: int, size: int) -> Tensor:
    """Mask of the elements that csrc/tops.h's sample of `size` does not look at."""
    strata, width = torch.arange(size), n // size
    bits = (uniform(0, strata).double() * 2**24).long()
    mask = torch.ones(n, dtype=torch.bool)
    mask[n // size * strata + n % size * strata // size + bits % width] = False
    return mask


@COMPARES
@pytest.mark.parametrize("hidden", ["far above", "far below", "inside"])
def test_a_sample_that_misses_everything_costs_time_only(hidden: str) -> None:
    n = 200_000
    sampled = ~unsampled(n, 256 + int(n ** (2 / 3) / 3))
    assert 1000 < int(sampled.sum()) < 2000
    noise = torch.rand(n)
    other = {"far above": 100 + noise, "far below": noise * 1e-6, "inside": 1 + 0.4 * noise}[hidden]
    delta = torch.where(sampled, torch.linspace(1, 2, n) if hidden != "inside" else 1 + noise * 0.4, other)
    if hidden == "inside":  # the sample's spread puts nearly all other elements between two neighbours of it
        delta = torch.where(sampled, torch.where(torch.arange(n) % 2 == 0, 1.0, 2.0), 1.5 + 0.1 * noise)
    for density in (0.3, 0.5, 0.9):
        assert_same_bits(merge.ties, torch.zeros(n), [delta], [1.0], [density])


@COMPARES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_elements_have_the_references_bits(bad: float) -> None:
    base, xs = models(3, 3000, [torch.float32], 0.01)
    for j, x in enumerate((base, *xs)):
        x[j::500] = bad
        x[7] = -bad if j % 2 else bad
    for density in (0.0, 1e-3, 0.5, 1.0):
        for keys in ([], [1, 2, 3]):
            for normalize in (False, True):
                assert_same_bits(merge.ties, base, xs, [1.0, -0.5, 2.0], [density] * 3, 1.0, normalize, keys=keys)


@pytest.mark.parametrize("rescale", ["none", "norm"])
@pytest.mark.parametrize("keys", [[], [1, 2, 3]])
def test_threads_do_not_change_a_bit(rescale: str, keys: list[int]) -> None:
    base, xs = models(3, 200_001, [torch.bfloat16], 1e-3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            merged = merge.ties(base, xs, [1.0, 2.0, 0.5], [0.5] * 3, 1.0, True, rescale, torch.float32, keys=keys)
            results.append((merged, merge.gram(base, xs) if backend._forced.get() == "csrc" else merged))
    finally:
        torch.set_num_threads(before)
    for merged, gram in results[1:]:
        assert torch.equal(gram, results[0][1])
        torch.testing.assert_close(merged, results[0][0], rtol=0, atol=0 if backend._forced.get() == "csrc" else 1e-7)


@pytest.mark.parametrize("dtype", STORED)
def test_inputs_may_start_anywhere(dtype: torch.dtype) -> None:
    base, xs = models(3, 5001, [dtype], 1e-3)
    moved = [torch.cat([x[:1], x])[1:] for x in xs]
    assert torch.equal(merge.ties(base, moved, [1.0] * 3, [0.5] * 3), merge.ties(base, xs, [1.0] * 3, [0.5] * 3))
    assert torch.equal(merge.linear([x[1:] for x in xs], [1.0] * 3), merge.linear(xs, [1.0] * 3)[1:])
    assert torch.equal(merge.linear([x[::3] for x in xs], [1.0] * 3), merge.linear(xs, [1.0] * 3)[::3])


@pytest.mark.parametrize("n", [1, 17, BLOCK + 1, 70_000])
@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float32], STORED], ids=str)
@pytest.mark.parametrize("differences", [False, True])
def test_gram_against_fp64(n: int, dtypes: list[torch.dtype], differences: bool) -> None:
    base, xs = models(4, n, dtypes, 0.01)
    wide = torch.stack([x.double() for x in xs])
    wide = wide - base.double() if differences else wide
    out = merge.gram(base if differences else None, xs)
    assert out.dtype == torch.float64
    norms = (wide @ wide.T).diagonal().sqrt()
    assert ((out - wide @ wide.T).abs() <= 2e-7 * norms[:, None] * norms).all()


def test_gram_shows_what_is_not_finite() -> None:
    xs = random_tensors(3, (50,), torch.float32)
    xs[1][3] = math.nan
    assert merge.gram(None, xs).isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ops_pass_opcheck(dtype: torch.dtype) -> None:
    base, x, y = random_tensors(3, (4, 3), dtype)
    ops = torch.ops.hyperllama
    torch.library.opcheck(ops.merge_linear.default, ([x, y], [1.0, 0.5], True, torch.float32))
    for densities, keys in (([], []), ([0.5, 0.5], []), ([0.5, 0.5], [1, -2])):
        options = ([1.0, 0.5], densities, keys, 1.0, True, "norm", torch.bfloat16)
        torch.library.opcheck(ops.merge_task_arithmetic.default, (base, [x, y], *options))
        if densities:
            torch.library.opcheck(ops.merge_ties.default, (base, [x, y], *options))
    torch.library.opcheck(ops.merge_gram.default, (base, [x, y]))
    torch.library.opcheck(ops.merge_gram.default, (None, [x, y]))
