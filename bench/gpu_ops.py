"""The problems of bench.gpu: inputs, calls, least traffic, useful FLOPs, peers and targets of every op on a GPU.

Traffic counts every input read once and every output written once; FLOPs are those of the products that the result needs (causal
attention: half; nothing recomputed). Targets are the shares of the copy's speed that a memory-bound op has to reach.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels import merge
from hyperllama.kernels import rms_norm as norm
from hyperllama.kernels.adamw import adamw as update
from hyperllama.kernels.attention import attention
from hyperllama.kernels.glu import glu_backward_reference, glu_reference
from hyperllama.kernels.grad_norm import grad_norm as total_norm
from hyperllama.kernels.grow import grow
from hyperllama.kernels.linear_cross_entropy import linear_cross_entropy
from hyperllama.kernels.rope import rope_reference, rope_tables

from .shapes import Shape

OPS = torch.ops.hyperllama
SEQ_LEN, MODELS, EPS = 2048, 5, 1e-5
BF16 = torch.bfloat16
Inputs = Sequence[Any]


@dataclass(frozen=True)
class Problem:
    """One op at one shape. `call` returns fresh outputs; where it writes to its inputs, it returns those."""

    bytes: int
    flops: int
    inputs: Callable[[str], Inputs]  # fresh, random, contiguous, on a device
    call: Callable[..., Any]
    share: float | None = None  # of the copy's speed; None: told only
    deterministic: bool = True
    in_place: bool = False
    plain: Callable[..., Any] | None = None  # the op in plain torch, to be given to torch.compile
    peers: dict[str, Callable[..., Any]] = field(
        default_factory=dict
    )  # called with the same inputs; a set-up may raise


def random(device: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal values, fresh every time."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def rms_norm(shape: Shape, tokens: int) -> Problem:
    """Of the sum with a residual: reads x and residual, writes y and the sum."""
    h = shape.hidden_size

    def liger(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
        return function.apply(x, residual, weight, EPS, 0.0, "llama", False)

    def quack(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return import_module("quack").rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)

    return Problem(
        8 * tokens * h + 6 * h + 4 * tokens, 0,
        lambda device: (random(device, tokens, h), random(device, tokens, h), random(device, h)),
        lambda x, residual, weight: OPS.rms_norm(x, residual, weight, EPS), 0.92,
        plain=lambda x, residual, weight: norm.forward_reference(x, residual, weight, EPS),
        peers={"liger": liger, "quack": quack},
    )  # fmt: skip


def rms_norm_backward(shape: Shape, tokens: int) -> Problem:
    """Reads the gradients of y and of the sum, and the sum; writes its gradient."""
    h = shape.hidden_size
    return Problem(
        8 * tokens * h + 6 * h + 4 * tokens, 0,
        lambda device: (
            *(random(device, tokens, h) for _ in range(3)), random(device, h), random(device, tokens, dtype=torch.float32).abs(),
        ),
        OPS.rms_norm_backward, 0.88, plain=norm.backward_reference,
    )  # fmt: skip


def rope(shape: Shape, tokens: int) -> Problem:
    """In place on the packed projection: queries and keys."""
    rotated = shape.num_heads + shape.num_kv_heads

    def call(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        OPS.rope_(qkv, cos, sin, None, rotated, False)
        return qkv

    def plain(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope_reference(qkv, qkv, cos, sin, None, rotated, False)
        return qkv

    return Problem(
        4 * tokens * rotated * shape.head_dim, 0,
        lambda device: (
            random(device, tokens // SEQ_LEN, SEQ_LEN, shape.qkv_width), *rope_tables(SEQ_LEN, shape.head_dim, 1e4, device=device),
        ),
        call, 0.90, in_place=True, plain=plain,
    )  # fmt: skip


def glu(shape: Shape, tokens: int) -> Problem:
    """Of the packed gate and up."""
    width = shape.intermediate_size

    def liger(gate_up: Tensor) -> Any:
        if shape.activation != "silu":
            raise NotImplementedError("Liger has tanh gelu only")
        return import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))

    return Problem(
        6 * tokens * width, 0, lambda device: (random(device, tokens, 2 * width),),
        lambda gate_up: OPS.glu(gate_up, shape.activation), 0.93, peers={"liger": liger},
        plain=lambda gate_up: glu_reference(gate_up, shape.activation),
    )  # fmt: skip


def glu_backward(shape: Shape, tokens: int) -> Problem:
    """Recomputes the activation."""
    width = shape.intermediate_size
    return Problem(
        10 * tokens * width, 0, lambda device: (random(device, tokens, width), random(device, tokens, 2 * width)),
        lambda dy, gate_up: OPS.glu_backward(dy, gate_up, shape.activation), 0.92,
        plain=lambda dy, gate_up: glu_backward_reference(dy, gate_up, shape.activation),
    )  # fmt: skip


def head(shape: Shape, tokens: int) -> Problem:
    """Loss and gradients of the head: three products, and logits read and written once by the pass between them.

    Liger's reads values on the host, which a CUDA graph can't capture: expect times of it in eager mode alone.
    """
    h, v = shape.hidden_size, shape.vocab_size

    def cce(x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor) -> Any:
        function = import_module("cut_cross_entropy").linear_cross_entropy
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = function(x, weight, targets, impl="cce_exact")  # the default leaves small gradients out
        return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))

    def liger(x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor) -> Any:
        name = "liger_kernel.ops.fused_linear_cross_entropy"
        function = import_module(name).LigerFusedLinearCrossEntropyFunction
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = function.apply(x, weight, targets)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))

    def call(x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor) -> Any:
        x = x.detach().requires_grad_()
        loss = linear_cross_entropy(x, weight, targets, loss_weight=1 / tokens, main_grad=main_grad.zero_())
        return loss.detach(), *torch.autograd.grad(loss, (x,)), main_grad

    def plain(x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor) -> Any:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = functional.cross_entropy(functional.linear(x, weight).float(), targets)
        return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))

    return Problem(
        4 * tokens * v, 6 * tokens * v * h,
        lambda device: (
            random(device, tokens, h), random(device, v, h) * h**-0.5, torch.randint(v, (tokens,), device=device),
            torch.zeros(v, h, device=device),
        ),
        call, in_place=True, plain=plain, peers={"liger": liger, "cut_cross_entropy": cce},
    )  # fmt: skip


def adamw(shape: Shape, tokens: int) -> Problem:
    """Master, gradient and moments fp32, weights bf16 written in the same pass; as many elements as tokens x hidden."""
    n = tokens * shape.hidden_size

    def call(
        master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor, lr: Tensor, step: Tensor, clip: Tensor
    ) -> Any:
        update(
            master, grad, m, v, weights, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=step, clip=clip
        )
        return master, m, v, weights

    def inputs(device: str) -> Inputs:
        flat = [random(device, n, dtype=torch.float32) for _ in range(3)]
        scalars = (torch.tensor(1e-3, device=device), torch.tensor(7, device=device), torch.tensor(0.5, device=device))
        return (
            *flat,
            random(device, n, dtype=torch.float32).square(),
            torch.empty(n, dtype=BF16, device=device),
            *scalars,
        )

    return Problem(30 * n, 0, inputs, call, 0.93, in_place=True)


def grad_norm(shape: Shape, tokens: int) -> Problem:
    """Reads the gradient."""
    n = tokens * shape.hidden_size
    return Problem(
        4 * n,
        0,
        lambda device: (random(device, n, dtype=torch.float32),),
        total_norm,
        plain=torch.linalg.vector_norm,
    )


def growth(shape: Shape, tokens: int) -> Problem:
    """Twice as many rows and columns: every element is read once and written four times."""
    return Problem(
        10 * tokens * shape.hidden_size, 0, lambda device: (random(device, tokens, shape.hidden_size),),
        lambda source: grow(source, 2, 2), 0.92, plain=lambda source: source.repeat(2, 2) / 2,
    )  # fmt: skip


def linear_merge(shape: Shape, tokens: int) -> Problem:
    """Five models, as the paper merges."""
    return _merge(shape, tokens, 0.92, lambda base, *models: merge.linear(models, [0.2] * MODELS), MODELS + 1)


def ties(shape: Shape, tokens: int) -> Problem:
    """Five models and their base, 30 % of each kept; least traffic, though the selection reads three times more."""
    return _merge(
        shape, tokens, None, lambda base, *models: merge.ties(base, models, [0.2] * MODELS, [0.3] * MODELS), MODELS + 2
    )


def _merge(shape: Shape, tokens: int, share: float | None, call: Callable[..., Any], tensors: int) -> Problem:
    n = tokens * shape.hidden_size
    return Problem(
        2 * n * tensors,
        0,
        lambda device: [random(device, tokens, shape.hidden_size) for _ in range(MODELS + 1)],
        call,
        share,
    )


def attend(shape: Shape, tokens: int, backward: bool) -> Problem:
    """Causal attention of whole windows; with `backward`, gradients too."""

    def by(backend: str) -> Callable[..., Any]:
        def call(qkv: Tensor, dy: Tensor) -> Any:
            qkv = qkv.detach().requires_grad_(backward)
            out = attention(qkv, shape.num_heads, shape.num_kv_heads, backend=backend)
            return (out.detach(), *torch.autograd.grad(out, (qkv,), dy)) if backward else out

        return call

    width = shape.num_heads * shape.head_dim
    flops = 2 * tokens * SEQ_LEN * width
    names = ("auto", "sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers")
    return Problem(
        2 * tokens * (shape.qkv_width + width) * (1 + backward), flops * (7 if backward else 2) // 2,
        lambda device: (
            random(device, tokens // SEQ_LEN, SEQ_LEN, shape.qkv_width), random(device, tokens // SEQ_LEN, SEQ_LEN, width),
        ),
        by("triton"), peers={name: by(name) for name in names},
    )  # fmt: skip


PROBLEMS: dict[str, Callable[[Shape, int], Problem]] = {
    "rms_norm": rms_norm,
    "rms_norm backward": rms_norm_backward,
    "rope": rope,
    "glu": glu,
    "glu backward": glu_backward,
    "attention": lambda shape, tokens: attend(shape, tokens, False),
    "attention with backward": lambda shape, tokens: attend(shape, tokens, True),
    "linear_cross_entropy with backward": head,
    "adamw": adamw,
    "grad_norm": grad_norm,
    "grow": growth,
    "merge_linear": linear_merge,
    "merge_ties": ties,
}
