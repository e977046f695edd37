"""Merging: one tensor of N models, and of their common base b for task-vector methods, becomes one tensor.

                                                  with normalize, the sum is divided by
    linear            sum_i w_i x_i               sum_i w_i
    task_arithmetic   b + lam * sum_i P_i         sum_i w_i                where P_i = w_i s_i kept_i(d_i), d_i = x_i - b
    ties              b + lam * sum_agree P_i     sum_agree w_i
    gram              <d_i, d_j> for all i, j     d_i = x_i without a base

    kept_i by magnitude keeps the floor(density_i * n) elements of d_i that are largest in magnitude, over the whole tensor
        of n elements; among equal magnitudes the lowest flat index first. floor(...) = 0 keeps nothing: the model adds 0.
    kept_i at random keeps element j if uniform(key_i, j) < density_i (counter.py): no draw depends on another tensor,
        on the order of the models or on the device. Without densities (task_arithmetic) everything is kept.
    s_i with rescale "density" is 1 / density_i (1 where that is 0), which keeps the expected sum; with "norm" it is
        |d_i|_1 / |kept_i(d_i)|_1 (1 when either is below 1e-7), from fp64 sums; with "none" it is 1.
    agree: element by element, models whose sign(P_i) is the vote, +1 if sum_i P_i >= 0 else -1; P_i = 0 never is.
    A divisor below 1e-8 in magnitude counts as 1 in task vectors (no model agrees: the base stays), not in linear.

Tensors share one shape; their dtypes are free. Arithmetic is fp32 (fp64 when any input is fp64) in the order written, models
one after another (linear's by fused multiply-add, as mergekit's), rounded once, to the output dtype; gram is fp64 from the
differences on (C++: from chains of 16 fp32 products on, 2e-8 of the norms off). A non-finite input element makes the output
element non-finite, also where it was not kept.
Sources: Wortsman et al. 2022 (linear), Ilharco et al. 2023 (task arithmetic), Yadav et al. 2023 (TIES), Yu et al. 2024, "Language
models are super Mario" (DARE: kept at random, rescale "density"); edge cases and rescale "norm" are mergekit's, except that
there the order among equal magnitudes is unspecified. C++ and Triton (merge_triton.py) take fp32, bf16, fp16 in any mix,
bit for bit the reference but for the last bits of the fp64 sums.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels.backend import choose, define, pointer, same_device
from hyperllama.kernels.counter import signed, uniform
from hyperllama.kernels.merge_triton import gram_triton, linear_triton, task_vectors_triton
from hyperllama.kernels.raw import RESCALE, SMALLEST_DIVISOR, Calls, Raw, Target, task_divisor

SMALLEST_L1 = 1e-7
CSRC_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 18  # elements of each tensor that the reference of gram widens at a time


def arithmetic_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that a merge of these tensors is computed in."""
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
    same_device("merge", **{f"tensor {i}": tensor for i, tensor in enumerate(tensors)})


def _check_trim(tensors: Sequence[Tensor], densities: Sequence[float], keys: Sequence[int], rescale: str) -> None:
    if densities:
        _check(tensors, densities)
    if keys:
        _check(tensors, densities, keys)
    if not all(0 <= density <= 1 for density in densities):
        raise ValueError(f"densities must be between 0 and 1, got {list(densities)}")
    if rescale not in RESCALE:
        raise ValueError(f"rescale is {rescale!r}, one of {', '.join(RESCALE)} was expected")


def linear_reference(
    tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """Weighted sum or mean, in plain torch."""
    total = torch.zeros(tensors[0].shape, dtype=arithmetic_dtype(tensors), device=tensors[0].device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    if normalize:
        total /= sum(weights)
    return total.to(out_dtype)


def largest(delta: Tensor, k: int) -> Tensor:
    """Mask of the `k` elements largest in magnitude, ties by lowest flat index; NaN is always kept."""
    n = delta.numel()
    if k == 0:
        return delta.isnan()
    magnitude = delta.abs().flatten()
    threshold = torch.kthvalue(magnitude, n - k + 1).values
    above, tied = (magnitude > threshold) | magnitude.isnan(), magnitude == threshold
    first_tied = tied & (tied.cumsum(0) <= k - above.sum())
    return (above | first_tied).view_as(delta)


def random_mask(shape: torch.Size, density: float, key: int, device: torch.device) -> Tensor:
    """Mask that keeps every element with probability `density`, by the hash of (key, flat index)."""
    return (uniform(key, torch.arange(shape.numel(), device=device)) < density).view(shape)


def rescaling(delta: Tensor, kept: Tensor) -> Tensor:
    """The fp64 factor that gives `kept` the L1 norm of `delta`; 1 when either norm is next to nothing."""
    before, after = delta.abs().sum(dtype=torch.float64), kept.abs().sum(dtype=torch.float64)
    small = (before < SMALLEST_L1) | (after < SMALLEST_L1)
    return torch.where(small, torch.ones_like(before), before / after.clamp(min=SMALLEST_L1))


def _trim(
    delta: Tensor, index: int, densities: Sequence[float], keys: Sequence[int], rescale: str
) -> tuple[Tensor, float | Tensor]:
    """Mask of model number `index`, and the scale of what it keeps."""
    if not densities:
        return torch.ones((), dtype=torch.bool, device=delta.device), 1.0
    density = densities[index]
    mask = (
        random_mask(delta.shape, density, keys[index], delta.device)
        if keys
        else largest(delta, int(density * delta.numel()))
    )
    if rescale == "norm":
        return mask, rescaling(delta, delta * mask)
    return mask, 1 / density if rescale == "density" and density > 0 else 1.0


def _product(delta: Tensor, mask: Tensor, scale: float | Tensor) -> Tensor:
    """delta * scale where kept; a product and not a where on delta: NaN and infinity stay visible."""
    scale = torch.as_tensor(scale, dtype=delta.dtype, device=delta.device)
    return delta * torch.where(mask, scale, torch.zeros_like(scale))


def task_arithmetic_reference(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    keys: Sequence[int],
    lam: float,
    normalize: bool,
    rescale: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Base plus the weighted sum or mean of the trimmed differences to it, in plain torch."""
    base = base.to(arithmetic_dtype([base, *tensors]))
    total = torch.zeros_like(base)
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        delta = tensor - base
        mask, scale = _trim(delta, i, densities, keys, rescale)
        total += _product(delta, mask, scale * weight)
    if normalize:
        total /= task_divisor(weights)
    return total.mul_(lam).add_(base).to(out_dtype)


def ties_reference(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    keys: Sequence[int],
    lam: float,
    normalize: bool,
    rescale: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Trim, elect sign, merge, in plain torch.

    Two passes over the models, and only a mask per model is kept between them.
    """
    base = base.to(arithmetic_dtype([base, *tensors]))
    masks: list[Tensor] = []
    scales: list[Tensor | float] = []
    elected = torch.zeros_like(base)
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        delta = tensor - base
        mask, scale = _trim(delta, i, densities, keys, rescale)
        masks.append(mask)
        scales.append(scale * weight)
        elected += _product(delta, mask, scales[-1])
    elected = torch.where(elected >= 0, 1.0, -1.0).to(base.dtype)
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for tensor, weight, mask, scale in zip(tensors, weights, masks, scales, strict=True):
        product = _product(tensor - base, mask, scale)
        agrees = product.sign() == elected
        total += product * agrees
        divisor.add_(agrees, alpha=weight)
    if normalize:
        total /= torch.where(divisor.abs() < SMALLEST_DIVISOR, 1.0, divisor)
    return total.mul_(lam).add_(base).to(out_dtype)


def gram_reference(base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs in plain torch, chunk by chunk."""
    dtype = arithmetic_dtype([*tensors, *([] if base is None else [base])])
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64, device=tensors[0].device)
    flat = [tensor.flatten() for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        part = slice(start, start + CHUNK)
        deltas = torch.stack([tensor[part].to(dtype) for tensor in flat])
        if base is not None:
            deltas -= base.flatten()[part]
        wide = deltas.to(torch.float64)
        total += wide @ wide.T
    return total


def _raw(tensors: Sequence[Tensor]) -> list[Raw]:
    return [Raw(t.data_ptr(), str(t.dtype).removeprefix("torch."), t.numel()) for t in tensors]


def _merge_csrc(
    base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    keys: Sequence[int], lam: float, normalize: bool, rescale: str, out_dtype: torch.dtype, elect: bool, divisor: float,
) -> Tensor:  # fmt: skip
    held = [tensor.contiguous() for tensor in (*tensors, *([] if base is None else [base]))]
    raw, out = _raw(held), torch.empty(tensors[0].shape, dtype=out_dtype)
    Calls(None if base is None else raw[-1], raw[: len(tensors)]).merge(
        Target(data=out.data_ptr()), str(out_dtype).removeprefix("torch."), weights=weights, divisor=divisor,
        densities=densities, keys=keys, lam=lam, normalize=normalize, rescale=rescale, elect=elect,
    )  # fmt: skip
    return out


def _linear_csrc(
    tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    divisor = sum(weights) if normalize else 1.0
    return _merge_csrc(None, tensors, weights, [], [], 1.0, normalize, "none", out_dtype, False, divisor)


def _task_arithmetic_csrc(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], keys: Sequence[int],
    lam: float, normalize: bool, rescale: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    divisor = task_divisor(weights) if normalize else 1.0
    return _merge_csrc(base, tensors, weights, densities, keys, lam, normalize, rescale, out_dtype, False, divisor)


def _ties_csrc(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], keys: Sequence[int],
    lam: float, normalize: bool, rescale: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _merge_csrc(base, tensors, weights, densities, keys, lam, normalize, rescale, out_dtype, True, 1.0)


def _gram_csrc(base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    held = [tensor.contiguous() for tensor in (*tensors, *([] if base is None else [base]))]
    raw, out = _raw(held), torch.empty(len(tensors), len(tensors), dtype=torch.float64)
    Calls(None if base is None else raw[-1], raw[: len(tensors)]).gram(pointer(out))
    return out


def _task_arithmetic_triton(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *options: Any) -> Tensor:
    divisor = task_divisor(weights)
    return task_vectors_triton(base, tensors, weights, *options, elect=False, divisor=divisor)


def _ties_triton(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *options: Any) -> Tensor:
    return task_vectors_triton(base, tensors, weights, *options, elect=True, divisor=1.0)


def _launcher(reference: Any, csrc_kernel: Any, triton_kernel: Any) -> Any:
    """Runs a kernel where it takes all of the dtypes, else `reference`."""

    def launch(*inputs: Any) -> Any:
        tensors = [t for x in inputs for t in (x if isinstance(x, Sequence) else [x]) if isinstance(t, Tensor)]
        dtypes = {tensor.dtype for tensor in tensors} | {x for x in inputs if isinstance(x, torch.dtype)}
        fits = dtypes <= set(CSRC_DTYPES)
        implementations = {"reference": reference} | ({"csrc": csrc_kernel, "triton": triton_kernel} if fits else {})
        return choose(implementations, tensors[0], CSRC_DTYPES)(*inputs)

    return launch


def _like(first: Tensor, dtype: torch.dtype) -> Tensor:
    return first.new_empty(first.shape, dtype=dtype)


_TASK_VECTORS = (
    "(Tensor base, Tensor[] tensors, float[] weights, float[] densities, int[] keys, float lam, bool normalize, "
    "str rescale, ScalarType out_dtype) -> Tensor"
)
_linear = define(
    "merge_linear(Tensor[] tensors, float[] weights, bool normalize, ScalarType out_dtype) -> Tensor",
    _launcher(linear_reference, _linear_csrc, linear_triton),
    lambda tensors, weights, normalize, out_dtype: _like(tensors[0], out_dtype),
)
_task_arithmetic = define(
    "merge_task_arithmetic" + _TASK_VECTORS,
    _launcher(task_arithmetic_reference, _task_arithmetic_csrc, _task_arithmetic_triton),
    lambda base, *options: _like(base, options[-1]),
)
_ties = define(
    "merge_ties" + _TASK_VECTORS,
    _launcher(ties_reference, _ties_csrc, _ties_triton),
    lambda base, *options: _like(base, options[-1]),
)
_gram = define(
    "merge_gram(Tensor? base, Tensor[] tensors) -> Tensor",
    _launcher(gram_reference, _gram_csrc, gram_triton),
    lambda base, tensors: tensors[0].new_empty((len(tensors), len(tensors)), dtype=torch.float64),
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
    *,
    densities: Sequence[float] = (),
    keys: Sequence[int] = (),
    rescale: str = "none",
) -> Tensor:
    """`base` plus `lam` times the weighted sum (mean with `normalize`) of the differences to it.

    `densities` in [0, 1] keep that share of each difference: the largest magnitudes or, with a 64-bit key per tensor, random
    elements (DARE). `rescale` is "none", "density" or "norm", see the top of the file. `out_dtype` defaults to the common
    dtype of the inputs. Raises ValueError for unequal shapes or lengths, densities out of range or another `rescale`.
    Sources: Ilharco et al. 2023, "Editing models with task arithmetic"; Yu et al. 2024 (DARE).
    """
    _check([*tensors, base], [*weights, 0.0])
    _check_trim(tensors, densities, keys, rescale)
    out_dtype = out_dtype or common_dtype([base.dtype, *(t.dtype for t in tensors)])
    keys = [signed(key) for key in keys]
    return _task_arithmetic(base, tensors, weights, densities, keys, lam, normalize, rescale, out_dtype)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    lam: float = 1.0,
    normalize: bool = True,
    rescale: str = "none",
    out_dtype: torch.dtype | None = None,
    *,
    keys: Sequence[int] = (),
) -> Tensor:
    """`base` plus `lam` times the trimmed, sign-elected, averaged differences to it; formula at the top of the file.

    `densities` in [0, 1]; with a 64-bit key per tensor the kept elements are random (DARE), else the largest. `rescale` is
    "none", "density" or "norm". `out_dtype` defaults to the common dtype of the inputs.
    Raises ValueError for unequal shapes or lengths, densities out of range or another `rescale`.
    Sources: Yadav et al. 2023, "TIES-merging"; Yu et al. 2024 (DARE).
    """
    _check([*tensors, base], [*weights, 0.0], [*densities, 0.0])
    _check_trim(tensors, densities, keys, rescale)
    out_dtype = out_dtype or common_dtype([base.dtype, *(t.dtype for t in tensors)])
    keys = [signed(key) for key in keys]
    return _ties(base, tensors, weights, densities, keys, lam, normalize, rescale, out_dtype)


def weighted(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    lam: float = 1.0,
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Task arithmetic whose weights are tensors: base + lam sum_i(W_i d_i) / (sum_i W_i with `normalize`).

    weights: one per model, broadcasting to the models' shape: (rows, 1) or the shape itself. Without a base b is 0. An element
    whose weights sum to zero is not divided. Plain torch. Raises ValueError for unequal shapes or lengths.
    """
    inputs = [*tensors, *([] if base is None else [base])]
    _check(inputs)
    if len(weights) != len(tensors):
        raise ValueError(f"expected one weight per tensor, got {len(tensors)} and {len(weights)}")
    wide = arithmetic_dtype(inputs)
    start = torch.zeros_like(tensors[0], dtype=wide) if base is None else base.to(wide)
    total = torch.zeros_like(start)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.addcmul_(tensor.to(wide) - start, weight.to(total))
    if normalize:
        divisor = sum((weight.to(total) for weight in weights[1:]), weights[0].to(total))
        total /= torch.where(divisor.abs() < SMALLEST_DIVISOR, 1.0, divisor)
    return total.mul_(lam).add_(start).to(out_dtype or common_dtype([tensor.dtype for tensor in inputs]))


def gram(base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Inner products (N, N) fp64 of N tensors of one shape, or of their differences to `base`.

    Norms, angles and every merge that is a linear combination by them (slerp, model stock) follow from it.
    Raises ValueError for unequal shapes.
    """
    _check([*tensors, *([] if base is None else [base])])
    return _gram(base, tensors)
