"""HyperCloning (Samragh et al. 2024, arXiv 2409.12903): every width of a Llama times an integer, its function kept.

    tensor                 row copies   column copies (divided by them)   noise
    embedding, norms       widths tiled, never divided
    q, k, v, gate, up      f            f                                 yes
    o, down                f            f                                 yes
    untied lm_head         1            f                                 no

The head count grows and head_dim stays, so RoPE and grouped queries carry over. A tied table can't be divided: the logits are,
by a factor that exported folders carry in the final norm (see hub.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperllama.arena import Arena
from hyperllama.dtypes import common_dtype
from hyperllama.errors import HyperLlamaError
from hyperllama.files import check_free
from hyperllama.flops import Ledger, window_flops
from hyperllama.hub import (
    Folder,
    folded,
    folder_hashes,
    hf_config,
    model_config,
    open_folder,
    read_weights,
    write_folder,
)
from hyperllama.kernels.grow import check_noise, grow, noise_key
from hyperllama.model import Llama
from hyperllama.names import EMBEDDING, HEAD, logical_tensors


def grow_tensor(name: str, source: Tensor, factor: int, noise_db: float | None, seed: int) -> Tensor:
    """One logical tensor, grown by `factor` under the rules above; dtype kept."""
    if name == EMBEDDING:
        return source.repeat(1, factor)
    if name == HEAD:
        return grow(source, 1, factor)
    return grow(source, factor, factor, noise_db=noise_db, key=noise_key(seed, name))


def plan_growth(path: str | Path, factor: int, noise_db: float | None, seed: int) -> dict[str, Any]:
    """What growing a folder would give: shapes, parameters and FLOPs, as exact integers. Writes nothing."""
    if factor < 2:
        raise HyperLlamaError(f"--factor is {factor}; growing needs an integer of at least 2")
    check_noise(noise_db)
    folder = open_folder(path)
    small = model_config(folder.config, folder.path)
    large = small.grown(factor)
    seq_len = small.max_position_embeddings
    return {
        "factor": factor,
        "noise_db": noise_db,
        "seed": seed,
        "model": large.model_dump(),
        "parameters": {"before": small.num_parameters, "after": large.num_parameters},
        "seq_len": seq_len,
        "dense_flops_per_window": {"before": window_flops(small, seq_len), "after": window_flops(large, seq_len)},
        "reads": [str(file) for file in folder.files],
    }


def grow_folder(
    path: str | Path,
    out: str | Path,
    factor: int,
    *,
    noise_db: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Grow the model in a Hugging Face folder into a new folder and verify that its function was kept.

    Growing costs no FLOPs; the new card's ledger inherits the small model's. Returns the plan with the verification's figures.
    Raises HyperLlamaError, with nothing written, when the input is not a Llama, or when a power-of-two factor, whose divisions
    are exact, did not keep the function. Other factors round every divided weight: the figures say by how much that tells.
    """
    check_free(out)
    plan = plan_growth(path, factor, noise_db, seed)
    folder = open_folder(path)
    small = _load(folder)
    config = small.config.grown(factor)
    large = Llama(config, Arena(config, small.arena.dtype, "cpu", training=False))
    sources, targets = small.arena.logical("weights"), large.arena.logical("weights")
    for done, tensor in enumerate(logical_tensors(config)):
        targets[tensor.name].copy_(grow_tensor(tensor.name, sources[tensor.name], factor, noise_db, seed))
        if progress:
            progress(done + 1, len(targets))
    report = verify(small, large)
    exact = factor & (factor - 1) == 0
    if not isfinite(report["max_logit_difference"]) or (exact and not report["preserved"]):
        raise HyperLlamaError(
            f"growing {path} changed its function: logits differ by up to {report['max_logit_difference']:.3g}; nothing was written"
        )
    write_folder(
        out,
        hf_config(config, small.arena.dtype),
        _tensors(large),
        _card(folder, factor, noise_db, seed),
        tokenizer_from=folder.path,
    )
    return {**plan, "verified": report}


def _load(folder: Folder) -> Llama:
    """The folder's model in the dtype that holds all of its weights, on the CPU."""
    config = model_config(folder.config, folder.path)
    dtype = getattr(torch, common_dtype(folder.dtype(name) for name in folder.names))
    arena = Arena(config, dtype, "cpu", training=False)
    read_weights(folder, config, arena.logical("weights"))
    return Llama(config, arena)


def _tensors(model: Llama) -> Iterator[tuple[str, Tensor]]:
    yield from folded(model.config, model.arena.logical("weights").items(), model.arena.dtype)


def _card(folder: Folder, factor: int, noise_db: float | None, seed: int) -> dict[str, Any]:
    parent = folder.card
    growth = {"method": "hyperclone", "factor": factor, "noise_db": noise_db, "seed": seed}
    made_from = [{"path": str(folder.path), "sha256": folder_hashes(folder)}]
    digest = hashlib.sha256(json.dumps([growth, made_from[0]["sha256"]], sort_keys=True).encode()).hexdigest()
    ledger = Ledger.child(f"grow-{digest[:12]}", folder.ledgers)
    return {
        "kind": "grow",
        "ledger": ledger.to_json(),
        "token_counts": parent.get("token_counts", {}),
        "made_from": made_from,
        "growth": [*parent.get("growth", []), growth],
    }


@torch.no_grad()
def verify(small: Llama, large: Llama, *, windows: int = 2, seq_len: int = 64) -> dict[str, Any]:
    """Compare the logits of both models on random tokens, weights as stored, arithmetic in fp32.

    `preserved` means a largest difference of at most 1e-4 of the largest logit: a few hundred roundings of fp32.
    """
    config = small.config
    seq_len = min(seq_len, config.max_position_embeddings)
    valid = config.unpadded_vocab_size or config.vocab_size
    ids = torch.randint(valid, (windows, seq_len), generator=torch.Generator().manual_seed(0))
    logits = [model.logits(model(ids))[..., :valid] for model in (_fp32(small), _fp32(large))]
    difference, largest = float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())
    return {
        "tokens": ids.numel(),
        "max_logit_difference": difference,
        "max_logit": largest,
        "preserved": difference <= 1e-4 * max(largest, 1e-3),
    }


def _fp32(model: Llama) -> "Llama":
    if model.arena.dtype == torch.float32:
        return model
    arena = Arena(model.config, torch.float32, "cpu", training=False)
    arena.weights.copy_(model.arena.weights)
    return Llama(model.config, arena)
