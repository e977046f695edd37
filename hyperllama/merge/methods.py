"""The merge methods: which parameters each takes, and the op each comes down to. Nothing here needs torch.

`METHODS` is the one table of methods: recipe, plan and executor ask it and know no method by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
"""The default of a parameter that every model must be given."""

SMALLEST_DIVISOR = 1e-8
"""A sum of weights below it can't be divided by: see kernels/merge.py."""

ModelValues = Sequence[dict[str, float]]
MergeValues = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of an op of kernels/merge.py, where its formula and the other fields are explained."""

    op: Literal["linear", "task_arithmetic", "ties"]
    weights: tuple[float, ...]
    normalize: bool
    lam: float = 1.0
    densities: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()
    rescale: Literal["none", "density", "norm"] = "none"


@dataclass(frozen=True)
class Method:
    """A merge method.

    model_parameters: parameters that each model has, with default; merge_parameters: those of the merge as a whole.
    inert: names that mergekit accepts for this method and that change nothing.
    needs_base: whether it works on differences to a base model; that base is then not one of the inputs.
    divides: whether `normalize` divides by the sum of all weights, which then must not be zero.
    lower: (values per model, values of the merge) -> the op that makes the merged tensor.
    """

    model_parameters: dict[str, Any]
    merge_parameters: dict[str, Any]
    lower: Callable[[ModelValues, MergeValues], Call]
    needs_base: bool = False
    divides: bool = True
    inert: frozenset[str] = field(default=frozenset({"int8_mask"}))


def _column(values: ModelValues, name: str) -> tuple[float, ...]:
    return tuple(float(value[name]) for value in values)


def _linear(values: ModelValues, merge: MergeValues) -> Call:
    return Call("linear", _column(values, "weight"), bool(merge["normalize"]))


def _task_arithmetic(values: ModelValues, merge: MergeValues) -> Call:
    return Call("task_arithmetic", _column(values, "weight"), bool(merge["normalize"]), float(merge["lambda"]))


def _ties(values: ModelValues, merge: MergeValues) -> Call:
    return Call(
        "ties",
        _column(values, "weight"),
        bool(merge["normalize"]),
        float(merge["lambda"]),
        _column(values, "density"),
        rescale="norm" if merge["rescale"] else "none",
    )


METHODS: dict[str, Method] = {
    "linear": Method(
        model_parameters={"weight": REQUIRED},
        merge_parameters={"normalize": True},
        lower=_linear,
        inert=frozenset({"density", "int8_mask", "rescale"}),
    ),
    "task_arithmetic": Method(
        model_parameters={"weight": REQUIRED},
        merge_parameters={"normalize": False, "lambda": 1.0},
        lower=_task_arithmetic,
        needs_base=True,
        inert=frozenset({"density", "int8_mask", "rescale"}),
    ),
    "ties": Method(
        model_parameters={"weight": REQUIRED, "density": 1.0},
        merge_parameters={"normalize": True, "rescale": False, "lambda": 1.0},
        lower=_ties,
        needs_base=True,
        divides=False,
    ),
}
