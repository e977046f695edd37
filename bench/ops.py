"""The CPU ops one by one: registered ops on shapes of the 180M model, the C++ against plain torch, and against their roofs.

Memory-bound ops move at least `traffic` bytes, well beyond any cache, and their roof is a copy of just as many bytes; so the
target "csrc is 0.8 x as fast as copy" reads: it reaches 80 % of copy bandwidth. `bytes` is the least traffic: every input read
once, every output written once. (A copy also reads its target's lines before it writes them, which is not counted; ops that
write in place, or only read, need no such reads and can be above 1.) Forward and backward are called without autograd.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import linear_cross_entropy as head
from hyperllama.kernels import merge
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.attention import attention
from hyperllama.kernels.backend import library, use
from hyperllama.kernels.embedding import embedding_backward_
from hyperllama.kernels.glu import glu
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.kernels.grow import grow
from hyperllama.kernels.rope import rope_tables
from hyperllama.settings import ModelConfig

from .harness import Case, Roof, Target, Thunk, copy_roof

OPS = torch.ops.hyperllama
TRAFFIC = 128 << 20  # bytes: four times a big L3
MODELS = 5  # to merge, as the paper does
# of copy bandwidth; the softmax pass is told only: two exponentials an element are more than its bytes, and it is a part of
# linear_cross_entropy, which is judged whole
SHARE = {"ties": 0.45, "grow": 0.75, "merge_linear": 0.75, "merge_task_arithmetic": 0.75, "softmax_gradient": None}
TRAINING_SHARE = 0.80  # all other ops

Maker = Callable[[], Thunk]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, `float32`."""
    return str(dtype).removeprefix("torch.")


def providers(make: Maker) -> dict[str, Maker]:
    """Set-ups of one thunk under plain torch and under csrc; `make` gives every caller data of its own to write to.

    Setting up csrc raises HyperLlamaError when the op runs no function of csrc: it would time plain torch twice.
    """

    def under(backend: str) -> Thunk:
        thunk = make()

        def call() -> Any:
            with use(backend):
                return thunk()

        return call

    def csrc() -> Thunk:
        if not calls_csrc(under("csrc")):
            raise HyperLlamaError("the op has no C++ yet, it runs plain torch")
        return under("csrc")

    return {"reference": lambda: under("reference"), "csrc": csrc}


def calls_csrc(thunk: Thunk) -> bool:
    """Whether a thunk looks up a function of csrc: ctypes keeps those it has looked up in the library's namespace."""
    lib = library()
    for name in [name for name in vars(lib or ()) if name.startswith("hyperllama_")] if lib else []:
        delattr(lib, name)
    thunk()
    return lib is not None and any(name.startswith("hyperllama_") for name in vars(lib))


def close(limit: float) -> Callable[[Any, Any], str | None]:
    """A check: the relative L2 error of every output is at most `limit`."""

    def check(output: Any, expected: Any) -> str | None:
        pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (output, expected)), strict=True)
        error = max(relative_error(got, want) for got, want in pairs)
        return None if error <= limit else f"relative error {error:.2g}, at most {limit:.2g} was expected"

    return check


def relative_error(got: Tensor, want: Tensor) -> float:
    """L2 norm of the difference over that of what was wanted; infinite for another shape, NaN included."""
    if got.shape != want.shape:
        return float("inf")
    want = want.float()
    error = float((got.float() - want).norm() / want.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def op_case(
    name: str, dtype: torch.dtype, shape: Sequence[int], traffic: int, make: Maker, limit: float = 1e-5
) -> Case:
    """A memory-bound op: reference, csrc, and the copy of its least traffic; `limit` is the error allowed in fp32."""
    least = next((share for prefix, share in SHARE.items() if prefix in name), TRAINING_SHARE)
    return Case(
        name, {"shape": "x".join(map(str, shape)), "dtype": dtype_name(dtype)}, 0, traffic, providers(make),
        close(max(limit, 4 * torch.finfo(dtype).eps)), {"copy": copy_roof(traffic)}, (Target("csrc", "copy", least),),
    )  # fmt: skip


# ---- memory-bound ops: (shape of the model, dtype, least traffic in bytes) -> case


def _rows(traffic: int, row_bytes: int) -> int:
    return -(-traffic // row_bytes)


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def rms_norm_case(c: ModelConfig, dtype: torch.dtype, traffic: int, backward: bool) -> Case:
    """Norm of the sum with a residual; the backward also adds the stream's gradient. Four tensors move."""
    rows = _rows(traffic, 4 * c.hidden_size * dtype.itemsize)
    x, residual = _random(dtype, 2, rows, c.hidden_size)
    weight = torch.ones(c.hidden_size, dtype=dtype)
    _, stream, rstd = OPS.rms_norm(x, residual, weight, c.rms_norm_eps)
    moved = 4 * x.nbytes + rstd.nbytes + weight.nbytes
    if backward:
        moved += 4 * c.hidden_size  # dw, fp32
        return op_case(
            "rms_norm backward", dtype, x.shape, moved,
            lambda: lambda: OPS.rms_norm_backward(x, residual, stream, weight, rstd),
        )  # fmt: skip
    return op_case(
        "rms_norm forward", dtype, x.shape, moved, lambda: lambda: OPS.rms_norm(x, residual, weight, c.rms_norm_eps)
    )


def rope_case(c: ModelConfig, dtype: torch.dtype, traffic: int, backward: bool) -> Case:
    """Rotation of q and k in packed windows; the backward turns the other way."""
    heads = c.num_heads + c.num_kv_heads
    width, seq_len = (heads + c.num_kv_heads) * c.head_dim, c.max_position_embeddings
    qkv = _random(dtype, _rows(traffic, 2 * seq_len * width * dtype.itemsize), seq_len, width)
    cos, sin = rope_tables(seq_len, c.head_dim, c.rope_theta)
    return op_case(
        f"rope {'backward' if backward else 'forward'}", dtype, qkv.shape, 2 * qkv.nbytes + cos.nbytes + sin.nbytes,
        lambda: lambda: OPS.rope(qkv, cos, sin, None, heads, backward),
    )  # fmt: skip


def glu_case(c: ModelConfig, dtype: torch.dtype, traffic: int, backward: bool) -> Case:
    """The packed gated unit: 2F in, F out; backward 3F in, 2F out."""
    width = c.intermediate_size
    rows = _rows(traffic, (5 if backward else 3) * width * dtype.itemsize)
    gate_up, dy = _random(dtype, rows, 2 * width), _random(dtype, rows, width)
    if backward:
        return op_case(
            "glu backward", dtype, gate_up.shape, 5 * dy.nbytes,
            lambda: lambda: OPS.glu_backward(dy, gate_up, c.activation),
        )  # fmt: skip
    return op_case("glu forward", dtype, gate_up.shape, 3 * dy.nbytes, lambda: lambda: glu(gate_up, c.activation))


def softmax_gradient_case(c: ModelConfig, dtype: torch.dtype, traffic: int) -> Case:
    """From logits to losses and dz, in place."""
    rows = _rows(traffic, 2 * c.vocab_size * dtype.itemsize)
    logits, targets = _random(dtype, rows, c.vocab_size), torch.arange(rows) % c.vocab_size

    def make() -> Thunk:
        mine = logits.clone()  # later calls work on the first one's dz: other numbers, the same work
        return lambda: head._softmax_gradient(mine, targets, 1 / rows, 1.0, None, -100, 0.0, True)

    return op_case("softmax_gradient", dtype, logits.shape, 2 * logits.nbytes + 12 * rows, make)


def embedding_backward_case(c: ModelConfig, dtype: torch.dtype, traffic: int) -> Case:
    """dy added to the rows of the fp32 table that random tokens name; each row named is read and written once."""
    rows = _rows(traffic, c.hidden_size * dtype.itemsize)  # dy alone; how many rows they name is only known below
    ids = torch.randint(c.vocab_size, (1, rows), generator=torch.Generator().manual_seed(0))
    dy = _random(dtype, 1, rows, c.hidden_size)
    named = ids.unique().numel()

    def make() -> Thunk:
        grad = torch.zeros(c.vocab_size, c.hidden_size)

        def call() -> Tensor:
            embedding_backward_(grad, ids, dy)
            return grad

        return call

    return op_case("embedding_backward_", dtype, dy.shape[1:], dy.nbytes + ids.nbytes + 8 * named * c.hidden_size, make)


def adamw_case(c: ModelConfig, dtype: torch.dtype, traffic: int) -> Case:
    """One optimizer step: four fp32 buffers read, three written, and bf16 weights where the masters are not the weights."""
    low = dtype == torch.bfloat16
    per_element = 28 + 2 * low
    size = _rows(traffic, per_element)
    start = _random(torch.float32, 2, size)

    def make() -> Thunk:
        master, grad = start.clone()
        m, v = torch.zeros_like(master), torch.zeros_like(master)
        weights = master.to(dtype) if low else None
        lr, step, clip = torch.tensor(1e-3), torch.tensor(1), torch.tensor(1.0)

        def call() -> tuple[Tensor, ...]:
            adamw(
                master, grad, m, v, weights, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=step, clip=clip
            )  # fmt: skip
            return master, m, v, *(() if weights is None else (weights,))

        return call

    return op_case("adamw", dtype, [size], per_element * size, make)


def grad_norm_case(c: ModelConfig, dtype: torch.dtype, traffic: int) -> Case:
    """The norm of a flat fp32 gradient."""
    grad = _random(torch.float32, _rows(traffic, 4))
    return op_case("grad_norm", torch.float32, grad.shape, grad.nbytes, lambda: lambda: grad_norm(grad))


def merge_case(method: str, c: ModelConfig, dtype: torch.dtype, traffic: int) -> Case:
    """Five models near one base become one; TIES has to read them all twice, its thresholds being of whole tensors."""
    passes = {"linear": MODELS + 1, "task_arithmetic": MODELS + 2, "ties": 2 * (MODELS + 1) + 1}[method]
    rows = _rows(traffic, passes * c.hidden_size * dtype.itemsize)
    base, *deltas = _random(torch.float32, MODELS + 1, rows, c.hidden_size)
    models = [(base + 0.1 * delta).to(dtype) for delta in deltas]
    base, weights = base.to(dtype), [0.1 + 0.1 * i for i in range(MODELS)]
    calls: dict[str, Thunk] = {
        "linear": lambda: merge.linear(models, weights),
        "task_arithmetic": lambda: merge.task_arithmetic(base, models, weights),
        "ties": lambda: merge.ties(base, models, weights, [0.5] * MODELS),
    }
    # ties in fp32: a vote that is a rounding from zero may fall either way
    limit = 1e-3 if method == "ties" else 1e-5
    return op_case(f"merge_{method}", dtype, base.shape, passes * base.nbytes, lambda: calls[method], limit)


def grow_case(c: ModelConfig, dtype: torch.dtype, traffic: int) -> Case:
    """Growth by two in both directions, without noise: one tensor in, four out."""
    source = _random(dtype, _rows(traffic, 5 * c.hidden_size * dtype.itemsize), c.hidden_size)
    return op_case("grow", dtype, source.shape, 5 * source.nbytes, lambda: lambda: grow(source, 2, 2))


BOTH = (torch.float32, torch.bfloat16)
MEMORY_BOUND: dict[str, tuple[Callable[[ModelConfig, torch.dtype, int], Case], tuple[torch.dtype, ...]]] = {
    "rms_norm forward": (partial(rms_norm_case, backward=False), BOTH),
    "rms_norm backward": (partial(rms_norm_case, backward=True), BOTH),
    "rope forward": (partial(rope_case, backward=False), BOTH),
    "rope backward": (partial(rope_case, backward=True), BOTH),
    "glu forward": (partial(glu_case, backward=False), BOTH),
    "glu backward": (partial(glu_case, backward=True), BOTH),
    "softmax_gradient": (softmax_gradient_case, BOTH),
    "embedding_backward_": (embedding_backward_case, BOTH),
    "adamw": (adamw_case, BOTH),
    "grad_norm": (grad_norm_case, (torch.float32,)),  # gradients are fp32 whatever the weights are
    "merge_linear": (partial(merge_case, "linear"), BOTH),
    "merge_task_arithmetic": (partial(merge_case, "task_arithmetic"), BOTH),
    "merge_ties": (partial(merge_case, "ties"), BOTH),
    "grow": (grow_case, BOTH),
}


# ---- ops with matrix products


def attention_case(
    windows: int, seq_len: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, documents: bool,
    backward: bool,
) -> Case:  # fmt: skip
    """Causal attention of packed windows, whole or cut into four documents; alone, or with its backward.

    The target, on forward and backward together, asks most of narrow heads, and of bf16 where the CPU multiplies it.
    """
    width = (heads + 2 * kv_heads) * head_dim
    start, dy = _random(dtype, windows, seq_len, width), _random(dtype, windows, seq_len, heads * head_dim)
    lengths = [seq_len // 8, seq_len // 4, seq_len // 16] if documents else []
    lengths = [*lengths, seq_len - sum(lengths)] * windows
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if documents else None

    def provider(backend: str) -> Maker:
        def setup() -> Thunk:
            qkv = start.clone().requires_grad_(backward)

            def call() -> Any:
                out = attention(qkv, heads, kv_heads, cu_seqlens=borders, backend=backend)
                return (out, *torch.autograd.grad(out, qkv, dy)) if backward else out

            return call

        return setup

    params = {"windows": windows, "T": seq_len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    products = 4 * heads * head_dim * sum(length * (length + 1) // 2 for length in lengths)
    fast_bf16 = dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("avx512_bf16")
    least = 2.0 if head_dim <= 32 else 1.5 if fast_bf16 else 1.3
    return Case(
        f"attention {'forward+backward' if backward else 'forward'}",
        {**params, "documents": len(lengths) if documents else 0, "dtype": dtype_name(dtype)},
        3 * products if backward else products,
        (2 if backward else 1) * (start.nbytes + dy.nbytes),
        {name: provider(name) for name in ("sdpa", "csrc")},
        close(2e-2 if dtype == torch.bfloat16 else 1e-4),
        targets=(Target("csrc", "sdpa", least if backward else None),),
    )


def linear_cross_entropy_case(tokens: int, c: ModelConfig, dtype: torch.dtype) -> Case:
    """Head and loss, forward and backward, dW accumulated in fp32; its roof is its three GEMMs alone, chunked as it does."""
    start, weight = _random(dtype, tokens, c.hidden_size), _random(torch.float32, c.vocab_size, c.hidden_size)
    weight = weight.mul_(c.initializer_range).to(dtype)
    targets = torch.arange(tokens) % c.vocab_size

    def make() -> Thunk:
        x, dweight = start.clone().requires_grad_(), torch.zeros(weight.shape)

        def call() -> tuple[Tensor, ...]:
            loss = head.linear_cross_entropy(x, weight, targets, loss_weight=1 / tokens, main_grad=dweight)
            return loss.detach(), *torch.autograd.grad(loss, x), dweight

        return call

    def gemms() -> Thunk:
        chunks = head.chunks(start, weight, None)
        dx, dweight = torch.empty_like(start), torch.empty_like(weight)
        z = start.new_empty(max(rows for _, rows in chunks), c.vocab_size)

        def call() -> None:
            for part in chunks:
                rows, dz = start.narrow(0, *part), z[: part[1]]
                torch.mm(rows, weight.t(), out=dz)
                torch.mm(dz, weight, out=dx.narrow(0, *part))
                torch.mm(dz.t(), rows, out=dweight)

        return call

    return Case(
        "linear_cross_entropy forward+backward",
        {"N": tokens, "D": c.hidden_size, "V": c.vocab_size, "dtype": dtype_name(dtype)},
        6 * tokens * c.vocab_size * c.hidden_size,
        2 * start.nbytes + weight.nbytes + 8 * weight.numel() + targets.nbytes,
        providers(make),
        close(max(1e-5, 4 * torch.finfo(dtype).eps)),
        {"gemms": Roof(gemms)},
        (Target("csrc", "gemms", 1 / 1.15),),  # at most 1.15 times the time of the GEMMs
    )
