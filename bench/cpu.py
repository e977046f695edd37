"""What HyperLlama claims on a CPU, measured and judged: ops against their roofs, training against transformers.

    python -m bench.cpu [--quick] [--only REGEX] [--out bench/results] [--malloc users|kept|default]

Every case prints a line when it starts and when it ends; with --out, the results so far are in <out>/<device>/cpu.json after
every case. The exit code is 1 when a target was measured and missed. --quick (below five minutes on two cores) measures fewer
rounds and says what it leaves out; everything takes about 20 minutes, most of it steps of the 180M model.
"""

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from hyperllama.memory import give_back_freed_blocks, keep_freed_blocks
from hyperllama.settings import ModelConfig

from .environment import device_slug, environment
from .harness import Case, Result, copy_bandwidth, judgement, matmul_rate, missed, run, table, write_results
from .ops import MEMORY_BOUND, TRAFFIC, attention_case, dtype_name, linear_cross_entropy_case
from .training import MATMUL, PEERS, Malloc, step_case

FP32, BF16 = torch.float32, torch.bfloat16
Floors = tuple[float | None, float | None, float | None]


def llama(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, seq_len: int
) -> Any:
    """The shape of a tied Llama for windows of `seq_len` tokens."""
    return ModelConfig(
        hidden_size=hidden, intermediate_size=ffn, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, vocab_size=vocab, max_position_embeddings=seq_len,
    )  # fmt: skip


TINY = llama(64, 176, 4, 2, 1, 32, 512, 128)
DEMO = llama(128, 352, 6, 4, 2, 32, 2048, 256)
M15 = llama(384, 1024, 8, 12, 4, 32, 8192, 512)
M180 = llama(576, 1536, 30, 9, 3, 64, 128256, 1024)
M180_LONG = M180.model_copy(update={"max_position_embeddings": 2048})


@dataclass(frozen=True)
class Job:
    """A case to be made when its turn comes, its rounds, and those of a quick run (0: left out)."""

    name: str
    make: Callable[[], Case]
    rounds: int
    quick: int
    warmup: int = 1
    min_sample: float = 2e-3  # seconds
    without: tuple[str, ...] = ()  # providers that are left out


def op_jobs() -> list[Job]:
    """The ops alone."""
    jobs = [
        Job(
            f"{name} {dtype_name(dtype)}", partial(make, M180, dtype, TRAFFIC), 5 if "ties" in name else 21, 5, 3
        )  # the heap settles
        for name, (make, dtypes) in MEMORY_BOUND.items()
        for dtype in dtypes
    ]
    for shape, quick in (((16, 256, 4, 2, 32), 5), ((1, 1024, 9, 3, 64), 5), ((1, 2048, 9, 3, 64), 3)):
        for dtype in (FP32, BF16):
            for documents in (False, True):
                for backward in (False, True):
                    name = (
                        f"attention {'forward+backward' if backward else 'forward'} {'x'.join(map(str, shape))} "
                        f"{'documents ' if documents else ''}{dtype_name(dtype)}"
                    )
                    make = partial(attention_case, *shape, dtype, documents=documents, backward=backward)
                    jobs.append(Job(name, make, 15, quick))
    for tokens, rounds, quick in ((1024, 0, 3), (2048, 7, 0)):
        name = f"linear_cross_entropy {tokens} {dtype_name(BF16)}"
        jobs.append(Job(name, partial(linear_cross_entropy_case, tokens, M180, BF16), rounds, quick, 0))
    return jobs


# model, its shape, windows, dtype; what csrc has to reach of (transformers, transformers compiled, matmul), None: only told;
# rounds, rounds when quick, warm-up rounds, least seconds of a sample
STEPS: tuple[tuple[str, ModelConfig, int, torch.dtype, Floors, int, int, int, float], ...] = (
    ("tiny", TINY, 16, BF16, (2.6, 1.8, None), 31, 9, 2, 0.2),
    ("demo", DEMO, 16, BF16, (2.4, 1.9, 0.60), 15, 5, 1, 0.5),
    ("demo", DEMO, 16, FP32, (1.6, 1.4, 0.70), 15, 5, 1, 0.5),
    ("15M", M15, 4, BF16, (None, None, None), 11, 3, 1, 0.1),
    ("180M", M180, 1, BF16, (1.4, 1.15, 0.78), 7, 3, 0, 0.3),
    ("180M", M180_LONG, 1, BF16, (1.4, 1.15, 0.78), 5, 0, 0, 0.3),
)


def step_jobs(quick: bool, malloc: Malloc = "users") -> list[Job]:
    """Whole training steps. A quick run compiles only small models: a cold torch.compile takes longer than big ones' steps."""
    jobs: list[Job] = []
    for model, shape, windows, dtype, floors, rounds, few, warmup, sample in STEPS:
        peers = ("transformers", "csrc") if quick and model in ("15M", "180M") else PEERS
        targets = dict(zip(("transformers", "transformers compiled", "matmul"), floors, strict=True))
        make = partial(step_case, model, shape, windows, dtype, targets, peers, malloc)
        name = f"step {model} {shape.max_position_embeddings} {dtype_name(dtype)}"
        without = tuple(peer for peer in PEERS if peer not in peers)
        jobs.append(Job(name, make, rounds, few, warmup, sample, without))
    return jobs


def release() -> None:
    """Give the memory of a finished case back: cycles, and the blocks glibc kept."""
    gc.collect()
    give_back_freed_blocks()


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def measure(jobs: list[Job], quick: bool, save: Callable[[list[Result]], None]) -> list[Result]:
    """Run the jobs one after another; `save` gets all results so far after every one."""
    results: list[Result] = []
    for i, job in enumerate(jobs, 1):
        say(f"[{i}/{len(jobs)}] {job.name} ...")
        began = time.perf_counter()
        rounds = job.quick if quick else job.rounds
        results.append(run(job.make(), rounds=rounds, warmup=job.warmup, min_sample=job.min_sample))
        release()
        say(f"[{i}/{len(jobs)}] {job.name}: {time.perf_counter() - began:.1f} s; {verdict(results[-1])}")
        save(results)
    return results


def verdict(result: Result) -> str:
    """The targets of a case in a few words."""
    words = [
        f"{target['measured']['median']:.2f} x {target['against']}"
        + {True: "", False: " MISSED", None: ""}[target["met"]]
        for target in result["targets"]
        if target["measured"]
    ]
    reasons = [f"{name}: {found['reason']}" for name, found in result["providers"].items() if found["reason"]]
    return "; ".join([*words, *reasons]) or "nothing to judge"


def main() -> int:
    """Measure, print, write; 1 when a target was measured and missed."""
    parser = argparse.ArgumentParser(description="Time the CPU ops and whole training steps, and judge the targets.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and only what fits into five minutes")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="cases whose name this regex finds")
    parser.add_argument("--out", type=Path, help="write <out>/<device>/<name>.json, after every case")
    parser.add_argument("--name", default="cpu", help="of that file (%(default)s)")
    parser.add_argument(
        "--malloc", choices=get_args(Malloc), default="users",
        help="which steps keep freed blocks: ours, as with users (default), all, none; ops: all, but for `default`",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.malloc != "default" and not keep_freed_blocks():
        say("no glibc here: freed blocks are not kept, and ops that allocate pay for page faults")
    named = [
        job for job in (*step_jobs(arguments.quick, arguments.malloc), *op_jobs()) if arguments.only.search(job.name)
    ]
    jobs = [job for job in named if (job.quick if arguments.quick else job.rounds)]
    roofs: dict[str, Any] = {"copy": copy_bandwidth()}
    roofs |= {f"matmul {dtype_name(dtype)}": matmul_rate(dtype=dtype, size=MATMUL) for dtype in (FP32, BF16)}
    path = arguments.out and arguments.out / device_slug(environment("cpu")["device"]) / f"{arguments.name}.json"
    results = measure(jobs, arguments.quick, lambda done: write_results(path, done, roofs) if path else None)
    print(table(results), judgement(results), sep="\n\n")
    if arguments.quick:
        left = [job.name for job in named if not job.quick]
        left += [f"{peer} in {job.name}" for job in jobs for peer in job.without]
        print(f"\nleft out by --quick: {', '.join(left) or 'nothing'}")
    if path:
        print(path)
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
