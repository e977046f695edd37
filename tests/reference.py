"""Random small models, and transformers' LlamaForCausalLM with the same weights as the independent truth."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hyperllama.arena import Arena
from hyperllama.hub import folded, hf_config, model_config, open_folder, read_weights, write_folder
from hyperllama.model import Llama
from hyperllama.settings import ModelConfig

HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def shape(**changes: Any) -> ModelConfig:
    """A model of two layers that differs from the default in `changes`."""
    values = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
    }
    return ModelConfig(**(values | changes))


def random_model(
    config: ModelConfig, dtype: torch.dtype, *, seed: int = 0, training: bool = False, **options: Any
) -> Llama:
    """Weights large enough that every part of the model matters, norms included."""
    model = Llama(config, Arena(config, dtype, "cpu", training=training), **options)
    generator = torch.Generator().manual_seed(seed)
    for view in model.arena.packed("weights").values():
        noise = torch.randn(view.shape, generator=generator, dtype=torch.float64)
        view.copy_(1 + 0.2 * noise if view.dim() == 1 else noise / view.shape[1] ** 0.5)
    return model


def random_ids(config: ModelConfig, *size: int, seed: int = 1) -> Tensor:
    """Real tokens."""
    valid = config.unpadded_vocab_size or config.vocab_size
    return torch.randint(valid, size, generator=torch.Generator().manual_seed(seed))


def transformers_llama(model: Llama) -> LlamaForCausalLM:
    """The same weights in transformers, in the same dtype; in fp64 its norms, which would round to fp32, are redone."""
    c, dtype = model.config, model.arena.dtype
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            hidden_act=HF_ACTIVATIONS[c.activation],
            rms_norm_eps=c.rms_norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            max_position_embeddings=c.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            attn_implementation="sdpa",
        )
    ).to(dtype)
    weights = {name: view.clone() for name, view in model.arena.logical("weights").items()}
    if c.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    if dtype == torch.float64:
        for norm in (module for module in theirs.modules() if isinstance(module, LlamaRMSNorm)):
            norm.forward = lambda x, m=norm: m.weight * x * (x.pow(2).mean(-1, True) + m.variance_epsilon).rsqrt()
    return theirs


def their_logits(theirs: LlamaForCausalLM, config: ModelConfig, ids: Tensor) -> Tensor:
    """Logits (B, T, real tokens) of a model of shape `config`, its head factor applied."""
    logits = theirs(ids, use_cache=False).logits / config.lm_head_normalization_factor
    return logits[..., : config.unpadded_vocab_size]


def write(model: Llama, path: Path, **options: Any) -> Path:
    """The model as a Hugging Face folder."""
    tensors = folded(model.config, model.arena.logical("weights").items(), model.arena.dtype)
    write_folder(path, hf_config(model.config, model.arena.dtype), tensors, {"kind": "test"}, **options)
    return path


def read(path: Path, dtype: torch.dtype) -> Llama:
    """The model in a Hugging Face folder."""
    folder = open_folder(path)
    config = model_config(folder.config, folder.path)
    model = Llama(config, Arena(config, dtype, "cpu", training=False))
    read_weights(folder, config, model.arena.logical("weights"))
    return model


@torch.no_grad()
def logits(model: Llama, ids: Tensor) -> Tensor:
    """Logits of the real tokens."""
    return model.logits(model(ids))[..., : model.config.unpadded_vocab_size]


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())
