"""Hugging Face Llama folders, in and out. Safetensors only: no pickle, no remote code.

A folder is config.json, model.safetensors (or shards with an index), tokenizer files, and our card hyperllama.json.

Grown models with a tied head divide their logits by a factor. A plain LlamaForCausalLM can't say that, so on the way out the
final norm's weight is divided by it (exact for powers of two) and config.json remembers the factor under
"hyperllama_folded_factor"; on the way in the fold is undone, and training goes on as if it had never been written.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperllama import __version__
from hyperllama.companions import Companions, write_companions
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_folder, check_room, json_text, read_json, sha256_file
from hyperllama.flops import Ledger
from hyperllama.kernels.raw import Raw
from hyperllama.names import EMBEDDING, FINAL_NORM, HEAD
from hyperllama.settings import ModelConfig, validated
from hyperllama.weights import (
    JOURNAL,
    NewTensor,
    TensorFile,
    WeightsWriter,
    journal_job,
    shard_index,
    shard_names,
    shards,
)

if TYPE_CHECKING:  # torch and numpy are imported by what needs them: merging folders does not
    import torch
    from torch import Tensor

CARD = "hyperllama.json"
FOLDED = "hyperllama_folded_factor"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class Folder:
    """A model folder opened for reading; tensors are memory-mapped and read when asked for."""

    def __init__(self, path: Path, config: dict[str, Any], card: dict[str, Any], files: list[Path]):
        self.path, self.config, self.card, self.files = path, config, card, files
        self._where: dict[str, TensorFile] = {}
        self._handles: dict[TensorFile, Any] = {}
        for file in map(TensorFile, files):
            self._where.update(dict.fromkeys(file.entries, file))
        # old exporters stored RoPE's frequencies with the weights; they follow from rope_theta
        self.names: list[str] = sorted(name for name in self._where if not name.endswith("rotary_emb.inv_freq"))

    @property
    def ledgers(self) -> list[Ledger]:
        """The ledger on the folder's card; none for a model from elsewhere."""
        return [Ledger.from_json(self.card["ledger"], self.path / CARD)] if "ledger" in self.card else []

    def file(self, name: str) -> TensorFile:
        """The file that holds a tensor. Raises HyperLlamaError when none does."""
        if name not in self._where:
            raise HyperLlamaError(f"{self.path} has no tensor {name}")
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header."""
        return self.file(name).entries[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor by its name, read from the header."""
        return self.file(name).dtype(name)

    def raw(self, name: str) -> Raw:
        """A tensor as the kernels take it, over the memory map; valid while the folder is."""
        return self.file(name).raw(name)

    def bytes(self, name: str) -> memoryview:
        """A tensor's bytes, over the memory map."""
        return self.file(name).bytes(name)

    def tensor(self, name: str) -> "Tensor":
        """A tensor on the CPU, over a memory map."""
        from safetensors import safe_open

        file = self.file(name)
        if file not in self._handles:
            self._handles[file] = safe_open(str(file.path), framework="pt")
        return self._handles[file].get_tensor(name)

    def check_hash(self, name: str, digest: str) -> None:
        """Raise HyperLlamaError when the folder's card knows another hash of a tensor."""
        known = self.card.get("weights", {}).get(name, digest)
        if known != digest:
            raise HyperLlamaError(
                f"{self.path}: tensor {name} has the hash {digest}, {CARD} says {known}: the file is damaged, or was "
                "changed by a program that left the card as it was"
            )


def open_folder(path: str | Path) -> Folder:
    """Open a Hugging Face model folder.

    Raises HyperLlamaError when the folder, its config.json or a weight file is missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise HyperLlamaError(f"{path} is not a folder; a model folder with config.json and *.safetensors was expected")
    config = read_config(path)
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    elif index.is_file():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not weight_map or not isinstance(weight_map, dict) or not {str}.issuperset(map(type, weight_map.values())):
            raise HyperLlamaError(f"{index} has no weight_map of tensor names to file names")
        files = [path / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != path or not file.is_file():
                raise HyperLlamaError(f"{index} names {file.name}, which is not in the folder")
    else:
        raise HyperLlamaError(f"{path} has no model.safetensors and no model.safetensors.index.json")
    card = read_json(path / CARD) if (path / CARD).is_file() else {}
    kinds = {"growth": list, "token_counts": dict, "weights": dict}
    if not isinstance(card, dict) or not all(isinstance(card.get(key, kind()), kind) for key, kind in kinds.items()):
        raise HyperLlamaError(
            f"{path / CARD} is damaged: a mapping with a list 'growth' and mappings 'token_counts' and 'weights' was expected"
        )
    folder = Folder(path, config, card, files)
    if index.is_file() and len(files) > 1:
        missing = sorted(set(read_json(index)["weight_map"]) - set(folder._where))
        if missing:
            raise HyperLlamaError(f"{path}: the index names tensor {missing[0]}, which is in no shard")
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises HyperLlamaError when it is missing or no mapping."""
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise HyperLlamaError(f"{path / 'config.json'} must hold a mapping")
    return config


def model_config(config: dict[str, Any], where: Path) -> ModelConfig:
    """Our shape of a config.json, the fold of the head factor undone.

    Raises HyperLlamaError for architectures and features that are not a plain Llama.
    """
    file = where / "config.json"
    kind = config.get("model_type")
    if kind not in ("llama", "hyperllama"):
        raise HyperLlamaError(f"{file}: model_type is {kind!r}; llama or hyperllama was expected")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise HyperLlamaError(f"{file}: {key} is true; only models without biases are supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise HyperLlamaError(f"{file}: RoPE's settings are {rope!r}; a mapping was expected")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise HyperLlamaError(f"{file}: scaled RoPE ({rope}) is not supported")
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise HyperLlamaError(f"{file}: hidden_act is {activation!r}; one of {', '.join(_ACTIVATIONS)} was expected")
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        values = {
            "vocab_size": config["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": config["intermediate_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden // heads,
            "activation": _ACTIVATIONS[activation],
            "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
            "lm_head_normalization_factor": config.get(FOLDED, config.get("lm_head_normalization_factor") or 1.0),
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "initializer_range": config.get("initializer_range", 0.02),
            "unpadded_vocab_size": config.get("unpadded_vocab_size"),
        }
    except KeyError as error:
        raise HyperLlamaError(f"{file}: key {error.args[0]} is missing") from None
    except (TypeError, ZeroDivisionError):
        raise HyperLlamaError(
            f"{file}: hidden_size is {hidden!r} and num_attention_heads {heads!r}; positive integers were expected"
        ) from None
    return validated(ModelConfig, values, str(file))


def hf_config(config: ModelConfig, dtype: "torch.dtype | str") -> dict[str, Any]:
    """The config.json of a plain LlamaForCausalLM; a head factor is noted as folded into the final norm."""
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.initializer_range,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.unpadded_vocab_size is not None:
        values["unpadded_vocab_size"] = config.unpadded_vocab_size
    if config.lm_head_normalization_factor != 1.0:
        values[FOLDED] = config.lm_head_normalization_factor
    return values


def factor_is_folded(config: dict[str, Any]) -> bool:
    """Whether the final norm in the files already holds 1/factor."""
    return FOLDED in config


def write_folder(
    path: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, "Tensor"]],
    card: dict[str, Any],
    *,
    tokenizer_from: Path | None = None,
    companions: Companions | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder atomically; tensors are taken one after another and a shard closes at 5 GB.

    Raises HyperLlamaError when the folder exists and `overwrite` is false; then nothing is written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_folder(path, overwrite=overwrite) as folder:
        pending: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        closed = 0

        def close() -> None:
            nonlocal pending, closed
            try:
                save_file(pending, str(folder / f"shard-{closed}"), metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, in the library's own words
                raise HyperLlamaError(f"{path} can't be written: {error}") from None
            pending, closed = {}, closed + 1

        for name, tensor in tensors:
            sizes[name] = tensor.numel() * tensor.element_size()
            if len(shards(sizes)) > closed + 1:
                close()
            pending[name] = tensor.contiguous()
        close()
        for i, file in enumerate(shard_names(closed)):
            (folder / f"shard-{i}").rename(folder / file)
        _complete(folder, sizes, config, card, tokenizer_from, companions)


def _complete(
    folder: Path,
    sizes: Mapping[str, int],
    config: dict[str, Any],
    card: dict[str, Any],
    tokenizer_from: Path | None,
    companions: Companions | None,
) -> None:
    """Write what a model folder has besides weights; `sizes` are the tensors' bytes, in order. The folder is a temporary one."""
    files = shards(sizes)
    values: dict[str, Any] = {"config.json": config, CARD: {"code_version": __version__, **card}}
    if len(files) > 1:
        values["model.safetensors.index.json"] = shard_index(files, sum(sizes.values()))
    for name, value in values.items():
        (folder / name).write_text(json_text(value), encoding="utf-8")
    write_companions(folder, companions or {})
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, folder)


class FolderWriter(WeightsWriter):
    """The weights of a new model folder, to be written one after another, then `complete`d."""

    def complete(
        self,
        config: dict[str, Any],
        card: dict[str, Any],
        tokenizer_from: Path | None,
        companions: Companions | None = None,
    ) -> None:
        """Write the rest of the folder; the tensors' hashes go on its card."""
        sizes = {tensor.name: tensor.n_bytes for tensor in self.tensors.values()}
        _complete(self.folder, sizes, config, {**card, "weights": self.hashes()}, tokenizer_from, companions)


@contextmanager
def streamed_folder(
    path: str | Path, tensors: Sequence[NewTensor], job: str, *, overwrite: bool = False, sync: bool = False
) -> Iterator[FolderWriter]:
    """Write a model folder tensor by tensor, in place and atomically; what a killed process of the same `job` left is gone on with.

    sync: see files.atomic_folder. Raises HyperLlamaError when the folder exists and `overwrite` is false, or the disk has no room.
    """
    check_room(path, sum(tensor.n_bytes for tensor in tensors))
    with atomic_folder(path, overwrite=overwrite, resumes=lambda left: journal_job(left) == job, sync=sync) as folder:
        writer = FolderWriter(folder, tensors, job)
        try:
            yield writer
        finally:
            writer.close()
        (folder / JOURNAL).unlink()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of a model folder, or one tokenizer file, into `folder`."""
    if source.is_dir():
        files = {name: source / name for name in TOKENIZER_FILES}
    elif source.suffix == ".model":
        files = {"tokenizer.model": source}
    else:
        files = {"tokenizer.json": source} | {name: source.parent / name for name in TOKENIZER_FILES[2:]}
    for name, file in files.items():
        if file.is_file():
            (folder / name).write_bytes(file.read_bytes())


def folder_hashes(folder: Folder) -> dict[str, str]:
    """SHA-256 of the config and weight files: what a model made from this folder says it was made from."""
    return {file.name: sha256_file(file) for file in [folder.path / "config.json", *folder.files]}


def weights_hash(folder: Folder, hashes: Mapping[str, str]) -> str:
    """One SHA-256 for the tensors of a folder in `hashes` (name -> hash), with their dtypes and shapes."""
    lines = [f"{name} {folder.dtype(name)} {list(folder.shape(name))} {hashes[name]}" for name in sorted(hashes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def origin(label: str, folder: Folder, hashes: Mapping[str, str]) -> dict[str, str]:
    """What a card says of a folder that something was made from; `hashes` are those of the tensors that were read."""
    return {
        "path": label,
        "config_sha256": sha256_file(folder.path / "config.json"),
        "weights": weights_hash(folder, hashes),
    }


def stamps(folder: Folder) -> list[list[Any]]:
    """Names, sizes and times of the weight files: whether they are still those that a killed process read."""
    return [
        [str(file.resolve()), status.st_size, status.st_mtime_ns] for file in folder.files for status in [file.stat()]
    ]


def check_weights(folder: Folder, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise HyperLlamaError naming the tensor that is missing, unexpected, of another shape, or no floating-point weight."""
    if config.tie_embeddings and HEAD in folder.names and HEAD not in shapes:
        check_tied(folder)
        names = [name for name in folder.names if name != HEAD]  # some tools write the tied table twice
    else:
        names = folder.names
    missing, unknown = sorted(set(shapes) - set(names)), sorted(set(names) - set(shapes))
    if missing:
        raise HyperLlamaError(f"{folder.path} has no tensor {missing[0]}, which its config.json asks for")
    if unknown:
        raise HyperLlamaError(f"{folder.path} has a tensor {unknown[0]} that no Llama of its config.json has")
    for name, shape in shapes.items():
        if folder.shape(name) != shape:
            raise HyperLlamaError(
                f"{folder.path}: tensor {name} has shape {folder.shape(name)}, config.json asks for {shape}"
            )
        folder.dtype(name)  # refuses quantised weights


def read_weights(folder: Folder, config: ModelConfig, targets: dict[str, "Tensor"]) -> None:
    """Copy a folder's weights into `targets` (Hugging Face name -> view), unfolding the head factor.

    Raises HyperLlamaError as `check_weights` does.
    """
    import torch

    with torch.no_grad():
        for name, source in stored_weights(folder, config, {k: tuple(view.shape) for k, view in targets.items()}):
            targets[name].copy_(source)


def stored_weights(
    folder: Folder, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> "Iterator[tuple[str, Tensor]]":
    """A folder's weights by Hugging Face name, one at a time, the head factor unfolded.

    Raises HyperLlamaError as `check_weights` does.
    """
    import torch

    check_weights(folder, config, shapes)
    factor = config.lm_head_normalization_factor if factor_is_folded(folder.config) else 1.0
    for name in shapes:
        source = folder.tensor(name)
        yield name, source.to(torch.float32) * factor if name == FINAL_NORM and factor != 1.0 else source


def check_tied(folder: Folder) -> None:
    """Raise HyperLlamaError when a folder said to be tied has a head of its own: readers differ on which of the two counts."""
    if HEAD not in folder.names:
        return
    import numpy as np

    same_dtype = folder.dtype(HEAD) == folder.dtype(EMBEDDING)
    if not same_dtype or not np.array_equal(folder.bytes(HEAD), folder.bytes(EMBEDDING)):
        raise HyperLlamaError(
            f"{folder.path}: config.json says that the embeddings are tied, but {HEAD} differs from {EMBEDDING}: "
            "set tie_word_embeddings to false, or remove one of them"
        )


def folded(
    config: ModelConfig, tensors: "Iterable[tuple[str, Tensor]]", dtype: "torch.dtype"
) -> "Iterable[tuple[str, Tensor]]":
    """Logical tensors as a plain Llama's: on the CPU, in `dtype`, the head factor folded into the final norm."""
    import torch

    for name, tensor in tensors:
        if name == FINAL_NORM and config.lm_head_normalization_factor != 1.0:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) / config.lm_head_normalization_factor
        yield name, tensor.detach().to("cpu", dtype, copy=True)  # a copy: safetensors refuses views that share a buffer
