"""Training state on disk: atomic, checksummed, found by scanning; and the model a run leaves behind.

    <run>/checkpoints/step-00000100/state.safetensors    master/<name>, m/<name>, v/<name>, all fp32
                                    state.json           step, windows, ledger, token counts, seconds, SHA-256
    <run>/model/                                         the finished model, a Hugging Face folder

Weights are not stored: they are the masters, rounded. So a resumed run continues from the same bits.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hyperllama.arena import Arena
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_folder, read_json, sha256_file, write_json
from hyperllama.hub import folded, hf_config, write_folder

ROLES = ("master", "m", "v")


def save_state(run: Path, step: int, arena: Arena, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step` atomically, then delete all but the newest `keep`."""
    folder = run / "checkpoints" / f"step-{step:08}"
    with atomic_folder(folder, overwrite=True) as temporary:
        views = {f"{role}/{name}": view for role in ROLES for name, view in arena.logical(role).items()}  # type: ignore[arg-type]
        # as numpy arrays: safetensors' torch writer refuses views that share a buffer
        save_file({name: view.cpu().numpy() for name, view in views.items()}, str(temporary / "state.safetensors"))
        state = {"step": step, **state}
        write_json(temporary / "state.json", {**state, "sha256": _checksum(temporary / "state.safetensors", state)})
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def _checksum(file: Path, state: dict[str, Any]) -> str:
    """SHA-256 over the tensors' file and the state beside it."""
    text = sha256_file(file) + json.dumps(state, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; leftovers of an interrupted save are not among them."""
    return sorted((run / "checkpoints").glob("step-*"))


def load_state(folder: Path, arena: Arena) -> dict[str, Any]:
    """Read a checkpoint into the arena and return its state.

    Raises HyperLlamaError when the checkpoint is damaged or belongs to another model; the arena is then unusable.
    """
    state = read_json(folder / "state.json")
    file, recorded = folder / "state.safetensors", state.pop("sha256", None)
    if not file.is_file() or _checksum(file, state) != recorded:
        raise HyperLlamaError(
            f"{file} or state.json is damaged (their SHA-256 is not the recorded one): remove {folder} to resume before it"
        )
    try:
        with safe_open(str(file), framework="pt") as handle:
            for role in ROLES:
                for name, view in arena.logical(role).items():  # type: ignore[arg-type]
                    source = handle.get_tensor(f"{role}/{name}")
                    if source.shape != view.shape:
                        raise HyperLlamaError(
                            f"{file}: {role}/{name} is {tuple(source.shape)}, the model's is {tuple(view.shape)}"
                        )
                    view.copy_(source)
    except SafetensorError as error:
        raise HyperLlamaError(f"{file} does not belong to this model: {error}") from None
    if arena.master is not arena.weights:
        arena.weights.copy_(arena.master)
    return state


def export_model(path: Path, arena: Arena, card: dict[str, Any], tokenizer: Path, dtype: torch.dtype) -> None:
    """Write the model as a Hugging Face folder with its card and tokenizer, atomically."""
    tensors = folded(arena.config, arena.logical("weights").items(), dtype)
    write_folder(path, hf_config(arena.config, dtype), tensors, card, tokenizer_from=tokenizer, overwrite=True)
