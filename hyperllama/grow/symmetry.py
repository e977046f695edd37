"""How far the copies in a clone have diverged.

A clone's matrix is p x q copies of an old one, W_ij. The share of its energy that is not common to the row copies is

    sum_ij |W_ij - mean_i W_ij|^2 / sum_ij |W_ij|^2

and the same over j for column copies: 0 for a fresh clone without noise, (p - 1)/p for copies that have nothing in common.
Copies that were given unequal shares (dyadic, lemon) count as apart by that much from the start.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperllama.config import ModelConfig
from hyperllama.errors import HyperLlamaError
from hyperllama.grow.operators import HyperClone
from hyperllama.hub import Folder, model_config, open_folder
from hyperllama.names import logical_tensors

CHUNK = 1 << 22  # elements held in fp64 at a time


def symmetry(path: str | Path, factor: int | None = None, ffn_factor: int | None = None) -> list[dict[str, Any]]:
    """Of every tensor of a clone: its name, row and column copies, and the shares not common to them (None: one copy).

    factor, ffn_factor: the clone's; default: what its card says. The last row is the whole model.
    Raises HyperLlamaError when there is no factor, or the shape is no multiple of it.
    """
    folder = open_folder(path)
    config = model_config(folder.config, folder.path)
    if factor is None:
        if ffn_factor is not None:
            raise HyperLlamaError("--ffn-factor needs --factor")
        factor, ffn_factor = _card_factors(folder)
    clone = HyperClone(factor, ffn_factor)
    widths = {
        "hidden_size": factor, "intermediate_size": clone.ffn, "num_heads": factor, "num_kv_heads": factor,
    }  # fmt: skip
    for key, copies in widths.items():
        if getattr(config, key) % copies:
            raise HyperLlamaError(f"{path}: {key} is {getattr(config, key)}, no multiple of the factor {copies}")
    small: ModelConfig = config.model_copy(update={key: getattr(config, key) // f for key, f in widths.items()})
    rows, total = [], torch.zeros(3, dtype=torch.float64)
    shapes = {tensor.name: tensor.shape for tensor in logical_tensors(config)}
    for name, how in clone.tensors(small).items():
        if folder.shape(name) != shapes[name]:
            raise HyperLlamaError(
                f"{path}: tensor {name} has shape {folder.shape(name)}, config.json asks for {shapes[name]}"
            )
        folder.dtype(name)  # refuses quantised weights
        q = how.cols.copies if how.cols else 1
        energies = _energies(folder.tensor(name), how.rows.copies, q)
        total += energies
        rows.append(_row(name, how.rows.copies, q, energies))
    return [*rows, _row("all", factor, factor, total)]


def _row(name: str, p: int, q: int, energies: Tensor) -> dict[str, Any]:
    row, col, whole = energies.tolist()
    return {
        "name": name,
        "row_copies": p,
        "column_copies": q,
        "row_asymmetry": (row / whole if whole else 0.0) if p > 1 else None,
        "column_asymmetry": (col / whole if whole else 0.0) if q > 1 else None,
    }


def _energies(tensor: Tensor, p: int, q: int) -> Tensor:
    """Energy not common to the row copies, to the column copies, and all of it; fp64."""
    copies = tensor.view(p, tensor.shape[0] // p, q, -1)
    sums = torch.zeros(3, dtype=torch.float64)
    step = max(1, CHUNK // max(1, p * copies[0, 0].numel())) if tensor.numel() else 1
    for start in range(0, copies.shape[1], step):
        part = copies[:, start : start + step].double()
        sums += torch.stack([_apart(part, 0), _apart(part, 2), part.square().sum()])
    return sums


def _apart(part: Tensor, dim: int) -> Tensor:
    """Energy around the mean over `dim`, from differences to the first copy: exactly zero for equal copies."""
    differences = part - part.narrow(dim, 0, 1)
    return (differences - differences.mean(dim, keepdim=True)).square().sum()


def _card_factors(folder: Folder) -> tuple[int, int]:
    """Factors of all the clonings on the card, multiplied."""
    factor = ffn_factor = 1
    for step in folder.card.get("growth", []):
        method = step.get("method") if isinstance(step, dict) else None
        if method not in ("hyperclone", "lemon"):
            continue
        times, ffn = step.get("factor"), step.get("ffn_factor")
        if type(times) is not int or type(ffn) not in (int, type(None)):
            raise HyperLlamaError(f"{folder.path}: the card's growth {step} has no integer factor: give --factor")
        factor, ffn_factor = factor * times, ffn_factor * (times if ffn is None else ffn)
    if factor < 2:
        raise HyperLlamaError(f"{folder.path}: its card names no cloning; give --factor N if it is a clone by N")
    return factor, ffn_factor
