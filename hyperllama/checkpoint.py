"""Training state on disk: sharded, asynchronous, atomic, checksummed, found by scanning; and the models a run leaves behind.

    <run>/checkpoints/step-00000100/rank-00000-of-00002.safetensors    master@0, m@0, v@0: flat fp32 arrays
                                    rank-00001-of-00002.safetensors    master@81920, ...
                                    state.json                         step, windows, card, model, where tensors start, ...
                                    SHA256SUMS                         `sha256sum -c` reads it
    <run>/model/                                                       the finished model, a Hugging Face folder

A checkpoint is the flat address space of an arena (arena.py), cut into pieces in whichever way the processes hold it:
`master@81920` are the masters from element 81920 on. So any number of processes reads what any other number wrote. Weights are
not stored: they are the masters, rounded. The run folder must be one file system for all processes.

A save copies this process's pieces to host memory, which is all that the loop waits for, and a thread writes the copy. There is one
copy: a save that finds the one before unfinished waits for it. So saving needs host memory for the pieces once more
(12 bytes a parameter of the piece), and never more than that.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperllama.arena import Arena
from hyperllama.companions import ADAM_V, Companion, Companions
from hyperllama.config import CheckpointSettings
from hyperllama.errors import HyperLlamaError
from hyperllama.files import fsync, read_json, sha256_file, write_json, write_text
from hyperllama.hub import folded, hf_config, write_folder
from hyperllama.names import FINAL_NORM, logical_tensors
from hyperllama.settings import ModelConfig, validated

ROLES = ("master", "m", "v")
SUMS = "SHA256SUMS"
DTYPES = {"float32": "F32", "float64": "F64"}
PART_SECONDS = 600.0  # how long the first process waits for another's part: a process that is gone must not stop the saves for ever
LAST_SECONDS = 10.0  # ... when the run has ended by an error: most likely that process is gone

Pieces = dict[int, dict[str, Tensor]]  # first element in the arena -> role -> flat tensor


class Peers(Protocol):
    """What a checkpoint needs to know of the run's processes: see train/distributed.py."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def largest_int(self, value: int) -> int: ...
    def alive(self) -> None: ...


def slices(arena: Arena, rank: int = 0, world: int = 1) -> Pieces:
    """This process's share of an arena that every process holds whole."""
    start, stop = (arena.size * r // world for r in (rank, rank + 1))
    return {start: {role: getattr(arena, role)[start:stop] for role in ROLES}}


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; leftovers of an interrupted save are not among them."""
    return sorted((run / "checkpoints").glob("step-*"))


class Checkpointer:
    """Writes the checkpoints of one run, and removes those that the settings don't keep.

    All processes construct it together and call `save` at the same steps. `say(event, sentence)` is told of what could not be
    saved: a save that fails (a full disk) leaves the checkpoints before it as they are, and the run goes on. As a context manager
    it learns of an error that ends the run, after which a save no longer waits for a process that may be gone.
    """

    def __init__(self, run: Path, settings: CheckpointSettings, peers: Peers, say: Callable[[str, str], None]):
        self.run, self.settings, self.rank, self.world, self.say = run, settings, peers.rank, peers.world, say
        self.alive = peers.alive
        self.attempt = peers.largest_int(
            time.time_ns()
        )  # one name for all processes' parts, unlike any that a killed run left
        self.saved, self.failed = 0, ""
        self.stalled = 0.0  # seconds that the loop has waited for saves
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._ended = Event()
        self._sweep("")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._ended.set()

    def save(
        self, step: int, pieces: Pieces, arena: Arena, state: dict[str, Any], first: Callable[[], None] = lambda: None
    ) -> None:
        """Copy `pieces` and let a thread write them as checkpoint `step`, with `state` (JSON) beside them.

        The thread calls `first`, which has the disk hold what belongs to the checkpoint but lies elsewhere: a save fails with it.
        """
        began = time.perf_counter()
        self.wait()
        state = {
            "step": step,
            **state,
            "model": arena.config.model_dump(),
            "arena": {"size": arena.size, "offsets": arena.offsets},
            "files": [_shard(rank, self.world) for rank in range(self.world)],
        }
        arrays = {
            f"{role}@{at}": self._copied(f"{role}@{at}", t) for at, held in pieces.items() for role, t in held.items()
        }
        self._thread = Thread(target=self._write, args=(step, arrays, state, first), name="checkpoint")
        self._thread.start()
        self.stalled += time.perf_counter() - began

    def wait(self) -> bool:
        """Wait until the last save is on disk; False when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return not self.failed

    def _sweep(self, current: str) -> None:
        """Remove unfinished saves other than `current`: of a killed run, or of a step where some process failed."""
        if self.rank == 0:
            for left in (self.run / "checkpoints").glob(".step-*"):
                if left.name != current:
                    shutil.rmtree(left, ignore_errors=True)

    def _copied(self, name: str, tensor: Tensor) -> np.ndarray:
        held = self._copies.get(name)
        if held is None or held.shape != tensor.shape:
            dtype = torch.promote_types(tensor.dtype, torch.float32)  # bf16 masters are kept as fp32, exactly
            self._copies[name] = held = torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda)
        return held.copy_(tensor).numpy()

    def _write(
        self, step: int, arrays: dict[str, np.ndarray], state: dict[str, Any], first: Callable[[], None]
    ) -> None:
        name, folder = f"step-{step:08}", self.run / "checkpoints"
        temporary, mine = folder / f".{name}.{self.attempt}.tmp", _shard(self.rank, self.world)
        self._sweep(temporary.name)
        try:
            first()
            temporary.mkdir(parents=True, exist_ok=True)
            digest = write_arrays(temporary / mine, arrays, self.alive)  # a slow disk is no hanging process
            write_text(temporary / f"{mine}.sum", f"{digest}  {mine}\n")
            if self.rank == 0:
                _complete(temporary, state, folder / name, self._ended)
                self._retain()
            self.failed = ""
            self.saved += 1
        except OSError as error:
            self.failed = error.strerror or str(error)
            with suppress(OSError):  # what is left is swept at the next start
                (temporary / mine).unlink(missing_ok=True)
                (temporary / f"{mine}.failed").touch()  # so that the first process need not wait for the part
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                kept = checkpoints(self.run)
                newest = f"the newest is {kept[-1]}" if kept else "there is none yet"
                self.say("not_saved", f"checkpoint {folder / name} could not be written ({self.failed}); {newest}")

    def _retain(self) -> None:
        """Remove what is neither among the newest, nor at a step to keep, nor the best."""
        keep, found = self.settings, checkpoints(self.run)
        kept = set(found[-keep.keep :])
        if keep.keep_every:
            kept |= {path for path in found if int(path.name[5:]) % keep.keep_every == 0}
        if keep.keep_best:
            scores = [(score, path) for path in found if (score := _score(path, keep.keep_best)) is not None]
            kept |= {path for _, path in sorted(scores)[:1]}
        for path in found:
            if path not in kept:  # renamed first: a kill must not leave half a checkpoint under a whole one's name
                shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")), ignore_errors=True)


def _score(folder: Path, key: str) -> float | None:
    """What a checkpoint's state says of `key` (lower is better); None where nothing, or where it can't be read."""
    try:
        return read_json(folder / "state.json").get(key)
    except HyperLlamaError:  # a damaged one is never the best
        return None


def _shard(rank: int, world: int) -> str:
    return f"rank-{rank:05}-of-{world:05}.safetensors"


def write_arrays(file: Path, arrays: dict[str, np.ndarray], alive: Callable[[], None] = lambda: None) -> str:
    """Write flat arrays as a safetensors file, onto the disk; returns its SHA-256, computed on the way. `alive` every 4 MiB.

    The safetensors library would copy every array and hold the interpreter's lock meanwhile: the training loop would stand still.
    """
    header, at = {}, 0
    for name, array in arrays.items():
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # arrays start on a multiple of 8 bytes
    digest = hashlib.sha256()
    blocks = [memoryview(len(text).to_bytes(8, "little") + text), *(a.view(np.uint8).data for a in arrays.values())]
    with file.open("wb", buffering=0) as out:
        for data in blocks:
            for first in range(0, len(data), 1 << 22):
                part = data[first : first + (1 << 22)]
                alive()
                digest.update(part)
                while len(part):
                    part = part[out.write(part) :]  # an unbuffered write may take less than it was given
        os.fsync(out.fileno())
    return digest.hexdigest()


def _complete(temporary: Path, state: dict[str, Any], folder: Path, ended: Event) -> None:
    """Wait for every process's part, not for long once the run has ended; then give the checkpoint its name."""
    began = time.monotonic()
    sums = [temporary / f"{name}.sum" for name in state["files"]]
    while not all(file.is_file() for file in sums):
        for file in temporary.glob("*.failed"):
            raise OSError(f"{file.stem} could not be written")
        seconds = LAST_SECONDS if ended.is_set() else PART_SECONDS
        if time.monotonic() - began > seconds:
            missing = next(file.stem for file in sums if not file.is_file())
            raise OSError(f"{missing} did not come within {seconds:.0f} seconds")
        time.sleep(0.01)
    write_json(temporary / "state.json", state)
    lines = [file.read_text() for file in sums] + [f"{sha256_file(temporary / 'state.json')}  state.json\n"]
    write_text(temporary / SUMS, "".join(lines))
    for file in sums:
        file.unlink()
    fsync(temporary)
    if folder.exists():  # the same step again, after a damaged one before it was used: this one counts
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")))
    temporary.rename(folder)
    fsync(folder.parent)


def read_sums(folder: Path) -> dict[str, str]:
    """A checkpoint's SHA-256 by file name. Raises HyperLlamaError when the list is damaged."""
    try:
        pairs = [line.split("  ") for line in (folder / SUMS).read_text(encoding="ascii").splitlines()]
        return {name: digest for digest, name in pairs}
    except (OSError, ValueError) as error:
        raise HyperLlamaError(f"{folder / SUMS} is damaged: {error}") from None


def verify(
    folder: Path, rank: int = 0, world: int = 1, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Check the SHA-256 of state.json and of this process's share of the other files; returns the state.

    `progress(n_bytes)` is called after every 4 MiB.
    Raises HyperLlamaError naming the file that is damaged.
    """
    sums = read_sums(folder)
    for i, name in enumerate(["state.json", *sorted(set(sums) - {"state.json"})]):
        if i and i % world != rank:
            continue
        if not (folder / name).is_file() or sha256_file(folder / name, progress) != sums.get(name):
            raise HyperLlamaError(f"{folder / name} is damaged: its SHA-256 is not the one in {SUMS}")
    state: dict[str, Any] = read_json(folder / "state.json")
    if set(sums) != {"state.json", *state["files"]}:
        raise HyperLlamaError(f"{folder / SUMS} is damaged: it does not list the files that state.json names")
    return state


def newest(run: Path, peers: Peers, say: Callable[[str, str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and its state, the same for all processes, which share the checking; None for a fresh run.

    A damaged one is told, set aside as damaged-step-..., and the one before it is tried.
    Raises HyperLlamaError when there are checkpoints and none is intact.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        problem, state = "", {}
        try:
            state = verify(folder, peers.rank, peers.world, lambda _: peers.alive())
        except HyperLlamaError as error:
            problem = str(error)
        finder = peers.largest_int(peers.rank + 1 if problem else 0)
        if not finder:
            return folder, state
        if peers.rank == 0:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            say(
                "damaged",
                f"{problem or f'rank {finder - 1} found {folder} damaged'}; moved to {aside}, the one before is used",
            )
    if found or any((run / "checkpoints").glob("damaged-*")):
        raise HyperLlamaError(
            f"no checkpoint in {run / 'checkpoints'} is intact: remove the folder {run} to start the run again from its beginning"
        )
    return None


class Reader:
    """The arrays of one checkpoint, whoever wrote which piece; read where asked for, over a memory map.

    Raises HyperLlamaError when a file is missing or no safetensors file.
    """

    def __init__(self, folder: Path, files: Iterable[str]):
        self.folder = folder
        self.pieces: dict[str, list[tuple[int, int, Any, str]]] = {role: [] for role in ROLES}
        for name in files:
            try:
                handle = safe_open(str(folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise HyperLlamaError(f"{folder / name} can't be read: {error}") from None
            for key in handle.keys():  # noqa: SIM118  (it is no dict)
                role, _, at = key.partition("@")
                self.pieces[role].append((int(at), int(at) + handle.get_slice(key).get_shape()[0], handle, key))

    def read(self, role: str, start: int, target: Tensor) -> None:
        """Fill the flat `target` with the elements of `role` from `start` on.

        Raises HyperLlamaError when the checkpoint does not hold all of them.
        """
        stop, copied = start + len(target), 0
        for first, last, handle, key in self.pieces[role]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                target[low - start : high - start].copy_(handle.get_slice(key)[low - first : high - first])
                copied += high - low
        if copied != len(target):
            raise HyperLlamaError(f"{self.folder} lacks {len(target) - copied} of the elements {role}[{start}:{stop}]")


def load(folder: Path, state: dict[str, Any], arena: Arena, pieces: Pieces) -> None:
    """Fill `pieces` of the arena from a checkpoint that `verify` found intact; weights are left to the caller.

    Raises HyperLlamaError when the checkpoint belongs to another model.
    """
    _same_shape(folder, state, arena)
    reader = Reader(folder, state["files"])
    for start, held in pieces.items():
        for role, target in held.items():
            inside = min(
                len(target), max(0, state["arena"]["size"] - start)
            )  # beyond is what other numbers of processes pad
            reader.read(role, start, target[:inside])
            target[inside:].zero_()


def _same_shape(folder: Path, state: dict[str, Any], arena: Arena) -> None:
    wanted = arena.config.model_dump()
    for key, value in wanted.items():
        if state["model"].get(key) != value:
            raise HyperLlamaError(
                f"{folder} is of a model with {key} {state['model'].get(key)}, this run's model has {value}"
            )
    if state["arena"]["offsets"] != arena.offsets:
        raise HyperLlamaError(
            f"{folder} was written by a version that laid tensors out otherwise: export it with that version"
        )


def plan_export(source: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `source` means (a checkpoint, or a run: its newest) and its state; only state.json is read.

    Raises HyperLlamaError when there is none.
    """
    found = [source] if (source / SUMS).is_file() else checkpoints(source)
    if not found:
        raise HyperLlamaError(
            f"{source} is neither a checkpoint nor a run with one (a run's finished model is {source}/model)"
        )
    return found[-1], read_json(found[-1] / "state.json")


def export_checkpoint(
    source: Path, out: Path, counts: Callable[[dict[str, Any], ModelConfig], Companions] = lambda state, config: {}
) -> tuple[Path, dict[str, Any]]:
    """Write a checkpoint as a Hugging Face folder, atomically, tensor by tensor; returns the checkpoint and its state.

    The run may go on meanwhile: a checkpoint that it removes before it was opened is replaced by its newest. `counts` makes the
    companions that hang on the data. AdamW's v goes along where the run exports it.
    Raises HyperLlamaError when `out` exists, the checkpoint is damaged, or the tokenizer of the run has gone.
    """
    while True:
        checkpoint, _ = plan_export(source)
        try:
            state = verify(checkpoint)
            reader = Reader(checkpoint, state["files"])  # from here on the files stay readable, removed or not
            break
        except HyperLlamaError:
            if checkpoint.is_dir():
                raise
    config = validated(ModelConfig, state["model"], str(checkpoint / "state.json"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[state["card"]["config"]["precision"]]

    def tensors(role: str) -> Iterator[tuple[str, Tensor]]:
        for tensor in logical_tensors(config):
            row = tensor.size // tensor.shape[0]
            flat = torch.empty(tensor.size)
            reader.read(role, state["arena"]["offsets"][tensor.packed] + tensor.start * row, flat)
            yield tensor.name, flat.view(tensor.shape)

    settings = state["card"]["config"]
    # rounded to what the forward reads: an export has the run's own bits
    weights = ((name, tensor.to(dtype)) for name, tensor in tensors("master"))
    companions = dict(counts(state, config))
    if settings["export"]["adam_v"]:
        companions[ADAM_V] = adam_v(dict(tensors("v")), config, state["updates"], settings["optimizer"]["beta2"])
    export_model(out, config, weights, state["card"], Path(settings["tokenizer"]), dtype, companions, overwrite=False)
    return checkpoint, state


def export_model(
    path: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], card: dict[str, Any], tokenizer: Path,
    dtype: torch.dtype, companions: Companions, *, overwrite: bool = True,
) -> None:  # fmt: skip
    """Write a model, its weights in arena order, as a Hugging Face folder with card, tokenizer and companions, atomically."""
    write_folder(
        path,
        hf_config(config, dtype),
        folded(config, tensors, dtype),
        card,
        tokenizer_from=tokenizer,
        companions=companions,
        overwrite=overwrite,
    )


def adam_v(v: Mapping[str, Tensor], config: ModelConfig, step: int, beta2: float) -> Companion:
    """AdamW's second moment (Hugging Face name -> v) after `step` updates, of the weights as `folded` writes them."""
    views = {name: view.float().cpu().numpy() for name, view in v.items()}
    factor = config.lm_head_normalization_factor  # a weight divided by it has its gradient times it
    views[FINAL_NORM] = views[FINAL_NORM] * factor**2
    return Companion(views, {"step": str(step), "beta2": repr(beta2)})
