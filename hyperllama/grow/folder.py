"""Growing a Hugging Face folder into a new one: planned, grown, verified, written. The operators are in operators.py."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperllama.arena import Arena
from hyperllama.dtypes import common_dtype
from hyperllama.errors import HyperLlamaError
from hyperllama.files import check_free
from hyperllama.flops import Ledger, shared_quantum, window_flops
from hyperllama.grow.operators import GrowVocabulary, Operator, grown_config
from hyperllama.grow.tensors import grow_through
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
from hyperllama.kernels.grow import check_noise
from hyperllama.model import Llama
from hyperllama.names import logical_tensors


def plan_growth(path: str | Path, operators: Sequence[Operator]) -> dict[str, Any]:
    """What growing a folder by `operators` in turn would give: shapes, parameters and FLOPs, as exact integers. Writes nothing.

    `shared_quantum`: both models can spend its multiples exactly (see flops.py).
    """
    for operator in operators:
        check_noise(getattr(operator, "noise_db", None))
    folder = open_folder(path)
    small = model_config(folder.config, folder.path)
    large = grown_config(operators, small)
    seq_len = small.max_position_embeddings
    costs = {"before": window_flops(small, seq_len), "after": window_flops(large, seq_len)}
    quantum = shared_quantum(costs.values())
    return {
        "growth": [operator.describe() for operator in operators],
        "model": large.model_dump(),
        "parameters": {"before": small.num_parameters, "after": large.num_parameters},
        "seq_len": seq_len,
        "dense_flops_per_window": costs,
        "dense_flops_per_token": {key: cost // seq_len for key, cost in costs.items()},
        "shared_quantum": {
            "flops": quantum,
            "windows": quantum // costs["before"],
            "windows_grown": quantum // costs["after"],
        },
        "function": "preserved" if all(operator.preserves for operator in operators) else "not preserved",
        "reads": [str(file) for file in folder.files],
    }


def grow_folder(
    path: str | Path,
    out: str | Path,
    operators: Sequence[Operator],
    *,
    tokenizer: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Grow the model in a Hugging Face folder by `operators` in turn into a new folder, and verify the result.

    `tokenizer`: file or folder of a grown vocabulary's tokenizer; default: the old one's.
    Growing costs no FLOPs; the new card's ledger inherits the small model's. Returns the plan with the verification's figures.
    Raises HyperLlamaError, with nothing written, when the input is not a Llama, when logits are not finite, or when operators that
    keep the function without rounding a weight did not keep it. Where weights are rounded the figures say by how much that tells.
    """
    check_free(out)
    plan = plan_growth(path, operators)
    folder = open_folder(path)
    small = _load(folder)
    config, maps = small.config, []
    for operator in operators:
        maps.append(operator.tensors(config))
        config = operator.grown(config)
    large = Llama(config, Arena(config, small.arena.dtype, "cpu", training=False))
    sources, targets = small.arena.logical("weights"), large.arena.logical("weights")
    for done, tensor in enumerate(logical_tensors(config)):
        targets[tensor.name].copy_(grow_through(maps, tensor.name, sources.__getitem__))
        if progress:
            progress(done + 1, len(targets))
    report = verify(small, large, operators)
    claimed = all(operator.preserves and operator.exact for operator in operators)
    if not isfinite(report["max_logit_difference"]) or (claimed and not report["preserved"]):
        raise HyperLlamaError(
            f"growing {path} changed its function: logits differ by up to {report['max_logit_difference']:.3g}; nothing was written"
        )
    write_folder(
        out,
        hf_config(config, small.arena.dtype),
        _tensors(large),
        _card(folder, plan["growth"]),
        tokenizer_from=tokenizer or folder.path,
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


def _card(folder: Folder, growth: list[dict[str, Any]]) -> dict[str, Any]:
    parent = folder.card
    made_from = [{"path": str(folder.path), "sha256": folder_hashes(folder)}]
    digest = hashlib.sha256(json.dumps([growth, made_from[0]["sha256"]], sort_keys=True).encode()).hexdigest()
    ledger = Ledger.child(f"grow-{digest[:12]}", folder.ledgers)
    return {
        "kind": "grow",
        "ledger": ledger.to_json(),
        "token_counts": parent.get("token_counts", {}),
        "made_from": made_from,
        "growth": [*parent.get("growth", []), *growth],
    }


@torch.no_grad()
def verify(
    small: Llama, large: Llama, operators: Sequence[Operator], *, windows: int = 2, seq_len: int = 64
) -> dict[str, Any]:
    """Compare the logits of both models on random tokens that both know, weights as stored, arithmetic in fp32.

    `claimed`: whether the operators keep the function; where they do not, the figures only show finite logits and how far they
    moved. `rounded`: whether they round weights, which moves the logits of a model in 16 bits. `preserved`: a largest difference
    of at most 1e-4 of the largest logit, a few hundred roundings of fp32.
    """
    config = small.config
    seq_len = min(seq_len, config.max_position_embeddings)
    before = after = torch.arange(config.unpadded_vocab_size or config.vocab_size)
    for operator in operators:
        if isinstance(operator, GrowVocabulary):
            new_id = {ids[0]: i for i, ids in enumerate(operator.pieces) if len(ids) == 1}
            kept = torch.tensor([int(i) in new_id for i in after])
            before = before[kept]
            after = torch.tensor([new_id[int(i)] for i in after[kept]], dtype=torch.int64)
    if not len(before):
        raise HyperLlamaError("the new vocabulary keeps no token of the old one: there is nothing to verify")
    drawn = torch.randint(len(before), (windows, seq_len), generator=torch.Generator().manual_seed(0))
    logits = [
        model.logits(model(tokens[drawn]))[..., tokens]
        for model, tokens in ((_fp32(small), before), (_fp32(large), after))
    ]
    difference, largest = float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())
    return {
        "tokens": drawn.numel(),
        "claimed": all(operator.preserves for operator in operators),
        "rounded": not all(operator.exact for operator in operators),
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
