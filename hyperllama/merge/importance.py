"""How much each model knows of each row or element: the shares that `hyperllama: importance:` multiplies a merge's weights by.

    token_counts    s_i[t] = (c_i[t] + a)^p            row t of embedding and head; c_i[t]: how often run i predicted token t
    adam_v          s_i = (v_i + a mean_j(v_j))^p      every element; v_i: AdamW's second moment at the run's end, bias corrected,
                                                       mean_j over models and over the tensor
    share_i = s_i / sum_j s_j                          a smoothing, p power; equal shares where every s_i is 0

The models of several languages each moved other rows of one embedding: a plain mean gives a row that one of five models trained a
fifth of what it learnt; its share by token counts is nearly 1. v estimates the mean squared gradient, the diagonal of the empirical
Fisher matrix; weighing by it minimises the sum of the models' quadratic approximations (p = 1), and it is free with AdamW.
Sources: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging" (adam_v stands in for their Fisher estimate);
Kingma and Ba 2015 (v); shares by token counts are ours.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hyperllama.companions import ADAM_V, TOKEN_COUNTS, CompanionFile
from hyperllama.errors import HyperLlamaError
from hyperllama.merge.recipe import Importance


def _counts(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Counts of all languages together, (rows, 1) fp64."""
    file = CompanionFile(folder, TOKEN_COUNTS)
    total = np.zeros(shape[:1])
    for language in file.names:
        total += file.array(language, shape[:1])
    return total[:, None]


def _second_moment(folder: Path, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bias-corrected v of a tensor, fp64."""
    file = CompanionFile(folder, ADAM_V)
    try:
        correction = 1 - float(file.metadata["beta2"]) ** int(file.metadata["step"])
    except (KeyError, ValueError):
        raise HyperLlamaError(f"{file.path} does not say its step and beta2") from None
    return file.array(tensor, shape).astype(np.float64) / correction


def check_companions(importance: Importance, reads: Sequence[tuple[Path, str]], shape: tuple[int, ...]) -> None:
    """Raise HyperLlamaError when a model lacks what the shares of a tensor are made from; reads headers, and counts whole."""
    for folder, tensor in reads:
        if importance.by == "token_counts":
            _counts(folder, shape)
        else:
            file = CompanionFile(folder, ADAM_V)
            if tensor not in file.names:
                raise HyperLlamaError(f"{file.path} has no {tensor}")


def shares(importance: Importance, reads: Sequence[tuple[Path, str]], shape: tuple[int, ...]) -> list[Tensor]:
    """Each model's share of a tensor, fp32 (rows, 1) or of the tensor's shape; they sum to 1 over models.

    reads: (folder, tensor's name) of each model.
    Raises HyperLlamaError when a companion file is missing, damaged or of another shape.
    """
    if importance.by == "token_counts":
        scores = [_counts(folder, shape) + importance.offset for folder, _ in reads]
    else:
        moments = [_second_moment(folder, tensor, shape) for folder, tensor in reads]
        floor = importance.offset * sum(float(v.mean()) for v in moments) / len(moments)
        scores = [v + floor for v in moments]
    powers = [score**importance.power for score in scores]
    total = np.sum(powers, axis=0)
    equal = 1 / len(powers)
    return [
        torch.from_numpy(np.divide(power, total, out=np.full_like(power, equal), where=total > 0)).float()
        for power in powers
    ]
