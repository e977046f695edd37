"""Carries out the merge of a plan from folders to a folder: tensor after tensor, from memory maps straight to its place in a file.

What is an op of csrc runs there, on every core, and its result goes to the file through a buffer in a core's cache: no tensor is
ever in memory. Peak anonymous memory is that of the search for thresholds: at most 16 MB per model and thread, and 16 bytes per
model and 1024 elements of a tensor; random masks take at most 16 MB per model. The inputs' pages are the kernel's to keep or drop.
Methods and dtypes that are no op of csrc (see methods.py; breadcrumbs, DELLA, `compat`, fp64) run in torch on whole tensors: a few
copies, in fp32, of the largest one.

The pass that reads a tensor first also hashes it (kernels/hashing.py). The hashes of what was read are in the card's `made_from`,
those of what was written in its `weights`; one that is not what an input's own card says is an error.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from ctypes import byref, c_double
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperllama import __version__
from hyperllama.companions import merged_counts
from hyperllama.errors import HyperLlamaError
from hyperllama.files import check_free, check_room, sha256_file
from hyperllama.flops import Ledger
from hyperllama.hub import Folder, FolderWriter, origin, stamps, streamed_folder
from hyperllama.kernels.hashing import hash_bytes
from hyperllama.kernels.native import usable
from hyperllama.kernels.raw import DTYPES, Calls, task_divisor
from hyperllama.memory import give_back_freed_blocks, keep_freed_blocks
from hyperllama.merge.methods import Call, TensorCall
from hyperllama.merge.planner import Plan
from hyperllama.merge.steps import Input, Step
from hyperllama.weights import NewTensor, hex_hash

if TYPE_CHECKING:
    from hyperllama.merge.search import Found
    from hyperllama.merge.tensors import Prepared

Progress = Callable[[int, int], None]
Hashes = dict[str, dict[str, str]]
"""Model -> tensor -> hash."""

AHEAD = 64 << 20  # bytes of each of the next tensors that are asked from the disk while this one is merged


def _is_op(call: Call | TensorCall) -> bool:
    """Whether a call is one of csrc's ops."""
    return isinstance(call, Call) and call.working is None and not call.gammas and not call.epsilons


def _merge(step: Step, folders: dict[str, Folder], writer: FolderWriter, prepared: "Prepared | None" = None) -> Hashes:
    """Carry out a step into its place; returns the hashes of the tensors it read."""
    call = step.call
    dtypes = {step.dtype, *(folders[read.model].dtype(read.tensor) for read in step.reads)}
    if prepared or step.importance or not _is_op(call) or not dtypes <= set(DTYPES) or not usable():
        return _merge_in_memory(step, folders, writer, prepared)
    assert isinstance(call, Call)
    inputs = [folders[read.model].raw(read.tensor) for read in step.inputs]
    base = None if step.base is None else folders[step.base.model].raw(step.base.tensor)
    calls = Calls(base, inputs)
    hashed = call.coefficients is None
    if call.coefficients is not None:
        gram = ((c_double * calls.count) * calls.count)()
        calls.gram(byref(gram), hashed=True)
        call = call.weighted([list(row) for row in gram])
    target = writer.target(step.name)
    divisor = 1.0
    if call.normalize and call.op == "linear":
        divisor = sum(call.weights)
    elif call.normalize and call.op == "task_arithmetic":
        divisor = task_divisor(call.weights)
    calls.merge(
        target, step.dtype, weights=call.weights, divisor=divisor, densities=call.densities, keys=call.keys, lam=call.lam,
        normalize=call.normalize, rescale=call.rescale, elect=call.op == "ties", hashed=hashed,
    )  # fmt: skip
    if not target.finite:
        raise step.not_finite()
    hashes: Hashes = {}
    for read, value in zip(step.reads, calls.hashes, strict=False):
        hashes.setdefault(read.model, {})[read.tensor] = hex_hash(value)
    writer.finish(step.name, hex_hash(target.hash), reads=hashes)
    return hashes


def _merge_in_memory(
    step: Step, folders: dict[str, Folder], writer: FolderWriter, prepared: "Prepared | None"
) -> Hashes:
    import torch

    from hyperllama.merge.tensors import merged

    result = merged(step, folders, prepared).contiguous().reshape(-1).view(torch.uint8).numpy()
    hashes: Hashes = {}
    for read in step.reads:
        content = folders[read.model].bytes(read.tensor)
        hashes.setdefault(read.model, {})[read.tensor] = hex_hash(hash_bytes(content))
    writer.finish(step.name, writer.write(step.name, result), reads=hashes)
    return hashes


def _expect(reads: tuple[Input, ...], folders: dict[str, Folder]) -> None:
    for read in reads:
        folders[read.model].file(read.tensor).expect(read.tensor, AHEAD)


def _card(plan: Plan, hashes: Hashes, prepared: "Prepared | None") -> dict[str, Any]:
    """Where the merge comes from: recipe, what was read, FLOPs of every ancestor run and of preparing, tokens by language."""
    made_from: list[dict[str, str]] = []
    ledgers: list[Ledger] = []
    by_model: dict[str, dict[str, int]] = {}
    tokens: dict[str, int] = {}
    for label, folder in _distinct(plan).items():
        made_from.append(origin(label, folder, hashes.get(label, {})))
        ledgers += folder.ledgers
        by_model[label] = dict(folder.card.get("token_counts", {}))
        for language, count in by_model[label].items():
            tokens[language] = tokens.get(language, 0) + count
    extensions = plan.recipe.hyperllama
    texts = [text for reads in (extensions.learn, extensions.regmean) if reads for text in reads.texts]
    made_from += [{"path": text, "sha256": sha256_file(text)} for text in texts]
    identity = json.dumps([plan.recipe.model_dump(mode="json"), made_from], sort_keys=True)
    ledger = Ledger.child(f"merge-{hashlib.sha256(identity.encode()).hexdigest()[:16]}", ledgers)
    ledger.spent = prepared.flops if prepared else 0
    return {
        "kind": "merge",
        "ledger": ledger.to_json(),
        "token_counts": tokens,
        "token_counts_by_model": by_model,
        "made_from": made_from,
        "recipe": plan.recipe.source,
        "hyperllama": plan.recipe.hyperllama.describe(),
        "notes": plan.notes,
        **(prepared.describe() if prepared else {}),
    }


def _distinct(plan: Plan) -> dict[str, Folder]:
    """The folders, each under the first spelling of its path."""
    first: dict[int, str] = {}
    return {label: folder for label, folder in plan.folders.items() if first.setdefault(id(folder), label) == label}


def check_output(plan: Plan, out: Path, overwrite: bool = False) -> None:
    """Refuse an output folder before any work: one that is taken, that the merge reads from, or without room on its disk."""
    for label, folder in plan.folders.items():
        source = folder.path.resolve()
        if source == out.resolve() or out.resolve() in source.parents:
            raise HyperLlamaError(f"{out} is or holds {label}, a model to merge from: name another output folder")
    if not overwrite:
        check_free(out)
    check_room(out, plan.bytes_written)


def _job(plan: Plan) -> str:
    """What names this work: one that a killed process left is gone on with when all of it is still the same."""
    files = [stamps(folder) for folder in plan.folders.values()]
    text = json.dumps([__version__, plan.recipe.model_dump(mode="json"), files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _prepared(plan: Plan) -> "Prepared | None":
    if plan.recipe.hyperllama.learn:
        from hyperllama.merge.learned import learn

        return learn(plan)
    if plan.recipe.hyperllama.regmean:
        from hyperllama.merge.regmean import regmean

        return regmean(plan)
    return None


def merge_on_gpu(plan: Plan, device: str) -> "Callable[..., Iterator[Hashes]] | None":
    """What merges the plan's steps on a device; None for the CPU. Raises HyperLlamaError when it is not there or can't do this."""
    if device == "cpu":
        return None
    from hyperllama.merge.device import device_named, merge_on

    named = device_named(device)
    extensions = plan.recipe.hyperllama
    if extensions.importance or extensions.learn or extensions.regmean:
        raise HyperLlamaError(
            f"--device {device}: hyperllama.importance, learn and regmean merge on the CPU; leave it out"
        )
    return partial(merge_on, named)


def run(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
    found: "Found | None" = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Merge the plan's folders into the folder `out`, which appears whole or not at all; what a killed merge left is gone on with.

    sync: have the disk hold the result before it appears (see files.atomic_folder). progress: called after every tensor with the
    bytes written so far and `plan.bytes_written`. found: the search that the plan comes from, for its cost and what it learnt.
    device: a GPU to merge on (see device.py), for what is not prepared from texts or weighed by files.
    Returns what was done: {"path", "tensors", "resumed", "bytes_read", "bytes_written", "ledger", "notes"}.
    Raises HyperLlamaError when the device can't be used, `out` exists without `overwrite`, is one of the models, has no room, a
    result is not finite, or an input is not what its card says.
    """
    out = Path(out)
    check_output(plan, out, overwrite)
    tensors = [NewTensor(step.name, step.dtype, step.shape) for step in plan.steps]
    same = {label: next(k for k, f in plan.folders.items() if f is folder) for label, folder in plan.folders.items()}
    gpu = merge_on_gpu(plan, device)
    prepared = found.learned if found else _prepared(plan)
    hashes: Hashes = {}
    done = 0
    keep_freed_blocks()  # the next tensor's masks and keys take as much: from here on, in this process
    with streamed_folder(out, tensors, _job(plan), overwrite=overwrite, sync=sync) as writer:
        resumed = len(writer.done)
        there = (
            gpu([step for step in plan.steps if step.name not in writer.done], plan.folders, writer) if gpu else None
        )
        for i, (step, tensor) in enumerate(zip(plan.steps, tensors, strict=True)):
            if i + 1 < len(plan.steps):
                _expect(plan.steps[i + 1].reads, plan.folders)
            known = writer.done.get(step.name)
            reads = known["reads"] if known else next(there) if there else _merge(step, plan.folders, writer, prepared)
            for label, read in reads.items():
                for name, digest in read.items():
                    plan.folders[label].check_hash(name, digest)
                hashes.setdefault(same[label], {}).update(read)
            done += tensor.n_bytes
            if progress is not None:
                progress(done, plan.bytes_written)
        card = _card(plan, hashes, prepared)
        if found:
            card["ledger"]["spent"] = found.flops
            card["search"] = {"evaluations": found.evaluations, "tried": found.rows}
        paths = [folder.path for folder in _distinct(plan).values()]
        writer.complete(plan.config, card, plan.tokenizer_from, merged_counts(paths, plan.config["vocab_size"]))
    give_back_freed_blocks()
    return {
        "path": str(out),
        "tensors": len(plan.steps),
        "resumed": resumed,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "ledger": card["ledger"],
        "notes": plan.notes,
    }
