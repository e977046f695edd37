"""Triton for kernels/merge.py: all models in one pass over memory, and an exact selection of the largest magnitudes.

Every program takes a block of elements of all models: a tuple of pointers, unrolled, so that each keeps its own dtype and 128-bit
accesses. Sums run over the models in order and nothing is fused but linear's chain: the reference's bits.

The k-th largest magnitude is found by its bits (an fp32 without its sign, 31 of them, orders as an integer does; NaN is last):

    histogram the next 11, 10, 10 bits of the keys that begin as the threshold does    one read of the models each
    take the bin that holds the k-th; it gives those bits, and how many of its keys are still to be kept
    limit = the threshold's key; of the keys equal to it the first m in flat order are kept: up to index `last`

Counts are integers, so their order does not matter; the state stays on the device, so the host never waits. Reads for `last` happen
only where some, but not all, of the equal keys are kept. GPU or Triton's interpreter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperllama.kernels.backend import constexpr, jit, tl
from hyperllama.kernels.counter import uniform_triton

BLOCK = 2048  # elements of every model a program takes; with 4 warps, 16 a thread: two 128-bit loads of bf16
LARGE_BLOCK = 4096  # where a program ends in atomics: fewer of those
DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits) of the passes of the selection
ALL, TOP, RANDOM = 0, 1, 2


@jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _key(delta):
    """|delta| as an integer that orders like it."""
    return delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _kept(delta, at, i: constexpr, state_ptr, densities, keys, TRIM: constexpr):
    """Which elements of model i stay."""
    if TRIM == 0:
        kept = delta == delta
    elif TRIM == 1:
        limit, last = tl.load(state_ptr + 4 * i), tl.load(state_ptr + 4 * i + 3)
        key = _key(delta)
        kept = (key > limit) | ((key == limit) & (at <= last))
    else:
        kept = uniform_triton(keys[i], at) < densities[i]
    return kept


@jit
def _product(delta, at, i: constexpr, factor_ptr, state_ptr, densities, keys, TRIM: constexpr):
    """w_i s_i kept_i(d_i); a product, so that NaN and infinity stay visible where they are not kept."""
    factor = tl.load(factor_ptr + i)
    if TRIM == 0:
        return delta * factor
    return delta * tl.where(_kept(delta, at, i, state_ptr, densities, keys, TRIM), factor, 0.0)


@jit
def _linear_kernel(model_ptrs, weights, out_ptr, divisor, n, COUNT: constexpr, NORMALIZE: constexpr, BLOCK: constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(COUNT):
        total = tl.fma(_load(model_ptrs[i], at, at < n), weights[i] + tl.zeros_like(total), total)
    if NORMALIZE:
        total = tl.div_rn(total, divisor + tl.zeros_like(total))
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < n)


@jit
def _task_vectors_kernel(
    base_ptr, model_ptrs, factor_ptr, state_ptr, weights, densities, keys, out_ptr, lam, divisor, n,
    COUNT: constexpr, TRIM: constexpr, ELECT: constexpr, NORMALIZE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base = _load(base_ptr, at, at < n)
    total = tl.zeros_like(base)
    for i in tl.static_range(COUNT):
        delta = _load(model_ptrs[i], at, at < n) - base
        total += _product(delta, at, i, factor_ptr, state_ptr, densities, keys, TRIM)
    share = divisor + tl.zeros_like(base)
    if ELECT:
        vote = tl.where(total >= 0, 1.0, -1.0)
        total, share = tl.zeros_like(base), tl.zeros_like(base)
        for i in tl.static_range(
            COUNT
        ):  # read again, from the cache: the products of all models are too many registers
            delta = _load(model_ptrs[i], at, at < n) - base
            product = _product(delta, at, i, factor_ptr, state_ptr, densities, keys, TRIM)
            agrees = tl.where(product * vote > 0, 1.0, 0.0)
            total += product * agrees
            share += agrees * weights[i]
        share = tl.where(tl.abs(share) < 1e-8, 1.0, share)
    if NORMALIZE:
        total = tl.div_rn(total, share)
    tl.store(out_ptr + at, (total * lam + base).to(out_ptr.dtype.element_ty), mask=at < n)


@jit
def _histogram_kernel(
    base_ptr, model_ptrs, state_ptr, counts_ptr, n, COUNT: constexpr, SHIFT: constexpr, BITS: constexpr, BLOCK: constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base, bins = _load(base_ptr, at, at < n), tl.arange(0, 1 << BITS)
    for i in tl.static_range(COUNT):
        key = _key(_load(model_ptrs[i], at, at < n) - base)
        belongs = (at < n) & ((key >> (SHIFT + BITS)).to(tl.int64) == tl.load(state_ptr + 4 * i))
        counts = tl.histogram((key >> SHIFT) & ((1 << BITS) - 1), 1 << BITS, mask=belongs)
        tl.atomic_add(counts_ptr + (i << BITS) + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@jit
def _digit_kernel(state_ptr, counts_ptr, n, BITS: constexpr):
    """Of one model: the next bits of the limit; state is (limit so far, still to keep, equal to the limit, last index)."""
    bins, state_ptr = tl.arange(0, 1 << BITS), state_ptr + 4 * tl.program_id(0)
    counts = tl.load(counts_ptr + (tl.program_id(0) << BITS) + bins)
    keep = tl.load(state_ptr + 1)
    from_here = tl.cumsum(counts, 0, reverse=True)
    chosen = tl.sum((from_here >= keep).to(tl.int32)) - 1
    tl.store(state_ptr, tl.load(state_ptr) * (1 << BITS) + chosen)
    tl.store(state_ptr + 1, keep - tl.sum(tl.where(bins > chosen, counts, 0)))
    tl.store(state_ptr + 2, tl.sum(tl.where(bins == chosen, counts, 0)))
    tl.store(state_ptr + 3, n)


@jit
def _equal_kernel(base_ptr, model_ptrs, state_ptr, equal_ptr, n, COUNT: constexpr, BLOCK: constexpr):
    """How many keys of each block are the limit, for models that keep only some of them."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(COUNT):
        if tl.load(state_ptr + 4 * i + 1) < tl.load(state_ptr + 4 * i + 2):
            key = _key(_load(model_ptrs[i], at, at < n) - _load(base_ptr, at, at < n)).to(tl.int64)
            equal = (at < n) & (key == tl.load(state_ptr + 4 * i))
            tl.store(equal_ptr + i * tl.num_programs(0) + block, tl.sum(equal.to(tl.int32)))


@jit
def _last_kernel(
    base_ptr, model_ptrs, state_ptr, equal_ptr, n, n_blocks, COUNT: constexpr, CHUNK: constexpr, BLOCK: constexpr
):  # fmt: skip
    """Of one model: the index of the last equal key that is kept."""
    for i in tl.static_range(COUNT):
        keep = tl.load(state_ptr + 4 * i + 1)
        if (tl.program_id(0) == i) & (keep < tl.load(state_ptr + 4 * i + 2)):
            block, before, total = keep * 0, keep * 0, keep * 0
            for start in range(0, n_blocks, CHUNK):
                blocks = start + tl.arange(0, CHUNK)
                counts = tl.load(equal_ptr + i * n_blocks + blocks, mask=blocks < n_blocks, other=0).to(tl.int64)
                passed = (blocks < n_blocks) & (total + tl.cumsum(counts, 0) < keep)
                block += tl.sum(passed.to(tl.int64))
                before += tl.sum(tl.where(passed, counts, 0))
                total += tl.sum(counts)
            at = block * BLOCK + tl.arange(0, BLOCK)
            key = _key(_load(model_ptrs[i], at, at < n) - _load(base_ptr, at, at < n)).to(tl.int64)
            equal = (at < n) & (key == tl.load(state_ptr + 4 * i))
            rank = before + tl.cumsum(equal.to(tl.int64), 0)
            tl.store(state_ptr + 4 * i + 3, block * BLOCK + tl.sum((rank < keep).to(tl.int64)))


@jit
def _l1_kernel(
    base_ptr, model_ptrs, state_ptr, densities, keys, partial_ptr, n,
    COUNT: constexpr, TRIM: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """fp64 sums of |d_i| and of |kept_i(d_i)| of a block."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base = _load(base_ptr, at, at < n)
    for i in tl.static_range(COUNT):
        delta = _load(model_ptrs[i], at, at < n) - base
        kept = delta * tl.where(_kept(delta, at, i, state_ptr, densities, keys, TRIM), 1.0, 0.0)
        to = partial_ptr + 2 * i * tl.num_programs(0) + tl.program_id(0)
        tl.store(to, tl.sum(tl.abs(delta).to(tl.float64)))
        tl.store(to + tl.num_programs(0), tl.sum(tl.abs(kept).to(tl.float64)))


@jit
def _gram_kernel(
    base_ptr, model_ptrs, partial_ptr, n, HAS_BASE: constexpr, COUNT: constexpr, BLOCK: constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base = tl.zeros((BLOCK,), tl.float32)
    if HAS_BASE:
        base = _load(base_ptr, at, at < n)
    for i in tl.static_range(COUNT):
        one = (_load(model_ptrs[i], at, at < n) - base).to(tl.float64)
        for j in tl.static_range(i, COUNT):
            other = (_load(model_ptrs[j], at, at < n) - base).to(tl.float64)
            total, blocks = tl.sum(one * other), tl.num_programs(0)
            tl.store(partial_ptr + (i * COUNT + j) * blocks + tl.program_id(0), total)
            tl.store(partial_ptr + (j * COUNT + i) * blocks + tl.program_id(0), total)


def _grid(n: int, block: int) -> tuple[int]:
    return (-(-n // block),)


def linear_triton(
    tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """Weighted sum or mean on a GPU."""
    models = tuple(tensor.contiguous() for tensor in tensors)
    out = torch.empty(models[0].shape, dtype=out_dtype, device=models[0].device)
    if n := out.numel():
        _linear_kernel[_grid(n, BLOCK)](
            models, tuple(map(float, weights)), out, float(sum(weights)) if normalize else 1.0, n,
            COUNT=len(models), NORMALIZE=normalize, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def task_vectors_triton(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], keys: Sequence[int],
    lam: float, normalize: bool, rescale: str, out_dtype: torch.dtype, *, elect: bool, divisor: float,
) -> Tensor:  # fmt: skip
    """Task arithmetic, or with `elect` TIES, on a GPU."""
    base, models = base.contiguous(), tuple(tensor.contiguous() for tensor in tensors)
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    n, count = out.numel(), len(models)
    if n == 0:
        return out
    trim = RANDOM if keys else TOP if densities else ALL
    state = largest_triton(base, models, [int(density * n) for density in densities]) if trim == TOP else base
    shares, seeds = tuple(map(float, densities)) or (1.0,) * count, tuple(keys) or (0,) * count
    factors = torch.tensor(weights, dtype=torch.float64, device=base.device)
    if rescale == "density" and densities:
        factors *= torch.tensor([1 / d if d > 0 else 1.0 for d in densities], dtype=torch.float64, device=base.device)
    elif rescale == "norm" and densities:
        partial = factors.new_empty(count, 2, *_grid(n, BLOCK))
        _l1_kernel[_grid(n, BLOCK)](
            base, models, state, shares, seeds, partial, n,
            COUNT=count, TRIM=trim, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        before, after = partial.sum(-1).unbind(1)
        small = (before < 1e-7) | (after < 1e-7)
        factors *= torch.where(small, torch.ones_like(before), before / after.clamp(min=1e-7))
    _task_vectors_kernel[_grid(n, BLOCK)](
        base, models, factors.to(torch.float32), state, tuple(map(float, weights)), shares, seeds, out, lam, divisor, n,
        COUNT=count, TRIM=trim, ELECT=elect, NORMALIZE=normalize, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def largest_triton(base: Tensor, models: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
    """Of each difference to `base` the `keep` largest magnitudes: (N, 4) int64 of limit, kept equals, equals, last index."""
    n, count, models = base.numel(), len(models), tuple(models)
    state = torch.tensor([[0, k, 0, 0] for k in keep], dtype=torch.int64, device=base.device)
    grid = _grid(n, LARGE_BLOCK)
    for shift, bits in DIGITS:
        counts = state.new_zeros(count, 1 << bits)
        _histogram_kernel[grid](
            base, models, state, counts, n, COUNT=count, SHIFT=shift, BITS=bits, BLOCK=LARGE_BLOCK, num_warps=8
        )
        _digit_kernel[(count,)](state, counts, n, BITS=bits, num_warps=4)
    equal = torch.empty(count, *grid, dtype=torch.int32, device=base.device)
    _equal_kernel[grid](base, models, state, equal, n, COUNT=count, BLOCK=LARGE_BLOCK, num_warps=8)
    _last_kernel[(count,)](
        base, models, state, equal, n, *grid, COUNT=count, CHUNK=1024, BLOCK=LARGE_BLOCK, num_warps=4
    )
    return state


def gram_triton(base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs on a GPU."""
    models = tuple(tensor.contiguous() for tensor in tensors)
    n, count = models[0].numel(), len(models)
    partial = torch.empty(count, count, *_grid(n, BLOCK), dtype=torch.float64, device=models[0].device)
    if n:
        _gram_kernel[_grid(n, BLOCK)](
            models[0] if base is None else base.contiguous(), models, partial, n,
            HAS_BASE=base is not None, COUNT=count, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return partial.sum(-1)
