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
product is in fp32 (fp64 for fp64), rounded once. C++ and Triton for both, bit for bit the reference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperllama.kernels import raw
from hyperllama.kernels.backend import choose, constexpr, define, floating, jit, same_device, tl, wide
from hyperllama.kernels.counter import signed, uniform, uniform_pair_triton
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


@dataclass(frozen=True)
class Launch:
    """The tile of the source that one program reads once and writes to all of its copies."""

    rows: int
    cols: int

    @classmethod
    def of(cls, n_cols: int, elements: int) -> "Launch":
        """About `elements` a program; the widest columns that leave at most an eighth of the lanes idle: 128 at 576."""
        cols = next((c for c in (1024, 512, 256, 128) if -(-n_cols // c) * c <= n_cols * 9 / 8), 64)
        return cls(elements // cols, cols)

    def grid(self, n_rows: int, n_cols: int) -> tuple[int, int]:
        """Programs over (n_rows, n_cols)."""
        return -(-n_rows // self.rows), -(-n_cols // self.cols)


@jit
def _grow_kernel(
    source_ptr, out_ptr, key, n_rows, n_cols, row_copies, col_copies, half_range,
    NOISE: constexpr, ROWS: constexpr, COLS: constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    dtype = out_ptr.dtype.element_ty
    source = tl.load(source_ptr + rows[:, None] * n_cols + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    copies = col_copies * 1.0
    divided = tl.div_rn(source, copies + tl.zeros_like(source)).to(dtype)
    shared = tl.div_rn(source, copies / 2 + tl.zeros_like(source)).to(dtype).to(tl.float32)
    for i in range(row_copies):
        at = (rows + i * n_rows)[:, None] * n_cols * col_copies + cols[None, :]
        if NOISE:
            for pair in range(col_copies // 2):
                first = at + pair * 2 * n_cols
                share, toss = uniform_pair_triton(key, first)
                larger = (shared * (0.5 + half_range * share)).to(dtype)
                smaller = (shared - larger.to(tl.float32)).to(dtype)
                coin = toss < 0.5
                tl.store(out_ptr + first, tl.where(coin, larger, smaller), mask=inside)
                tl.store(out_ptr + first + n_cols, tl.where(coin, smaller, larger), mask=inside)
            if col_copies % 2 == 1:
                tl.store(out_ptr + at + (col_copies - 1) * n_cols, divided, mask=inside)
        else:
            for j in range(col_copies):
                tl.store(out_ptr + at + j * n_cols, divided, mask=inside)


def grow_triton(source: Tensor, row_copies: int, col_copies: int, noise_db: float | None, key: int) -> Tensor:
    """The growth on a GPU (or in Triton's interpreter)."""
    source, out = source.contiguous(), source.new_empty(_shape(source, row_copies, col_copies))
    rows, cols, col_copies = (*source.shape, col_copies) if source.dim() == 2 else (1, len(source), 1)
    noise = noise_db is not None and col_copies > 1
    if out.numel():
        launch = Launch.of(cols, 2048 if noise else 4096)  # the hash needs registers
        _grow_kernel[launch.grid(rows, cols)](
            source, out, key, rows, cols, row_copies, col_copies, 0.0 if noise_db is None else half_range(noise_db),
            NOISE=noise, ROWS=launch.rows, COLS=launch.cols, num_warps=4, enable_fp_fusion=False,  # the reference's roundings
        )  # fmt: skip
    return out


def _launch_grow(source: Tensor, *options) -> Tensor:
    implementations = {"reference": grow_reference}
    if source.dim() <= 2:
        implementations |= {"csrc": _grow_csrc, "triton": grow_triton}
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


@jit
def _remap_kernel(
    source_ptr, out_ptr, rows_ptr, cols_ptr, scale_ptr, width, n_rows, n_cols,
    SCALED: constexpr, ROWS: constexpr, COLS: constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    from_row = tl.load(rows_ptr + rows, mask=rows < n_rows, other=0)
    from_col = tl.load(cols_ptr + cols, mask=cols < n_cols, other=0)
    values = tl.load(source_ptr + from_row[:, None] * width + from_col[None, :], mask=inside, other=0.0)
    if SCALED:
        scale = tl.load(scale_ptr + cols, mask=cols < n_cols, other=0.0)
        values = (values.to(tl.float32) * scale[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], values, mask=inside)


def remap_triton(source: Tensor, rows: Tensor, cols: Tensor, scale: Tensor | None) -> Tensor:
    """Rows and columns by index on a GPU (or in Triton's interpreter)."""
    source, rows, cols = source.contiguous(), rows.contiguous(), cols.contiguous()
    out = source.new_empty(len(rows), len(cols))
    if out.numel():
        launch = Launch.of(len(cols), 4096)
        _remap_kernel[launch.grid(*out.shape)](
            source, out, rows, cols, source if scale is None else scale.contiguous(), source.shape[1], *out.shape,
            SCALED=scale is not None, ROWS=launch.rows, COLS=launch.cols, num_warps=4,
        )  # fmt: skip
    return out


def _launch_remap(source: Tensor, rows: Tensor, cols: Tensor, scale: Tensor | None) -> Tensor:
    for name, index, size in (("row", rows, source.shape[0]), ("column", cols, source.shape[1])):
        if index.numel() and not 0 <= (low := int(index.min())) <= (high := int(index.max())) < size:
            raise IndexError(f"remap: {name} {low if low < 0 else high} of a matrix with {size} {name}s")
    implementations = {"reference": remap_reference, "csrc": _remap_csrc, "triton": remap_triton}
    return choose(implementations, source)(source, rows, cols, scale)


_remap = define(
    "remap(Tensor source, Tensor rows, Tensor cols, Tensor? scale) -> Tensor",
    _launch_remap,
    lambda source, rows, cols, scale: source.new_empty((rows.shape[0], cols.shape[0])),
)


def grow(source: Tensor, row_copies: int, col_copies: int, *, noise_db: float | None = None, key: int = 0) -> Tensor:
    """Tile a matrix (R, C) or vector (R,) to (p R, q C) and divide by q = `col_copies`; the dtype is kept.

    `noise_db` adds paired noise (at least 4.78 dB), drawn from the 64-bit `key`.
    Raises HyperLlamaError when the noise would be too loud to keep the pairs' sums exact, ValueError for other copies or tensors.
    """
    floating("grow", source=source)
    if source.dim() not in (1, 2) or row_copies < 1 or col_copies < 1:
        raise ValueError(
            f"grow makes copies of a matrix or vector, not {row_copies} x {col_copies} of {tuple(source.shape)}"
        )
    check_noise(noise_db)
    return _grow(source, row_copies, col_copies, noise_db, signed(key))


def remap(source: Tensor, rows: Tensor, cols: Tensor, scale: Tensor | None = None) -> Tensor:
    """Matrix (len(rows), len(cols)) of the given rows and columns of `source` (R, C), column j times scale[j].

    rows, cols: int64 vectors; scale: fp32 vector (fp64 may scale fp64) as long as cols; the dtype of `source` is kept. Indices
    are read on the host.
    Raises IndexError for an index outside of `source`, ValueError for other dtypes or shapes.
    """
    floating("remap", source=source)
    same_device("remap", source=source, rows=rows, cols=cols, scale=scale)
    if source.dim() != 2 or any(index.dim() != 1 or index.dtype != torch.int64 for index in (rows, cols)):
        raise ValueError("remap takes a matrix and int64 vectors of rows and columns")
    if scale is not None and (scale.shape != cols.shape or scale.dtype not in (torch.float32, wide(source.dtype))):
        raise ValueError(f"remap takes one fp32 scale per column, got {tuple(scale.shape)} {scale.dtype}")
    return _remap(source, rows, cols, scale)
