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

from hyperllama.arena import Arena
from hyperllama.errors import HyperLlamaError
from hyperllama.grow.operators import HyperClone
from hyperllama.hub import model_config, open_folder
from hyperllama.names import logical_tensors
from hyperllama.settings import ModelConfig

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
        factor, ffn_factor = clone_factors(folder.card.get("growth", []), folder.path)
        if factor < 2:
            raise HyperLlamaError(f"{folder.path}: its card names no cloning; give --factor N if it is a clone by N")
    clone = HyperClone(factor, ffn_factor)
    for key, copies in _widths(factor, clone.ffn).items():
        if getattr(config, key) % copies:
            raise HyperLlamaError(f"{path}: {key} is {getattr(config, key)}, no multiple of the factor {copies}")
    small = _before(config, factor, clone.ffn)
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


def _widths(factor: int, ffn_factor: int) -> dict[str, int]:
    return {"hidden_size": factor, "intermediate_size": ffn_factor, "num_heads": factor, "num_kv_heads": factor}


def _before(config: ModelConfig, factor: int, ffn_factor: int) -> ModelConfig:
    """The shape that a clone was made of."""
    widths = _widths(factor, ffn_factor).items()
    return config.model_copy(update={key: getattr(config, key) // copies for key, copies in widths})


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
    sums = torch.zeros(3, dtype=torch.float64, device=tensor.device)
    step = max(1, CHUNK // max(1, p * copies[0, 0].numel())) if tensor.numel() else 1
    for start in range(0, copies.shape[1], step):
        part = copies[:, start : start + step].double()
        sums += torch.stack([_apart(part, 0), _apart(part, 2), part.square().sum()])
    return sums


def _apart(part: Tensor, dim: int) -> Tensor:
    """Energy around the mean over `dim`, from differences to the first copy: exactly zero for equal copies."""
    differences = part - part.narrow(dim, 0, 1)
    return (differences - differences.mean(dim, keepdim=True)).square().sum()


def clone_factors(growth: list[Any], where: str | Path) -> tuple[int, int]:
    """Factors of all the clonings in a card's `growth`, multiplied: widths, FFN; (1, 1) where there is none.

    Raises HyperLlamaError naming the file `where` for a cloning without an integer factor.
    """
    factor = ffn_factor = 1
    for step in growth:
        method = step.get("method") if isinstance(step, dict) else None
        if method not in ("hyperclone", "lemon"):
            continue
        times, ffn = step.get("factor"), step.get("ffn_factor")
        if type(times) is not int or type(ffn) not in (int, type(None)):
            raise HyperLlamaError(f"{where}: the card's growth {step} has no integer factor: give --factor")
        factor, ffn_factor = factor * times, ffn_factor * (times if ffn is None else ffn)
    return factor, ffn_factor


def layer_asymmetry(arena: Arena, factors: tuple[int, int], layer: int) -> Tensor:
    """Share of the energy of one layer's matrices that their row copies do not have in common, 0-dim fp64: what a run can afford.

    factors: the clone's, of its widths and of its FFN.
    """
    small = _before(arena.config, *factors)
    maps, views = HyperClone(*factors).tensors(small), arena.logical("weights")
    total = torch.zeros(3, dtype=torch.float64, device=arena.weights.device)
    for name, how in maps.items():
        if name.startswith(f"model.layers.{layer}.") and how.cols is not None:
            total += _energies(views[name], how.rows.copies, how.cols.copies)
    return total[0] / total[2]
