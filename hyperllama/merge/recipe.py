"""A mergekit YAML as a validated `Recipe`, and how its parameters are looked up for one tensor of one model.

A parameter value is one of
    0.5                                       the same everywhere
    [0.2, 0.9]                                a gradient: piecewise linear over the layers of its slice, at t in [0, 1]
    [{filter: mlp, value: 0.3}, {value: 1}]   the first entry whose filter is a substring of the tensor's name
Embedding, final norm and LM head are at t = 0; a slice of one layer is at t = 1.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hyperllama.errors import HyperLlamaError, nearest
from hyperllama.merge.methods import METHODS
from hyperllama.names import EMBEDDING, HEAD
from hyperllama.recipes import parse_yaml, read_text

DTYPES = ("float16", "bfloat16", "float32", "float64")


def _scalar(value: Any) -> float | bool:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is text, expected a number")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number or true/false")
    return value


def _gradient(value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError("an empty list holds no value")
        return [_scalar(item) for item in value]
    return _scalar(value)


def _setting(value: Any) -> Any:
    """A parameter value as YAML gives it, checked; raises ValueError."""
    if isinstance(value, dict):
        raise ValueError("a filter must be an item of a list: '- filter: ...' and '  value: ...'")
    if not (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        return _gradient(value)
    for item in value:
        if not isinstance(item, dict) or "value" not in item:
            raise ValueError("every item of a list of filters needs a 'value'")
        for key in item:
            if key not in ("filter", "value"):
                raise ValueError(f"unknown key '{key}' beside a filter; {nearest(str(key), ('filter', 'value'))}")
        if not isinstance(item.get("filter"), str | None):
            raise ValueError(f"filter {item['filter']!r} is not text")
        _gradient(item["value"])
    return value


Setting = Annotated[Any, BeforeValidator(_setting)]
Parameters = Annotated[dict[str, Setting], BeforeValidator(lambda value: {} if value is None else value)]


def evaluate(setting: Any, tensor_name: str, t: float) -> float | bool | None:
    """The value of a parameter setting for one tensor at position `t` in [0, 1]; None when no filter matches."""
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], dict):
        for item in setting:
            if item.get("filter") in (None, "*") or item["filter"] in tensor_name:
                return evaluate(item["value"], tensor_name, t)
        return None
    position = t * (len(setting) - 1)
    low = int(position)
    if any(isinstance(item, bool) for item in setting):
        return setting[low]
    high = min(low + 1, len(setting) - 1)
    return (1 - (position - low)) * setting[low] + (position - low) * setting[high]


def first_set(levels: Iterable[Parameters], name: str, tensor_name: str, t: float) -> float | bool | None:
    """The first value that a list of parameter mappings, innermost first, has for `name`; None when none has."""
    for level in levels:
        if name in level and (value := evaluate(level[name], tensor_name, t)) is not None:
            return value
    return None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key '{key}'; {nearest(str(key), cls.model_fields)}")
        return value


class Model(_Strict):
    """One entry of `models:`: a folder and its own parameters."""

    model: str
    parameters: Parameters = {}


class SliceSource(Model):
    """One model's layers [first, end) in a slice."""

    layer_range: Annotated[tuple[int, int], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]

    @model_validator(mode="after")
    def _some_layers(self) -> "SliceSource":
        if not 0 <= self.layer_range[0] < self.layer_range[1]:
            raise ValueError(f"layer_range {list(self.layer_range)} holds no layer: expected [first, end), first < end")
        return self


class Slice(_Strict):
    """A run of output layers, made from equally long runs of layers of its sources."""

    sources: list[SliceSource] = Field(min_length=1)
    base_model: str | None = None
    residual_weight: float | None = None
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _equal_lengths(self) -> "Slice":
        if len({end - first for first, end in (source.layer_range for source in self.sources)}) > 1:
            ranges = ", ".join(f"{source.model} {list(source.layer_range)}" for source in self.sources)
            raise ValueError(f"the sources of a slice must have equally many layers: {ranges}")
        return self


class Importance(_Strict):
    """Shares that weigh the models by row or element: see importance.py for `by`, `power` and `smoothing`.

    filter: a substring of the tensors' names that it is for; None: all. By token_counts it is for embedding and head alone.
    """

    by: Literal["token_counts", "adam_v"]
    filter: str | None = None
    power: float = Field(1.0, gt=0, allow_inf_nan=False)
    smoothing: float | None = Field(None, ge=0, allow_inf_nan=False)

    @property
    def offset(self) -> float:
        """What is added to the scores."""
        return {"token_counts": 1.0, "adam_v": 0.1}[self.by] if self.smoothing is None else self.smoothing

    def matches(self, tensor: str) -> bool:
        """Whether it is for a tensor."""
        return (self.filter or "") in tensor and (self.by != "token_counts" or tensor in (EMBEDDING, HEAD))


class Learn(_Strict):
    """Weights found by gradient: see learned.py.

    texts: one file a language, read from the working folder. by: one coefficient a tensor, or one an output row. windows: of
    `seq_len` tokens (None: the model's longest) in each of the `steps`, evenly from the texts. rate: Adam's; numbers start at 1.
    """

    texts: list[str] = Field(min_length=1)
    by: Literal["tensor", "row"] = "tensor"
    steps: int = Field(24, gt=0)
    windows: int = Field(24, gt=0)
    rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    seq_len: int | None = Field(None, gt=0)
    seed: int = 0


class RegMeanSettings(_Strict):
    """Linear layers merged by least squares on the models' own inputs: see regmean.py.

    texts: one file a model, in the order of the models and without the base, read from the working folder. windows: of `seq_len`
    tokens (None: the model's longest) of each, drawn by `seed`. off_diagonal: what the products of different inputs are scaled by.
    """

    texts: list[str] = Field(min_length=1)
    windows: int = Field(64, gt=0)
    off_diagonal: float = Field(0.9, ge=0, lt=1)
    seq_len: int | None = Field(None, gt=0)
    seed: int = 0


class Extensions(_Strict):
    """What HyperLlama understands beyond mergekit, under `hyperllama:`.

    importance: what weighs the models further, by row or element; a tensor takes the first entry that matches it.
    learn: the weights are where learning begins. regmean: how the linear layers are merged instead.
    seed: of the random masks of DARE and DELLA. compat: "mergekit" rounds every operation of linear and of the task-vector
    methods to the working dtype, as it does; the others differ from it by rounding alone.
    """

    seed: int = 0
    compat: Literal["mergekit"] | None = None
    importance: list[Importance] = []
    learn: Learn | None = None
    regmean: RegMeanSettings | None = None

    def describe(self) -> dict[str, Any]:
        """As plain values; what is not asked for is left out."""
        return {key: value for key, value in self.model_dump().items() if value or key in ("seed", "compat")}


class Recipe(_Strict):
    """A merge as its YAML says it. `source` is that YAML, verbatim ("" for a recipe made in Python)."""

    merge_method: str
    base_model: str | None = None
    models: list[Model] | None = None
    slices: list[Slice] | None = None
    modules: Any = None
    parameters: Parameters = {}
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: str | None = None
    hyperllama: Annotated[Extensions, BeforeValidator(lambda value: {} if value is None else value)] = Extensions()
    source: str = Field(default="", repr=False)

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        if self.modules is not None:
            raise ValueError("modules is not supported: a Llama is one module, give its 'models' or 'slices'")
        if bool(self.models) == bool(self.slices):
            raise ValueError("exactly one of 'models' and 'slices' must be given and not be empty")
        if self.merge_method not in METHODS:
            raise ValueError(f"merge_method '{self.merge_method}' is unknown; {nearest(self.merge_method, METHODS)}")
        if METHODS[self.merge_method].needs_base and not self.base_model:
            raise ValueError(f"{self.merge_method} needs a base_model")
        for key in ("dtype", "out_dtype"):
            name = getattr(self, key)
            if name is not None and name.removeprefix("torch.") not in DTYPES:
                raise ValueError(f"{key} '{name}' is not supported; {nearest(name, DTYPES)}")
        if self.tokenizer is not None or self.tokenizer_source not in (None, "base", *self.model_names):
            key = "tokenizer_source" if self.tokenizer is None else "tokenizer"
            raise ValueError(
                f"{key} is not supported beyond 'tokenizer_source: base' or a model's name: all models must share one "
                "tokenizer, which is copied to the result; remove the key"
            )
        if self.tokenizer_source == "base" and not self.base_model:
            raise ValueError("tokenizer_source is 'base', but there is no base_model")
        method = METHODS[self.merge_method]
        if self.hyperllama.importance and (not method.weighable or self.hyperllama.compat):
            other = "compat: mergekit" if self.hyperllama.compat else self.merge_method
            usable = " and ".join(name for name, method in METHODS.items() if method.weighable)
            raise ValueError(f"hyperllama.importance works with {usable}, not with {other}")
        if self.hyperllama.learn and (not method.weighable or not method.needs_base or self.hyperllama.compat):
            other = "compat: mergekit" if self.hyperllama.compat else self.merge_method
            raise ValueError(f"hyperllama.learn works with task_arithmetic, not with {other}")
        if self.hyperllama.regmean:
            self._check_regmean(self.hyperllama.regmean)
        for where, parameters, per_model in self._levels():
            for name in parameters:
                valid = {*method.model_parameters, *(() if per_model else method.merge_parameters)}
                if name in method.merge_parameters and per_model:
                    raise ValueError(f"{where}.{name} is not a parameter of one model; move it to the top level")
                if name not in valid and name not in method.inert:
                    raise ValueError(f"{where}.{name} is no parameter of {self.merge_method}; {nearest(name, valid)}")
        return self

    def _check_regmean(self, settings: RegMeanSettings) -> None:
        if not METHODS[self.merge_method].weighable or self.hyperllama.compat:
            other = "compat: mergekit" if self.hyperllama.compat else self.merge_method
            raise ValueError(f"hyperllama.regmean works with linear and task_arithmetic, not with {other}")
        if self.hyperllama.importance or self.hyperllama.learn:
            other = "importance" if self.hyperllama.importance else "learn"
            raise ValueError(
                f"hyperllama.regmean and hyperllama.{other} can't be used together: each weighs the same tensors"
            )
        if self.slices:
            raise ValueError("hyperllama.regmean runs the models as they are: give 'models', not 'slices'")
        merged = [
            model for model in self.models or [] if model.model != self.base_model or self.merge_method == "linear"
        ]
        if len(settings.texts) != len(merged):
            raise ValueError(
                f"hyperllama.regmean.texts has {len(settings.texts)} files for {len(merged)} models: give one a model"
            )

    def _levels(self) -> Iterator[tuple[str, Parameters, bool]]:
        """(place in the YAML, parameters, whether they belong to one model) of every parameter mapping."""
        for i, model in enumerate(self.models or []):
            yield f"models[{i}].parameters", model.parameters, True
        for i, part in enumerate(self.slices or []):
            for j, source in enumerate(part.sources):
                yield f"slices[{i}].sources[{j}].parameters", source.parameters, True
            yield f"slices[{i}].parameters", part.parameters, False
        yield "parameters", self.parameters, False

    @property
    def model_names(self) -> list[str]:
        """Every model the recipe names, base first, each once."""
        bases = [self.base_model, *(part.base_model for part in self.slices or [])]
        listed = [model.model for model in self.models or []]
        listed += [source.model for part in self.slices or [] for source in part.sources]
        return list(dict.fromkeys([base for base in bases if base] + listed))

    @property
    def notes(self) -> list[str]:
        """Keys that are accepted, because mergekit accepts them, but change nothing; one sentence each."""
        inert = METHODS[self.merge_method].inert
        found = {name for _, parameters, _ in self._levels() for name in parameters if name in inert}
        notes = [f"{name} has no effect under {self.merge_method}" for name in sorted(found)]
        if any(part.residual_weight is not None for part in self.slices or []):
            notes.append("residual_weight has no effect")
        if self.chat_template is not None:
            notes.append("chat_template has no effect: the tokenizer files are copied as they are")
        return notes


def parse_recipe(text: str, where: str | Path) -> Recipe:
    """A recipe from YAML text; `where` names it in errors. Raises HyperLlamaError naming file and key."""
    value = parse_yaml(text, where)
    if "source" in value:
        raise HyperLlamaError(f"{where}: unknown key 'source'; did you mean 'tokenizer_source'?")
    try:
        return Recipe.model_validate({**value, "source": text})
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        message = first["msg"].removeprefix("Value error, ")
        raise HyperLlamaError(f"{where}: {place + ': ' if place else ''}{message}") from None


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Raises HyperLlamaError naming file and key."""
    return parse_recipe(read_text(path), path)


def with_extensions(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with keys of its `hyperllama:` mapping replaced by those values that are not None.

    Raises HyperLlamaError for a value that the key can't have.
    """
    given = {key: value for key, value in values.items() if value is not None}
    try:
        extensions = Extensions.model_validate(recipe.hyperllama.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise HyperLlamaError(f"--{first['loc'][0]} {first['input']!r}: {first['msg']}") from None
    return recipe.model_copy(update={"hyperllama": extensions})
