"""Merging and growing folders as a user does it: whole processes from the shell, against the public tools and the machine's floor.

    python -m bench.merge [--quick] [--peers PYTHON] [--only REGEX] [--out bench/results]

Synthetic models are made once in a temporary folder: plain Llamas, tied, bf16, normal(0, 0.03) and per model normal(0, 0.003)
on top; five models of 572M parameters and their base, or of 180M with --quick. Settings are those of Glocker et al. 2025's merges.
Inputs are in the page cache; outputs are removed before every call, untimed. Our code is compiled to byte code first, as pip does
with what it installs. `--peers` names a Python that has mergekit and transformers; without it only floor, memory and start-up are
judged. The floor copies every input byte through a buffer of 4 MiB by two threads and writes the output. The exit code is 1 when a
target was measured and missed.
"""

import argparse
import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hyperllama
from hyperllama.hub import hf_config, open_folder, streamed_folder
from hyperllama.merge import plan, read_recipe, run
from hyperllama.names import EMBEDDING, logical_tensors
from hyperllama.settings import ModelConfig
from hyperllama.weights import NewTensor, narrowed, widened

from .environment import device_slug, environment
from .harness import Case, CpuClock, Result, Roof, Target, judgement, limit, missed, table, write_results
from .harness import run as measure

MODELS = 5
BUFFER = 4 << 20  # bytes
PEER_CLONE = Path(__file__).parent / "clone_peer.py"


def shape(hidden: int, ffn: int, heads: int, kv_heads: int) -> ModelConfig:
    """The paper's family: 30 layers, 128256 tokens, tied."""
    return ModelConfig(
        hidden_size=hidden, intermediate_size=ffn, num_layers=30, num_heads=heads, num_kv_heads=kv_heads, head_dim=64,
        vocab_size=128256, max_position_embeddings=2048,
    )  # fmt: skip


SHAPES = {"180M": shape(576, 1536, 9, 3), "572M": shape(1152, 3072, 18, 6)}


@dataclass(frozen=True)
class Method:
    """A merge of the paper: with a base or not, per-model parameters, and its targets (None: told only)."""

    base: bool
    parameters: dict[str, float]
    against_tool: float
    floors: float


METHODS = {
    "linear": Method(False, {"weight": 1}, 15, 1.5),
    "task_arithmetic": Method(True, {"weight": 1, "density": 0.5}, 15, 1.5),
    "multislerp": Method(False, {"weight": 1}, 20, 4),
    "dare_ties": Method(True, {"weight": 1, "density": 0.5}, 40, 4),
    "ties": Method(True, {"weight": 1, "density": 0.5}, 60, 4),
}
MERGE_GB, GROW_GB, START_SECONDS = 0.5, 0.4, 0.5


@dataclass
class Process:
    """A command to run to its end; `figures` are of the last run: CPU seconds, and the peak of its anonymous memory in bytes."""

    command: list[str]
    cwd: Path
    out: Path | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def __call__(self) -> Path | None:
        began = time.perf_counter()
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(self.command, cwd=self.cwd, stdout=subprocess.DEVNULL, stderr=said)
            peak = 0
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                peak = max(peak, _anonymous(process.pid))
                time.sleep(0.002 if time.perf_counter() - began < 5 else 0.05)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                last = said.read().decode(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"exit code {process.returncode}: {''.join(last)}")
        self.figures = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_anonymous_bytes": peak}
        return self.out


def _anonymous(pid: int) -> int:
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def make_models(folder: Path, config: ModelConfig) -> list[Path]:
    """The base, then MODELS models close to it; folders that are there stay."""
    paths = [folder / name for name in ("base", *(f"model{i}" for i in range(MODELS)))]
    tensors = [NewTensor(tensor.name, "bfloat16", tensor.shape) for tensor in logical_tensors(config)]
    for i, path in enumerate(paths):
        if path.is_dir():
            continue
        say(f"making {path.name}")
        base = open_folder(paths[0]) if i else None
        with streamed_folder(path, tensors, "bench") as writer:
            for seed, tensor in enumerate(tensors):
                random = np.random.Generator(np.random.SFC64([i, seed]))
                values = random.standard_normal(int(np.prod(tensor.shape)), np.float32) * np.float32(
                    0.003 if i else 0.03
                )
                if base:
                    values += widened(base.bytes(tensor.name), "bfloat16")
                writer.finish(tensor.name, writer.write(tensor.name, narrowed(values, "bfloat16")))
            writer.complete(hf_config(config, "bfloat16"), {"kind": "bench"}, None)
        (path / "hyperllama.json").unlink()  # models from elsewhere
    return paths


def floor(inputs: list[Path], out: Path, out_bytes: int) -> Callable[[], None]:
    """Two threads copy every byte of the inputs through a buffer and write `out_bytes` in pieces of it."""

    def part(thread: int) -> None:
        buffer = np.ones(BUFFER, np.uint8)
        for file in inputs:
            data = np.memmap(file, np.uint8, "r")
            for at in range(len(data) * thread // 2, len(data) * (thread + 1) // 2, BUFFER):
                piece = data[at : min(at + BUFFER, len(data) * (thread + 1) // 2)]
                np.copyto(buffer[: len(piece)], piece)
        for at in range(out_bytes * thread // 2, out_bytes * (thread + 1) // 2, BUFFER):
            os.pwrite(descriptors[0], buffer[: min(BUFFER, out_bytes * (thread + 1) // 2 - at)].data, at)

    descriptors = [0]

    def thunk() -> None:
        descriptors[0] = os.open(out, os.O_RDWR | os.O_CREAT, 0o644)
        os.posix_fallocate(descriptors[0], 0, out_bytes)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(part, range(2)))
        os.close(descriptors[0])

    return thunk


def _differs(method: str) -> Callable[[Any, Any], str | None]:
    """Why a folder isn't the same merge: names, shapes, dtypes; and values, where nothing is drawn."""

    def check(output: Path | None, expected: Path | None) -> str | None:
        if output is None or expected is None:
            return None
        ours, theirs = open_folder(output), open_folder(expected)
        for name in ours.names:
            if (
                name not in theirs.names
                or ours.shape(name) != theirs.shape(name)
                or ours.dtype(name) != theirs.dtype(name)
            ):
                return f"tensor {name} is another one"
        if method == "dare_ties":
            return None
        name = "model.layers.7.mlp.up_proj.weight"
        a, b = (widened(f.bytes(name), f.dtype(name)).astype(np.float64) for f in (ours, theirs))
        error = float(np.sqrt(np.square(a - b).mean() / np.square(b).mean()))
        # differences of bf16 weights have few values: mergekit's TIES cuts anywhere among a few per cent that are equal
        return None if error < (3e-2 if method == "ties" else 5e-3) else f"relative difference {error:.2g} in {name}"

    return check


@dataclass(frozen=True)
class Merge:
    """One merge of the synthetic models: recipe, inputs, sizes in bytes."""

    method: str
    size: str
    recipe: Path
    inputs: list[Path]

    @property
    def written(self) -> int:
        """Bytes of the result; those of each input too."""
        return self.inputs[0].stat().st_size

    def case(self, name: str, **fields: Any) -> Case:
        """A case of this merge."""
        params: dict[str, int | float | str] = {"method": self.method, "models": MODELS, "size": self.size}
        return Case(name, params, 0, (len(self.inputs) + 1) * self.written, check=_differs(self.method), **fields)


def merge_of(method: str, models: list[Path], folder: Path, size: str) -> Merge:
    """Write the recipe of one of the paper's merges."""
    how = METHODS[method]
    recipe = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": how.parameters} for path in models[1:]],
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16",
        **({"base_model": str(models[0])} if how.base else {}),
    }
    file = folder / f"{method}.yaml"
    file.write_text(json.dumps(recipe))
    return Merge(method, size, file, [path / "model.safetensors" for path in models[0 if how.base else 1 :]])


def shell_case(merge: Merge, folder: Path, peers: str | None) -> Case:
    """A merge from the shell, by mergekit and by us."""
    arguments = {who: [str(merge.recipe), str(folder / f"out-{who}"), "--quiet"] for who in ("ours", "mergekit")}
    ours = [sys.executable, "-m", "hyperllama", "merge", *arguments["ours"]]
    theirs = [str(peers), "-m", "mergekit.scripts.run_yaml", *arguments["mergekit"]]
    providers: dict[str, Callable[[], Any]] = {}
    if peers:
        providers["mergekit"] = partial(Process, theirs, folder, folder / "out-mergekit")
    providers["ours"] = partial(Process, ours, folder, folder / "out-ours")
    targets = (Target("ours", "mergekit", METHODS[merge.method].against_tool),) if peers else ()
    return merge.case("merge", providers=providers, targets=targets)


def inside_case(merge: Merge, folder: Path) -> Case:
    """The same merge in this process, without start-up, against the floor."""

    def ours() -> Path:
        run(plan(read_recipe(merge.recipe), folder), folder / "out-inside")
        return folder / "out-inside"

    return merge.case(
        "merge without start-up",
        providers={"ours": lambda: ours},
        roofs={"floor": Roof(lambda: floor(merge.inputs, folder / "out-floor", merge.written))},
        targets=(Target("ours", "floor", 1 / METHODS[merge.method].floors),),
    )


def grow_case(source: Path, folder: Path, peers: str | None) -> Case:
    """HyperCloning by two, by the published formulas in plain torch and by us."""
    ours = [sys.executable, "-m", "hyperllama", "grow", str(source), str(folder / "out-ours"), "--quiet"]
    theirs = [str(peers), str(PEER_CLONE), str(source), str(folder / "out-clone"), "2"]
    written = source.joinpath("model.safetensors").stat().st_size
    large = 2 * sum(int(np.prod(t.shape)) for t in logical_tensors(SHAPES["572M"]))
    providers: dict[str, Callable[[], Any]] = (
        {"plain torch": lambda: Process(theirs, folder, folder / "out-clone")} if peers else {}
    )
    providers["ours"] = lambda: Process(ours, folder, folder / "out-ours")

    def check(output: Path, expected: Path) -> str | None:
        small, clone = open_folder(output), open_folder(expected)
        names = [
            name for name in small.names if name != "model.norm.weight"
        ]  # theirs has the factor in a head of its own
        same = all(np.array_equal(small.bytes(name), clone.bytes(name)) for name in (EMBEDDING, names[5], names[-1]))
        return None if same else "weights differ"

    targets = (Target("ours", "plain torch", 20),) if peers else ()
    roofs = {"floor": Roof(lambda: floor([source / "model.safetensors"], folder / "out-floor", large))}
    return Case(
        "grow", {"method": "hyperclone", "size": "180M to 572M"}, 0, written + large, providers, check, roofs, targets
    )


def start_case(folder: Path, models: list[Path]) -> Case:
    """What commands take before they read a weight."""
    file = merge_of("linear", models, folder, "").recipe
    program = [sys.executable, "-m", "hyperllama"]
    commands = {
        "--help": ["--help"],
        "merge --dry-run": ["merge", str(file), str(folder / "out-dry"), "--dry-run"],
        "grow --dry-run": ["grow", str(models[0]), str(folder / "out-dry"), "--dry-run"],
    }
    providers: dict[str, Callable[[], Any]] = {
        name: partial(Process, [*program, *rest], folder) for name, rest in commands.items()
    }
    return Case("start", {}, 0, 0, providers, lambda output, expected: None)


def judge_process(result: Result, seconds: float | None) -> None:
    """Add the targets of our processes to a result: peak anonymous memory, and seconds where there is a limit."""
    gigabytes = GROW_GB if result["case"] == "grow" else MERGE_GB
    for name, found in result["providers"].items():
        if name == "ours" and found["figures"]:
            peak = found["figures"]["peak_anonymous_bytes"] / 1e9
            result["targets"].append(limit(name, f"{gigabytes} GB anonymous memory", gigabytes, [peak]))
        if seconds and found["samples"]:
            result["targets"].append(limit(name, f"{seconds} s", seconds, found["samples"]))


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, write; 1 when a target was measured and missed."""
    parser = argparse.ArgumentParser(description="Time merges and growth of folders, and judge the targets.")
    parser.add_argument(
        "--quick", action="store_true", help="models of 180M and fewer rounds; ratios to the tools are told"
    )
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has mergekit and transformers")
    parser.add_argument(
        "--only", type=re.compile, default=re.compile(""), help="methods (or grow, start) that this regex finds"
    )
    parser.add_argument("--work", type=Path, help="folder for the models, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write <out>/<device>/<name>.json, after every case")
    parser.add_argument("--name", default="merge", help="of that file (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    package = Path(hyperllama.__file__).parent
    for part in (package, package / "kernels"):  # in a checkout a link, which compile_dir does not follow
        compileall.compile_dir(part, quiet=1)
    size = "180M" if arguments.quick else "572M"
    path = arguments.out and arguments.out / device_slug(environment("cpu")["device"]) / f"{arguments.name}.json"
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work.absolute() if arguments.work else Path(temporary)
        (folder / size).mkdir(parents=True, exist_ok=True)
        models = make_models(folder / size, SHAPES[size])
        if arguments.only.search("grow") and size != "180M":
            (folder / "180M").mkdir(exist_ok=True)
            small = make_models(folder / "180M", SHAPES["180M"])
        else:
            small = models
        few, many = (1, 5) if arguments.quick else (2, 9)
        cases: dict[str, tuple[Callable[[], Case], int]] = {}
        for method in METHODS:
            merge = merge_of(method, models, folder, size)
            cases[f"{method} from the shell"] = partial(shell_case, merge, folder, arguments.peers), few
            cases[f"{method} without start-up"] = partial(inside_case, merge, folder), many
        cases["grow"] = partial(grow_case, small[0], folder, arguments.peers), few
        cases["start"] = partial(start_case, folder, models), 9

        def clear() -> None:
            for out in folder.glob("out-*"):
                out.unlink() if out.is_file() else shutil.rmtree(out)

        for name, (make, rounds) in cases.items():
            if not arguments.only.search(name):
                continue
            say(f"{name} ...")
            for file in (folder / size).rglob("*.safetensors"):
                np.memmap(file, np.uint8, "r")[::4096].sum()  # into the page cache
            clear()
            result = measure(make(), rounds=rounds, warmup=0, min_sample=0, clock=CpuClock(clear))
            judge_process(result, START_SECONDS if name == "start" else None)
            results.append(result)
            if path:
                write_results(path, results)
        clear()
    print(table(results), judgement(results), sep="\n\n")
    for result in results:
        for name, found in result["providers"].items():
            if found["figures"]:
                peak, cpu = found["figures"]["peak_anonymous_bytes"] / 1e9, found["figures"]["cpu_seconds"]
                print(
                    f"{result['case']} {result['params'].get('method', '')} {name}: CPU {cpu:.2f} s, anonymous {peak:.3f} GB"
                )
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
