"""What a recipe does to which tensors: one `Step` per output tensor, all of it checked before any tensor is read.

recipe --slices--> layers of models --names, shapes, parameters--> [Step, Step, ...]
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hyperllama.dtypes import common_dtype
from hyperllama.errors import HyperLlamaError
from hyperllama.keys import key_of
from hyperllama.merge.methods import METHODS, REQUIRED, Call, Method, TensorCall
from hyperllama.merge.recipe import Importance, Recipe, Slice, SliceSource, first_set
from hyperllama.names import EMBEDDING, FINAL_NORM, HEAD

SHARES = {"density", "gamma", "select_topk"}
NOT_NEGATIVE = {"epsilon", "eps", "tol", "max_iter", "r", "alpha"}


class TensorSource(Protocol):
    """What is known of the named tensors of one model without reading them; a `hub.Folder` is one."""

    @property
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...


@dataclass(frozen=True)
class Input:
    """A tensor of a model; the model by its name in the recipe."""

    model: str
    tensor: str


@dataclass(frozen=True)
class Step:
    """How one output tensor is made: `method` over `inputs` (and `base`), each input with its own `values`.

    seed: of the random masks. working: the dtype that every operation rounds to under `compat: mergekit`, else None.
    importance: what else weighs its rows or elements, model by model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: Method
    inputs: tuple[Input, ...]
    base: Input | None
    values: tuple[dict[str, float], ...]
    merge_values: dict[str, Any]
    seed: int = 0
    working: str | None = None
    importance: Importance | None = None

    @property
    def reads(self) -> tuple[Input, ...]:
        """Every tensor that is read."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def call(self) -> Call | TensorCall:
        """The op that makes it."""
        call = self.method.lower(self.values, self.merge_values)
        if isinstance(call, TensorCall):
            return call
        if self.method.base == "optional" and self.base is not None:
            call = replace(call, op="task_arithmetic")
        if self.method.random:
            call = replace(call, keys=tuple(key_of(self.seed, self.name, read.model) for read in self.inputs))
        return replace(call, working=self.working)

    def not_finite(self) -> HyperLlamaError:
        """The error of a result that has NaN or infinity."""
        models = ", ".join(read.model for read in self.reads)
        return HyperLlamaError(f"tensor {self.name} merged from {models} has NaN or infinity as {self.dtype}")


def _layer_tensors(source: TensorSource) -> dict[int, set[str]]:
    """The tensors of every layer, by what follows its number."""
    found: dict[int, set[str]] = {}
    for name in source.names:
        if match := re.match(r"model\.layers\.(\d+)\.(.+)", name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _output_slices(recipe: Recipe, sources: Mapping[str, TensorSource], layers: Mapping[str, int]) -> list[Slice]:
    """The recipe's slices; `models:` is one slice of all layers, with the base last unless it is listed."""
    if recipe.slices:
        for part in recipe.slices:
            for source in part.sources:
                if source.layer_range[1] > layers[source.model]:
                    raise HyperLlamaError(
                        f"{source.model} has {layers[source.model]} layers, layer_range is {list(source.layer_range)}"
                    )
        return recipe.slices
    models = [(model.model, model.parameters) for model in recipe.models or []]
    base = recipe.base_model
    if base is not None and not any(sources[label] is sources[base] for label, _ in models):
        models.append((base, {}))
    for label, _ in models:
        if layers[label] != layers[models[0][0]]:
            raise HyperLlamaError(f"{label} has {layers[label]} layers, {models[0][0]} has {layers[models[0][0]]}")
    if not layers[models[0][0]]:
        raise HyperLlamaError(f"{models[0][0]} has no tensor model.layers.0.*: it is not a Llama")
    return [Slice(sources=[SliceSource(model=m, parameters=p, layer_range=(0, layers[m])) for m, p in models])]


def _check_value(name: str, value: Any, default: Any, where: str) -> float | bool:
    if isinstance(default, bool):
        if value not in (0, 1):
            raise HyperLlamaError(f"{name} of {where} is {value}, expected true or false")
        return bool(value)
    if isinstance(value, bool):
        raise HyperLlamaError(f"{name} of {where} is {str(value).lower()}, expected a number")
    if name in SHARES and not 0 <= value <= 1:
        raise HyperLlamaError(f"{name} of {where} is {value}, expected a share between 0 and 1")
    if name in NOT_NEGATIVE and value < 0:
        raise HyperLlamaError(f"{name} of {where} is {value}, expected a number that is not negative")
    return value


class _Steps:
    """Builds the steps of one recipe over opened models."""

    def __init__(self, recipe: Recipe, sources: Mapping[str, TensorSource], tied: Collection[str]):
        self.recipe, self.sources, self.tied = recipe, sources, tied
        self.layers = {label: _layer_tensors(source) for label, source in sources.items()}
        self.method = METHODS[recipe.merge_method]
        asked = recipe.out_dtype or recipe.dtype
        self.dtype = asked.removeprefix("torch.") if asked else None

    def build(self) -> Iterator[Step]:
        """All steps: embedding from the first slice, layers in order, final norm and head from the last slice."""
        numbers = {label: max(found, default=-1) + 1 for label, found in self.layers.items()}
        slices = _output_slices(self.recipe, self.sources, numbers)
        yield self._step(EMBEDDING, [EMBEDDING] * len(slices[0].sources), slices[0], 0.0)
        out = 0
        for part in slices:
            first, end = part.sources[0].layer_range
            for offset in range(end - first):
                t = offset / (end - first - 1) if end - first > 1 else 1.0
                layers = [source.layer_range[0] + offset for source in part.sources]
                for suffix in self._suffixes(part, layers):
                    names = [f"model.layers.{layer}.{suffix}" for layer in layers]
                    yield self._step(f"model.layers.{out}.{suffix}", names, part, t)
                out += 1
        last = slices[-1]
        yield self._step(FINAL_NORM, [FINAL_NORM] * len(last.sources), last, 0.0)
        if any(source.model not in self.tied for source in last.sources):
            yield self._step(HEAD, [HEAD] * len(last.sources), last, 0.0)

    def _suffixes(self, part: Slice, layers: list[int]) -> list[str]:
        """The tensors of a layer, which all sources must have alike."""
        found = [self.layers[s.model].get(layer, set()) for s, layer in zip(part.sources, layers, strict=True)]
        for i in range(1, len(found)):
            for having, lacking in ((0, i), (i, 0)):
                if missing := sorted(found[having] - found[lacking]):
                    raise HyperLlamaError(
                        f"{part.sources[lacking].model} has no tensor model.layers.{layers[lacking]}.{missing[0]}, "
                        f"{part.sources[having].model} has it"
                    )
        return sorted(found[0])

    def _step(self, name: str, names: list[str], part: Slice, t: float) -> Step:
        recipe, method = self.recipe, self.method
        base_label = part.base_model or recipe.base_model
        inputs: list[Input] = []
        values: list[dict[str, float]] = []
        base: Input | None = None
        for source, tensor in zip(part.sources, names, strict=True):
            entry = Input(source.model, EMBEDDING if tensor == HEAD and source.model in self.tied else tensor)
            is_base = base_label is not None and self.sources[source.model] is self.sources[base_label]
            if is_base and method.base != "input":
                base = entry
                continue
            inner = (source.parameters, part.parameters, recipe.parameters)
            inputs.append(entry)
            values.append(self._values(method.model_parameters, inner, tensor, t, f"{source.model}, tensor {tensor}"))
        if method.base != "input" and base_label is not None and base is None:
            raise HyperLlamaError(
                f"a slice lacks a source with its base_model {base_label}, which {recipe.merge_method} needs"
            )
        if not inputs:
            raise HyperLlamaError(f"{recipe.merge_method} needs a model besides its base_model {base_label}")
        if base is not None and method.base == "first":
            inputs, values, base = [base, *inputs], [{}, *values], None
        least, most = method.inputs
        if not least <= len(inputs) <= most:
            expected = f"exactly {least}" if least == most else f"at least {least}"
            besides = "" if base is None else f" besides its base_model {base_label}"
            raise HyperLlamaError(
                f"{recipe.merge_method} merges {expected} model{'s' if least > 1 else ''}{besides}, tensor {name} has "
                f"{len(inputs)}: {', '.join(read.model for read in inputs)}"
            )
        levels = (part.parameters, recipe.parameters)
        merge_values = self._values(method.merge_parameters, levels, name, t, f"tensor {name}")
        if problem := method.problem(values, merge_values):
            raise HyperLlamaError(f"tensor {name}: {problem}")
        reads = inputs if base is None else [*inputs, base]
        shape = self._shape(reads)
        stored = common_dtype(self.sources[read.model].dtype(read.tensor) for read in reads)
        dtype = self.dtype or stored
        working = (recipe.dtype or stored).removeprefix("torch.") if recipe.hyperllama.compat else None
        seed = recipe.hyperllama.seed
        importance = next((entry for entry in recipe.hyperllama.importance if entry.matches(name)), None)
        return Step(
            name, shape, dtype, method, tuple(inputs), base, tuple(values), merge_values, seed, working, importance
        )

    def _values(
        self, parameters: dict[str, Any], levels: tuple[dict[str, Any], ...], tensor: str, t: float, where: str
    ) -> dict[str, Any]:
        values = {}
        for name, default in parameters.items():
            value = first_set(levels, name, tensor, t)
            if value is None:
                if default is REQUIRED:
                    raise HyperLlamaError(f"no {name} is given for {where}: {self.recipe.merge_method} needs one")
                value = default
            values[name] = _check_value(name, value, default, where)
        return values

    def _shape(self, reads: list[Input]) -> tuple[int, ...]:
        for read in reads:
            if read.tensor not in self.sources[read.model].names:
                raise HyperLlamaError(f"{read.model} has no tensor {read.tensor}")
        first = reads[0]
        shape = self.sources[first.model].shape(first.tensor)
        for read in reads[1:]:
            other = self.sources[read.model].shape(read.tensor)
            if other != shape:
                raise HyperLlamaError(
                    f"{read.model}: tensor {read.tensor} has shape {other}, that of {first.model} has {shape}; "
                    "only models of one shape can be merged"
                )
        return shape


def tensor_steps(recipe: Recipe, sources: Mapping[str, TensorSource], tied: Collection[str]) -> list[Step]:
    """One step per output tensor of `recipe`, in output order.

    sources: every model the recipe names, by that name. tied: the names of those whose LM head is their embedding;
    the output has a head when any source of the last slice has one, and embeddings then stand in for tied heads.
    Raises HyperLlamaError naming model and tensor for anything that doesn't fit or isn't given.
    """
    return list(_Steps(recipe, sources, tied).build())
