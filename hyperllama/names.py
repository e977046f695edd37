"""The one place that knows how weights are called.

Packed tensors are what the model computes with (Q, K and V in one matrix, gate and up in one); logical tensors are what
files, growth and merging see, under their Hugging Face names. A logical tensor is a block of rows of a packed one.

    packed                 logical
    embed                  model.embed_tokens.weight
    layers.0.attn_norm     model.layers.0.input_layernorm.weight
    layers.0.qkv           model.layers.0.self_attn.{q,k,v}_proj.weight      rows [all q heads; all k heads; all v heads]
    layers.0.o             model.layers.0.self_attn.o_proj.weight
    layers.0.mlp_norm      model.layers.0.post_attention_layernorm.weight
    layers.0.gate_up       model.layers.0.mlp.{gate,up}_proj.weight          rows [gate; up]
    layers.0.down          model.layers.0.mlp.down_proj.weight
    norm                   model.norm.weight
    head                   lm_head.weight                                    untied models only
"""

from dataclasses import dataclass
from math import prod

from hyperllama.settings import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LogicalTensor:
    """A weight under its Hugging Face name: rows `start:start + shape[0]` of the packed tensor `packed`."""

    name: str
    shape: tuple[int, ...]
    packed: str
    start: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def logical_tensors(config: ModelConfig) -> list[LogicalTensor]:
    """All weights of a model in arena order."""
    width, ffn = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = [LogicalTensor(EMBEDDING, (config.vocab_size, width), "embed")]
    for layer in range(config.num_layers):
        name, packed = f"model.layers.{layer}", f"layers.{layer}"
        tensors += [
            LogicalTensor(f"{name}.input_layernorm.weight", (width,), f"{packed}.attn_norm"),
            LogicalTensor(f"{name}.self_attn.q_proj.weight", (q_rows, width), f"{packed}.qkv"),
            LogicalTensor(f"{name}.self_attn.k_proj.weight", (kv_rows, width), f"{packed}.qkv", q_rows),
            LogicalTensor(f"{name}.self_attn.v_proj.weight", (kv_rows, width), f"{packed}.qkv", q_rows + kv_rows),
            LogicalTensor(f"{name}.self_attn.o_proj.weight", (width, q_rows), f"{packed}.o"),
            LogicalTensor(f"{name}.post_attention_layernorm.weight", (width,), f"{packed}.mlp_norm"),
            LogicalTensor(f"{name}.mlp.gate_proj.weight", (ffn, width), f"{packed}.gate_up"),
            LogicalTensor(f"{name}.mlp.up_proj.weight", (ffn, width), f"{packed}.gate_up", ffn),
            LogicalTensor(f"{name}.mlp.down_proj.weight", (width, ffn), f"{packed}.down"),
        ]
    tensors.append(LogicalTensor(FINAL_NORM, (width,), "norm"))
    if not config.tie_embeddings:
        tensors.append(LogicalTensor(HEAD, (config.vocab_size, width), "head"))
    return tensors


def packed_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the packed tensors, in arena order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in logical_tensors(config):
        rows = shapes.get(tensor.packed, (0,))[0] + tensor.shape[0]
        shapes[tensor.packed] = (rows, *tensor.shape[1:])
    return shapes
