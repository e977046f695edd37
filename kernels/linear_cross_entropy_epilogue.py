"""The head's first product with softmax in its epilogue: linear_cross_entropy without a pass over the logits.

    u = 2^(z - k), S = sum of u, a = 1 + 2 z_loss lse;   in the target's column then u - S / a
    dz = c u, c = loss_weight scale a / S, a factor of the row;   dx = c (u W),   dW += u^T (c x)

All that a logit's gradient needs of the rest of its row is a factor, and a factor of rows goes through both other products: they
stay plain products, of u, and only x and dx, which are V / D times smaller, are scaled. So the epilogue can write u, in the dtype
of the model, when most of its row is not yet known, given some k near the row's largest logit (z and k in base 2, k whole): bf16
has the exponents of fp32, and a u far from 1 is as exact as one near it. k is the target's logit, a dot product a row, made before.

A tile with a logit beyond k + REACH takes its own largest for k. Its row, whose loss is then above 0.69 REACH nats, is brought to
one k by a pass over that row alone. fp16 has not the exponents for this. Without gradients no u is written at all.

Sums are made in tiles of columns, then over tiles in order: no atomics, the same bits every time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperllama.kernels.backend import constexpr, gpu_of, jit, tl, wrong_index_flag

DTYPES = (torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634
LN_2 = constexpr(1 / LOG2_E)
# of u beyond 1: S stays below 2^(64 + log2 V), and c, at least 2^-82 times the weight of the loss, a normal number of bf16
REACH = constexpr(64.0)


@jit
def _counted(targets, n_cols, ignore_index):
    return (targets >= 0) & (targets < n_cols) & (targets != ignore_index)


@jit
def _shift(largest, guess):
    """k of a tile: its row's, or where that is too far below, the tile's own."""
    return tl.where(largest - guess > REACH, tl.ceil(largest), guess)


@jit
def _guess_kernel(
    x_ptr, weight_ptr, targets_ptr, guesses_ptr, flag_ptr, n_rows, n_cols, ignore_index, scale,
    WIDTH: constexpr, ROWS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """k of every row: the target's logit, rounded up; 0 where there is no target."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    targets = tl.load(targets_ptr + rows, mask=rows < n_rows, other=ignore_index)
    counted = _counted(targets, n_cols, ignore_index)
    tl.atomic_or(flag_ptr + rows * 0, 2, mask=(counted == 0) & (targets != ignore_index))
    x_at, weight_at = rows.to(tl.int64)[:, None] * WIDTH, targets[:, None] * WIDTH
    total = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    for first in range(0, WIDTH, DEPTH):
        depth = first + tl.arange(0, DEPTH)[None, :]
        there = counted[:, None] & (depth < WIDTH)
        x = tl.load(x_ptr + x_at + depth, mask=there, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + weight_at + depth, mask=there, other=0.0).to(tl.float32)
    tl.store(guesses_ptr + rows, tl.ceil(tl.sum(total, 1) * scale), mask=rows < n_rows)


@jit
def _tile(base, first, count, width, ROWS: constexpr, DEPTH: constexpr):
    """Where (ROWS, DEPTH) elements from row `first` are; what would be beyond row `count` is its last: loads need no mask."""
    rows = tl.minimum(tl.arange(0, ROWS), count - 1 - first)
    return base + tl.cast(first, tl.int64) * width + (rows[:, None] * width + tl.arange(0, DEPTH)[None, :])


@jit
def _product_kernel(
    x_ptr, weight_ptr, targets_ptr, guesses_ptr, u_ptr, largest_ptr, sums_ptr, of_target_ptr,
    n_rows, n_cols, valid, ignore_index, scale,
    GRADIENT: constexpr, WIDTH: constexpr, PRECISION: constexpr, ROWS: constexpr, COLS: constexpr, DEPTH: constexpr,
    GROUP: constexpr,
):  # fmt: skip
    """Program: a tile of u, and of each of its rows the largest logit and the sum of u; the target's logit where it lies there.

    GROUP blocks of rows, which stay in L2, meet all columns before the next do: the weight is read once a group.
    """
    blocks, tiles = tl.cdiv(n_rows, ROWS), tl.cdiv(n_cols, COLS)
    before = tl.program_id(0) // (GROUP * tiles) * GROUP
    at_once = tl.minimum(GROUP, blocks - before)
    first_row = (before + tl.program_id(0) % (GROUP * tiles) % at_once) * ROWS
    tile = tl.program_id(0) % (GROUP * tiles) // at_once
    first_col = tile * COLS

    x_at = _tile(x_ptr, first_row, n_rows, WIDTH, ROWS, DEPTH)
    weight_at = _tile(weight_ptr, first_col, n_cols, WIDTH, COLS, DEPTH)
    z = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for first in range(0, WIDTH, DEPTH):
        if WIDTH % DEPTH == 0:
            x, weight = tl.load(x_at + first), tl.load(weight_at + first)
        else:
            depth = (first + tl.arange(0, DEPTH) < WIDTH)[None, :]
            x, weight = tl.load(x_at + first, mask=depth, other=0.0), tl.load(weight_at + first, mask=depth, other=0.0)
        z = tl.dot(x, tl.trans(weight), z, input_precision=PRECISION)

    rows, cols = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    inside = rows < n_rows
    targets = tl.load(targets_ptr + rows, mask=inside, other=ignore_index)
    guess = tl.load(guesses_ptr + rows, mask=inside, other=0.0)
    seen = _counted(targets, n_cols, ignore_index)[:, None] & (cols < valid)[None, :]
    z = tl.where(seen, z * scale, float("-inf"))  # so that what overflows in a row without a target is left out, too
    here = (targets >= first_col) & (targets < first_col + COLS)
    if tl.max(here.to(tl.int32), 0) > 0:  # one program in eight at most, V = 128256 and tiles of 128 x 256: 128 of 501
        hit = targets[:, None] == cols[None, :]
        tl.store(of_target_ptr + rows, tl.sum(tl.where(hit, z, 0.0), 1), mask=here & inside)
    largest = tl.max(z, 1)
    u = tl.exp2(z - _shift(largest, guess)[:, None])
    place = tl.cast(tile, tl.int64) * n_rows + rows
    tl.store(largest_ptr + place, largest, mask=inside)
    tl.store(sums_ptr + place, tl.sum(u, 1), mask=inside)
    if GRADIENT:
        at = tl.cast(first_row, tl.int64) * n_cols + first_col
        at += tl.arange(0, ROWS)[:, None] * n_cols + tl.arange(0, COLS)[None, :]
        tl.store(
            u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=inside[:, None] & (cols < n_cols)[None, :],
            eviction_policy="evict_first",
        )  # fmt: skip


@jit
def _finish_kernel(
    targets_ptr, guesses_ptr, largest_ptr, sums_ptr, of_target_ptr, u_ptr, losses_ptr, correct_ptr, shifts_ptr, factors_ptr,
    n_rows, n_cols, n_tiles, ignore_index, z_loss, weight,
    GRADIENT: constexpr, ROWS: constexpr, TILES: constexpr,
):  # fmt: skip
    """Tiles of some rows summed: losses, hits, the rows' k and c, and u in the targets' columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    targets = tl.load(targets_ptr + rows, mask=inside, other=ignore_index)
    counted = _counted(targets, n_cols, ignore_index)
    guess = tl.load(guesses_ptr + rows, mask=inside, other=0.0)[None, :]
    peaks = tl.full((TILES, ROWS), float("-inf"), dtype=tl.float32)
    totals = tl.zeros((TILES, ROWS), dtype=tl.float32)
    shifts = totals + guess
    for first in range(0, n_tiles, TILES):
        tiles = first + tl.arange(0, TILES)[:, None]
        there = (tiles < n_tiles) & inside[None, :]
        at = tiles.to(tl.int64) * n_rows + rows[None, :]
        largest = tl.load(largest_ptr + at, mask=there, other=float("-inf"))
        shift = _shift(largest, guess)
        higher = tl.maximum(shifts, shift)
        sums = tl.load(sums_ptr + at, mask=there, other=0.0)
        totals = totals * tl.exp2(shifts - higher) + sums * tl.exp2(shift - higher)
        peaks, shifts = tl.maximum(peaks, largest), higher
    shift = tl.max(shifts, 0)
    total = tl.sum(totals * tl.exp2(shifts - shift[None, :]), 0)
    of_target = tl.load(of_target_ptr + rows, mask=counted, other=0.0)
    lse = (tl.log2(total) + shift) * LN_2
    loss = (tl.log2(total) - (of_target - shift)) * LN_2 + z_loss * lse * lse
    tl.store(losses_ptr + rows, tl.where(counted, loss, 0.0), mask=inside)
    tl.store(correct_ptr + rows, (counted & (of_target >= tl.max(peaks, 0))).to(tl.int8), mask=inside)
    if GRADIENT:
        steeper = 1.0 + 2.0 * z_loss * lse
        steeper = tl.where(steeper == 0.0, 1e-20, steeper)  # u is divided by it, and c has it
        tl.store(shifts_ptr + rows, shift, mask=inside)
        tl.store(factors_ptr + rows, tl.where(counted, weight * steeper / total, 0.0), mask=inside)
        u = tl.exp2(of_target - shift) - total / steeper
        tl.store(u_ptr + rows.to(tl.int64) * n_cols + targets, u.to(u_ptr.dtype.element_ty), mask=counted)


@jit
def _rescale_kernel(
    u_ptr, targets_ptr, guesses_ptr, shifts_ptr, largest_ptr, n_rows, n_cols, n_tiles, COLS: constexpr, TILES: constexpr
):  # fmt: skip
    """Program: a row; nothing to do but where a tile was beyond REACH. Powers of two: nothing is rounded a second time."""
    row = tl.program_id(0)
    guess, shift = tl.load(guesses_ptr + row), tl.load(shifts_ptr + row)
    if shift != guess:
        target = tl.load(targets_ptr + row)
        base = u_ptr + tl.cast(row, tl.int64) * n_cols
        for first in range(0, n_tiles, TILES):
            tiles = first + tl.arange(0, TILES)
            at = largest_ptr + tiles.to(tl.int64) * n_rows + row
            own = _shift(tl.load(at, mask=tiles < n_tiles, other=float("-inf")), guess)
            cols = tiles[:, None] * COLS + tl.arange(0, COLS)[None, :]
            u = tl.load(base + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            u *= tl.where(cols == target, 1.0, tl.exp2(own - shift)[:, None])  # the target's is what it shall be
            tl.store(base + cols, u.to(u_ptr.dtype.element_ty), mask=cols < n_cols)


@dataclass(frozen=True)
class Launch:
    """How the product is launched; a pure function of its depth, dtype and architecture.

    A tile's operands come from L2, so tiles are as large as their sums fit the registers: 128 x 256 make 85 FLOPs of a byte,
    and an H100 makes about 95 (989 TFLOP/s, and some 10 TB/s of L2) in the time that it gets one.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int  # blocks of rows: 16 MiB, a third of an H100's L2

    @classmethod
    def of(cls, width: int, dtype: torch.dtype, arch: str) -> "Launch":
        """The launch for products over `width` on `arch` (see backend.Gpu)."""
        if arch == "interpreter":
            tile = (32, 64, 32, 4, 1)
        elif dtype == torch.float32:  # exact products have no matrix unit
            tile = (64, 64, 16, 4, 2)
        elif arch.startswith(("sm_9", "sm_10")):
            tile = (128, 256, 64, 8, 3)
        elif arch.startswith("gfx9"):
            tile = (128, 128, 64, 4, 2)
        else:
            tile = (128, 128, 64, 8, 3)
        return cls(*tile, max(8, (16 << 20) // (tile[0] * width * dtype.itemsize)))


def exponentials(
    x: Tensor, weight: Tensor, targets: Tensor, loss_weight: float, scale: float, valid_vocab: int | None, ignore_index: int,
    z_loss: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (R,) fp32 of rows x (R, D) under weight (V, D), hits (R,) bool, u (R, V) in their dtype and c (R,) fp32.

    u and c mean nothing without `gradient`. On a GPU, or in Triton's interpreter; bf16 and fp32.
    """
    (n_rows, width), n_cols = x.shape, weight.shape[0]
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    launch = Launch.of(width, x.dtype, gpu_of(x).arch)
    n_tiles = -(-n_cols // launch.cols)
    # each an allocation of its own, and so aligned
    losses, of_target, guesses, shifts, factors = (x.new_empty(n_rows, dtype=torch.float32) for _ in range(5))
    largest, sums = (x.new_empty(n_tiles, n_rows, dtype=torch.float32) for _ in range(2))
    correct = x.new_empty(n_rows, dtype=torch.int8)
    u = x.new_empty((n_rows, n_cols) if gradient else (0,))
    _guess_kernel[(-(-n_rows // 16),)](
        x, weight, targets, guesses, wrong_index_flag(x), n_rows, n_cols, ignore_index, scale * LOG2_E, WIDTH=width, ROWS=16,
        DEPTH=64, num_warps=2,
    )  # fmt: skip
    _product_kernel[(-(-n_rows // launch.rows) * n_tiles,)](
        x, weight, targets, guesses, u, largest, sums, of_target, n_rows, n_cols, valid_vocab or n_cols, ignore_index,
        scale * LOG2_E, GRADIENT=gradient, WIDTH=width, PRECISION="ieee", ROWS=launch.rows, COLS=launch.cols, DEPTH=launch.depth,
        GROUP=launch.group, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    _finish_kernel[(-(-n_rows // 64),)](
        targets, guesses, largest, sums, of_target, u, losses, correct, shifts, factors, n_rows, n_cols, n_tiles, ignore_index,
        z_loss, loss_weight * scale, GRADIENT=gradient, ROWS=64, TILES=16, num_warps=4,
    )  # fmt: skip
    if gradient:
        _rescale_kernel[(n_rows,)](
            u, targets, guesses, shifts, largest, n_rows, n_cols, n_tiles, COLS=launch.cols, TILES=8, num_warps=1
        )  # fmt: skip
    return losses, correct.view(torch.bool), u, factors
