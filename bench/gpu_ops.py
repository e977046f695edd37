"""The problems of bench.gpu: inputs, calls, least traffic, useful FLOPs, peers and targets of every op on a GPU.

Traffic counts every input read once and every output written once; FLOPs are those of the products that the result needs (causal
attention: half; nothing recomputed). Targets are the shares of the copy's speed that a memory-bound op has to reach.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels import attention_choice, merge
from hyperllama.kernels import linear_cross_entropy as head_op
from hyperllama.kernels import rms_norm as norm
from hyperllama.kernels.adamw import adamw as update
from hyperllama.kernels.attention import attention
from hyperllama.kernels.backend import choose
from hyperllama.kernels.embedding import embedding_backward_, embedding_backward_reference
from hyperllama.kernels.glu import glu_backward_reference, glu_reference
from hyperllama.kernels.grad_norm import grad_norm as total_norm
from hyperllama.kernels.grow import grow, remap_reference, remap_triton
from hyperllama.kernels.rope import rope_reference, rope_tables

from .harness import Thunk, on_capture_stream
from .shapes import Shape

OPS = torch.ops.hyperllama
SEQ_LEN, MODELS, EPS = 2048, 5, 1e-5
LOGITS_ROWS = 8192  # that the head makes at a time on a GPU at V = 128256, of 16384 tokens and more
BF16 = torch.bfloat16
DTYPES = (BF16, torch.float16, torch.float32)
Inputs = Sequence[Any]


@dataclass(frozen=True)
class Prepared:
    """A call in two parts: `make` does with the inputs what shall not be timed, and returns what shall."""

    make: Callable[..., Thunk]

    def __call__(self, *inputs: Any) -> Any:
        """Both parts."""
        return self.make(*inputs)()


def timed(call: Callable[..., Any], inputs: Inputs) -> Thunk:
    """What is timed of a call with these inputs."""
    return call.make(*inputs) if isinstance(call, Prepared) else partial(call, *inputs)


def backward_alone(forward: Callable[..., tuple[Any, Any, Any]]) -> Prepared:
    """The backward of `forward(*inputs)`, which returns outputs, what is to be differentiated by, and the outputs' gradients.

    What the forward has saved serves every call: a peer that overwrites it has no place here.
    """

    def make(*inputs: Any) -> Thunk:
        with on_capture_stream():
            outputs, wanted, grads = forward(*inputs)
        return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    return Prepared(make)


@dataclass(frozen=True)
class Problem:
    """One op at one shape. `call` returns fresh outputs; where it writes to its inputs, it returns those."""

    bytes: int
    flops: int
    inputs: Callable[[str], Inputs]  # fresh, random, contiguous, on a device
    call: Callable[..., Any]
    share: float | None = None  # of the copy's speed; None: told only
    deterministic: bool = True
    dtypes: Sequence[torch.dtype] = DTYPES  # in which it has to be right
    in_place: bool = False
    restore: bool = False  # in place, and what it leaves is unlike its input: put back before every call, untimed
    reference: Callable[..., Any] | None = None  # plain torch's call, where `call` names its backend itself
    plain: Callable[..., Any] | None = None  # the op in plain torch, to be given to torch.compile
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)  # with the same inputs; a set-up may raise


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

    def inputs(device: str) -> Inputs:
        dy, dstream, stream = (random(device, tokens, h) for _ in range(3))
        return dy, dstream, stream, random(device, h), (stream.float().square().mean(-1) + EPS).rsqrt()

    def by(peer: Callable[..., Any]) -> Prepared:
        def forward(dy: Tensor, dstream: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor) -> Any:
            x, weight = stream.detach().requires_grad_(), weight.detach().requires_grad_()
            return peer(x, torch.zeros_like(x), weight), (x, weight), (dy, dstream)

        return backward_alone(forward)

    return Problem(
        8 * tokens * h + 6 * h + 4 * tokens, 0, inputs, OPS.rms_norm_backward, 0.88, plain=norm.backward_reference,
        peers={name: by(peer) for name, peer in rms_norm(shape, tokens).peers.items()},
    )  # fmt: skip


def rope(shape: Shape, tokens: int, inverse: bool = False) -> Problem:
    """In place on the packed projection: queries and keys; the backward is the inverse, on the gradient."""
    rotated = shape.num_heads + shape.num_kv_heads

    def call(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        OPS.rope_(qkv, cos, sin, None, rotated, inverse)
        return qkv

    def plain(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope_reference(qkv, qkv, cos, sin, None, rotated, inverse)
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

    def liger(gate_up: Tensor) -> Thunk:
        if shape.activation != "silu":
            raise NotImplementedError("Liger has tanh gelu only")
        function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return partial(function.apply, *(half.contiguous() for half in gate_up.chunk(2, -1)))  # it would copy each time

    return Problem(
        6 * tokens * width, 0, lambda device: (random(device, tokens, 2 * width),),
        lambda gate_up: OPS.glu(gate_up, shape.activation), 0.93, peers={"liger": Prepared(liger)},
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


def head(shape: Shape, tokens: int, softmax: str = "pass") -> Problem:
    """Loss and gradients of the head: three products, and logits read and written once by the pass between them.

    With softmax in the first product's epilogue: against what runs take, which has the pass. dW is added to what main_grad
    holds, as in a run, so it grows from call to call; the check sees the first.
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

    def ours(softmax: str, x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor) -> Any:
        x = x.detach().requires_grad_()
        options: Any = {"loss_weight": 1 / tokens, "main_grad": main_grad, "softmax": softmax}
        loss = head_op.linear_cross_entropy(x, weight, targets, **options)
        return loss.detach(), *torch.autograd.grad(loss, (x,)), main_grad

    def plain(x: Tensor, weight: Tensor, targets: Tensor, main_grad: Tensor) -> Any:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = functional.cross_entropy(functional.linear(x, weight).float(), targets)
        return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))

    traffic, flops, passing = 4 * tokens * v, 6 * tokens * v * h, partial(ours, "pass")

    def inputs(device: str) -> Inputs:
        targets = torch.randint(v, (tokens,), device=device)
        return random(device, tokens, h), random(device, v, h) * h**-0.5, targets, torch.zeros(v, h, device=device)

    if softmax == "epilogue":
        return Problem(
            traffic, flops, inputs, partial(ours, "epilogue"), dtypes=head_op.DTYPES, in_place=True, reference=passing,
            peers={"pass": passing},
        )  # fmt: skip
    peers = {"liger": liger, "cut_cross_entropy": cce}
    return Problem(traffic, flops, inputs, passing, in_place=True, plain=plain, peers=peers)


def token_losses(shape: Shape, tokens: int) -> Problem:
    """Losses alone, softmax in the epilogue, which keeps no logits; against what evaluations take."""
    h, v = shape.hidden_size, shape.vocab_size
    return Problem(
        2 * (tokens + v) * h + 12 * tokens, 2 * tokens * v * h,
        lambda device: (random(device, tokens, h), random(device, v, h) * h**-0.5, torch.randint(v, (tokens,), device=device)),
        partial(head_op.token_losses, softmax="epilogue"), dtypes=head_op.DTYPES, reference=head_op.token_losses,
        peers={"pass": head_op.token_losses},
    )  # fmt: skip


def softmax_gradient(shape: Shape, tokens: int) -> Problem:
    """The pass between the head's products alone, over the rows of logits that it works on together at so many tokens."""
    rows, v = min(tokens, LOGITS_ROWS), shape.vocab_size

    def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda logits, targets: function(logits, targets, 1 / len(targets), 1.0, None, -100, 0.0, True)

    def liger(logits: Tensor, targets: Tensor) -> Any:  # in place; reads values on the host, as its head does
        loss = import_module("liger_kernel.transformers").LigerCrossEntropyLoss()(
            logits.detach().requires_grad_(), targets
        )
        return loss.detach(), logits

    return Problem(
        4 * rows * v + 13 * rows, 0,
        lambda device: (random(device, rows, v), torch.randint(v, (rows,), device=device)),
        with_options(head_op._softmax_gradient), 0.88, in_place=True, restore=True,
        plain=with_options(head_op.softmax_gradient_reference), peers={"liger": liger},
    )  # fmt: skip


def embedding_backward(shape: Shape, tokens: int, deterministic: bool) -> Problem:
    """Added to the fp32 gradient: every row that one of random tokens names is read and written once."""
    h, v = shape.hidden_size, shape.vocab_size
    named = round(v * (1 - (1 - 1 / v) ** tokens))  # expected

    def with_grad(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(grad: Tensor, ids: Tensor, dy: Tensor) -> Tensor:
            function(grad, ids, dy, deterministic)
            return grad

        return call

    def torchs(grad: Tensor, ids: Tensor, dy: Tensor) -> Tensor:  # a gradient of its own, of the whole table, in bf16
        return torch.ops.aten.embedding_dense_backward(dy, ids, v, -1, False)

    return Problem(
        2 * tokens * h + 8 * tokens + 8 * named * h, 0,
        lambda device: (
            torch.zeros(v, h, device=device), torch.randint(v, (1, tokens), device=device), random(device, 1, tokens, h),
        ),
        with_grad(embedding_backward_), deterministic=deterministic, in_place=True,
        plain=with_grad(embedding_backward_reference), peers={"embedding_dense_backward": torchs},
    )  # fmt: skip


def adamw(shape: Shape, tokens: int) -> Problem:
    """Master, gradient and moments fp32, weights bf16 written in the same pass; as many elements as tokens x hidden.

    torch's fused optimizer has no bf16 weights and takes no clip coefficient: it gets a clipped gradient, which is not timed, and
    the copy of its masters to bf16, without which a step is not done, is.
    """
    n = tokens * shape.hidden_size

    def fused(
        master: Tensor, grad: Tensor, m: Tensor, v: Tensor, weights: Tensor, lr: Tensor, step: Tensor, clip: Tensor
    ) -> Thunk:
        parameter = torch.nn.Parameter(master)
        parameter.grad = grad * clip
        optimizer = torch.optim.AdamW(
            [parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True, capturable=master.is_cuda
        )
        optimizer.state[parameter] = {"step": (step - 1).float(), "exp_avg": m, "exp_avg_sq": v}

        def thunk() -> Any:
            optimizer.step()
            weights.copy_(master)
            return master, m, v, weights

        return thunk

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

    return Problem(30 * n, 0, inputs, call, 0.93, in_place=True, peers={"torch fused": Prepared(fused)})


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


def remap(shape: Shape, tokens: int) -> Problem:
    """Growth by index maps to twice as many rows and columns, each a copy of a random one from the half on, columns scaled."""
    rows, cols = tokens, shape.hidden_size

    def inputs(device: str) -> Inputs:
        maps = [
            torch.cat([torch.arange(size, device=device), torch.randint(size, (size,), device=device)])
            for size in (rows, cols)
        ]
        return random(device, rows, cols), *maps, torch.rand(2 * cols, device=device) + 0.5

    def call(source: Tensor, *maps: Tensor) -> Tensor:  # the public op reads the indices on the host
        return choose({"reference": remap_reference, "triton": remap_triton}, source)(source, *maps)

    return Problem(10 * rows * cols + 16 * (rows + cols) + 8 * cols, 0, inputs, call, 0.92, plain=remap_reference)


def linear_merge(shape: Shape, tokens: int) -> Problem:
    """Five models, as the paper merges."""
    return _merge(shape, tokens, 0.92, lambda base, *models: merge.linear(models, [0.2] * MODELS), MODELS + 1)


def task_arithmetic(shape: Shape, tokens: int) -> Problem:
    """Five models and their base."""
    return _merge(
        shape, tokens, None, lambda base, *models: merge.task_arithmetic(base, models, [0.2] * MODELS), MODELS + 2
    )


def gram(shape: Shape, tokens: int) -> Problem:
    """Inner products of five models' differences to their base, in fp64; what it writes is nothing."""
    return _merge(shape, tokens, None, lambda base, *models: merge.gram(base, models), MODELS + 1)


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


@cache
def chosen_attention(shape: Shape, tokens: int, device: str) -> str:
    """What a run with `attention: auto` takes: measured, as it is there."""
    problem = attention_choice.Problem(
        tokens // SEQ_LEN,
        SEQ_LEN,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        BF16,
        torch.device(device),
        False,
    )
    return attention_choice.pick(attention_choice.measure(problem), deterministic=False)


BACKENDS = ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers", "triton")


def attend(shape: Shape, tokens: int, part: str) -> Problem:
    """Causal attention of whole windows; `part`: forward, backward, or both."""

    def run(qkv: Tensor, dy: Tensor, backend: str) -> tuple[Any, Any, Any]:
        qkv = qkv.detach().requires_grad_(part != "forward")
        return (attention(qkv, shape.num_heads, shape.num_kv_heads, backend=backend),), (qkv,), (dy,)

    def by(backend: str) -> Callable[..., Any]:
        def call(qkv: Tensor, dy: Tensor) -> Any:
            outputs, wanted, grads = run(qkv, dy, backend)
            return outputs if part == "forward" else (outputs[0].detach(), *torch.autograd.grad(outputs, wanted, grads))

        return backward_alone(partial(run, backend=backend)) if part == "backward" else call

    def auto(qkv: Tensor, dy: Tensor) -> Thunk:
        return timed(by(chosen_attention(shape, tokens, str(qkv.device))), (qkv, dy))

    width = shape.num_heads * shape.head_dim
    forward = 2 * tokens * (shape.qkv_width + width)
    # which also reads qkv, out and the sums
    backward = 4 * tokens * (shape.qkv_width + width) + 4 * tokens * shape.num_heads
    products = {"forward": 2, "backward": 5, "both": 7}[part]
    return Problem(
        {"forward": forward, "backward": backward, "both": forward + backward}[part],
        products * tokens * SEQ_LEN * width,
        lambda device: (
            random(device, tokens // SEQ_LEN, SEQ_LEN, shape.qkv_width), random(device, tokens // SEQ_LEN, SEQ_LEN, width),
        ),
        by("triton"), reference=by("sdpa"), peers={"auto": Prepared(auto), **{name: by(name) for name in BACKENDS[:-1]}},
    )  # fmt: skip


PROBLEMS: dict[str, Callable[[Shape, int], Problem]] = {
    "rms_norm": rms_norm,
    "rms_norm backward": rms_norm_backward,
    "rope": rope,
    "rope backward": partial(rope, inverse=True),
    "glu": glu,
    "glu backward": glu_backward,
    "attention": partial(attend, part="forward"),
    "attention backward": partial(attend, part="backward"),
    "attention with backward": partial(attend, part="both"),
    "linear_cross_entropy with backward": head,
    "softmax_gradient": softmax_gradient,
    "linear_cross_entropy epilogue with backward": partial(head, softmax="epilogue"),
    "token_losses epilogue": token_losses,
    "embedding backward": partial(embedding_backward, deterministic=True),
    "embedding backward atomic": partial(embedding_backward, deterministic=False),
    "adamw": adamw,
    "grad_norm": grad_norm,
    "grow": growth,
    "remap": remap,
    "merge_linear": linear_merge,
    "merge_task_arithmetic": task_arithmetic,
    "merge_ties": ties,
    "merge_gram": gram,
}
