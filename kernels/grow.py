"""Growth of one tensor: tile it, divide it, and optionally break the symmetry of the copies without changing the function.

    out[i R + r, j C + c] = W[r, c] / q              i < p row copies, j < q column copies of W (R, C)

With noise, neighbouring column copies 2a and 2a + 1 share S = 2 W / q unevenly, with u uniform in [0, sqrt(3) s):

    larger = round(S (1 + u) / 2),  smaller = S - larger,  and a coin decides which copy gets which.

Both copies read equal inputs, so the sum S is all that the function sees; larger lies in [S/2, S], where the subtraction is
exact in every binary format (Sterbenz): the pair sums to S to the last bit. s = 10^(-dB/20) is the noise's share of W/q, so the
signal-to-noise ratio of the tensor is `noise_db`. An odd last copy gets no noise. u and the coin are functions of
(seed, name, element): see counter.py. Vectors have C = 1 and only row copies.

    remap: out[i, j] = W[rows[i], cols[j]] * scale[j]

is what growth by other maps needs (Net2Wider, Chen et al. 2016: units copied unevenly, scaled by one over their copies); the
product is in fp32 (fp64 for fp64), rounded once. CPU: C++ for both, bit for bit the reference.
"""

import torch
from torch import Tensor

from hyperllama.kernels import raw
from hyperllama.kernels.backend import choose, define, wide
from hyperllama.kernels.counter import signed, uniform
from hyperllama.kernels.raw import check_noise, half_range


def grow_reference(source: Tensor, row_copies: int, col_copies: int, noise_db: float | None, key: int) -> Tensor:
    """Tiles, quotient and paired noise in plain torch."""
    if source.dim() == 1:
        return source.repeat(row_copies)
    out = source.repeat(row_copies, col_copies) / col_copies
    if noise_db is None or col_copies < 2:
        return out
    rows, cols = out.shape[0], source.shape[1]
    half = half_range(noise_db)
    shared = (source / (col_copies / 2)).repeat(row_copies, 1)
    unrounded = shared.to(wide(shared.dtype))
    for pair in range(col_copies // 2):
        first = pair * 2 * cols
        counter = torch.arange(rows, device=out.device)[:, None] * (2 * out.shape[1]) + torch.arange(
            2 * first, 2 * (first + cols), 2, device=out.device
        )
        share = 0.5 + half * uniform(key, counter)
        larger = (unrounded * share.to(unrounded.dtype)).to(out.dtype)
        smaller = shared - larger
        coin = uniform(key, counter + 1) < 0.5
        out[:, first : first + cols] = torch.where(coin, larger, smaller)
        out[:, first + cols : first + 2 * cols] = torch.where(coin, smaller, larger)
    return out


def _shape(source: Tensor, row_copies: int, col_copies: int) -> list[int]:
    return [size * copies for size, copies in zip(source.shape, (row_copies, col_copies), strict=False)]


def _raw(source: Tensor) -> raw.Raw:
    return raw.Raw(source.data_ptr(), str(source.dtype).removeprefix("torch."), source.numel())


def _grow_csrc(source: Tensor, row_copies: int, col_copies: int, noise_db: float | None, key: int) -> Tensor:
    source, out = source.contiguous(), source.new_empty(_shape(source, row_copies, col_copies))
    rows, cols, col_copies = (*source.shape, col_copies) if source.dim() == 2 else (1, len(source), 1)
    half = None if noise_db is None else half_range(noise_db)
    target = raw.Target(data=out.data_ptr())
    raw.grow(_raw(source), target, rows, cols, row_copies, col_copies, col_copies, half, key)
    return out


def _launch_grow(source: Tensor, *options) -> Tensor:
    implementations = {"reference": grow_reference} | ({"csrc": _grow_csrc} if source.dim() <= 2 else {})
    return choose(implementations, source)(source, *options)


_grow = define(
    "grow(Tensor source, int row_copies, int col_copies, float? noise_db, int key) -> Tensor",
    _launch_grow,
    lambda source, row_copies, col_copies, noise_db, key: source.new_empty(_shape(source, row_copies, col_copies)),
)


def remap_reference(source: Tensor, rows: Tensor, cols: Tensor, scale: Tensor | None) -> Tensor:
    """Rows and columns by index, columns scaled, in plain torch."""
    out = source[rows][:, cols]
    return out if scale is None else (out.to(wide(source.dtype)) * scale).to(source.dtype)


def _remap_csrc(source: Tensor, rows: Tensor, cols: Tensor, scale: Tensor | None) -> Tensor:
    source, rows, cols = source.contiguous(), rows.contiguous(), cols.contiguous()
    scale = None if scale is None else scale.contiguous()
    out = source.new_empty(len(rows), len(cols))
    raw.remap(
        _raw(source), raw.Target(data=out.data_ptr()), source.shape[1], rows.data_ptr(), len(rows), cols.data_ptr(),
        len(cols), None if scale is None else scale.data_ptr(),
    )  # fmt: skip
    return out


def _launch_remap(source: Tensor, rows: Tensor, cols: Tensor, scale: Tensor | None) -> Tensor:
    for name, index, size in (("row", rows, source.shape[0]), ("column", cols, source.shape[1])):
        if index.numel() and not 0 <= (low := int(index.min())) <= (high := int(index.max())) < size:
            raise IndexError(f"remap: {name} {low if low < 0 else high} of a matrix with {size} {name}s")
    implementations = {"reference": remap_reference, "csrc": _remap_csrc}
    return choose(implementations, source)(source, rows, cols, scale)


_remap = define(
    "remap(Tensor source, Tensor rows, Tensor cols, Tensor? scale) -> Tensor",
    _launch_remap,
    lambda source, rows, cols, scale: source.new_empty((rows.shape[0], cols.shape[0])),
)


def grow(source: Tensor, row_copies: int, col_copies: int, *, noise_db: float | None = None, key: int = 0) -> Tensor:
    """Tile a matrix (R, C) or vector (R,) to (p R, q C) and divide by q = `col_copies`; the dtype is kept.

    `noise_db` adds paired noise (at least 4.78 dB), drawn from the 64-bit `key`.
    Raises HyperLlamaError when the noise would be too loud to keep the pairs' sums exact.
    """
    check_noise(noise_db)
    return _grow(source, row_copies, col_copies, noise_db, signed(key))


def remap(source: Tensor, rows: Tensor, cols: Tensor, scale: Tensor | None = None) -> Tensor:
    """Matrix (len(rows), len(cols)) of the given rows and columns of `source` (R, C), column j times scale[j].

    rows, cols: int64 vectors; scale: fp32 vector (fp64 may scale fp64) as long as cols; the dtype of `source` is kept. Indices
    are read on the host.
    Raises IndexError for an index outside of `source`, ValueError for other dtypes or shapes.
    """
    if source.dim() != 2 or any(index.dim() != 1 or index.dtype != torch.int64 for index in (rows, cols)):
        raise ValueError("remap takes a matrix and int64 vectors of rows and columns")
    if scale is not None and (scale.shape != cols.shape or scale.dtype not in (torch.float32, wide(source.dtype))):
        raise ValueError(f"remap takes one fp32 scale per column, got {tuple(scale.shape)} {scale.dtype}")
    return _remap(source, rows, cols, scale)
