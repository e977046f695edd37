"""Merge kernels: each against a loop over elements in fp64, and the definitions that only an edge case shows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperllama.kernels import merge

F32_ULP, BF16_ULP = 2.0**-23, 2.0**-7


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
        assert merge.largest(delta, k / 6 + 1e-9).flatten().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("density", [0.0, 0.1, 0.29, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_largest_equals_a_stable_sort(density: float, levels: int) -> None:
    delta = torch.randint(-levels, levels + 1, (997,), generator=torch.Generator().manual_seed(levels)).to(
        torch.float32
    )
    kept = loop_top(delta.numpy(), density)
    assert torch.equal(delta * merge.largest(delta, density), torch.from_numpy(kept))


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


