"""A run folder explains itself: environment.json says what made it, loss.png how it went."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hyperllama import __version__
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_file, write_json
from hyperllama.train.distributed import Processes
from hyperllama.train.metrics import device_name
from hyperllama.train.plan import Plan

LOCK = ".lock"
SHARED_SECONDS = 60.0  # how long a network's file system may take to show another machine's file
PACKAGES = ("hyperllama", "torch", "triton", "numpy", "safetensors", "tokenizers", "sentencepiece")


def check_alike(plan: Plan, mine: Processes) -> None:
    """Raise HyperLlamaError in every process when they have other settings, data or code: each would train something else."""
    text = json.dumps([plan.config.model_dump(mode="json"), plan.ledger.run, __version__])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    if mine.largest_int(number) + mine.largest_int(-number):
        raise HyperLlamaError(
            f"the processes of this run differ in settings, data or version (rank {mine.rank}: {plan.ledger.run}, "
            f"{__version__}): start all of them with the same recipe, overrides, files and code"
        )


@contextmanager
def only_run(out: Path, mine: Processes) -> Iterator[None]:
    """Keep other runs out of the folder while this one goes on; the system forgets the lock when the process ends, however it does.

    A file system without locks is used without one. Raises HyperLlamaError when another run is there, or when the folder is not
    the same one for all processes.
    """
    taken, file = False, None
    if mine.is_main:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass
    try:
        if mine.largest_int(int(taken)):
            raise HyperLlamaError(
                f"{out}: another process is training in this folder; wait for it, or choose another out"
            )
        word = mine.largest_int(time.time_ns() if mine.is_main else 0)
        if file is not None:
            file.truncate(0)
            file.write(str(word))
            file.flush()
            os.fsync(file.fileno())
        if blind := mine.largest_int(0 if _comes(out / LOCK, str(word)) else mine.rank):
            raise HyperLlamaError(
                f"{out} of rank {blind} is not the folder of rank 0: choose an out on a file system that all machines share"
            )
        yield
    finally:
        if file is not None:
            file.close()


def _comes(file: Path, text: str) -> bool:
    """Whether `file` holds `text`, now or within SHARED_SECONDS."""
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with suppress(OSError):
            if file.read_text() == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def write_environment(out: Path, plan: Plan, mine: Processes) -> None:
    """Write <out>/environment.json: versions, the code's commit, hardware, and hashes of all that is read."""
    import torch

    start = {"path": str(plan.start.path), "sha256": plan.start_hashes} if plan.start else None
    write_json(
        out / "environment.json",
        {
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "code": _commit(),
            "device": device_name(mine.device),
            "processes": mine.world,
            "cpus": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "data": [
                {"path": str(source.shards.path), "sha256": source.shards.fingerprint}
                for source in plan.mixture.sources
            ],
            "tokenizer": {"path": plan.config.tokenizer, "sha256": plan.tokenizer.fingerprint},
            "start": start,
        },
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """The commit of the code that runs, and whether files differ from it; None for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=30)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed_files": len(changed.stdout.splitlines())}


def plot_runs(runs: dict[str, Path], file: Path) -> None:
    """Draw the losses of runs (label -> folder) against their total FLOPs; the file's suffix is the format: png, svg, pdf.

    Raises HyperLlamaError when a run has no metrics.jsonl, or the suffix is none of matplotlib's.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    if file.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise HyperLlamaError(f"{file} names no format of a plot: a file that ends in .png, .svg or .pdf was expected")
    axes = figure.add_subplot(xlabel="FLOPs, ancestors included", ylabel="training loss (nats per token)")
    for label, folder in runs.items():
        try:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except FileNotFoundError:
            raise HyperLlamaError(f"{folder} has no metrics.jsonl to plot") from None
        taken = [line for line in lines if line["loss"] is not None]
        axes.plot(
            [float(line["total_flops"]) for line in taken], [line["loss"] for line in taken], label=label, linewidth=1
        )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:], dpi=130)
