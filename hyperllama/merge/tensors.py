"""Merge steps on torch tensors: models in memory, on the inputs' device, and the methods that need torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import merge as kernels
from hyperllama.merge import elementwise
from hyperllama.merge.methods import Call, TensorCall
from hyperllama.merge.recipe import Recipe
from hyperllama.merge.steps import Step, tensor_steps
from hyperllama.names import HEAD


class _InMemory:
    """Named tensors as a TensorSource."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.names = sorted(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def merged(step: Step, sources: Mapping[str, Any]) -> Tensor:
    """The tensor of one step; sources: model name -> what has `tensor(name)`.

    Raises HyperLlamaError when it is not finite.
    """
    tensors = [sources[read.model].tensor(read.tensor) for read in step.inputs]
    base = None if step.base is None else sources[step.base.model].tensor(step.base.tensor)
    result = combine(step.call, base, tensors, getattr(torch, step.dtype))
    if not torch.isfinite(result).all():
        raise step.not_finite()
    return result


def combine(call: Call | TensorCall, base: Tensor | None, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One call on tensors of one shape and device, in `dtype`."""
    if isinstance(call, TensorCall):
        return elementwise.run(call, base, tensors).to(dtype)
    if call.coefficients is not None:
        call = call.weighted(kernels.gram(base, tensors).tolist())
    elif call.working is not None:
        return elementwise.rounded(call, base, tensors).to(dtype)
    elif call.gammas or call.epsilons:
        return elementwise.trimmed(call, base, tensors).to(dtype)
    if call.op == "linear":
        return kernels.linear(tensors, call.weights, call.normalize, dtype)
    assert base is not None  # the plan has one for every method on differences
    options: dict[str, Any] = {
        "lam": call.lam,
        "normalize": call.normalize,
        "densities": call.densities,
        "keys": call.keys,
        "rescale": call.rescale,
        "out_dtype": dtype,
    }
    return (kernels.ties if call.op == "ties" else kernels.task_arithmetic)(base, tensors, call.weights, **options)


def merge_tensors(recipe: Recipe, models: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Merge live models: yields (Hugging Face name, merged tensor) in output order, computed on the inputs' device.

    models: the name that `recipe` calls a model -> Hugging Face name -> tensor; one without lm_head.weight is tied.
    Raises HyperLlamaError as `plan` does, before the first tensor; then when a result is not finite.
    """
    if missing := [name for name in recipe.model_names if name not in models]:
        raise HyperLlamaError(f"the recipe names model {missing[0]}, given are {', '.join(models)}")
    sources = {label: _InMemory(tensors) for label, tensors in models.items()}
    steps = tensor_steps(recipe, sources, {label for label in models if HEAD not in models[label]})
    return ((step.name, merged(step, sources)) for step in steps)
