"""Model folders: transformers reads what we write, we read what it writes, and mistakes are one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hyperllama import weights
from hyperllama.arena import Arena
from hyperllama.errors import HyperLlamaError
from hyperllama.hub import folded, hf_config, model_config, open_folder, read_weights, write_folder
from hyperllama.model import Llama
from tests.reference import (
    logits,
    random_ids,
    random_model,
    read,
    relative_error,
    shape,
    their_logits,
    transformers_llama,
    write,
)

CASES = {
    "tied": shape(),
    "untied": shape(tie_embeddings=False),
    "gelu, free head_dim, rope_theta 500000": shape(activation="gelu", head_dim=12, rope_theta=500000.0),
    "gelu_tanh, padded vocabulary": shape(activation="gelu_tanh", unpadded_vocab_size=83),
    "head factor": shape(lm_head_normalization_factor=4.0),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def in_fp32(model: Llama) -> Llama:
    wide = Llama(model.config, Arena(model.config, torch.float32, "cpu", training=False))
    wide.arena.weights.copy_(model.arena.weights)
    return wide


@cases
@dtypes
def test_transformers_loads_a_written_folder_with_the_same_logits(config, dtype, tmp_path):
    model = random_model(config, dtype)
    theirs = LlamaForCausalLM.from_pretrained(write(model, tmp_path / "model"), dtype=torch.float32)
    ids = random_ids(config, 2, 11)
    with torch.no_grad():
        want = theirs(ids).logits[..., : config.unpadded_vocab_size]
    assert relative_error(logits(in_fp32(model), ids), want) < 1e-5


@cases
@dtypes
def test_a_written_folder_reads_back_to_the_same_bits(config, dtype, tmp_path):
    model = random_model(config, dtype)
    again = read(write(model, tmp_path / "model"), dtype)
    assert again.config == config
    assert torch.equal(again.arena.weights, model.arena.weights)


@cases
def test_a_folder_written_by_transformers_is_read_with_the_same_logits(config, tmp_path):
    plain = config.model_copy(update={"lm_head_normalization_factor": 1.0, "unpadded_vocab_size": None})
    theirs = transformers_llama(random_model(plain, torch.float32))
    theirs.save_pretrained(tmp_path / "theirs")
    model = read(tmp_path / "theirs", torch.float32)
    assert model.config == plain
    ids = random_ids(plain, 2, 11)
    with torch.no_grad():
        assert relative_error(logits(model, ids), theirs(ids).logits) < 1e-5


def test_config_keys_of_older_transformers_are_read():
    config = hf_config(shape(rope_theta=500000.0), torch.float32)
    assert model_config(config, Path("a")).rope_theta == 500000.0
    old = {key: value for key, value in config.items() if key not in ("head_dim", "num_key_value_heads")}
    read = model_config(old | {"rope_scaling": None, "hidden_act": "gelu_new"}, Path("a"))
    assert (read.head_dim, read.num_kv_heads, read.activation) == (8, 4, "gelu_tanh")


@dtypes
def test_shards_are_cut_at_the_limit_and_read_by_both(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 10_000)
    model = random_model(shape(tie_embeddings=False), dtype)
    path = write(model, tmp_path / "model")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    assert not (path / "model.safetensors").exists()
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 10_000
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(view.nbytes for view in model.arena.logical("weights").values())
    assert torch.equal(read(path, dtype).arena.weights, model.arena.weights)
    theirs = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = random_ids(model.config, 1, 9)
    with torch.no_grad():
        assert relative_error(logits(in_fp32(model), ids), theirs(ids).logits) < 1e-5


def test_an_unfolded_head_factor_divides_the_logits(tmp_path):
    plain = random_model(shape(), torch.float32)
    path = write(plain, tmp_path / "model")
    change_config(path, {"model_type": "hyperllama", "lm_head_normalization_factor": 2.0})
    model = read(path, torch.float32)
    ids = random_ids(plain.config, 2, 9)
    assert model.config.lm_head_normalization_factor == 2.0
    assert torch.equal(logits(model, ids), logits(plain, ids) / 2)
    with torch.no_grad():
        want = their_logits(transformers_llama(plain), model.config, ids)
    assert relative_error(logits(model, ids), want) < 1e-5


def test_a_tied_table_written_twice_is_read_once(tmp_path):
    model = random_model(shape(), torch.float32)
    path = write(model, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    assert torch.equal(read(path, torch.float32).arena.weights, model.arena.weights)
    other = tensors["model.embed_tokens.weight"]
    for head in (other + 1, other.bfloat16()):
        save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
        with pytest.raises(HyperLlamaError, match=r"model: config\.json says that the embeddings are tied"):
            read(path, torch.float32)


def test_an_existing_folder_is_kept_unless_it_may_be_overwritten(tmp_path):
    first, second = random_model(shape(), torch.float32), random_model(shape(), torch.float32, seed=1)
    path = write(first, tmp_path / "model")
    with pytest.raises(HyperLlamaError, match="already exists"):
        write(second, path)
    assert torch.equal(read(path, torch.float32).arena.weights, first.arena.weights)
    write(second, path, overwrite=True)
    assert torch.equal(read(path, torch.float32).arena.weights, second.arena.weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def change_config(path: Path, changes: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    config |= changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


def change_tensors(path: Path, changes: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Tensor | None] = {**load_file(path / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors")


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
CONFIG_MISTAKES = {
    "another architecture": ({"model_type": "mistral"}, ["config.json", "mistral", "llama"]),
    "attention bias": ({"attention_bias": True}, ["config.json", "attention_bias"]),
    "mlp bias": ({"mlp_bias": True}, ["config.json", "mlp_bias"]),
    "scaled rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["config.json", "RoPE"]),
    "scaled rope, new key": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["config.json", "RoPE"]),
    "scaled rope, old key": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["config.json", "RoPE"]),
    "unknown activation": ({"hidden_act": "relu"}, ["config.json", "relu", "silu"]),
    "missing key": ({"hidden_size": ...}, ["config.json", "hidden_size", "missing"]),
    "wrong type": ({"num_hidden_layers": "two"}, ["config.json", "num_layers"]),
    "hidden_size is text": ({"hidden_size": "32", "head_dim": ...}, ["config.json", "hidden_size"]),
    "rope_theta is text": ({"rope_theta": "large"}, ["config.json", "rope_theta"]),
    "rope_theta is null": ({"rope_theta": None}, ["config.json", "rope_theta"]),
    "kv heads do not divide": ({"num_key_value_heads": 3}, ["config.json", "num_kv_heads"]),
}


@pytest.mark.parametrize(("changes", "parts"), CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES)
def test_a_config_that_is_no_plain_llama_is_refused_naming_file_and_key(changes, parts, tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "model")
    change_config(path, changes)
    with pytest.raises(HyperLlamaError) as error:
        read(path, torch.float32)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


TENSOR_MISTAKES = {
    "missing": ({O_PROJ: None}, [O_PROJ, "no tensor"]),
    "unexpected": ({"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}, ["model.layers.2.mlp.up_proj.weight"]),
    "bias": ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, ["q_proj.bias"]),
    "wrong shape": ({O_PROJ: torch.zeros(32, 31)}, [O_PROJ, "(32, 31)", "(32, 32)"]),
    "transposed": ({"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 56)}, ["up_proj", "(32, 56)", "(56, 32)"]),
    "integers": ({O_PROJ: torch.zeros(32, 32, dtype=torch.int8)}, [O_PROJ, "I8", "BF16"]),
}


@pytest.mark.parametrize(("changes", "parts"), TENSOR_MISTAKES.values(), ids=TENSOR_MISTAKES)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(changes, parts, tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "model")
    change_tensors(path, changes)
    with pytest.raises(HyperLlamaError) as error:
        read(path, torch.float32)
    assert all(part in str(error.value) for part in [*parts, str(path)]), error.value


def test_missing_and_damaged_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 10_000)
    model = random_model(shape(), torch.float32)

    def broken(name: str) -> Path:
        return write(model, tmp_path / name)

    def refused(path: Path, *parts: str) -> None:
        with pytest.raises(HyperLlamaError) as error:
            open_folder(path)
        assert all(part in str(error.value) for part in parts), error.value

    refused(tmp_path / "nothing", "nothing", "not a folder")
    path = broken("no config")
    (path / "config.json").unlink()
    refused(path, "config.json", "does not exist")
    path = broken("config is no JSON")
    (path / "config.json").write_text("{")
    refused(path, "config.json", "not valid JSON")
    path = broken("config is a list")
    (path / "config.json").write_text("[]")
    refused(path, "config.json", "mapping")
    path = broken("lost shard")
    lost = sorted(path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(path, "model.safetensors.index.json", lost.name)
    path = broken("cut shard")
    cut = sorted(path.glob("*.safetensors"))[0]
    cut.write_bytes(cut.read_bytes()[:-3])
    refused(path, str(cut), "damaged")
    path = broken("shard is text")
    text = sorted(path.glob("*.safetensors"))[0]
    text.write_text("no tensors in here")
    refused(path, str(text), "damaged")
    path = broken("no weights")
    for file in path.glob("model*"):
        file.unlink()
    refused(path, "no weights", "model.safetensors")
    path = broken("index outside")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    refused(path, "index.json", "b.safetensors")
    for content in ("[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        (path / "model.safetensors.index.json").write_text(content)
        refused(path, "index.json", "weight_map")


def test_rope_frequencies_of_old_exporters_are_passed_over(tmp_path):
    config = shape()
    model = random_model(config, torch.float32)
    tensors = folded(config, model.arena.logical("weights").items(), torch.float32)
    stored = ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    write_folder(tmp_path / "old", hf_config(config, torch.float32), [*tensors, stored], {})
    arena = Arena(config, torch.float32, "cpu", training=False)
    read_weights(open_folder(tmp_path / "old"), config, arena.logical("weights"))
    assert torch.equal(arena.weights, model.arena.weights)
