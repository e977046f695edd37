"""Merge steps on torch tensors: models in memory, on the inputs' device, and the methods that need torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import merge as kernels
from hyperllama.merge import elementwise
from hyperllama.merge.importance import shares
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


class Prepared(Protocol):
    """What a merge works out before its first tensor, from texts: coefficients, or tensors. FLOPs are what that took."""

    @property
    def flops(self) -> int: ...
    def tensor(self, step: Step, sources: Mapping[str, Any]) -> Tensor | None:
        """A step's tensor, in fp32; None: as the step says."""

    def describe(self) -> dict[str, Any]:
        """For the merge's card."""


def merged(step: Step, sources: Mapping[str, Any], prepared: Prepared | None = None) -> Tensor:
    """The tensor of one step; sources: model name -> what has `tensor(name)`, a folder where the step has an importance.

    Raises HyperLlamaError when it is not finite.
    """
    dtype = getattr(torch, step.dtype)
    result = prepared.tensor(step, sources) if prepared else None
    result = _as_planned(step, sources, dtype) if result is None else result.to(dtype)
    if not torch.isfinite(result).all():
        raise step.not_finite()
    return result


def _as_planned(step: Step, sources: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    tensors = [sources[read.model].tensor(read.tensor) for read in step.inputs]
    base = None if step.base is None else sources[step.base.model].tensor(step.base.tensor)
    if step.importance is None:
        return combine(step.call, base, tensors, dtype)
    call = step.call
    assert isinstance(call, Call)  # of linear or task_arithmetic
    return kernels.weighted(base, tensors, _weights(step, sources), call.lam, call.normalize, dtype)


def merged_tensors(
    steps: Sequence[Step], sources: Mapping[str, Any], prepared: Prepared | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, merged tensor) of steps in their order, as files would hold them."""
    for step in steps:
        yield step.name, merged(step, sources, prepared)


def _weights(step: Step, sources: Mapping[str, Any]) -> list[Tensor]:
    """The models' weights as tensors: the recipe's numbers, times their shares where the step has an importance."""
    call = step.call
    assert isinstance(call, Call)
    numbers = [torch.tensor(weight) for weight in call.weights]
    if step.importance is None:
        return numbers
    reads = [(sources[read.model].path, read.tensor) for read in step.inputs]
    return [weight * share for weight, share in zip(numbers, shares(step.importance, reads, step.shape), strict=True)]


def effective_differences(step: Step, sources: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The base and what the recipe adds to it of each model, fp32: their sum is the merge by task arithmetic."""
    assert step.base is not None and isinstance(step.call, Call)
    base, weights = sources[step.base.model].tensor(step.base.tensor).float(), _weights(step, sources)
    divisor = torch.ones(())
    if step.call.normalize:
        total = sum(weights[1:], weights[0])
        divisor = torch.where(total.abs() < kernels.SMALLEST_DIVISOR, 1.0, total)
    tensors = [sources[read.model].tensor(read.tensor).float() for read in step.inputs]
    pairs = zip(tensors, weights, strict=True)
    return base, [(tensor - base) * (step.call.lam * weight / divisor) for tensor, weight in pairs]


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
    if recipe.hyperllama.importance or recipe.hyperllama.learn or recipe.hyperllama.regmean:
        raise HyperLlamaError("hyperllama.importance, learn and regmean read files: merge folders, not live models")
    sources = {label: _InMemory(tensors) for label, tensors in models.items()}
    steps = tensor_steps(recipe, sources, {label for label in models if HEAD not in models[label]})
    return ((step.name, merged(step, sources)) for step in steps)
