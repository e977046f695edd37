"""Table look-up whose gradient is added to the fp32 gradient that a tied head shares.

    y[i] = W[ids[i]];   dW[ids[i]] += dy[i], in the order of i

ids: (B, T) int64, W: (V, D), y: (B, T, D); dW: (V, D) fp32 (fp64). Deterministic on a CPU, which has it in C++, and on a GPU
by Triton: tokens are sorted by id, and sums of pieces of at most 16 of one id are added in a fixed order. `deterministic=False`
adds with atomics, in any order.
"""

from ctypes import c_int64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.errors import WrongIndex
from hyperllama.kernels.backend import (
    Differentiable,
    choose,
    constexpr,
    csrc,
    define,
    floating,
    forced,
    jit,
    pointer,
    same_device,
    tl,
    use,
    wide,
    wrong_index_flag,
)

# ---- reference


def embedding_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """W[ids]; plain torch."""
    try:
        return functional.embedding(ids, weight)
    except IndexError:  # torch's sentence on a CPU names nothing
        raise WrongIndex(f"embedding: an id is outside the vocabulary of {weight.shape[0]} tokens") from None


def embedding_backward_reference(grad: Tensor, ids: Tensor, dy: Tensor, deterministic: bool) -> None:
    """grad[ids] += dy in place, in plain torch: in the order of i on a CPU."""
    grad.index_add_(0, ids.flatten(), dy.flatten(0, -2).to(grad.dtype))


# ---- Triton


@jit
def _forward_kernel(ids_ptr, weight_ptr, y_ptr, flag_ptr, n_tokens, n_cols, vocab, ROWS: constexpr, COLS: constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_tokens
    ids = tl.load(ids_ptr + rows, mask=exists, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < vocab)
    tl.atomic_or(flag_ptr + rows * 0, 1, mask=known == 0)
    for start in range(0, n_cols, COLS):
        cols = start + tl.arange(0, COLS)
        inside = (cols < n_cols)[None, :]
        row = tl.load(weight_ptr + (ids * n_cols)[:, None] + cols[None, :], mask=inside & known[:, None], other=0.0)
        tl.store(y_ptr + (rows * n_cols)[:, None] + cols[None, :], row, mask=inside & exists[:, None])


@jit
def _piece_kernel(
    dy_ptr, sorted_ptr, order_ptr, grad_ptr, partial_ptr, n_tokens, n_cols, vocab, PIECE: constexpr, COLS: constexpr
):
    """Program i, where place i of the sorted tokens begins a piece: the tokens of one id up to the next multiple of PIECE.

    An id that is all in one piece goes straight to the gradient. Of others, a chunk of PIECE places holds at most the end of one
    that began before it (row 2 c of `partial`) and the beginning of one that goes on after it (row 2 c + 1).
    """
    i = tl.program_id(0)
    token = tl.load(sorted_ptr + i)
    before = tl.load(sorted_ptr + i - 1, mask=i > 0, other=-2)
    if ((i % PIECE == 0) | (token != before)) & (token >= 0) & (token < vocab):
        chunk = i // PIECE
        rows = i + tl.arange(0, PIECE)
        inside = (rows < (chunk + 1) * PIECE) & (rows < n_tokens)
        same = inside & (tl.load(sorted_ptr + rows, mask=inside, other=-2) == token)
        end = i + tl.sum(same.to(tl.int32), axis=0)
        after = tl.load(sorted_ptr + end, mask=end < n_tokens, other=-2)
        order = tl.load(order_ptr + rows, mask=same, other=0)
        for start in range(0, n_cols, COLS):
            cols = start + tl.arange(0, COLS)
            wanted = same[:, None] & (cols < n_cols)[None, :]
            dy = tl.load(dy_ptr + (order * n_cols)[:, None] + cols[None, :], mask=wanted, other=0.0)
            total = tl.sum(dy.to(tl.float32), axis=0)
            if (before != token) & (after != token):
                to = grad_ptr + token.to(tl.int64) * n_cols + cols
                tl.store(to, tl.load(to, mask=cols < n_cols, other=0.0) + total, mask=cols < n_cols)
            else:
                row = 2 * chunk.to(tl.int64) + (before != token).to(tl.int64)
                tl.store(partial_ptr + row * n_cols + cols, total, mask=cols < n_cols)


@jit
def _join_kernel(
    sorted_ptr, grad_ptr, partial_ptr, n_tokens, n_cols, vocab, PIECE: constexpr, CHUNKS: constexpr, COLS: constexpr
):
    """Program c, where an id begins in chunk c and goes on after it: adds up its pieces, CHUNKS chunks at a time."""
    c = tl.program_id(0)
    first, after = c * PIECE, (c + 1) * PIECE
    if after < n_tokens:
        token = tl.load(sorted_ptr + after)
        last = tl.load(sorted_ptr + after - 1)
        before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-2)
        begins = (tl.load(sorted_ptr + first) != token) | (before != token)
        if begins & (last == token) & (token >= 0) & (token < vocab):
            for start in range(0, n_cols, COLS):
                cols = start + tl.arange(0, COLS)
                inside = cols < n_cols
                total = tl.load(partial_ptr + (2 * c.to(tl.int64) + 1) * n_cols + cols, mask=inside, other=0.0)
                chunk = c + 1 + tl.arange(0, CHUNKS)
                left = CHUNKS
                while left == CHUNKS:
                    exists = chunk * PIECE < n_tokens
                    same = exists & (tl.load(sorted_ptr + chunk * PIECE, mask=exists, other=-2) == token)
                    at = (2 * chunk.to(tl.int64) * n_cols)[:, None] + cols[None, :]
                    pieces = tl.load(partial_ptr + at, mask=same[:, None] & inside[None, :], other=0.0)
                    total += tl.sum(pieces, axis=0)
                    left = tl.sum(same.to(tl.int32), axis=0)
                    chunk += CHUNKS
                to = grad_ptr + token.to(tl.int64) * n_cols + cols
                tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


@jit
def _atomic_kernel(ids_ptr, dy_ptr, grad_ptr, n_tokens, n_cols, vocab, ROWS: constexpr, COLS: constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ids = tl.load(ids_ptr + rows, mask=rows < n_tokens, other=-1).to(tl.int64)
    known = (ids >= 0) & (ids < vocab)
    for start in range(0, n_cols, COLS):
        cols = start + tl.arange(0, COLS)
        inside = known[:, None] & (cols < n_cols)[None, :]
        dy = tl.load(dy_ptr + (rows * n_cols)[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.atomic_add(grad_ptr + (ids * n_cols)[:, None] + cols[None, :], dy, mask=inside, sem="relaxed")


PIECE = 16  # tokens of one id summed by one program; more would idle at the many ids that come once


@dataclass(frozen=True)
class Launch:
    """How the Triton kernels are launched; a pure function of the shape."""

    rows: int  # tokens of a block of the look-up and of the atomic gradient: 2048 elements, 16 a thread
    cols: int  # of a block; the largest power of two up to 256 that divides D, or masked lanes
    warps: int

    @classmethod
    def of(cls, n_cols: int) -> "Launch":
        """The launch for rows of n_cols."""
        cols = min(256, n_cols & -n_cols)
        if cols < 64:
            cols = min(256, max(16, 1 << (n_cols - 1).bit_length()))
        return cls(2048 // cols, cols, 4)


def _embedding_triton(ids: Tensor, weight: Tensor) -> Tensor:
    y = weight.new_empty(*ids.shape, weight.shape[1])
    if y.numel():
        launch = Launch.of(weight.shape[1])
        _forward_kernel[(-(-ids.numel() // launch.rows),)](
            ids.contiguous(), weight.contiguous(), y, wrong_index_flag(weight), ids.numel(), weight.shape[1], weight.shape[0],
            ROWS=launch.rows, COLS=launch.cols, num_warps=launch.warps,
        )  # fmt: skip
    return y


def _embedding_backward_triton(grad: Tensor, ids: Tensor, dy: Tensor, deterministic: bool) -> None:
    (vocab, n_cols), n_tokens = grad.shape, ids.numel()
    launch, dy = Launch.of(n_cols), dy.contiguous()
    if dy.numel() and deterministic:
        chunks = -(-n_tokens // PIECE)
        places, order = ids.flatten().clamp(-1, vocab).to(torch.int32).sort(stable=True)
        partial = grad.new_empty(2 * chunks, n_cols)
        _piece_kernel[(n_tokens,)](
            dy, places, order, grad, partial, n_tokens, n_cols, vocab,
            PIECE=PIECE, COLS=launch.cols, num_warps=launch.warps,
        )  # fmt: skip
        _join_kernel[(chunks,)](
            places, grad, partial, n_tokens, n_cols, vocab,
            PIECE=PIECE, CHUNKS=8, COLS=launch.cols, num_warps=launch.warps,
        )  # fmt: skip
    elif dy.numel():
        _atomic_kernel[(-(-n_tokens // launch.rows),)](
            ids.contiguous(), dy, grad, n_tokens, n_cols, vocab,
            ROWS=launch.rows, COLS=launch.cols, num_warps=launch.warps,
        )  # fmt: skip


# ---- C++


def _embedding_backward_csrc(grad: Tensor, ids: Tensor, dy: Tensor, deterministic: bool) -> None:
    ids, dy = ids.contiguous(), dy.contiguous()
    if not csrc("embedding_backward")(
        int(dy.dtype == torch.bfloat16), pointer(grad), pointer(ids), pointer(dy), c_int64(ids.numel()),
        c_int64(grad.shape[0]), c_int64(grad.shape[1]), torch.get_num_threads(),
    ):  # fmt: skip
        raise WrongIndex(f"embedding: an id is outside the vocabulary of {grad.shape[0]} tokens")


# ---- the op


def _look_up(ids: Tensor, weight: Tensor) -> Tensor:
    return choose({"reference": embedding_reference, "triton": _embedding_triton}, weight)(ids, weight)


def _backward(grad: Tensor, ids: Tensor, dy: Tensor, deterministic: bool = True) -> None:
    if grad.dim() != 2 or dy.shape != (*ids.shape, grad.shape[1]) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"embedding_backward: grad is {tuple(grad.shape)}, ids {tuple(ids.shape)} {ids.dtype}, dy {tuple(dy.shape)}; "
            "expected (V, D), int64 (...), (..., D)"
        )
    same_device("embedding_backward", grad=grad, ids=ids, dy=dy)
    fits = grad.dtype == torch.float32 and grad.is_contiguous() and ids.dtype == torch.int64
    kernels = {"triton": _embedding_backward_triton, "csrc": _embedding_backward_csrc} if fits else {}
    choose({"reference": embedding_backward_reference} | kernels, dy)(grad, ids, dy, deterministic)


embedding_backward_ = define(
    "embedding_backward_(Tensor(a!) grad, Tensor ids, Tensor dy, bool deterministic=True) -> ()",
    _backward,
    lambda grad, ids, dy, deterministic=True: None,
)


def _functional_backward(dy: Tensor, ids: Tensor, vocab: int, deterministic: bool) -> Tensor:
    grad = torch.zeros(vocab, dy.shape[-1], dtype=wide(dy.dtype), device=dy.device)
    _backward(grad, ids, dy, deterministic)
    return grad.to(dy.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, ctx.deterministic = inputs
    ctx.vocab = weight.shape[0]
    ctx.save_for_backward(ids)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return None, run(dy, ctx.saved_tensors[0], ctx.vocab, ctx.deterministic), None


_embedding = Differentiable(
    define(
        "embedding(Tensor ids, Tensor weight, bool deterministic) -> Tensor",
        lambda ids, weight, deterministic: _look_up(ids, weight),
        lambda ids, weight, deterministic: weight.new_empty(*ids.shape, weight.shape[1]),
    ),
    define(
        "embedding_backward(Tensor dy, Tensor ids, SymInt vocab, bool deterministic) -> Tensor",
        _functional_backward,
        lambda dy, ids, vocab, deterministic: dy.new_empty(vocab, dy.shape[-1]),
    ),
    _setup,
    _gradients,
)


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, main_grad: Tensor, deterministic: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.main_grad, ctx.deterministic, ctx.forced = main_grad, deterministic, forced()
        return _look_up(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        with use(ctx.forced):
            embedding_backward_(ctx.main_grad, ctx.saved_tensors[0], dy, ctx.deterministic)
        return None, None, None, None


def embedding(ids: Tensor, weight: Tensor, *, main_grad: Tensor | None = None, deterministic: bool = True) -> Tensor:
    """Rows of weight (V, D) for ids (B, T): (B, T, D); `main_grad` (V, D) fp32 receives the weight's gradient in place.

    Without `deterministic`, a GPU adds gradients of one id in any order. Raises ValueError when shapes, dtypes or devices do not
    fit. An id outside the vocabulary raises WrongIndex: at once on a CPU, from `check_indices` on a GPU, where its row is zeros.
    """
    floating("embedding", weight=weight)
    if weight.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"embedding: ids are {ids.dtype}, weight {tuple(weight.shape)}; expected int64 (int32) and (V, D)"
        )
    if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != wide(weight.dtype)):
        raise ValueError(
            f"embedding: main_grad is {tuple(main_grad.shape)} {main_grad.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
        )
    same_device("embedding", ids=ids, weight=weight, main_grad=main_grad)
    if main_grad is None:
        return _embedding(ids, weight, deterministic)
    return _Accumulating.apply(ids, weight, main_grad, deterministic)
