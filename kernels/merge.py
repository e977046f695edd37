"""Merging: one tensor of N models, and of their common base b for task-vector methods, becomes one tensor.

                                                  with normalize, the sum is divided by
    linear            sum_i w_i x_i               sum_i w_i
    task_arithmetic   b + lam * sum_i w_i d_i     sum_i w_i                where d_i = x_i - b
    ties              b + lam * sum_agree P_i     sum_agree w_i            where P_i = w_i s_i top_i(d_i)

    top_i keeps the floor(density_i * n) elements of d_i that are largest in magnitude, over the whole tensor of n
        elements; among equal magnitudes the lowest flat index first. floor(...) = 0 keeps nothing: the model adds 0.
    s_i is |d_i|_1 / |top_i(d_i)|_1 with rescale (1 when either norm is below 1e-7), else 1.
    agree: element by element, models whose sign(P_i) is the vote, +1 if sum_i P_i >= 0 else -1; P_i = 0 never is.
    A divisor below 1e-8 in magnitude counts as 1 in task vectors (no model agrees: the base stays), not in linear.

Tensors share one shape; their dtypes are free. Arithmetic is fp32 (fp64 when any input is fp64), rounded once, to the
output dtype. A non-finite input element makes the output element non-finite, also where TIES would have dropped it.
Sources: Wortsman et al. 2022 (linear), Ilharco et al. 2023 (task arithmetic), Yadav et al. 2023 (TIES); edge cases are
mergekit's, except that there the order among equal magnitudes is unspecified. Reference only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperllama.kernels.backend import define

SMALLEST_DIVISOR = 1e-8
SMALLEST_NORM = 1e-7


def _arithmetic_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of `dtypes`: the output dtype when none is asked for."""
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common


def _check(tensors: Sequence[Tensor], *columns: Sequence[float]) -> None:
    if not tensors or any(len(column) != len(tensors) for column in columns):
        raise ValueError(f"expected one number per tensor, got {len(tensors)} and {[len(c) for c in columns]}")
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(f"tensors to merge must have one shape, got {[tuple(tensor.shape) for tensor in tensors]}")


def _task_divisor(weights: Sequence[float]) -> float:
    total = sum(weights)
    return total if abs(total) >= SMALLEST_DIVISOR else 1.0


def linear_reference(
    tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """Weighted sum or mean, in plain torch."""
    total = torch.zeros(tensors[0].shape, dtype=_arithmetic_dtype(tensors), device=tensors[0].device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    if normalize:
        total /= sum(weights)
    return total.to(out_dtype)


def task_arithmetic_reference(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    lam: float,
    normalize: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Base plus the weighted sum or mean of the differences to it, in plain torch."""
    base = base.to(_arithmetic_dtype([base, *tensors]))
    total = torch.zeros_like(base)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor - base, alpha=weight)
    if normalize:
        total /= _task_divisor(weights)
    return total.mul_(lam).add_(base).to(out_dtype)


def largest(delta: Tensor, density: float) -> Tensor:
    """Mask of the floor(density * n) elements largest in magnitude, ties by lowest flat index; NaN is always kept."""
    n = delta.numel()
    k = int(density * n)
    if k == 0:
        return delta.isnan()
    magnitude = delta.abs().flatten()
    threshold = torch.kthvalue(magnitude, n - k + 1).values
    above, tied = magnitude > threshold, magnitude == threshold
    room = k - above.sum()
    first_tied = tied & (tied.cumsum(0) <= room)
    return (above | first_tied | magnitude.isnan()).view_as(delta)


def _rescale(delta: Tensor, kept: Tensor) -> Tensor:
    """The factor that gives `kept` the L1 norm of `delta`; 1 when either norm is next to nothing."""
    before, after = delta.abs().sum(), kept.abs().sum()
    small = (before < SMALLEST_NORM) | (after < SMALLEST_NORM)
    return torch.where(small, torch.ones_like(before), before / after.clamp(min=SMALLEST_NORM))


def ties_reference(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    lam: float,
    normalize: bool,
    rescale: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Trim, elect sign, merge, in plain torch.

    Two passes over the models, and only a mask per model is kept between them.
    """
    base = base.to(_arithmetic_dtype([base, *tensors]))
    masks: list[Tensor] = []
    scales: list[Tensor | float] = []
    elected = torch.zeros_like(base)
    for tensor, weight, density in zip(tensors, weights, densities, strict=True):
        delta = tensor - base
        masks.append(largest(delta, density))
        kept = delta * masks[-1]
        scales.append(_rescale(delta, kept) * weight if rescale else weight)
        elected += kept * scales[-1]
    elected = torch.where(elected >= 0, 1.0, -1.0).to(base.dtype)
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for tensor, weight, mask, scale in zip(tensors, weights, masks, scales, strict=True):
        product = (tensor - base) * mask * scale
        agrees = product.sign() == elected
        total += product * agrees  # a product and not a where: NaN and infinity stay visible
        divisor.add_(agrees, alpha=weight)
    if normalize:
        total /= torch.where(divisor.abs() < SMALLEST_DIVISOR, 1.0, divisor)
    return total.mul_(lam).add_(base).to(out_dtype)


def _like(first: Tensor, dtype: torch.dtype) -> Tensor:
    return first.new_empty(first.shape, dtype=dtype)


_linear = define(
    "merge_linear(Tensor[] tensors, float[] weights, bool normalize, ScalarType out_dtype) -> Tensor",
    linear_reference,
    lambda tensors, weights, normalize, out_dtype: _like(tensors[0], out_dtype),
)
_task_arithmetic = define(
    "merge_task_arithmetic(Tensor base, Tensor[] tensors, float[] weights, float lam, bool normalize, "
    "ScalarType out_dtype) -> Tensor",
    task_arithmetic_reference,
    lambda base, tensors, weights, lam, normalize, out_dtype: _like(base, out_dtype),
)
_ties = define(
    "merge_ties(Tensor base, Tensor[] tensors, float[] weights, float[] densities, float lam, bool normalize, bool rescale, "
    "ScalarType out_dtype) -> Tensor",
    ties_reference,
    lambda base, tensors, weights, densities, lam, normalize, rescale, out_dtype: _like(base, out_dtype),
)


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Weighted sum of tensors of one shape, divided by the sum of the weights with `normalize`.

    `out_dtype` defaults to the common dtype of the inputs. Raises ValueError for unequal shapes or lengths.
    Source: Wortsman et al. 2022, "Model soups".
    """
    _check(tensors, weights)
    out_dtype = out_dtype or common_dtype([t.dtype for t in tensors])
    return _linear(tensors, weights, normalize, out_dtype)


def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    lam: float = 1.0,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`base` plus `lam` times the weighted sum (mean with `normalize`) of the differences to it.

    `out_dtype` defaults to the common dtype of the inputs. Raises ValueError for unequal shapes or lengths.
    Source: Ilharco et al. 2023, "Editing models with task arithmetic".
    """
    _check([*tensors, base], [*weights, 0.0])
    out_dtype = out_dtype or common_dtype([base.dtype, *(t.dtype for t in tensors)])
    return _task_arithmetic(base, tensors, weights, lam, normalize, out_dtype)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    lam: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`base` plus `lam` times the trimmed, sign-elected, averaged differences to it; formula at the top of the file.

    `densities` in [0, 1]; `out_dtype` defaults to the common dtype of the inputs.
    Raises ValueError for unequal shapes or lengths.
    Source: Yadav et al. 2023, "TIES-merging".
    """
    _check([*tensors, base], [*weights, 0.0], [*densities, 0.0])
    out_dtype = out_dtype or common_dtype([base.dtype, *(t.dtype for t in tensors)])
    return _ties(base, tensors, weights, densities, lam, normalize, rescale, out_dtype)
