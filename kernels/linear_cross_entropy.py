"""Head and cross-entropy in one op that never holds all logits.

    z = scale * (x W^T), columns >= valid_vocab at -inf;   l = logsumexp(z) - z[target] + z_loss * logsumexp(z)^2
    loss = loss_weight * sum of l over the targets that are not ignore_index
    dz = loss_weight * ((1 + 2 z_loss logsumexp(z)) softmax(z) - onehot(target));   dx = scale dz W;   dW += scale dz^T x

x: (N, D), W: (V, D), targets: (N,) int64. Products are in the dtype of x, softmax in fp32 (fp64 for fp64). Rows are worked
on in chunks; when gradients are wanted they are made in the same pass, dz in place of z, dW accumulated in fp32. The GEMMs are
those of linear.py; between them one pass over the logits: Triton on a GPU, C++ on a CPU. With softmax="epilogue" there is no pass:
the first GEMM is a Triton kernel that makes what the other two need (linear_cross_entropy_epilogue.py).
"""

from ctypes import byref, c_float, c_int, c_int64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError, WrongIndex
from hyperllama.kernels.backend import (
    LIBRARY,
    choose,
    constexpr,
    csrc,
    define,
    floating,
    gpu_of,
    jit,
    pointer,
    same_device,
    tl,
    wide,
    wrong_index_flag,
)
from hyperllama.kernels.linear import accumulate_product, input_gradient, product
from hyperllama.kernels.linear_cross_entropy_epilogue import DTYPES, exponentials

# Where softmax is made: in a pass of its own between the products, or in the first one's epilogue, which no GPU has yet timed
SOFTMAX = ("pass", "epilogue")

# of fp32 logits at a time, half that in bf16. CPU: what stays in the last cache from their product to the next two, and is little
# beside the activations. GPU: 2 GiB of bf16 is 8320 rows at V = 128256; there dW's traffic is 3 % of the GEMMs' time
CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 32}
LEAST_ROWS = 1024  # but no fewer rows: every chunk reads and writes all of dW, 295 MB at V = 128256, D = 576
TILE_ROWS = 128  # of a GPU's GEMM


def chunks(x: Tensor, weight: Tensor, chunk_bytes: int | None) -> list[tuple[int, int]]:
    """(start, length) of the rows of x (N, D) that are worked on together; without `chunk_bytes`, as the device likes it."""
    count = x.shape[0]
    rows = max(LEAST_ROWS, (chunk_bytes or CHUNK_BYTES.get(x.device.type, 1 << 26)) // (4 * weight.shape[0]))
    if x.is_cuda and rows < count:  # whole tiles, and no small last chunk
        rows = rows // TILE_ROWS * TILE_ROWS
        tiles, parts = -(-count // TILE_ROWS), -(-count // rows)
        rows = -(-tiles // parts) * TILE_ROWS
    return [(start, min(rows, count - start)) for start in range(0, count, rows)]


# ---- reference


def softmax_gradient_reference(
    logits: Tensor, targets: Tensor, loss_weight: float, scale: float, valid_vocab: int | None, ignore_index: int,
    z_loss: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (R,) of some rows of logits (R, V), whether the target has the largest, and dz in their dtype; plain torch.

    dz is meaningless without `gradient`.
    """
    kind, logits = logits.dtype, logits.to(wide(logits.dtype))
    if scale != 1.0:
        logits *= scale
    if valid_vocab is not None:
        logits[:, valid_vocab:] = float("-inf")
    counted = targets != ignore_index
    index = torch.where(counted, targets, 0)[:, None]
    peak = logits.amax(-1, keepdim=True)
    logits -= peak  # before anything else: differences of large numbers are exact here, their exponentials are not
    of_target = logits.gather(1, index)
    total = logits.exp_().sum(-1, keepdim=True)
    correct = (of_target.squeeze(1) >= 0) & counted
    losses, lse = total.log() - of_target, total.log() + peak
    if z_loss:
        losses += z_loss * lse.square()
    losses = losses.squeeze(1).masked_fill(~counted, 0.0)
    if not gradient:
        return losses, correct, logits
    dz = logits.div_(total)
    if z_loss:
        dz *= 1 + 2 * z_loss * lse
    dz.scatter_add_(1, index, torch.full_like(index, -1, dtype=dz.dtype))
    dz.mul_(loss_weight * scale).masked_fill_(~counted[:, None], 0.0)
    return losses, correct, dz.to(kind)


# ---- Triton

LOG2_E = constexpr(1.4426950408889634)


@jit
def _softmax_gradient_kernel(
    logits_ptr, targets_ptr, losses_ptr, correct_ptr, flag_ptr, n_rows, n_cols, valid, ignore_index, scale, z_loss, loss_weight,
    GRADIENT: constexpr, COLS: constexpr,
):  # fmt: skip
    """Program p takes rows p, p + programs, ...: two passes over a row, in opposite directions.

    A row is read from DRAM once: the last block never leaves the registers, and what was read shortly before it is still in L1 (all
    of it in L2) when the second pass begins there. Each block is asked for before the one ahead of it is worked on. The gradient
    is written over the logits.
    """
    last = (valid - 1) // COLS
    cols = tl.arange(0, COLS)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        base = logits_ptr + row * tl.cast(n_cols, tl.int64)  # passes 2^31 at 16744 rows of V = 128256
        target = tl.load(targets_ptr + row)
        exists = (target >= 0) & (target < n_cols)
        tl.atomic_or(flag_ptr, 2, mask=(exists == 0) & (target != ignore_index))
        if exists & (target != ignore_index):
            of_target = tl.load(base + target).to(tl.float32) * scale
            of_target = tl.where(target < valid, of_target, float("-inf"))
            peak = float("-inf")
            total = tl.zeros(
                (COLS,), tl.float32
            )  # lane by lane, so that only the peak is shared by all threads at every block
            block = tl.load(base + cols, mask=cols < n_cols, other=0.0, eviction_policy="evict_last")
            for i in range(last):
                z = block.to(tl.float32) * scale
                at = (i + 1) * COLS + cols
                block = tl.load(base + at, mask=at < n_cols, other=0.0, eviction_policy="evict_last")
                higher = tl.maximum(peak, tl.max(z, axis=0))
                total = total * tl.exp2((peak - higher) * LOG2_E) + tl.exp2((z - higher) * LOG2_E)
                peak = higher
            at = last * COLS + cols
            z = tl.where(at < valid, block.to(tl.float32) * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(z, axis=0))
            total = total * tl.exp2((peak - higher) * LOG2_E) + tl.exp2((z - higher) * LOG2_E)
            sum_exp = tl.sum(total, axis=0)
            lse = tl.log(sum_exp) + higher
            tl.store(losses_ptr + row, tl.log(sum_exp) - (of_target - higher) + z_loss * lse * lse)
            tl.store(correct_ptr + row, (of_target >= higher).to(tl.int8))
            if GRADIENT:
                factor = loss_weight * scale * (1.0 + 2.0 * z_loss * lse) / sum_exp
                dz = tl.where(at < valid, tl.exp2((block.to(tl.float32) * scale - higher) * LOG2_E) * factor, 0.0)
                for i in range(last):
                    before = (last - 1 - i) * COLS + cols
                    block = tl.load(base + before, eviction_policy="evict_first")
                    tl.store(
                        base + at, dz.to(logits_ptr.dtype.element_ty), mask=at < n_cols, eviction_policy="evict_first"
                    )
                    dz = tl.exp2((block.to(tl.float32) * scale - higher) * LOG2_E) * factor
                    at = before
                tl.store(base + at, dz.to(logits_ptr.dtype.element_ty), mask=at < n_cols, eviction_policy="evict_first")
                for start in range((last + 1) * COLS, n_cols, COLS):  # columns that only pad the vocabulary
                    zeros = tl.zeros((COLS,), logits_ptr.dtype.element_ty)
                    tl.store(base + start + cols, zeros, mask=start + cols < n_cols)
                of_target = tl.exp2((of_target - higher) * LOG2_E) * factor - loss_weight * scale
                tl.debug_barrier()  # the target's column, last: another thread has written it without the one
                tl.store(base + target, of_target.to(logits_ptr.dtype.element_ty))
        else:
            tl.store(losses_ptr + row, 0.0)
            tl.store(correct_ptr + row, 0)
            if GRADIENT:
                for start in range(0, n_cols, COLS):
                    zeros = tl.zeros((COLS,), logits_ptr.dtype.element_ty)
                    tl.store(base + start + cols, zeros, mask=start + cols < n_cols, eviction_policy="evict_first")


@dataclass(frozen=True)
class Launch:
    """How the Triton kernel is launched; a pure function of the shape and number of multiprocessors."""

    cols: int  # of a block: 16 a thread, with the block ahead and the lanes' sums in registers enough for two programs
    warps: int
    programs: (
        int  # so many rows at a time: two a multiprocessor overlap one's waiting with the other's work, and of their
    )
    # 512 kB of bf16 each, a third is in registers and L1; the rest, 45 MB, in an H200's L2 of 50 MB

    @classmethod
    def of(cls, n_rows: int, n_cols: int, multiprocessors: int) -> "Launch":
        """The launch for logits (n_rows, n_cols)."""
        cols = min(4096, max(128, 1 << (n_cols - 1).bit_length()))
        rows_at_a_time = max(2, min(16, 262144 // n_cols))
        return cls(cols, max(1, cols // 512), min(n_rows, rows_at_a_time * multiprocessors))


def _softmax_gradient_triton(
    logits: Tensor, targets: Tensor, loss_weight: float, scale: float, valid_vocab: int | None, ignore_index: int,
    z_loss: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n_rows, n_cols = logits.shape
    losses = logits.new_empty(n_rows, dtype=torch.float32)
    correct = logits.new_empty(n_rows, dtype=torch.int8)
    if logits.numel():
        launch = Launch.of(n_rows, n_cols, gpu_of(logits).multiprocessors)
        _softmax_gradient_kernel[(launch.programs,)](
            logits, targets.contiguous(), losses, correct, wrong_index_flag(logits), n_rows, n_cols, valid_vocab or n_cols,
            ignore_index, scale, z_loss, loss_weight, GRADIENT=gradient, COLS=launch.cols, num_warps=launch.warps,
        )  # fmt: skip
    return losses, correct.view(torch.bool), logits


# ---- C++


def _softmax_gradient_csrc(
    logits: Tensor, targets: Tensor, loss_weight: float, scale: float, valid_vocab: int | None, ignore_index: int,
    z_loss: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    targets, wrong = targets.contiguous(), c_int(0)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    correct = torch.empty(logits.shape[0], dtype=torch.bool)
    if logits.numel():
        csrc("softmax_gradient")(
            int(logits.dtype == torch.bfloat16), pointer(logits), pointer(targets), pointer(losses), pointer(correct),
            byref(wrong), c_int64(logits.shape[0]), c_int64(logits.shape[1]), c_int64(valid_vocab or logits.shape[1]),
            c_int64(ignore_index), c_float(scale), c_float(z_loss), c_float(loss_weight), int(gradient),
            torch.get_num_threads(),
        )  # fmt: skip
    if wrong.value:
        raise WrongIndex(f"linear_cross_entropy: a target is outside the vocabulary of {logits.shape[1]} tokens")
    return losses, correct, logits


# ---- the op


def _softmax_gradient(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    implementations = {
        "reference": softmax_gradient_reference,
        "triton": _softmax_gradient_triton,
        "csrc": _softmax_gradient_csrc,
    }
    return choose(implementations, logits)(logits, *options)


def _no_epilogue(x: Tensor, *_: Any) -> Any:
    raise HyperLlamaError(
        f"linear_cross_entropy: softmax='epilogue' is a Triton kernel for bf16 and fp32 on a GPU; x is {x.dtype} on {x.device}"
    )


def _forward_backward(
    x: Tensor, weight: Tensor, targets: Tensor, dweight: Tensor | None, loss_weight: float, scale: float,
    valid_vocab: int | None, ignore_index: int, z_loss: float, chunk_bytes: int | None, softmax: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses, correct, dx); dW is added to `dweight` (V, D) fp32 in place. Without it there are no gradients: dx is empty."""
    losses = torch.empty(targets.shape, dtype=wide(x.dtype), device=x.device)
    correct = torch.empty(targets.shape, dtype=torch.bool, device=x.device)
    dx = torch.empty(x.shape if dweight is not None else (0,), dtype=x.dtype, device=x.device)
    options = (loss_weight, scale, valid_vocab, ignore_index, z_loss, dweight is not None)
    in_epilogue = choose({"reference": _no_epilogue} | ({"triton": exponentials} if x.dtype in DTYPES else {}), x)
    for part in chunks(x, weight, chunk_bytes):
        rows, some_targets = x.narrow(0, *part), targets.narrow(0, *part)
        if softmax == "epilogue":
            *some, dz, factors = in_epilogue(rows, weight, some_targets, *options)
        else:
            *some, dz = _softmax_gradient(product(rows, weight), some_targets, *options)
            factors = None
        losses.narrow(0, *part).copy_(some[0])
        correct.narrow(0, *part).copy_(some[1])
        if dweight is not None:
            drows = input_gradient(dz, weight)
            if factors is not None:  # of rows of dz; x and dx are narrower
                drows.mul_(factors[:, None])
                rows = torch.mul(rows, factors[:, None], out=torch.empty_like(rows))
            dx.narrow(0, *part).copy_(drows)
            accumulate_product(dweight, dz, rows)
        del dz  # before the next chunk's: never two chunks of logits at a time
    return losses, correct, dx


def _functional(
    x: Tensor, weight: Tensor, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dweight = torch.zeros(weight.shape, dtype=wide(weight.dtype), device=weight.device)
    losses, correct, dx = _forward_backward(x, weight, targets, dweight, *options)
    return losses.sum() * options[0], dx, dweight, losses, correct


def _accumulating(
    x: Tensor, weight: Tensor, targets: Tensor, dweight: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, correct, dx = _forward_backward(x, weight, targets, dweight, *options)
    return losses.sum() * options[0], dx, losses, correct


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.dtype = inputs[1].dtype


def _gradients(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dweight = ctx.saved_tensors
    return (dx * dloss).to(dx.dtype), (dweight * dloss).to(ctx.dtype), *(None,) * 8


def _fake(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    losses = targets.new_empty(targets.shape, dtype=wide(x.dtype))
    return x.new_empty((), dtype=wide(x.dtype)), dx, losses, targets.new_empty(targets.shape, dtype=torch.bool)


def _fake_functional(x: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    loss, dx, losses, correct = _fake(x, targets)
    return loss, dx, weight.new_empty(weight.shape, dtype=wide(weight.dtype)), losses, correct


_OPTIONS = (
    "float loss_weight, float scale, int? valid_vocab, int ignore_index, float z_loss, int? chunk_bytes, str softmax"
)
_linear_cross_entropy = define(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _functional,
    _fake_functional,
)
torch.library.register_autograd("hyperllama::linear_cross_entropy", _gradients, setup_context=_setup, lib=LIBRARY)
_accumulate = define(
    f"linear_cross_entropy_(Tensor x, Tensor weight, Tensor targets, Tensor(a!) dweight, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _accumulating,
    lambda x, weight, targets, dweight, *options: _fake(x, targets),
)


class _Accumulating(torch.autograd.Function):
    """Gradients are made in the forward: dW is already in the arena when the backward only hands dx on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor, *options: Any) -> Any:
        loss, dx, losses, correct = _accumulate(x, weight, targets, main_grad, *options)
        ctx.dx = dx
        ctx.mark_non_differentiable(losses, correct)
        ctx.set_materialize_grads(False)
        return loss, losses, correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if ctx.dx is None:
            raise RuntimeError("linear_cross_entropy: a second backward would miss the gradient already accumulated")
        dx, ctx.dx = ctx.dx, None
        return dx, *(None,) * 10


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, loss_weight: float = 1.0, logit_scale: float = 1.0,
    valid_vocab: int | None = None, ignore_index: int = -100, z_loss: float = 0.0, main_grad: Tensor | None = None,
    chunk_bytes: int | None = None, losses: Tensor | None = None, correct: Tensor | None = None, softmax: str = "pass",
) -> Tensor:  # fmt: skip
    """`loss_weight` times the summed cross-entropy, in nats, of targets (N,) under the head weight (V, D) at x (N, D).

    Columns from `valid_vocab` on only pad the vocabulary. `chunk_bytes` of fp32 logits (default: as the
    device likes it) are held at a time. `losses` (N,) fp32 (fp64) receives the loss of every target, 0 where it is ignored, and
    `correct` (N,) bool whether no logit is larger than the target's; neither has a gradient. `softmax` is made in a "pass" over the
    logits or in the "epilogue" of their product: bf16 and fp32 on a GPU, not yet measured on one, no logits without gradients.
    Returns a scalar in fp32 (fp64). With `main_grad` (V, D) fp32 the weight's gradient is added to it in the forward; then
    `loss_weight` must hold the whole scale, as the upstream gradient is taken to be 1, and a second backward raises.
    Raises ValueError when shapes, dtypes or devices do not fit, HyperLlamaError where there is no epilogue. A target outside the
    vocabulary raises WrongIndex: at once on a CPU, from `check_indices` on a GPU, where it is left out.
    """
    _check(x, weight, targets, valid_vocab, softmax, main_grad, losses, correct)
    options = (loss_weight, logit_scale, valid_vocab, ignore_index, z_loss, chunk_bytes, softmax)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        each, hits, _ = _forward_backward(x, weight, targets, None, *options)
        loss = each.sum() * loss_weight
    elif main_grad is None:
        loss, _, _, each, hits = torch.ops.hyperllama.linear_cross_entropy(x, weight, targets, *options)
    else:
        loss, each, hits = _Accumulating.apply(x, weight, targets, main_grad, *options)
    for buffer, values in ((losses, each), (correct, hits)):
        if buffer is not None:
            buffer.copy_(values.detach())
    return loss


@torch.no_grad()
def token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0, valid_vocab: int | None = None,
    ignore_index: int = -100, z_loss: float = 0.0, chunk_bytes: int | None = None, softmax: str = "pass",
) -> Tensor:  # fmt: skip
    """The loss of every target (N,), fp32 (fp64) in nats; 0 where it is ignored. No gradients."""
    _check(x, weight, targets, valid_vocab, softmax)
    return _forward_backward(
        x, weight, targets, None, 1.0, logit_scale, valid_vocab, ignore_index, z_loss, chunk_bytes, softmax
    )[0]


def _check(
    x: Tensor, weight: Tensor, targets: Tensor, valid_vocab: int | None, softmax: str, main_grad: Tensor | None = None,
    losses: Tensor | None = None, correct: Tensor | None = None,
) -> None:  # fmt: skip
    floating("linear_cross_entropy", x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}; "
            "expected (N, D), (V, D), (N,)"
        )
    if weight.dtype != x.dtype or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: x is {x.dtype}, weight {weight.dtype}, targets {targets.dtype}; "
            "expected one dtype and int64 targets"
        )
    if valid_vocab is not None and not 1 <= valid_vocab <= weight.shape[0]:
        raise ValueError(f"linear_cross_entropy: valid_vocab is {valid_vocab}, expected 1 to {weight.shape[0]}")
    if softmax not in SOFTMAX:
        raise ValueError(f"linear_cross_entropy: softmax is {softmax!r}, expected one of {', '.join(SOFTMAX)}")
    wanted = {"main_grad": (main_grad, weight.shape, wide(x.dtype)), "losses": (losses, targets.shape, wide(x.dtype))}
    for name, (buffer, shape, dtype) in (wanted | {"correct": (correct, targets.shape, torch.bool)}).items():
        if buffer is not None and (buffer.shape != shape or buffer.dtype != dtype):
            raise ValueError(
                f"linear_cross_entropy: {name} is {tuple(buffer.shape)} {buffer.dtype}, expected {tuple(shape)} {dtype}"
            )
    same_device(
        "linear_cross_entropy", x=x, weight=weight, targets=targets, main_grad=main_grad, losses=losses, correct=correct
    )
