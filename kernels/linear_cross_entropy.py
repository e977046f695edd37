"""Head and cross-entropy in one op that never holds all logits.

    z = scale * (x W^T), columns >= valid_vocab at -inf;   l = logsumexp(z) - z[target] + z_loss * logsumexp(z)^2
    loss = loss_weight * sum of l over the targets that are not ignore_index
    dz = loss_weight * ((1 + 2 z_loss logsumexp(z)) softmax(z) - onehot(target));   dx = scale dz W;   dW += scale dz^T x

x: (N, D), W: (V, D), targets: (N,) int64. Products are in the dtype of x, softmax in fp32 (fp64 for fp64). Rows are worked
on in chunks; when gradients are wanted they are made in the same pass, dz in place of z, dW accumulated in fp32. The GEMMs are
those of linear.py; between them one pass over the logits: C++ on a CPU.
"""

from ctypes import byref, c_float, c_int, c_int64
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels.backend import LIBRARY, choose, csrc, define, pointer, wide
from hyperllama.kernels.linear import accumulate_product, product

# of fp32 logits at a time: what stays in the last cache from their product to the next two, and is little beside the activations
CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 26}
LEAST_ROWS = 1024  # but no fewer rows: every chunk reads and writes all of dW, 295 MB at V = 128256, D = 576


def chunks(x: Tensor, weight: Tensor, chunk_bytes: int | None) -> list[slice]:
    """The rows of x (N, D) that are worked on together; without `chunk_bytes`, as the device likes it."""
    rows = max(LEAST_ROWS, (chunk_bytes or CHUNK_BYTES.get(x.device.type, 1 << 26)) // (4 * weight.shape[0]))
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


def softmax_gradient_reference(
    logits: Tensor, targets: Tensor, loss_weight: float, scale: float, valid_vocab: int | None, ignore_index: int,
    z_loss: float, gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses (R,) of some rows of logits (R, V), and dz in their dtype (meaningless without `gradient`); plain torch."""
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
    losses, lse = total.log() - of_target, total.log() + peak
    if z_loss:
        losses += z_loss * lse.square()
    losses = losses.squeeze(1).masked_fill(~counted, 0.0)
    if not gradient:
        return losses, logits
    dz = logits.div_(total)
    if z_loss:
        dz *= 1 + 2 * z_loss * lse
    dz.scatter_add_(1, index, torch.full_like(index, -1, dtype=dz.dtype))
    dz.mul_(loss_weight * scale).masked_fill_(~counted[:, None], 0.0)
    return losses, dz.to(kind)


def _softmax_gradient_csrc(
    logits: Tensor, targets: Tensor, loss_weight: float, scale: float, valid_vocab: int | None, ignore_index: int,
    z_loss: float, gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    targets, wrong = targets.contiguous(), c_int(0)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    if logits.numel():
        csrc("softmax_gradient")(
            int(logits.dtype == torch.bfloat16), pointer(logits), pointer(targets), pointer(losses), byref(wrong),
            c_int64(logits.shape[0]), c_int64(logits.shape[1]), c_int64(valid_vocab or logits.shape[1]), c_int64(ignore_index),
            c_float(scale), c_float(z_loss), c_float(loss_weight), int(gradient),
            torch.get_num_threads(),
        )  # fmt: skip
    if wrong.value:
        raise IndexError(f"linear_cross_entropy: a target is outside the vocabulary of {logits.shape[1]} tokens")
    return losses, logits


def _softmax_gradient(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    implementations = {"reference": softmax_gradient_reference, "csrc": _softmax_gradient_csrc}
    return choose(implementations, logits)(logits, *options)


def _forward_backward(
    x: Tensor, weight: Tensor, targets: Tensor, dweight: Tensor, loss_weight: float, scale: float, valid_vocab: int | None,
    ignore_index: int, z_loss: float, chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, dx); dW is added to `dweight` (V, D) fp32 in place."""
    loss = torch.zeros((), dtype=wide(x.dtype), device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in chunks(x, weight, chunk_bytes):
        logits = product(x[rows], weight)
        losses, dz = _softmax_gradient(
            logits, targets[rows], loss_weight, scale, valid_vocab, ignore_index, z_loss, True
        )
        loss += losses.sum()
        dx[rows] = product(dz, weight.t())
        accumulate_product(dweight, dz, x[rows])
    return loss * loss_weight, dx


def _functional(
    x: Tensor, weight: Tensor, targets: Tensor, loss_weight: float, scale: float, valid_vocab: int | None, ignore_index: int,
    z_loss: float, chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dweight = torch.zeros(weight.shape, dtype=wide(weight.dtype), device=weight.device)
    loss, dx = _forward_backward(
        x, weight, targets, dweight, loss_weight, scale, valid_vocab, ignore_index, z_loss, chunk_bytes
    )
    return loss, dx, dweight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.dtype = inputs[1].dtype


def _gradients(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dweight = ctx.saved_tensors
    return (dx * dloss).to(dx.dtype), (dweight * dloss).to(ctx.dtype), *(None,) * 7


_OPTIONS = "float loss_weight, float scale, int? valid_vocab, int ignore_index, float z_loss, int? chunk_bytes"
_linear_cross_entropy = define(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _functional,
    lambda x, weight, targets, *options: (
        x.new_empty((), dtype=wide(x.dtype)),
        torch.empty_like(x, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape, dtype=wide(weight.dtype)),
    ),
)
torch.library.register_autograd("hyperllama::linear_cross_entropy", _gradients, setup_context=_setup, lib=LIBRARY)
_accumulate = define(
    "linear_cross_entropy_(Tensor x, Tensor weight, Tensor targets, Tensor(a!) dweight, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _forward_backward,
    lambda x, weight, targets, dweight, *options: (
        x.new_empty((), dtype=wide(x.dtype)),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
)


class _Accumulating(torch.autograd.Function):
    """Gradients are made in the forward: dW is already in the arena when the backward only hands dx on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor, *options: Any) -> Tensor:
        loss, dx = _accumulate(x, weight, targets, main_grad, *options)
        ctx.dx = dx
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if ctx.dx is None:
            raise RuntimeError("linear_cross_entropy: a second backward would miss the gradient already accumulated")
        dx, ctx.dx = ctx.dx, None
        return dx, *(None,) * 9


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, loss_weight: float = 1.0, logit_scale: float = 1.0,
    valid_vocab: int | None = None, ignore_index: int = -100, z_loss: float = 0.0, main_grad: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:  # fmt: skip
    """`loss_weight` times the summed cross-entropy, in nats, of targets (N,) under the head weight (V, D) at x (N, D).

    Columns from `valid_vocab` on only pad the vocabulary. `chunk_bytes` of fp32 logits (default: as the
    device likes it) are held at a time.
    Returns a scalar in fp32 (fp64). With `main_grad` (V, D) fp32 the weight's gradient is added to it in the forward; then
    `loss_weight` must hold the whole scale, as the upstream gradient is taken to be 1, and a second backward raises.
    Raises ValueError when shapes do not fit.
    """
    _check(x, weight, targets)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        losses = token_losses(
            x, weight, targets, logit_scale=logit_scale, valid_vocab=valid_vocab, ignore_index=ignore_index, z_loss=z_loss,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip
        return losses.sum() * loss_weight
    options = (loss_weight, logit_scale, valid_vocab, ignore_index, z_loss, chunk_bytes)
    if main_grad is None:
        return torch.ops.hyperllama.linear_cross_entropy(x, weight, targets, *options)[0]
    return _Accumulating.apply(x, weight, targets, main_grad, *options)


@torch.no_grad()
def token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0, valid_vocab: int | None = None,
    ignore_index: int = -100, z_loss: float = 0.0, chunk_bytes: int | None = None,
) -> Tensor:  # fmt: skip
    """The loss of every target (N,), fp32 (fp64) in nats; 0 where it is ignored. No gradients."""
    _check(x, weight, targets)
    out = torch.empty(targets.shape, dtype=wide(x.dtype), device=x.device)
    for rows in chunks(x, weight, chunk_bytes):
        logits = product(x[rows], weight)
        out[rows] = _softmax_gradient(
            logits, targets[rows], 1.0, logit_scale, valid_vocab, ignore_index, z_loss, False
        )[0]
    return out


def _check(x: Tensor, weight: Tensor, targets: Tensor) -> None:
    if x.dim() != 2 or x.shape[1:] != weight.shape[1:] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}; "
            "expected (N, D), (V, D), (N,)"
        )
