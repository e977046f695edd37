"""How costs grow with what they are made of, beside the work itself: exponents, fitted.

    python -m bench.scaling [--quick] [--only REGEX] [--json] [--out bench/results]

A series measures one cost at several sizes, all in turns (harness.py), and fits log(seconds) to log(work) by least squares. Work
is the least there is to do, counted: FLOPs, or bytes that have to move. An exponent of 1 is a cost that grows as its work does;
below 1 small sizes pay overhead; above 1 something grows faster than the work, and is looked into. Sizes that are only counted
(whole models up to 8B) have no seconds: their work is told, and what one block of them takes is measured.
"""

import argparse
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperllama.data.build import build_shards
from hyperllama.data.shards import Shards
from hyperllama.files import read_json, write_json
from hyperllama.flops import Convention, window_flops
from hyperllama.kernels import merge
from hyperllama.settings import ModelConfig

from .cpu import llama, release
from .environment import device_slug, environment
from .harness import Case, Thunk, run
from .ops import linear_cross_entropy_case
from .pipeline import Workspace
from .shapes import SHAPES
from .training import our_step

ABOVE = 1.1  # an exponent that says the cost grows faster than its work
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Point:
    """One size: what it is, its work, and what does it."""

    size: int
    work: int
    setup: Callable[[], Thunk]


@dataclass(frozen=True)
class Series:
    """One cost over sizes; `unit` is that of the work."""

    name: str
    size: str
    unit: str
    points: list[Point]


def model_size(names: list[str], seq_len: int) -> Series:
    """A training step of one block at the widths of the models, with next to no vocabulary."""
    points = []
    for name in names:
        settings = SHAPES[name].settings(1) | {
            "vocab_size": 128,
            "tie_embeddings": True,
            "max_position_embeddings": seq_len,
        }
        config = ModelConfig(**settings)
        step = partial(our_step, config, 1, BF16, "csrc")
        points.append(Point(config.num_parameters, window_flops(config, seq_len, "causal"), step))
    return Series("one block", "parameters", "FLOPs", points)


def sequence_length(lengths: list[int]) -> Series:
    """A training step of the demo's model on one window of so many tokens."""
    points = []
    for length in lengths:
        config = llama(128, 352, 6, 4, 2, 32, 2048, length)
        step = partial(our_step, config, 1, BF16, "csrc")
        points.append(Point(length, window_flops(config, length, "causal"), step))
    return Series("sequence length", "tokens", "FLOPs", points)


def vocabulary(sizes: list[int], tokens: int) -> Series:
    """The head and the loss, forward and backward."""
    points = []
    for size in sizes:
        case = linear_cross_entropy_case(tokens, llama(576, 1536, 1, 9, 3, 64, size, tokens), BF16)
        points.append(Point(size, case.flops, case.providers["csrc"]))
    return Series("vocabulary", "tokens in it", "FLOPs", points)


def merged_models(method: str, counts: list[int], elements: int) -> Series:
    """A merge of so many tensors in memory, and their base; TIES reads them twice."""
    base = torch.randn(elements).to(BF16)
    models = [(base + 0.1 * torch.randn(elements)).to(BF16) for _ in range(max(counts))]

    def thunk(count: int) -> Thunk:
        weights = [1 / count] * count
        if method == "linear":
            return lambda: merge.linear(models[:count], weights)
        return lambda: merge.ties(base, models[:count], weights, [0.5] * count)

    passes = {"linear": lambda n: n + 1, "ties": lambda n: 2 * (n + 1) + 1}[method]
    points = [Point(n, passes(n) * base.nbytes, partial(thunk, n)) for n in counts]
    return Series(f"merge {method}", "models", "bytes", points)


def data_size(what: str, sizes: list[int], space: Workspace) -> Series:
    """Tokenizing text of so many bytes to shards, or opening those shards and reading a thousand windows in a mixture's order."""

    def tokenize(text: Path, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        build_shards([text], space.tokenizer(), out, language="eng")

    def read(folder: Path) -> None:
        opened = Shards.open(folder)
        opened.windows(np.arange(opened.num_windows(128)), 128)

    points = []
    for size in sizes:
        text, shards = space.text(size), space.shards(size)

        do = partial(tokenize, text, space.path / f"out-{size}") if what == "tokenize" else partial(read, shards)
        points.append(Point(size, text.stat().st_size, partial(lambda do: do, do)))
    return Series(f"data {what}", "bytes of text", "bytes", points)


def processes(counts: list[int], space: Workspace, steps: int) -> Series:
    """The loop of one run on so many processes, without start-up: the same global batch, so the same work for all together.

    Work is counted for a process; what processes do beyond their share (reductions, waiting) raises the exponent's distance from 1.
    """
    config = llama(128, 352, 6, 4, 2, 32, 1024, 128)
    settings = {
        "name": "processes", "tokenizer": str(space.tokenizer().path), "seed": 7, "precision": "fp32", "device": "cpu",
        "model": {name: getattr(config, name) for name in (
            "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")},
        "data": {"sources": [{"path": str(space.shards(1_000_000))}], "seq_len": 128}, "budget": {"steps": steps},
        "global_batch": 16, "micro_batch": 4, "optimizer": {"lr": 0.01}, "schedule": {"warmup_steps": 2},
    }  # fmt: skip
    recipe, out = space.path / "processes.yaml", space.path / "processes"
    work = steps * 16 * window_flops(config, 128, "causal")

    def thunk(count: int) -> Thunk:
        def call() -> None:
            shutil.rmtree(out, ignore_errors=True)
            recipe.write_text(json.dumps(settings | {"out": str(out)}))  # JSON is YAML
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // max(counts)))}
            done = subprocess.run(
                [*command, "-m", "hyperllama", "train", str(recipe), "--quiet"],
                env=os.environ | threads, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["torchrun failed"])[-1])
            vars(call)["figures"] = {"seconds": read_json(out / "run.json")["seconds"]}

        return call

    return Series("processes", "processes", "FLOPs of each", [Point(n, work // n, partial(thunk, n)) for n in counts])


def fit(work: list[int], seconds: list[float]) -> dict[str, Any]:
    """The exponent of seconds in work, and its standard error by the residuals (None for two points)."""
    x, y = np.log(work), np.log(seconds)
    x = x - x.mean()
    slope = float(x @ (y - y.mean()) / (x @ x))
    rest = y - y.mean() - slope * x
    error = math.sqrt(float(rest @ rest) / (len(x) - 2) / float(x @ x)) if len(x) > 2 else None
    return {"exponent": slope, "standard_error": error}


def measure(series: Series, rounds: int) -> dict[str, Any]:
    """Time a series' points in turns and fit."""
    case = Case(series.name, {}, 0, 0, {str(point.size): point.setup for point in series.points})
    result = run(case, rounds=rounds, warmup=1, min_sample=2e-3 if series.name != "processes" else 0)
    points = []
    for point in series.points:
        found = result["providers"][str(point.size)]
        seconds = found["seconds"]
        if found["figures"] and seconds:  # what the run itself says, without its start
            seconds = {"median": found["figures"]["seconds"], "low": None, "high": None}
        reason = None if seconds else found["reason"]
        points.append({"size": point.size, "work": point.work, "seconds": seconds, "reason": reason})
    ran = [point for point in points if point["seconds"]]
    fitted = fit([p["work"] for p in ran], [p["seconds"]["median"] for p in ran]) if len(ran) > 1 else None
    about = {"name": series.name, "size": series.size, "unit": series.unit}
    return {
        **about,
        "points": points,
        "fit": fitted,
        "faster_than_work": fitted is not None and fitted["exponent"] > ABOVE,
    }


def counted(seq_len: int) -> list[dict[str, Any]]:
    """Whole models by counting: parameters and FLOPs of a window."""
    rows = []
    conventions: tuple[Convention, ...] = ("dense", "causal")
    for name, shape in SHAPES.items():
        config = ModelConfig(**shape.settings(shape.num_layers), max_position_embeddings=seq_len)
        flops = {convention: window_flops(config, seq_len, convention) for convention in conventions}
        rows.append({"model": name, "parameters": config.num_parameters, "seq_len": seq_len, "flops_per_window": flops})
    return rows


def all_series(quick: bool, space: Workspace) -> dict[str, Callable[[], Series]]:
    """Series by name, made when their turn comes."""
    lengths = [64, 128, 256, 512] if quick else [128, 256, 512, 1024, 2048, 4096]
    texts = [50_000, 100_000, 200_000] if quick else [1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000]
    return {
        "one block": lambda: model_size(["180M", "572M"] if quick else list(SHAPES), 64 if quick else 256),
        "sequence length": lambda: sequence_length(lengths),
        "vocabulary": lambda: vocabulary([2048, 8192] if quick else [2048, 8192, 32768, 131072], 64 if quick else 512),
        "merge linear": lambda: merged_models("linear", [2, 4, 8] if quick else [2, 4, 8, 16], 1 << (20 if quick else 25)),
        "merge ties": lambda: merged_models("ties", [2, 4, 8] if quick else [2, 4, 8, 16], 1 << (18 if quick else 25)),
        "data tokenize": lambda: data_size("tokenize", texts, space),
        "data read": lambda: data_size("read", texts, space),
        "processes": lambda: processes([1, 2], space, 8 if quick else 60),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The series for a person."""
    lines = []
    for row in rows:
        found = row["fit"]
        spread = f" +- {found['standard_error']:.2f}" if found and found["standard_error"] is not None else ""
        verdict = f"{found['exponent']:.2f}{spread}" if found else "-"
        lines.append(
            f"{row['name']}: seconds ~ {row['unit']}^{verdict}{'  FASTER THAN ITS WORK' * row['faster_than_work']}"
        )
        for point in row["points"]:
            took = f"{point['seconds']['median']:.4g} s" if point["seconds"] else point["reason"]
            lines.append(f"  {row['size']} {point['size']:>12,}  {row['unit']} {point['work']:>18,}  {took}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, fit, print, write."""
    parser = argparse.ArgumentParser(description="Fit how costs grow with their work.")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer sizes")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="series whose name this regex finds")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--out", type=Path, help="write <out>/<device>/scaling.json, after every series")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hyperllama-bench-") as folder:
        rows: list[dict[str, Any]] = []
        series = all_series(given.quick, Workspace(Path(folder)))
        if not any(map(given.only.search, series)):
            parser.error(f"--only {given.only.pattern} finds none of {', '.join(series)}")
        for name, make in series.items():
            if not given.only.search(name):
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows.append(measure(make(), 3 if given.quick or name == "processes" else 7))
            release()
            about = {"date": datetime.date.today().isoformat(), "environment": environment()}
            document = {**about, "command": ["scaling.py", *sys.argv[1:]], "series": rows, "counted": counted(2048)}
            if given.out:
                write_json(given.out / device_slug(environment()["device"]) / "scaling.json", document)
    print(json.dumps(document, indent=1) if given.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
