"""The Llama: embedding, blocks, head. Shapes: B windows, T tokens, D hidden, n query heads, k kv heads, h head_dim, V rows.

The residual stream is added inside the norm that reads it, so a block takes (stream, update) and returns the same pair:

    stream += update; a = attention(norm(stream));  stream += a;  m = mlp(norm(stream));  return stream, m
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hyperllama.arena import Arena
from hyperllama.kernels.attention import attention
from hyperllama.kernels.embedding import embedding
from hyperllama.kernels.glu import glu
from hyperllama.kernels.linear import linear
from hyperllama.kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from hyperllama.kernels.rms_norm import rms_norm
from hyperllama.kernels.rope import rope_, rope_tables
from hyperllama.settings import ModelConfig

IGNORE = -100  # a target that takes no part in the loss


class Weight(nn.Parameter):
    """A parameter that is a view into the arena and knows the fp32 view its gradient accumulates in."""

    main_grad: Tensor | None

    def __new__(cls, view: Tensor, main_grad: Tensor | None) -> "Weight":
        weight = super().__new__(cls, view, requires_grad=main_grad is not None)
        weight.main_grad = main_grad
        return weight


class Positions:
    """Where the tokens of a batch stand: RoPE tables (T, h/2), and with documents their restarting positions (B, T)."""

    def __init__(self, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, batch: int, seq_len: int):
        self.cos, self.sin, self.cu_seqlens = cos, sin, cu_seqlens
        self.ids: Tensor | None = None
        if cu_seqlens is not None:
            flat = torch.arange(batch * seq_len, device=cos.device, dtype=cu_seqlens.dtype)
            starts = cu_seqlens[torch.searchsorted(cu_seqlens, flat, right=True) - 1]
            self.ids = (flat - starts).view(batch, seq_len).long()


class Block(nn.Module):
    """Attention and MLP on one residual stream."""

    def __init__(self, config: ModelConfig, weights: dict[str, Weight], backend: str):
        super().__init__()
        self.config, self.backend = config, backend
        self.attn_norm, self.qkv, self.o = weights["attn_norm"], weights["qkv"], weights["o"]
        self.mlp_norm, self.gate_up, self.down = weights["mlp_norm"], weights["gate_up"], weights["down"]

    def forward(self, stream: Tensor | None, update: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
        """(B, T, D) stream (None at the first block) and update -> the same pair."""
        c = self.config
        normed, stream = add_norm(stream, update, self.attn_norm, c.rms_norm_eps)
        qkv = linear(normed, self.qkv, main_grad=self.qkv.main_grad)
        qkv = rope_(qkv, at.cos, at.sin, at.ids, c.num_heads, c.num_kv_heads)
        mixed = attention(qkv, c.num_heads, c.num_kv_heads, cu_seqlens=at.cu_seqlens, backend=self.backend)
        update = linear(mixed, self.o, main_grad=self.o.main_grad)

        normed, stream = add_norm(stream, update, self.mlp_norm, c.rms_norm_eps)
        hidden = glu(linear(normed, self.gate_up, main_grad=self.gate_up.main_grad), c.activation)
        return stream, linear(hidden, self.down, main_grad=self.down.main_grad)


class _Recomputed(torch.autograd.Function):
    """A block that keeps its inputs alone and runs again in the backward (Chen et al. 2016, arXiv 1604.06174): the same bits."""

    @staticmethod
    def forward(ctx: Any, block: Block, at: Positions, stream: Tensor | None, update: Tensor) -> tuple[Tensor, Tensor]:
        ctx.block, ctx.at = block, at
        ctx.save_for_backward(stream, update)
        return block(stream, update, at)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stream, update = ctx.saved_tensors
        stream = None if stream is None else stream.detach().requires_grad_()
        update = update.detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.block(stream, update, ctx.at)
        torch.autograd.backward(outputs, grads)  # gradients of weights go to the arena
        return None, None, None if stream is None else stream.grad, update.grad


class Exchange(Protocol):
    """What the processes of a run do about its weights and gradients while the model goes through its layers.

    Layer -1 is the embedding, `num_layers` what follows the last. See train/parallel.py.
    """

    def forward_reaches(self, layer: int) -> None:
        """The weights of `layer` are needed now."""

    def backward_left(self, layer: int) -> None:
        """The gradients of `layer` are complete for this micro-batch; the backward goes on to the one before."""


class Llama(nn.Module):
    """A decoder over an arena. Gradients go to the arena's fp32 buffer, not to `.grad`, when the arena is for training.

    `functional=True` leaves main gradients out: weights get ordinary `.grad`s (comparisons, torch.compile). `tables`: the dtype
    that RoPE's cos and sin are rounded to. `recompute`: blocks keep their inputs only, and run again in the backward.
    """

    def __init__(
        self,
        config: ModelConfig,
        arena: Arena,
        *,
        backend: str = "auto",
        functional: bool = False,
        tables: torch.dtype = torch.float32,
        recompute: bool = False,
    ):
        super().__init__()
        self.table_dtype, self.recompute = tables, recompute
        self.config, self.arena = config, arena
        packed = arena.packed("weights")
        grads = arena.packed("grad") if arena.training and not functional else {}
        weights = {name: Weight(view, grads.get(name)) for name, view in packed.items()}
        if functional:
            for weight in weights.values():
                weight.requires_grad_(True)
        self.weights = weights  # by packed name
        self.embed, self.norm = weights["embed"], weights["norm"]
        self.head = weights.get("head", self.embed)
        self.blocks = nn.ModuleList(
            Block(
                config, {key.split(".")[-1]: w for key, w in weights.items() if key.startswith(f"layers.{i}.")}, backend
            )
            for i in range(config.num_layers)
        )
        self._tables: tuple[Tensor, Tensor] | None = None
        self.exchange: Exchange | None = None  # of several processes

    def positions(self, ids: Tensor, cu_seqlens: Tensor | None) -> Positions:
        """RoPE tables for windows as long as those of `ids` (B, T)."""
        batch, seq_len = ids.shape
        if self._tables is None or self._tables[0].shape[0] < seq_len or self._tables[0].device != ids.device:
            length = max(seq_len, self.config.max_position_embeddings)
            self._tables = rope_tables(
                length, self.config.head_dim, self.config.rope_theta, dtype=self.table_dtype, device=ids.device
            )
        cos, sin = (table[:seq_len] for table in self._tables)
        return Positions(cos, sin, cu_seqlens, batch, seq_len)

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> final normed hidden states (B, T, D); `cu_seqlens` (int32, over B*T) separates documents."""
        at = self.positions(ids, cu_seqlens)
        stream: Tensor | None = None
        if self.exchange is not None:
            self.exchange.forward_reaches(-1)
        update = embedding(ids, self.embed, main_grad=self.embed.main_grad)
        for layer, block in enumerate(self.blocks):
            self._reach(layer, update)
            if self.recompute and update.requires_grad:
                stream, update = _Recomputed.apply(block, at, stream, update)
            else:
                stream, update = block(stream, update, at)
        self._reach(len(self.blocks), update)
        return add_norm(stream, update, self.norm, self.config.rms_norm_eps)[0]

    def _reach(self, layer: int, update: Tensor) -> None:
        """Tell the other processes' exchange; `update` gets its gradient from the last op of the layer's backward."""
        if self.exchange is not None:
            self.exchange.forward_reaches(layer)
            if update.requires_grad:
                update.register_hook(partial(_leave, self.exchange, layer))

    def loss(
        self, ids: Tensor, targets: Tensor, *, loss_weight: float, cu_seqlens: Tensor | None = None, z_loss: float = 0.0
    ) -> Tensor:
        """`loss_weight` times the summed cross-entropy of `targets` (B, T), in nats; -100 takes no part."""
        hidden = self.forward(ids, cu_seqlens).flatten(0, 1)
        return linear_cross_entropy(
            hidden,
            self.head,
            targets.flatten(),
            loss_weight=loss_weight,
            logit_scale=self.logit_scale,
            valid_vocab=self.config.unpadded_vocab_size,
            ignore_index=IGNORE,
            z_loss=z_loss,
            main_grad=self.head.main_grad,
        )

    @torch.no_grad()
    def token_losses(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Cross-entropy of every target (B, T) fp32 in nats; 0 where the target is -100."""
        hidden = self.forward(ids, cu_seqlens).flatten(0, 1)
        losses = token_losses(
            hidden,
            self.head,
            targets.flatten(),
            logit_scale=self.logit_scale,
            valid_vocab=self.config.unpadded_vocab_size,
            ignore_index=IGNORE,
        )
        return losses.view(targets.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V); rows that only pad the vocabulary are -inf."""
        logits = linear(hidden, self.head) / self.config.lm_head_normalization_factor
        if self.config.unpadded_vocab_size is not None:
            logits[..., self.config.unpadded_vocab_size :] = float("-inf")
        return logits

    @property
    def logit_scale(self) -> float:
        """What logits are multiplied by: one over the head factor of a grown tied model."""
        return 1 / self.config.lm_head_normalization_factor

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random start: N(0, std), projections back into the stream scaled by 1/sqrt(2 L), norms 1.

        A pure function of (config, seed): drawn on the CPU in fp32 in arena order, whatever the device and dtype.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        arena, real = self.arena, self.config.unpadded_vocab_size
        for name, shape in arena.shapes.items():
            if len(shape) == 1:
                values = torch.ones(shape)
            else:
                scale = std / (2 * self.config.num_layers) ** 0.5 if name.endswith((".o", ".down")) else std
                values = torch.randn(shape, generator=generator) * scale
            if name in ("embed", "head") and real is not None:
                values[real:] = 0
            arena.write(arena.offsets[name], values)
        if self.arena.training:
            self.arena.master_from_weights()


def _leave(exchange: Exchange, layer: int, _: Tensor) -> None:
    exchange.backward_left(layer)


def add_norm(stream: Tensor | None, update: Tensor, weight: Weight, eps: float) -> tuple[Tensor, Tensor]:
    """Add `update` to the residual stream and norm the sum: (normed, stream), all (B, T, D)."""
    if stream is None:
        return rms_norm(update, weight, eps, main_grad=weight.main_grad), update
    return rms_norm(update, weight, eps, residual=stream, main_grad=weight.main_grad)
