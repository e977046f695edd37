"""What stands around the ops of a run: tokenizing, the loader, checkpoints, measuring a model, the loop itself.

    python -m bench.pipeline data|checkpoint|evaluate [--quick] [--json] [--out bench/results]

tokenize    text to shards; beside it the tokenizer alone, which bounds it
loader      windows from shards, in the order of a mixture, as batches
stall       how long the loop waits when it asks for a checkpoint; at most 2 % of the time between two, here a minute
save        the training state to a checkpoint, waited for; beside it a plain write of as many bytes, without a checksum
restore     the newest checkpoint, verified and read; beside it a plain read of as many bytes
pairs       4000 minimal pairs on a model of the demo's size, from folder to accuracy; well under a minute
The loop is for the regression gate (regress_cases.py). Files are in the page cache.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hyperllama.arena import Arena
from hyperllama.checkpoint import Checkpointer, export_model, load, newest, slices
from hyperllama.config import CheckpointSettings, RunConfig
from hyperllama.data.build import build_shards
from hyperllama.data.loader import Loader
from hyperllama.data.mixture import Mixture, Source
from hyperllama.data.sample import write_corpus
from hyperllama.data.shards import Shards
from hyperllama.data.tokenizer import Tokenizer, train_tokenizer
from hyperllama.model import Llama
from hyperllama.settings import ModelConfig, validated
from hyperllama.train.distributed import Processes

from .environment import device_slug, environment
from .harness import Case, Result, Roof, Thunk, judgement, limit, missed, run, table, write_results

BUFFER = 4 << 20  # bytes
SEQ_LEN, WINDOWS = 512, 64  # of a batch
ALONE = Processes(0, 1, torch.device("cpu"))


class Workspace:
    """A folder with what cases read, made when first asked for; without a `path` a temporary one, removed with this object."""

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hyperllama-bench-")
        self.path = path or Path(self._folder.name)

    def text(self, n_bytes: int) -> Path:
        """JSONL of about `n_bytes` of English sample text."""
        folder = self.path / f"corpus-{n_bytes}"
        if not folder.is_dir():
            write_corpus(folder, ("eng",), n_bytes, seed=1, dev_bytes=2_000, pairs=1)
        return folder / "text" / "eng" / "train.jsonl"

    def tokenizer(self) -> Tokenizer:
        """1024 tokens of that text."""
        file = self.path / "tokenizer.model"
        return Tokenizer.load(file) if file.is_file() else train_tokenizer([self.text(200_000)], file, 1024, seed=0)

    def shards(self, n_bytes: int) -> Path:
        """The text of `text` as shards."""
        folder = self.path / f"shards-{n_bytes}"
        if not folder.is_dir():
            build_shards([self.text(n_bytes)], self.tokenizer(), folder, language="eng")
        return folder


def tokenize_case(space: Workspace, n_bytes: int) -> Case:
    """Text to shards, checksums and index included."""
    text, tokenizer, out = space.text(n_bytes), space.tokenizer(), space.path / "tokenized"
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]

    def ours() -> int:
        shutil.rmtree(out, ignore_errors=True)
        return int(build_shards([text], tokenizer, out, language="eng")["tokens"])

    tokens, size = ours(), sum(len(document.encode()) for document in documents)
    return Case(
        "tokenize", {"text_bytes": size, "tokens": tokens}, 0, size, {"ours": lambda: ours},
        roofs={"tokenizer alone": Roof(lambda: lambda: tokenizer.encode_batch(documents))},
    )  # fmt: skip


def loader_case(space: Workspace, n_bytes: int, batches: int) -> Case:
    """`batches` batches in turn, the next one being read in the background. Bytes: int64 ids and targets."""
    mixture = Mixture([Source("eng", Shards.open(space.shards(n_bytes)), 1.0)], SEQ_LEN, 0)
    tokens = batches * WINDOWS * SEQ_LEN

    def setup() -> Thunk:
        loader, at = Loader(mixture, WINDOWS), 0

        def ours() -> None:
            nonlocal at
            for _ in range(batches):
                loader.batch(at)
                at += WINDOWS

        return ours

    params: dict[str, int | float | str] = {"windows": WINDOWS, "T": SEQ_LEN, "batches": batches, "tokens": tokens}
    return Case("loader", params, 0, 16 * tokens, {"ours": setup})


def _arena(parameters: int) -> Arena:
    """An arena of about `parameters` weights, masters and moments being normal values."""
    shape = ModelConfig(
        hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32,
        vocab_size=max(64, parameters // 64), max_position_embeddings=64,
    )  # fmt: skip
    arena = Arena(shape, torch.float32, "cpu", training=True)
    for role in ("master", "m", "v"):
        getattr(arena, role).normal_(generator=torch.Generator().manual_seed(0))
    return arena


def _quiet(event: str, sentence: str) -> None:
    raise OSError(f"{event}: {sentence}")  # a benchmark's checkpoints are written


def _saves(folder: Path, arena: Arena, *, waited: bool) -> Thunk:
    """Saves a checkpoint, and the last save is over before the next call; `waited`: it is over at the end of its own."""
    saver, steps = Checkpointer(folder, CheckpointSettings(keep=1), ALONE, _quiet), itertools.count(1)

    def ours() -> None:
        saver.save(next(steps), slices(arena), arena, {})
        if waited:
            saver.wait()

    vars(ours)["before"] = saver.wait
    return ours


def stall_case(space: Workspace, parameters: int) -> Case:
    """A checkpoint as the loop feels it: the call alone."""
    arena = _arena(parameters)
    setup = partial(_saves, space.path / "stalled", arena, waited=False)
    return Case("stall", {"parameters": arena.size}, 0, 12 * arena.size, {"ours": setup})


def save_case(space: Workspace, parameters: int) -> Case:
    """A checkpoint, from the call to the end of its thread."""
    arena = _arena(parameters)
    size, setup = 12 * arena.size, partial(_saves, space.path / "saved", arena, waited=True)

    def write() -> None:
        with open(space.path / "written", "wb", buffering=0) as file:
            for role in ("master", "m", "v"):
                data = memoryview(getattr(arena, role).numpy()).cast("B")
                for at in range(0, len(data), BUFFER):
                    file.write(data[at : at + BUFFER])

    roofs = {"write": Roof(lambda: write)}
    return Case("save", {"parameters": arena.size}, 0, size, {"ours": setup}, roofs=roofs)


def restore_case(space: Workspace, parameters: int) -> Case:
    """The newest checkpoint, its checksums proved, into an arena."""
    arena, run_folder = _arena(parameters), space.path / "restored"
    saver = Checkpointer(run_folder, CheckpointSettings(keep=1), ALONE, _quiet)
    saver.save(1, slices(arena), arena, {})
    saver.wait()
    buffer = np.empty(BUFFER, np.uint8)

    def ours() -> None:
        found = newest(run_folder, ALONE, _quiet)
        assert found is not None  # saved above
        load(*found, arena, slices(arena))

    def read() -> None:
        for path in run_folder.rglob("*.safetensors"):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer.data):
                    pass

    roofs = {"read": Roof(lambda: read)}
    return Case("restore", {"parameters": arena.size}, 0, 12 * arena.size, {"ours": lambda: ours}, roofs=roofs)


def pairs_case(space: Workspace, count: int) -> Case:
    """Minimal pairs of English sample text on a model with random weights."""
    from hyperllama.evaluate import evaluate_folder

    from .cpu import DEMO

    corpus, folder, tokenizer = space.path / f"pairs-{count}", space.path / "demo", space.tokenizer()
    write_corpus(corpus, ("eng",), 10_000, seed=1, dev_bytes=2_000, pairs=count)
    model = Llama(DEMO, Arena(DEMO, torch.float32, "cpu", training=False))
    model.init_weights(seed=0)
    export_model(folder, DEMO, model.arena.logical("weights").items(), {}, tokenizer.path, torch.float32, {})
    pairs = corpus / "minimal_pairs" / "eng.jsonl"

    def ours() -> None:
        evaluate_folder(folder, [], [pairs])

    return Case("pairs", {"pairs": count, "parameters": DEMO.num_parameters}, 0, 0, {"ours": lambda: ours})


def loop_case(space: Workspace, steps: int) -> Case:
    """A whole run of a model so small that what is not an op takes most of a step: plan, loader, metrics, export."""
    out, shards = space.path / "run", space.shards(200_000)
    settings = {
        "name": "loop", "out": str(out), "tokenizer": str(space.tokenizer().path), "seed": 7, "precision": "fp32",
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
        "data": {"sources": [{"path": str(shards)}], "seq_len": 32}, "budget": {"steps": steps}, "global_batch": 4,
        "micro_batch": 4, "log_every": 1, "optimizer": {"lr": 0.01}, "schedule": {"warmup_steps": 2},
    }  # fmt: skip

    def ours() -> None:
        from hyperllama.train.loop import train

        shutil.rmtree(out, ignore_errors=True)
        train(validated(RunConfig, settings, "the loop's recipe"), quiet=True)

    return Case("loop", {"steps": steps}, 0, 0, {"ours": lambda: ours})


LIMITS = {"stall": ("2 % of a minute", 1.2), "pairs": ("a minute", 60.0)}  # seconds


def cases(what: str, quick: bool) -> list[Callable[[Workspace], Case]]:
    """The cases of `data`, `checkpoint` or `evaluate`."""
    size, parameters = (1_000_000, 4_000_000) if quick else (20_000_000, 180_000_000)
    makers: dict[str, list[Callable[[Workspace], Case]]] = {
        "data": [partial(tokenize_case, n_bytes=size), partial(loader_case, n_bytes=size, batches=8)],
        "checkpoint": [partial(case, parameters=parameters) for case in (stall_case, save_case, restore_case)],
        "evaluate": [partial(pairs_case, count=400 if quick else 4000)],
    }
    return makers[what]


def measured(case: Case, rounds: int) -> Result:
    """A case's result, judged where its time has a limit."""
    result = run(case, rounds=rounds, min_sample=0)
    if case.name in LIMITS:
        result["targets"].append(limit("ours", *LIMITS[case.name], result["providers"]["ours"]["samples"]))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description="Time the data pipeline, checkpoints, or the measuring of a model.")
    parser.add_argument("what", choices=("data", "checkpoint", "evaluate"))
    parser.add_argument("--quick", action="store_true", help="text, state and pairs of a tenth or less")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--out", type=Path, help="write <out>/<device>/<what>.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    space, rounds = Workspace(), 5 if given.quick else 9
    results = [measured(make(space), rounds) for make in cases(given.what, given.quick)]
    print(json.dumps(results, indent=1) if given.json else f"{table(results)}\n\n{judgement(results)}")
    if given.out:
        write_results(given.out / device_slug(environment()["device"]) / f"{given.what}.json", results)
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
