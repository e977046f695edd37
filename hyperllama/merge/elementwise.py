"""Merges of one tensor of N models in plain torch: those that are no op of kernels/merge.py.

d_i = x_i - b. Everything is fp32 (fp64 for fp64 inputs) with sums over a whole tensor in fp64, and is rounded once by the caller.

    model_stock    by rows: t mean_i(x_i) + (1 - t) b, t = N c / (1 + (N-1) c), c the mean over pairs of cos(d_i, d_j) of the row
    nuslerp        spherical interpolation along one dimension, at t; linear where the angle is nearly 0 or pi
    nearswap       (1 - w) b + w x, w = clip(t / max(|b - x|, 1e-6), 0, 1)
    arcee_fusion   b + d where |d| KL(softmax(x) || softmax(b)), the divergence by rows, reaches median + 1.5 (Q3 - Q1) of it
    sce            select the floor(top_k * count(var > 0)) elements of largest variance over models; weigh model i by mean(d_i^2);
                   erase the d_i whose sign is not that of sum_i d_i; mean of the rest with these weights
    ram            b + the mean of those d_i with |d_i| > epsilon; ramplus_tl: where that is one model alone,
                   d_i (1 + r min(s_i, alpha)), s_i how many elements it shares with others over how many it changes alone
    breadcrumbs    drop the floor(gamma n) largest magnitudes, keep the next floor(density n); fewer are dropped if too many
    della          keep with a chance that rises linearly with the magnitude's rank in its row, density - epsilon to + epsilon
Equal magnitudes and variances rank by lowest flat index first. Quantiles are exact: mergekit samples tensors above 10^6 elements.
Sources: Jang et al. 2024 (model stock); Wan et al. 2024, FuseChat (SCE); arXiv 2601.13572 (RAM); Davari and Belilovsky 2023
(breadcrumbs); Deep et al. 2024 (DELLA); nuslerp, nearswap and arcee_fusion are mergekit's.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels.counter import uniform
from hyperllama.kernels.merge import SMALLEST_DIVISOR, SMALLEST_L1, arithmetic_dtype, largest, random_mask, rescaling
from hyperllama.merge.methods import Call, TensorCall
from hyperllama.merge.spherical import SMALLEST_NORM, SMALLEST_NORM_PRODUCT, SMALLEST_SINE


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def model_stock(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Model stock with one interpolation ratio per row; a tensor of one dimension is one row."""
    deltas = [tensor - base for tensor in tensors]
    wide = [delta.double() for delta in deltas]
    norms = [delta.norm(dim=-1) for delta in wide]
    cosine = torch.zeros_like(norms[0])
    pairs = list(combinations(range(len(tensors)), 2))
    for i, j in pairs:
        products = (norms[i] * norms[j]).clamp(min=SMALLEST_NORM_PRODUCT)
        cosine += ((wide[i] * wide[j]).sum(-1) / products).clamp(-1, 1)
    cosine /= len(pairs)
    divisor = 1 + (len(tensors) - 1) * cosine
    weight = torch.where(divisor > SMALLEST_NORM_PRODUCT, cosine / divisor, 0.0).unsqueeze(-1).to(base.dtype)
    return base + weight * sum(deltas[1:], deltas[0])


def nuslerp(base: Tensor | None, tensors: Sequence[Tensor], t: float, dim: int) -> Tensor:
    """Spherical interpolation between two tensors, or their differences to the base, along every slice of `dim`."""
    first, second = tensors if base is None else [tensor - base for tensor in tensors]
    a, b = first.double(), second.double()
    norms = a.norm(dim=dim, keepdim=True), b.norm(dim=dim, keepdim=True)
    product = torch.where(torch.minimum(*norms) > SMALLEST_NORM, norms[0] * norms[1], torch.inf)
    angle = ((a * b).sum(dim, keepdim=True) / product).clamp(-1, 1).acos()
    curved = angle.sin() > SMALLEST_SINE
    sine = torch.where(curved, angle.sin(), 1.0)
    from_first = torch.where(curved, ((1 - t) * angle).sin() / sine, 1 - t)
    from_second = torch.where(curved, (t * angle).sin() / sine, t)
    result = (from_first * a + from_second * b).to(first.dtype)
    return result if base is None else base + result


def nearswap(base: Tensor, tensors: Sequence[Tensor], t: float) -> Tensor:
    """The other model where it is near the base, less of it with distance."""
    delta = tensors[0] - base
    weight = (t / delta.abs().clamp(min=1e-6)).clamp(0, 1)
    return base * (1 - weight) + tensors[0] * weight


def arcee_fusion(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The other model in the elements of outstanding importance."""
    (tensor,) = tensors
    delta = tensor - base
    p, q = tensor.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    importance = delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    order = importance.flatten().sort().values
    low, median, high = (order[int(share * (order.numel() - 1))] for share in (0.25, 0.5, 0.75))
    return base + delta * (importance >= median + 1.5 * (high - low))


def sce(base: Tensor, tensors: Sequence[Tensor], select_topk: float) -> Tensor:
    """Select, calculate, erase."""
    deltas = [tensor - base for tensor in tensors]
    if select_topk < 1:
        variance = torch.stack(deltas).var(0, correction=0)
        count = int(select_topk * int(variance.count_nonzero()))
        kept = largest(variance, count)
        deltas = [delta * kept for delta in deltas]
    squares = [float(delta.double().square().sum()) for delta in deltas]
    total = sum(squares)
    weights = [square / total for square in squares] if total > 0 else [1 / len(deltas)] * len(deltas)
    elected = torch.where(sum(deltas[1:], deltas[0]) >= 0, 1.0, -1.0)
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign() == elected
        merged += weight * delta * agrees
        divisor += weight * agrees
    return base + merged / torch.where(divisor == 0, 1.0, divisor)


def ram(base: Tensor, tensors: Sequence[Tensor], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Tensor:
    """Reinforced agent merging; r > 0 is its plus variant, tensor by tensor."""
    changed = [(tensor - base).abs() > epsilon for tensor in tensors]
    count = sum((mask.to(torch.int32) for mask in changed), torch.zeros_like(base, dtype=torch.int32))
    total = torch.zeros_like(base)
    for tensor, mask in zip(tensors, changed, strict=True):
        alone = mask & (count == 1)
        unique, shared = int(alone.sum()), int(mask.sum()) - int(alone.sum())
        boost = 1 + r * min(shared / max(unique, epsilon), alpha) if shared else 1.0
        total += torch.where(alone, boost, 1.0) * (tensor - base) * mask
    return base + total / count.clamp(min=1)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (model_stock, nuslerp, nearswap, arcee_fusion, sce, ram)
}


def run(call: TensorCall, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """The merged tensor before rounding."""
    options: Any = call.options
    wide_base = None if base is None else _wide(base)
    return _FUNCTIONS[call.function](wide_base, [_wide(tensor) for tensor in tensors], **options)


def _ranked_chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    rows = delta.abs().reshape(-1, delta.shape[-1])
    ranks = rows.argsort(dim=-1, stable=True).argsort(dim=-1).double() / max(rows.shape[-1] - 1, 1)
    return (density - epsilon + 2 * epsilon * ranks).view_as(delta)


def mask_of(call: Call, i: int, delta: Tensor) -> Tensor:
    """Which elements of difference number `i` the call keeps."""
    if not call.densities or call.densities[i] >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    density, n = call.densities[i], delta.numel()
    if call.epsilons and density > 0:
        draws = uniform(call.keys[i], torch.arange(n, device=delta.device)).view_as(delta)
        return draws < _ranked_chances(delta, density, call.epsilons[i])
    if call.keys:
        return random_mask(delta.shape, density, call.keys[i], delta.device)
    kept = int(density * n)
    dropped = min(int(call.gammas[i] * n), n - kept) if call.gammas else 0
    return largest(delta, kept + dropped) & ~largest(delta, dropped) if dropped else largest(delta, kept)


def trimmed(call: Call, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """task_arithmetic and ties of kernels/merge.py with the masks of breadcrumbs or DELLA, before rounding."""
    assert base is not None  # the plan has one for every method on differences
    return _task_vectors(call, base, tensors, arithmetic_dtype([base, *tensors]))


def rounded(call: Call, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """linear, task_arithmetic and ties with every operation rounded to the working dtype, in mergekit's order.

    Sums over models accumulate in fp32. Bit for bit mergekit 0.1.4 on a CPU, except where its masks are random or where equal
    magnitudes leave it a choice.
    """
    assert call.working is not None
    dtype = getattr(torch, call.working)
    if call.op == "linear":
        weights = torch.tensor(call.weights, dtype=dtype)
        total = sum_rounded([tensor.to(dtype) * weight for tensor, weight in zip(tensors, weights, strict=True)])
        return total / sum_rounded(list(weights)) if call.normalize else total
    return _task_vectors(call, base, tensors, dtype)


def sum_rounded(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, accumulated in fp32 at least, in their dtype."""
    total = _wide(terms[0]).clone()
    for term in terms[1:]:
        total += term
    return total.to(terms[0].dtype)


def _rescaled(call: Call, delta: Tensor, kept: Tensor) -> Tensor:
    """`kept` with the L1 norm of `delta`."""
    if call.working is None:
        return kept * rescaling(delta, kept).to(kept.dtype)
    if call.keys and delta.dtype == torch.float16:  # mergekit widens what it trims at random, and nothing else
        return _rescaled(call, delta.float(), kept.float()).to(torch.float16)
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if min(before, after) < SMALLEST_L1 else kept * (before / after)


def _task_vectors(call: Call, base: Tensor | None, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    assert base is not None  # the plan has one for every method on differences
    base = base.to(dtype)
    weights = torch.tensor(call.weights, dtype=dtype, device=base.device)
    products = []
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        delta = tensor.to(dtype) - base
        kept = delta * mask_of(call, i, delta)
        if call.rescale == "norm" and call.densities[i] < 1:
            kept = _rescaled(call, delta, kept)
        products.append(weight * kept)
    total, divisor = sum_rounded(products), sum_rounded(list(weights))
    if call.op == "ties":
        elected = torch.where(total >= 0, 1.0, -1.0)
        agrees = [product.sign() == elected for product in products]
        total = sum_rounded([product * agree for product, agree in zip(products, agrees, strict=True)])
        divisor = sum_rounded([weight * agree for weight, agree in zip(weights, agrees, strict=True)])
    if call.normalize:
        total = total / torch.where(_wide(divisor).abs() < SMALLEST_DIVISOR, 1.0, divisor).to(dtype)
    return base + call.lam * total
