"""Tiny Llama folders written with safetensors and json alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def llama_tensors(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights of a Llama, by Hugging Face name."""
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """make_model("name", seed=1, dtype=..., card=..., tokenizer=..., change=..., **config) writes tmp_path/name."""

    def make(
        name: str,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        card: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        whole = {**CONFIG, **config}
        tensors = llama_tensors(whole, seed, dtype)
        change(tensors)
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(whole))
        if card is not None:
            (folder / "hyperllama.json").write_text(json.dumps(card))
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer)
        return folder

    return make


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden merges: $HYPERLLAMA_SHARED/goldens, else ../shared/goldens beside the checkout."""
    shared = Path(os.environ.get("HYPERLLAMA_SHARED", Path(__file__).parents[3] / "shared"))
    if not (shared / "goldens" / "manifest.json").is_file():
        pytest.skip(f"no golden merges under {shared}: set HYPERLLAMA_SHARED to the folder that has goldens/")
    return shared / "goldens"
