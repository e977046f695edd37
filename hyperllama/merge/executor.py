"""Carries out merge steps tensor by tensor: from folders to a folder, or between models in memory."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.files import check_free
from hyperllama.flops import Ledger
from hyperllama.hub import Folder, folder_hashes, write_folder
from hyperllama.kernels import merge as kernels
from hyperllama.merge.methods import Call, TensorCall
from hyperllama.merge.planner import Plan
from hyperllama.merge.recipe import Recipe
from hyperllama.merge.steps import Step, tensor_steps
from hyperllama.names import HEAD

Progress = Callable[[int, int], None]


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


def _merged(step: Step, sources: Mapping[str, "_InMemory | Folder"]) -> Tensor:
    tensors = [sources[read.model].tensor(read.tensor) for read in step.inputs]
    base = None if step.base is None else sources[step.base.model].tensor(step.base.tensor)
    result = _combine(step.call, base, tensors, getattr(torch, step.dtype))
    if not torch.isfinite(result).all():
        models = ", ".join(read.model for read in step.reads)
        raise HyperLlamaError(f"tensor {step.name} merged from {models} has NaN or infinity as {step.dtype}")
    return result


def _combine(call: Call | TensorCall, base: Tensor | None, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    from hyperllama.merge import elementwise

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
    return ((step.name, _merged(step, sources)) for step in steps)


def _card(plan: Plan) -> dict[str, Any]:
    """Where the merge comes from: recipe, files, FLOPs of every distinct ancestor run, tokens by language."""
    made_from: list[dict[str, str]] = []
    ledgers: list[Ledger] = []
    by_model: dict[str, dict[str, int]] = {}
    tokens: dict[str, int] = {}
    seen: set[int] = set()
    for label, folder in plan.folders.items():
        if id(folder) in seen:  # one folder under two spellings of its path
            continue
        seen.add(id(folder))
        made_from += [{"path": f"{label}/{name}", "sha256": digest} for name, digest in folder_hashes(folder).items()]
        ledgers += folder.ledgers
        by_model[label] = dict(folder.card.get("token_counts", {}))
        for language, count in by_model[label].items():
            tokens[language] = tokens.get(language, 0) + count
    identity = json.dumps([plan.recipe.model_dump(mode="json"), made_from], sort_keys=True)
    return {
        "kind": "merge",
        "ledger": Ledger.child(f"merge-{hashlib.sha256(identity.encode()).hexdigest()[:16]}", ledgers).to_json(),
        "token_counts": tokens,
        "token_counts_by_model": by_model,
        "made_from": made_from,
        "recipe": plan.recipe.source,
        "hyperllama": plan.recipe.hyperllama.model_dump(),
        "notes": plan.notes,
    }


def check_output(plan: Plan, out: Path, overwrite: bool = False) -> None:
    """Refuse an output folder before any work: one that is taken, or one that the merge reads from."""
    for label, folder in plan.folders.items():
        source = folder.path.resolve()
        if source == out.resolve() or out.resolve() in source.parents:
            raise HyperLlamaError(f"{out} is or holds {label}, a model to merge from: name another output folder")
    if not overwrite:
        check_free(out)


def run(plan: Plan, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Merge the plan's folders into the folder `out`, which appears whole or not at all.

    progress: called after every tensor with the bytes written so far and `plan.bytes_written`.
    Returns what was done: {"path", "tensors", "bytes_read", "bytes_written", "ledger", "notes"}.
    Raises HyperLlamaError when `out` exists without `overwrite`, is one of the models, or a result is not finite.
    """
    out = Path(out)
    check_output(plan, out, overwrite)
    card = _card(plan)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for step in plan.steps:
            result = _merged(step, plan.folders)
            yield step.name, result
            done += result.numel() * result.element_size()
            if progress is not None:
                progress(done, plan.bytes_written)

    write_folder(out, plan.config, tensors(), card, tokenizer_from=plan.tokenizer_from, overwrite=overwrite)
    return {
        "path": str(out),
        "tensors": len(plan.steps),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "ledger": card["ledger"],
        "notes": plan.notes,
    }
