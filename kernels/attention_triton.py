"""Causal attention of documents in Triton: FlashAttention's tiles (Dao 2023, arXiv 2307.08691) on the packed qkv, in place.

The B T tokens are one axis, cut into blocks whatever the documents are: a block of queries reads the keys from the first token
of its first document to its own last token, a block of keys the queries from its own first token to the last of its last
document. So the grid hangs on the number of tokens alone, nothing is read back from the device, and a block that several short
documents share costs no more than one. `_spans_kernel` finds the document of every token; without documents they are the windows.

forward    program (block of queries, query head): online softmax in base 2, out and lse
backward   program (block of queries, query head): dq, and per row lse and D = rowsum(g out) for the next
           program (block of keys, kv head): dk and dv, over the query heads of the group in order

Every output has one writer and one order of summation: no atomics, the same bits every time. The price is that the backward makes
the scores twice, 7 products where one pass with atomic sums of dq takes 5.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels.backend import constexpr, gpu_of, jit, tl

LARGEST_HEAD = 128  # beyond it the backward's tiles no longer fit the registers, and no Llama has more


@jit
def _tile(base, first, stop, ROWS: constexpr, DEPTH: constexpr, STRIDE: constexpr, WIDTH: constexpr):
    """(ROWS, DEPTH) from row `first` of a buffer with STRIDE elements a row; 0 from row `stop` and column WIDTH on."""
    rows, depth = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    inside = (rows < stop - first)[:, None] & (depth < WIDTH)[None, :]
    # 64 bits for where the tile is, which passes 2^31 at 2.2 million tokens of the smallest model; 32 inside it
    at = base + tl.cast(first, tl.int64) * STRIDE
    return tl.load(at + (rows[:, None] * STRIDE + depth[None, :]), mask=inside, other=0.0)


@jit
def _store_tile(base, values, first, stop, ROWS: constexpr, DEPTH: constexpr, STRIDE: constexpr, WIDTH: constexpr):
    rows, depth = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    inside = (rows < stop - first)[:, None] & (depth < WIDTH)[None, :]
    at = base + tl.cast(first, tl.int64) * STRIDE
    tl.store(at + (rows[:, None] * STRIDE + depth[None, :]), values.to(base.dtype.element_ty), mask=inside)


@jit
def _spans_kernel(borders_ptr, starts_ptr, ends_ptr, n_borders, n_tokens, steps, BLOCK: constexpr):
    """First token and end of the document of every token, by bisection; borders that don't fit are bent, so that nothing faults."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    high = low + n_borders - 1
    for _ in range(steps):  # borders[low] <= token < borders[high]
        middle = (low + high) // 2
        left = tl.load(borders_ptr + middle) <= tokens
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    start, end = tl.load(borders_ptr + low).to(tl.int32), tl.load(borders_ptr + high).to(tl.int32)
    tl.store(starts_ptr + tokens, tl.minimum(tl.maximum(start, 0), tokens), mask=tokens < n_tokens)
    tl.store(ends_ptr + tokens, tl.maximum(tl.minimum(end, n_tokens), tokens + 1), mask=tokens < n_tokens)


@jit
def _starts(starts_ptr, tokens, n_tokens, seq_len, DOCUMENTS: constexpr):
    """First tokens of the documents, or windows, of `tokens`."""
    if DOCUMENTS:
        return tl.load(starts_ptr + tokens, mask=tokens < n_tokens, other=0)
    else:
        return tokens // seq_len * seq_len


@jit
def _ends(ends_ptr, tokens, n_tokens, seq_len, DOCUMENTS: constexpr):
    """Ends of the documents, or windows, of `tokens`: the first token that is not theirs any more."""
    if DOCUMENTS:
        return tl.load(ends_ptr + tokens, mask=tokens < n_tokens, other=0)
    else:
        return (tokens // seq_len + 1) * seq_len


@jit
def _lse_at(tokens, head, seq_len, HEADS: constexpr):
    """Where lse (B, n, T) has them."""
    return tl.cast(tokens // seq_len * HEADS + head, tl.int64) * seq_len + tokens % seq_len


@jit
def _forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, starts_ptr, n_tokens, seq_len, scale,
    HEADS: constexpr, KV_HEADS: constexpr, WIDTH: constexpr, DOCUMENTS: constexpr, PRECISION: constexpr,
    ROWS: constexpr, COLS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    STRIDE: constexpr = (HEADS + 2 * KV_HEADS) * WIDTH
    # the heads of a block run together and share its keys in L2; late blocks, which see most keys, start first
    head = tl.program_id(0) % HEADS
    first = (tl.cdiv(n_tokens, ROWS) - 1 - tl.program_id(0) // HEADS) * ROWS
    stop = tl.minimum(first + ROWS, n_tokens)
    rows = first + tl.arange(0, ROWS)
    starts = _starts(starts_ptr, rows, n_tokens, seq_len, DOCUMENTS)
    first_start = _starts(starts_ptr, first, n_tokens, seq_len, DOCUMENTS)
    last_start = _starts(starts_ptr, stop - 1, n_tokens, seq_len, DOCUMENTS)
    keys = qkv_ptr + (HEADS + head // (HEADS // KV_HEADS)) * WIDTH
    values = keys + KV_HEADS * WIDTH
    scale *= 1.4426950408889634  # exp(x) is exp2(x log2(e)), and exp2 an instruction

    q = _tile(qkv_ptr + head * WIDTH, first, stop, ROWS, DEPTH, STRIDE, WIDTH)
    out = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for col in range(first_start, stop, COLS):
        k = _tile(keys, col, stop, COLS, DEPTH, STRIDE, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (col < last_start) | (col + COLS > first + 1):  # else every row sees every column: no comparisons
            cols = col + tl.arange(0, COLS)
            seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= starts[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a row of a later document sees nothing yet
        shares = tl.exp2(scores * scale - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(shares, 1)
        v = _tile(values, col, stop, COLS, DEPTH, STRIDE, WIDTH)
        out = tl.dot(shares.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        largest = larger
    _store_tile(out_ptr + head * WIDTH, out / total[:, None], first, stop, ROWS, DEPTH, HEADS * WIDTH, WIDTH)
    lse = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + _lse_at(rows, head, seq_len, HEADS), lse, mask=rows < n_tokens)


@jit
def _dq_kernel(
    dy_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, sums_ptr, starts_ptr, n_tokens, seq_len, scale,
    HEADS: constexpr, KV_HEADS: constexpr, WIDTH: constexpr, DOCUMENTS: constexpr, PRECISION: constexpr,
    ROWS: constexpr, COLS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """sums: (2, n, B T) fp32, for the other kernel: lse in base 2, and D."""
    STRIDE: constexpr = (HEADS + 2 * KV_HEADS) * WIDTH
    head = tl.program_id(0) % HEADS
    first = (tl.cdiv(n_tokens, ROWS) - 1 - tl.program_id(0) // HEADS) * ROWS
    stop = tl.minimum(first + ROWS, n_tokens)
    rows = first + tl.arange(0, ROWS)
    starts = _starts(starts_ptr, rows, n_tokens, seq_len, DOCUMENTS)
    first_start = _starts(starts_ptr, first, n_tokens, seq_len, DOCUMENTS)
    last_start = _starts(starts_ptr, stop - 1, n_tokens, seq_len, DOCUMENTS)
    keys = qkv_ptr + (HEADS + head // (HEADS // KV_HEADS)) * WIDTH
    values = keys + KV_HEADS * WIDTH

    dy = _tile(dy_ptr + head * WIDTH, first, stop, ROWS, DEPTH, HEADS * WIDTH, WIDTH)
    out = _tile(out_ptr + head * WIDTH, first, stop, ROWS, DEPTH, HEADS * WIDTH, WIDTH)
    delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + _lse_at(rows, head, seq_len, HEADS), mask=rows < n_tokens, other=0.0) * 1.4426950408889634
    plane = tl.cast(head, tl.int64) * n_tokens
    tl.store(sums_ptr + plane + rows, lse, mask=rows < n_tokens)
    tl.store(sums_ptr + (plane + HEADS * n_tokens) + rows, delta, mask=rows < n_tokens)

    q = _tile(qkv_ptr + head * WIDTH, first, stop, ROWS, DEPTH, STRIDE, WIDTH)
    dq = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    for col in range(first_start, stop, COLS):
        k = _tile(keys, col, stop, COLS, DEPTH, STRIDE, WIDTH)
        v = _tile(values, col, stop, COLS, DEPTH, STRIDE, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (col < last_start) | (col + COLS > first + 1):
            cols = col + tl.arange(0, COLS)
            seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= starts[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        shares = tl.exp2(scores * (scale * 1.4426950408889634) - lse[:, None])
        dshares = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        dscores = shares * (dshares - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    _store_tile(dqkv_ptr + head * WIDTH, dq * scale, first, stop, ROWS, DEPTH, STRIDE, WIDTH)


@jit
def _dkv_kernel(
    dy_ptr, qkv_ptr, sums_ptr, dqkv_ptr, ends_ptr, n_tokens, seq_len, scale,
    HEADS: constexpr, KV_HEADS: constexpr, WIDTH: constexpr, DOCUMENTS: constexpr, PRECISION: constexpr,
    ROWS: constexpr, COLS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    STRIDE: constexpr = (HEADS + 2 * KV_HEADS) * WIDTH
    GROUP: constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    first = tl.program_id(0) // KV_HEADS * COLS  # early keys, which most queries see, start first
    stop = tl.minimum(first + COLS, n_tokens)
    cols = first + tl.arange(0, COLS)
    ends = _ends(ends_ptr, cols, n_tokens, seq_len, DOCUMENTS)
    first_end = _ends(ends_ptr, first, n_tokens, seq_len, DOCUMENTS)
    last_end = _ends(ends_ptr, stop - 1, n_tokens, seq_len, DOCUMENTS)
    key = (HEADS + kv_head) * WIDTH
    k = _tile(qkv_ptr + key, first, stop, COLS, DEPTH, STRIDE, WIDTH)
    v = _tile(qkv_ptr + key + KV_HEADS * WIDTH, first, stop, COLS, DEPTH, STRIDE, WIDTH)
    dk = tl.zeros((COLS, DEPTH), dtype=tl.float32)
    dv = tl.zeros((COLS, DEPTH), dtype=tl.float32)
    blocks = tl.cdiv(last_end - first, ROWS)
    for i in range(GROUP * blocks):  # heads and blocks in one loop: its pipeline fills once
        head = kv_head * GROUP + i // blocks
        row = first + i % blocks * ROWS
        rows = row + tl.arange(0, ROWS)
        q = _tile(qkv_ptr + head * WIDTH, row, last_end, ROWS, DEPTH, STRIDE, WIDTH)
        dy = _tile(dy_ptr + head * WIDTH, row, last_end, ROWS, DEPTH, HEADS * WIDTH, WIDTH)
        plane = tl.cast(head, tl.int64) * n_tokens
        lse = tl.load(sums_ptr + plane + rows, mask=rows < last_end, other=0.0)
        delta = tl.load(sums_ptr + (plane + HEADS * n_tokens) + rows, mask=rows < last_end, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (COLS, ROWS), as dk and dv need it
        if (row < first + COLS - 1) | (row + ROWS > first_end):
            seen = (rows[None, :] >= cols[:, None]) & (rows[None, :] < ends[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        shares = tl.exp2(scores * (scale * 1.4426950408889634) - lse[None, :])
        dv = tl.dot(shares.to(dy.dtype), dy, dv, input_precision=PRECISION)
        dshares = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        dscores = shares * (dshares - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    _store_tile(dqkv_ptr + key, dk * scale, first, stop, COLS, DEPTH, STRIDE, WIDTH)
    _store_tile(dqkv_ptr + key + KV_HEADS * WIDTH, dv, first, stop, COLS, DEPTH, STRIDE, WIDTH)


@dataclass(frozen=True)
class Tile:
    """One kernel's block and how it is compiled."""

    rows: int  # queries
    cols: int  # keys
    warps: int
    stages: int  # loads in flight: 1 on CDNA, where loads go through registers


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched; a pure function of head size, dtype and architecture.

    A tile is as large as the registers of a thread allow without a spill, and where there is a choice so large that two or three
    programs fit a multiprocessor: while one is at its exponentials, another keeps the matrix unit busy. Triton 3.9's registers.
    """

    forward: Tile
    dq: Tile
    dkv: Tile

    @classmethod
    def of(cls, head: int, dtype: torch.dtype, arch: str) -> "Launch":
        """The launch for heads of `head` elements on `arch` (see backend.Gpu).

        An architecture that is not here gets the launch of sm_80, whose instructions later ones still have.
        """
        depth = max(16, 1 << (head - 1).bit_length())
        if (
            arch == "interpreter"
        ):  # 0.1 ms an operation whatever the block, and still several blocks in a test's documents
            return cls(*[Tile(32, 32, 4, 1)] * 3)
        if dtype == torch.float32:  # exact products have no matrix unit: every thread holds whole rows and columns
            return cls(*[Tile(32, 32, 8, 1) if depth <= 64 else Tile(16, 16, 8, 1)] * 3)
        if arch.startswith("sm_9"):
            if depth <= 64:  # 123, 155 and 212 registers: 2, 3 and 2 programs
                return cls(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
            return cls(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2))  # 204, 206 and 228: 1, 2 and 2
        if arch.startswith("sm_10"):  # sums are in tensor memory, which two programs share
            if depth <= 64:
                return cls(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))
            return cls(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2))
        if arch.startswith("gfx9"):  # 64 threads a wave and 512 registers: one tile more a wave, no loads in flight
            if depth <= 64:
                return cls(Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))
            return cls(Tile(128, 64, 8, 1), Tile(64, 32, 4, 1), Tile(64, 64, 4, 1))
        if depth <= 64:  # a warp with 32 rows reads half as much shared memory a product as one with 16
            return cls(Tile(128, 64, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2))
        return cls(Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(32, 32, 4, 2))


def _launch(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Launch, dict[str, Any]]:
    """The launch, and the constants that all kernels share."""
    head = qkv.shape[2] // (num_heads + 2 * num_kv_heads)
    constants = {
        "HEADS": num_heads, "KV_HEADS": num_kv_heads, "WIDTH": head, "DEPTH": max(16, 1 << (head - 1).bit_length()),
        # tf32 would lose 13 bits of fp32; for bf16 and fp16 there is one way only
        "PRECISION": "ieee",
    }  # fmt: skip
    return Launch.of(head, qkv.dtype, gpu_of(qkv).arch), constants


def _block(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLS": tile.cols, "num_warps": tile.warps, "num_stages": tile.stages}


def _spans(qkv: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """First token and end of the document of every token, int32 (B T,); anything without documents: windows need no table."""
    if cu_seqlens is None:
        return qkv, qkv, {"DOCUMENTS": False}
    tokens, borders = qkv.shape[0] * qkv.shape[1], cu_seqlens.contiguous()
    starts, ends = qkv.new_empty(2, tokens, dtype=torch.int32)
    count = borders.numel()
    _spans_kernel[(-(-tokens // 1024),)](
        borders, starts, ends, count, tokens, max(1, count - 1).bit_length(), BLOCK=1024, num_warps=4
    )
    return starts, ends, {"DOCUMENTS": True}


def forward_triton(qkv: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp on a GPU (or in Triton's interpreter)."""
    batch, seq_len, _ = qkv.shape
    launch, constants = _launch(qkv, num_heads, num_kv_heads)
    out = qkv.new_empty(batch, seq_len, num_heads * constants["WIDTH"])
    lse = qkv.new_empty(batch, num_heads, seq_len, dtype=torch.float32)
    if qkv.numel() == 0:
        return out, lse
    tokens, tile = batch * seq_len, launch.forward
    starts, _, documents = _spans(qkv, cu_seqlens)
    _forward_kernel[(-(-tokens // tile.rows) * num_heads,)](
        qkv, out, lse, starts, tokens, seq_len, constants["WIDTH"] ** -0.5, **documents, **constants, **_block(tile)
    )
    return out, lse


def backward_triton(
    dy: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, num_kv_heads: int, cu_seqlens: Tensor | None
) -> Tensor:
    """The gradient of qkv on a GPU (or in Triton's interpreter)."""
    batch, seq_len, _ = qkv.shape
    launch, constants = _launch(qkv, num_heads, num_kv_heads)
    dqkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return dqkv
    tokens, scale = batch * seq_len, constants["WIDTH"] ** -0.5
    starts, ends, documents = _spans(qkv, cu_seqlens)
    sums = lse.new_empty(2, num_heads, tokens)
    _dq_kernel[(-(-tokens // launch.dq.rows) * num_heads,)](
        dy, qkv, out, lse, dqkv, sums, starts, tokens, seq_len, scale, **documents, **constants, **_block(launch.dq)
    )
    _dkv_kernel[(-(-tokens // launch.dkv.cols) * num_kv_heads,)](
        dy, qkv, sums, dqkv, ends, tokens, seq_len, scale, **documents, **constants, **_block(launch.dkv)
    )
    return dqkv
