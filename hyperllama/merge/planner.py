"""A merge of model folders, checked before any work: do configs, tensors and tokenizers fit, and what comes out?"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from hyperllama.dtypes import BYTES
from hyperllama.errors import HyperLlamaError, nearest
from hyperllama.files import sha256_file
from hyperllama.hub import Folder, check_tied, factor_is_folded, model_config, open_folder
from hyperllama.merge.methods import Call
from hyperllama.merge.recipe import Recipe
from hyperllama.merge.steps import Step, tensor_steps
from hyperllama.names import HEAD, logical_tensors
from hyperllama.settings import ModelConfig

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_MAY_DIFFER = {"tie_embeddings", "max_position_embeddings", "initializer_range"}


@dataclass(frozen=True)
class Plan:
    """A merge of folders, checked: what will be read, computed and written."""

    recipe: Recipe
    folders: dict[str, Folder]
    steps: list[Step]
    config: dict[str, Any]
    tokenizer_from: Path | None
    notes: list[str]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that are read, each as often as it is used."""
        reads = [(prod(step.shape), read) for step in self.steps for read in step.reads]
        return sum(elements * BYTES[self.folders[read.model].dtype(read.tensor)] for elements, read in reads)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors in the result."""
        return sum(prod(step.shape) * BYTES[step.dtype] for step in self.steps)

    def describe(self) -> dict[str, Any]:
        """The plan as plain values, for `--dry-run`; a parameter that varies over tensors is [lowest, highest]."""
        ranges: dict[str, dict[str, Any]] = {}
        for step in self.steps:
            owners = ["all models", *(read.model for read in step.inputs)]
            for owner, values in zip(owners, [step.merge_values, *step.values], strict=True):
                for name, value in values.items():
                    low, high = ranges.setdefault(owner, {}).get(name, (value, value))
                    ranges[owner][name] = (min(low, value), max(high, value))
        return {
            "method": self.recipe.merge_method,
            "hyperllama": self.recipe.hyperllama.describe(),
            "models": list(self.folders),
            "base_model": self.recipe.base_model,
            "tensors": len(self.steps),
            "elements": sum(prod(step.shape) for step in self.steps),
            "dtype": ", ".join(sorted({step.dtype for step in self.steps})),
            "parameters": {
                owner: {name: low if low == high else [low, high] for name, (low, high) in values.items()}
                for owner, values in ranges.items()
            },
            "tokenizer_from": None if self.tokenizer_from is None else str(self.tokenizer_from),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "notes": self.notes,
        }


def _open(recipe: Recipe, cwd: Path) -> dict[str, Folder]:
    opened: dict[Path, Folder] = {}
    folders: dict[str, Folder] = {}
    for label in recipe.model_names:
        path = cwd / label
        if not path.is_dir():
            raise HyperLlamaError(
                f"{path} is not a folder; models are read from local folders (no Hub names, no @revision, no +lora)"
            )
        if path.resolve() not in opened:
            opened[path.resolve()] = open_folder(path)
        folders[label] = opened[path.resolve()]
    groups = [recipe.models] if recipe.models else [part.sources for part in recipe.slices or []]
    for group in groups:
        seen: set[int] = set()
        for model in group or []:
            if id(folders[model.model]) in seen:
                raise HyperLlamaError(f"{model.model} is listed twice; give it once, with the sum of the weights")
            seen.add(id(folders[model.model]))
    return folders


def _check_folder(label: str, folder: Folder, config: ModelConfig) -> None:
    """A folder holds the tensors that its config.json asks for, and no others."""
    wanted = {tensor.name: tensor.shape for tensor in logical_tensors(config)}
    for name, shape in wanted.items():
        if name not in folder.names:
            raise HyperLlamaError(f"{label} has no tensor {name}, which its config.json asks for")
        if folder.shape(name) != shape:
            raise HyperLlamaError(
                f"{label}: tensor {name} has shape {folder.shape(name)}, its config.json asks for {shape}"
            )
    if config.tie_embeddings:
        check_tied(folder)
    for name in folder.names:
        if name not in wanted and name != HEAD:
            raise HyperLlamaError(f"{label} has a tensor {name}, which no Llama of its config.json has")


def _check_configs(recipe: Recipe, folders: dict[str, Folder]) -> dict[str, ModelConfig]:
    configs = {label: model_config(folder.config, folder.path) for label, folder in folders.items()}
    first = next(iter(configs))
    may_differ = _MAY_DIFFER | ({"num_layers"} if recipe.slices else set())
    for label, config in configs.items():
        for field in (name for name in type(config).model_fields if name not in may_differ):
            ours, theirs = getattr(configs[first], field), getattr(config, field)
            if ours != theirs:
                raise HyperLlamaError(
                    f"{label} has {field} {theirs}, {first} has {ours}; only models of one shape can be merged"
                )
        if factor_is_folded(folders[label].config) != factor_is_folded(folders[first].config):
            raise HyperLlamaError(f"only one of {first} and {label} has its head factor in the norm; export both alike")
        _check_folder(label, folders[label], config)
    return configs


def _tokenizer(folders: dict[str, Folder]) -> Path | None:
    """The first folder that has a tokenizer (the base is first). Raises HyperLlamaError when two differ."""
    first: Path | None = None
    owners: dict[str, tuple[str, str]] = {}
    for label, folder in folders.items():
        for name in TOKENIZERS:
            if (file := folder.path / name).is_file():
                first = first or folder.path
                digest = sha256_file(file)
                owner, known = owners.setdefault(name, (label, digest))
                if digest != known:
                    raise HyperLlamaError(
                        f"{label}/{name} differs from {owner}/{name}: models must share one tokenizer"
                    )
    return first


def _check_regmean(step: Step) -> None:
    """Least squares divide by the sum of the weighted models."""
    assert isinstance(step.call, Call)
    if not step.call.normalize:
        raise HyperLlamaError(f"tensor {step.name}: hyperllama.regmean needs normalize: true")
    if min(step.call.weights) < 0 or not any(step.call.weights):
        raise HyperLlamaError(
            f"tensor {step.name}: hyperllama.regmean needs weights of 0 or more, not all 0; they are "
            f"{list(step.call.weights)}"
        )


@dataclass(frozen=True)
class Outline:
    """A model of which only the shape is known: what a folder of its weights will hold."""

    config: ModelConfig
    stored: str = "bfloat16"

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in logical_tensors(self.config)}

    @property
    def names(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Dtype of a tensor."""
        return self.stored


def plan_outlines(recipe: Recipe, outlines: Mapping[str, Outline]) -> list[Step]:
    """The steps of a merge of models that need not exist yet, by their labels in the recipe.

    Raises HyperLlamaError as plan does for shapes and parameters that do not fit, and for a label without an outline.
    """
    for label in recipe.model_names:
        if label not in outlines:
            raise HyperLlamaError(f"{label} is no model that is planned; {nearest(label, outlines)}")
    named = {label: outlines[label] for label in recipe.model_names}
    return tensor_steps(recipe, named, {label for label, model in named.items() if model.config.tie_embeddings})


def plan(recipe: Recipe, cwd: str | Path = ".") -> Plan:
    """Check a recipe against its model folders, whose paths are relative to `cwd`, without reading a tensor.

    Raises HyperLlamaError naming model and key or tensor for the first thing that does not fit.
    """
    folders = _open(recipe, Path(cwd))
    configs = _check_configs(recipe, folders)
    tokenizer_from = _tokenizer(folders)
    tied = {label for label, config in configs.items() if config.tie_embeddings}
    steps = tensor_steps(recipe, folders, tied)
    if recipe.hyperllama.importance:
        from hyperllama.merge.importance import check_companions  # brings torch

        for step in steps:
            if step.importance is not None:
                reads = [(folders[read.model].path, read.tensor) for read in step.inputs]
                check_companions(step.importance, reads, step.shape)
    if recipe.hyperllama.regmean:
        for step in steps:
            _check_regmean(step)

    notes = list(recipe.notes)
    has_head = steps[-1].name == HEAD
    if has_head and tied:
        notes.append(f"the result has its own lm_head: the embedding stands in for that of {', '.join(sorted(tied))}")
    if not has_head and len(tied) < len(folders):
        notes.append("the result is tied: no source of the last slice has an lm_head of its own")
    unknown = [label for label, folder in folders.items() if not folder.card]
    notes += [f"{label} has no hyperllama.json: its FLOPs are unknown and not counted" for label in unknown]

    first = next(iter(folders.values()))
    config = {key: value for key, value in first.config.items() if key != "dtype"}
    config["num_hidden_layers"] = len({step.name.split(".")[2] for step in steps if ".layers." in step.name})
    config["tie_word_embeddings"] = not has_head
    config["torch_dtype"] = steps[0].dtype
    return Plan(recipe, folders, steps, config, tokenizer_from, notes)
