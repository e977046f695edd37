"""The public ops as runs use them, to be recorded on a GPU that is not there (fake_gpu.py)."""

from dataclasses import replace

import torch

from hyperllama.arena import Arena
from hyperllama.config import ModelConfig
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.attention import attention
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.model import Llama

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
        arena.master, arena.grad, arena.m, arena.v, None if arena.weights is arena.master else arena.weights, lr=lr.fill_(1e-3),
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=at.fill_(1), clip=clip,
    )  # fmt: skip


def evaluation(shape: Shape, dtype: torch.dtype) -> None:
    """Losses of tokens, without gradients."""
    arena = Arena(ModelConfig(**shape.settings(1)), dtype, "cuda", training=False)
    ids = torch.zeros(2, SEQ_LEN, dtype=torch.int64, device="cuda")
    Llama(arena.config, arena).token_losses(ids, ids)


def own_attention(shape: Shape, dtype: torch.dtype) -> None:
    """Triton's attention of whole windows, which `auto` may choose on any GPU; without a choice it runs with documents only."""
    qkv = torch.zeros(8, SEQ_LEN, shape.qkv_width, dtype=dtype, device="cuda", requires_grad=True)
    backward(attention(qkv, shape.num_heads, shape.num_kv_heads, backend="triton").sum())


def everything() -> None:
    """Every op at every shape and dtype it is used at; kernels that this misses are named by the gate."""
    for shape in SHAPES.values():
        gradients(shape, torch.bfloat16, 8)
        own_attention(shape, torch.bfloat16)
    small = replace(SHAPES["180M"], vocab_size=1024)
    for dtype in (torch.bfloat16, torch.float32):
        training_step(small, dtype, 8)
    own_attention(small, torch.float32)
    gradients(small, torch.bfloat16, 8, documents=True, z_loss=1e-4)
    gradients(small, torch.bfloat16, 8, z_loss=1e-4)
    evaluation(SHAPES["180M"], torch.bfloat16)
