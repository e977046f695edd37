"""The public ops as runs use them, to be recorded on a GPU that is not there (fake_gpu.py)."""

from dataclasses import replace

import torch

from hyperllama.arena import Arena
from hyperllama.kernels import grow, merge
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.attention import attention
from hyperllama.kernels.embedding import embedding_backward_
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.kernels.linear_cross_entropy import linear_cross_entropy
from hyperllama.model import Llama
from hyperllama.settings import ModelConfig

from .fake_gpu import backward
from .shapes import SHAPES, Shape

SEQ_LEN = 2048


def training_step(
    shape: Shape, dtype: torch.dtype, windows: int, *, num_layers: int = 2, documents: bool = False
) -> None:
    """What train/loop.py does between two steps: loss, backward, norm, clip, update."""
    arena = gradients(shape, dtype, windows, num_layers=num_layers, documents=documents)
    update(arena)


def gradients(
    shape: Shape, dtype: torch.dtype, windows: int, *, num_layers: int = 2, documents: bool = False, z_loss: float = 0.0
) -> Arena:
    """Loss and backward of `windows` windows; `num_layers` stand for all: the first has no residual, the others are alike."""
    arena = Arena(ModelConfig(**shape.settings(num_layers)), dtype, "cuda", training=True)
    ids = torch.zeros(windows, SEQ_LEN, dtype=torch.int64, device="cuda")
    borders = torch.zeros(windows + 5, dtype=torch.int32, device="cuda") if documents else None
    arena.grad.zero_()
    loss = Llama(arena.config, arena).loss(ids, ids, loss_weight=1 / ids.numel(), cu_seqlens=borders, z_loss=z_loss)
    backward(loss)
    return arena


def update(arena: Arena) -> None:
    """Norm, clip and AdamW; nothing in them depends on the model's shape."""
    lr, at = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    clip = torch.clamp(1.0 / (grad_norm(arena.grad) + 1e-6), max=1.0)
    adamw(
        arena.master, arena.grad, arena.m, arena.v, arena.weights if arena.rounds else None, lr=lr.fill_(1e-3),
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=at.fill_(1), clip=clip,
        rounding=1 << 40 if arena.master.dtype == torch.bfloat16 else None,
    )  # fmt: skip


def evaluation(shape: Shape, dtype: torch.dtype) -> None:
    """Losses of tokens, without gradients."""
    arena = Arena(ModelConfig(**shape.settings(1)), dtype, "cuda", training=False)
    ids = torch.zeros(2, SEQ_LEN, dtype=torch.int64, device="cuda")
    Llama(arena.config, arena).token_losses(ids, ids)


def grow_and_merge(shape: Shape, dtype: torch.dtype) -> None:
    """Growth of a matrix of every width, and merges of five models, as the paper's, with their base."""
    for cols in (shape.hidden_size, shape.intermediate_size):
        source = torch.zeros(shape.hidden_size, cols, dtype=dtype, device="cuda")
        grow.grow(source, 2, 2)
        grow.grow(source, 2, 2, noise_db=10.0, key=1 << 40)
        # the public op reads the indices on the host
        rows, columns = (torch.zeros(2 * size, dtype=torch.int64, device="cuda") for size in source.shape)
        for scale in (None, torch.ones(2 * cols, device="cuda")):
            grow.remap_triton(source, rows, columns, scale)
    grow.grow(torch.zeros(shape.hidden_size, dtype=dtype, device="cuda"), 2, 1)
    base, *models = torch.zeros(6, shape.hidden_size, shape.hidden_size, dtype=dtype, device="cuda")
    weights, densities, keys = [0.2] * 5, [0.3] * 5, [1 << 40] * 5
    merge.linear(models, weights)
    merge.task_arithmetic(base, models, weights)
    merge.task_arithmetic(base, models, weights, densities=densities, keys=keys, rescale="norm")
    for rescale in ("density", "norm"):
        merge.ties(base, models, weights, densities, rescale=rescale)
    merge.ties(base, models, weights, densities, keys=keys)
    merge.gram(base, models)
    merge.gram(None, models)


def own_attention(shape: Shape, dtype: torch.dtype) -> None:
    """Triton's attention of whole windows, which `auto` may choose on any GPU; without a choice it runs with documents only."""
    qkv = torch.zeros(8, SEQ_LEN, shape.qkv_width, dtype=dtype, device="cuda", requires_grad=True)
    backward(attention(qkv, shape.num_heads, shape.num_kv_heads, backend="triton").sum())


def softmax_in_epilogue(shape: Shape, dtype: torch.dtype, gradient: bool) -> None:
    """The head for those who ask for softmax in its first product's epilogue."""
    x, weight = (
        torch.zeros(rows, shape.hidden_size, dtype=dtype, device="cuda") for rows in (8 * SEQ_LEN, shape.vocab_size)
    )
    targets = torch.zeros(len(x), dtype=torch.int64, device="cuda")
    main_grad = torch.zeros(weight.shape, device="cuda")
    linear_cross_entropy(x.requires_grad_(gradient), weight, targets, main_grad=main_grad, softmax="epilogue")


def everything() -> None:
    """Every op at every shape and dtype it is used at; kernels that this misses are named by the gate."""
    for shape in SHAPES.values():
        gradients(shape, torch.bfloat16, 8)
        own_attention(shape, torch.bfloat16)
        softmax_in_epilogue(shape, torch.bfloat16, True)
    small = replace(SHAPES["180M"], vocab_size=1024)
    for dtype in (torch.bfloat16, torch.float32):
        training_step(small, dtype, 8)
    update(Arena(ModelConfig(**small.settings(1)), torch.bfloat16, "cuda", training=True, masters=False))
    own_attention(small, torch.float32)
    softmax_in_epilogue(small, torch.float32, True)
    gradients(small, torch.bfloat16, 8, documents=True, z_loss=1e-4)
    gradients(small, torch.bfloat16, 8, z_loss=1e-4)
    evaluation(SHAPES["180M"], torch.bfloat16)
    softmax_in_epilogue(SHAPES["180M"], torch.bfloat16, False)
    for name in ("180M", "8B"):
        grow_and_merge(SHAPES[name], torch.bfloat16)
    grow_and_merge(SHAPES["572M"], torch.float32)
    for shape in SHAPES.values():  # the variant by atomics, which is for those who ask for it
        grad = torch.zeros(1024, shape.hidden_size, device="cuda")
        ids, dy = (
            torch.zeros(8, SEQ_LEN, dtype=torch.int64, device="cuda"),
            torch.zeros(8, SEQ_LEN, shape.hidden_size, device="cuda"),
        )
        embedding_backward_(grad, ids, dy.bfloat16(), False)
