"""The merge methods: which parameters each takes, and the op that combines one tensor of all models.

`METHODS` is the one table of methods: recipe, plan and executor ask it and know no method by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperllama.kernels import merge as kernels

REQUIRED = object()
"""The default of a parameter that every model must be given."""

ModelValues = Sequence[dict[str, float]]
MergeValues = dict[str, Any]
Combine = Callable[[Tensor | None, list[Tensor], ModelValues, MergeValues, torch.dtype], Tensor]


@dataclass(frozen=True)
class Method:
    """A merge method.

    model_parameters: parameters that each model has, with default; merge_parameters: those of the merge as a whole.
    inert: names that mergekit accepts for this method and that change nothing.
    needs_base: whether it works on differences to a base model; that base is then not one of `tensors`.
    divides: whether `normalize` divides by the sum of all weights, which then must not be zero.
    combine: (base, tensors, values per model, values of the merge, output dtype) -> merged tensor.
    """

    model_parameters: dict[str, Any]
    merge_parameters: dict[str, Any]
    combine: Combine
    needs_base: bool = False
    divides: bool = True
    inert: frozenset[str] = field(default=frozenset({"int8_mask"}))


def _column(values: ModelValues, name: str) -> list[float]:
    return [float(value[name]) for value in values]


def _linear(
    base: Tensor | None, tensors: list[Tensor], values: ModelValues, merge: MergeValues, dtype: torch.dtype
) -> Tensor:
    return kernels.linear(tensors, _column(values, "weight"), bool(merge["normalize"]), dtype)


def _task_arithmetic(
    base: Tensor | None, tensors: list[Tensor], values: ModelValues, merge: MergeValues, dtype: torch.dtype
) -> Tensor:
    assert base is not None
    weights = _column(values, "weight")
    return kernels.task_arithmetic(base, tensors, weights, float(merge["lambda"]), bool(merge["normalize"]), dtype)


def _ties(
    base: Tensor | None, tensors: list[Tensor], values: ModelValues, merge: MergeValues, dtype: torch.dtype
) -> Tensor:
    assert base is not None
    return kernels.ties(
        base,
        tensors,
        _column(values, "weight"),
        _column(values, "density"),
        float(merge["lambda"]),
        bool(merge["normalize"]),
        "norm" if merge["rescale"] else "none",
        dtype,
    )


METHODS: dict[str, Method] = {
    "linear": Method(
        model_parameters={"weight": REQUIRED},
        merge_parameters={"normalize": True},
        combine=_linear,
        inert=frozenset({"density", "int8_mask", "rescale"}),
    ),
    "task_arithmetic": Method(
        model_parameters={"weight": REQUIRED},
        merge_parameters={"normalize": False, "lambda": 1.0},
        combine=_task_arithmetic,
        needs_base=True,
        inert=frozenset({"density", "int8_mask", "rescale"}),
    ),
    "ties": Method(
        model_parameters={"weight": REQUIRED, "density": 1.0},
        merge_parameters={"normalize": True, "rescale": False, "lambda": 1.0},
        combine=_ties,
        needs_base=True,
        divides=False,
    ),
}
