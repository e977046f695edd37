"""Every op on a GPU: right first, then how fast, cell by cell, within the minutes that there are.

    python -m bench.gpu --minutes 9 [--out bench/results/gpu.json]     run again: it goes on where it stopped

First every op's error against fp64 (at most twice plain torch's in the same dtype: bf16, fp16, fp32) and equal bits of two runs
that race each other for the GPU; then times at the paper's shapes and the binding sizes, then the rest. A time is taken three ways:
CUDA graph with cold caches, CUDA graph with warm ones, eager. Copies (torch's, and a Triton kernel's) and the big matrix product
take turns with the op, so that a share of a roof is of the same moment. Targets are judged where they bind: cold, graphed, at 65536
tokens. Exit 1: one that was measured is missed.

Cold: calls go round clones of the inputs that are FLUSH_BYTES together, outputs kept, so that a call finds in the L2 neither what
it reads nor what it writes. Sweeping the cache instead, as the CPU's clock does, would leave an L2 full of a sweep's dirty lines,
whose write-back the op would pay for, and put two events around every 5 us. The copies go round as the op does. Warm: one set.

Not yet run on a GPU. Needs torch, Triton, numpy and this project's kernels and harness, nothing else; peers run when installed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json, write_json
from hyperllama.kernels.backend import constexpr, jit, tl, use

from .environment import environment
from .gpu_ops import BF16, PROBLEMS, Inputs, Problem, timed
from .harness import FLUSH_BYTES, Case, CudaClock, Roof, Target, Thunk, judgement, matmul_roof, missed, run, table
from .shapes import SHAPES

SCHEMA = 1
LARGEST_COPY = 4 << 30  # bytes read and written; a head of 65536 tokens moves 34 GB: no GPU holds three such copies
BINDING = 65536  # tokens: the smallest at which the 180M shape moves 250 MB
MODES: dict[str, Any] = {"cold": {"cold": True, "graph": True}, "warm": {"graph": True}, "eager": {"cold": True}}
HEAD_LEAST = {"180M": 1 / 1.15, "572M": 1 / 1.10}  # against its three products and a copy of its logits
# ours against every other backend, so against the best; both together are what `auto` chooses by and is judged on
ATTENTION_LEAST = {"attention": 0.80, "attention backward": 0.75, "attention with backward": None}


@dataclass(frozen=True)
class Cell:
    """One thing to find out; `mode` is "correct" or one of MODES."""

    op: str
    shape: str
    tokens: int
    mode: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.op} {self.shape} {self.tokens} {self.mode}"


def cells() -> list[Cell]:
    """All cells in order of priority."""
    order = [Cell(op, "180M", 2048, "correct") for op in PROBLEMS]
    for shapes, tokens, modes in (
        (("180M", "572M"), (BINDING,), ("cold",)),
        (("180M", "572M"), (16384, 2048), ("cold",)),
        (("180M", "572M"), (BINDING, 16384, 2048), ("warm", "eager")),
        (("1.7B", "8B"), (16384, 2048, BINDING), ("cold", "warm", "eager")),
    ):
        order += [Cell(op, shape, n, mode) for n in tokens for mode in modes for shape in shapes for op in PROBLEMS]
    return order


@jit
def _copy_kernel(source_ptr, target_ptr, n, BLOCK: constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < n), mask=at < n)


def sets(held: int, mode: str) -> int:
    """Clones of `held` bytes of inputs that a mode goes round."""
    return 1 if mode == "warm" else max(1, -(-FLUSH_BYTES // max(1, held)))


def copy_roofs(traffic: int, mode: str) -> dict[str, Roof]:
    """torch's copy and a Triton kernel's, of `traffic` bytes read and written, or a part that is more than any cache.

    They go round as the op does.
    """
    part = min(traffic, LARGEST_COPY)
    count, scale = sets(part // 2, mode), traffic / part

    def setup(copy: Callable[[Tensor, Tensor], Any]) -> Callable[[], Thunk]:
        def prepare() -> Thunk:
            sources = [torch.ones(part // 8, dtype=torch.int32, device="cuda") for _ in range(count)]
            pairs = [(source, torch.zeros_like(source)) for source in sources]

            def thunk() -> None:
                for pair in pairs:
                    copy(*pair)

            return thunk

        return prepare

    def own(source: Tensor, target: Tensor) -> None:
        n = source.numel()
        _copy_kernel[(-(-n // 4096),)](source, target, n, BLOCK=4096, num_warps=8)

    torchs = setup(lambda source, target: target.copy_(source))
    return {"copy": Roof(torchs, scale / count), "copy_triton": Roof(setup(own), scale / count)}


def products_roof(inputs: Inputs, traffic: int) -> Roof:
    """The head's three bare products, at the chunk that ours uses, and a copy of its logits' traffic."""
    from hyperllama.kernels.linear_cross_entropy import chunks

    x, weight = inputs[:2]

    def setup() -> Thunk:
        times = -(-traffic // LARGEST_COPY)
        copy = copy_roofs(traffic // times, "warm")["copy"].setup()  # of gigabytes: cold however it is done
        parts = chunks(x, weight, None)
        logits = torch.empty(max(rows for _, rows in parts), weight.shape[0], dtype=x.dtype, device=x.device)
        dx, dw = torch.empty_like(x), torch.empty_like(weight)

        def thunk() -> None:
            for part in parts:
                rows, z = x.narrow(0, *part), logits[: part[1]]
                torch.mm(rows, weight.t(), out=z)
                torch.mm(z, weight, out=dx.narrow(0, *part))
                torch.mm(z.t(), rows, out=dw)
            for _ in range(times):
                copy()

        return thunk

    return Roof(setup)


def targets(cell: Cell, problem: Problem) -> tuple[Target, ...]:
    """What is asked of a cell; told but not judged where it does not bind."""
    binds = cell.mode == "cold" and cell.tokens == BINDING and cell.shape in ("180M", "572M")
    least: dict[str, float | None] = {"copy": problem.share, "copy_triton": problem.share} if not problem.flops else {}
    if cell.op.startswith("linear_cross_entropy"):
        least = {"products": HEAD_LEAST.get(cell.shape) if cell.op == "linear_cross_entropy with backward" else None}
    if cell.op in ATTENTION_LEAST:
        least = {name: ATTENTION_LEAST[cell.op] for name in problem.peers if name != "auto"}
    chosen = [Target("triton", against, ratio if binds else None) for against, ratio in least.items()]
    if cell.op in ATTENTION_LEAST:
        judged = binds and cell.op == "attention with backward"
        chosen += [Target("auto", name, 0.98 if judged else None) for name in problem.peers if name != "auto"]
    else:  # not slower than anybody, at every size
        others = (*problem.peers, *(["compiled"] if problem.plain else []))
        judged = cell.mode != "eager" and "epilogue" not in cell.op  # which nobody gets who does not ask for it
        chosen += [Target("triton", name, 1.0 if judged else None) for name in others]
    return tuple(chosen)


def case_of(cell: Cell, device: str = "cuda") -> Case:
    """The case that the harness times."""
    problem = PROBLEMS[cell.op](SHAPES[cell.shape], cell.tokens)
    inputs = problem.inputs(device)
    count = sets(sum(x.nbytes for x in inputs), cell.mode)

    def provider(call: Callable[..., Any], backend: str | None) -> Callable[[], Thunk]:
        def setup() -> Thunk:
            copies = [clones(inputs) if problem.in_place or i else list(inputs) for i in range(count)]
            with use(backend):
                calls = [timed(call, own) for own in copies]

            def thunk() -> Any:
                with use(backend):
                    outputs = [once() for once in calls]  # all are kept until the last: no two write to one memory
                return outputs[0]

            def restore() -> None:
                for own in copies:
                    for x, original in zip(own, inputs, strict=True):
                        x.copy_(original)

            if problem.restore:
                vars(thunk)["before"] = restore
            return thunk

        return setup

    providers = {
        "reference": provider(problem.reference or problem.call, "reference"),
        "triton": provider(problem.call, "triton"),
    }
    if problem.plain is not None:
        providers["compiled"] = provider(torch.compile(problem.plain, dynamic=False), None)
    providers |= {name: provider(call, None) for name, call in problem.peers.items()}
    roofs = copy_roofs(problem.bytes, cell.mode)
    if problem.flops:
        roofs["matmul"] = matmul_roof(problem.flops, BF16, 8192, device)
    if cell.op.startswith("linear_cross_entropy"):
        roofs["products"] = products_roof(inputs, problem.bytes)
    params: dict[str, int | float | str] = {"shape": cell.shape, "tokens": cell.tokens, "mode": cell.mode}
    return Case(cell.op, params, problem.flops, problem.bytes, providers, close, roofs, targets(cell, problem), count)


def clones(inputs: Inputs, dtype: torch.dtype | None = None, only: torch.dtype | None = None) -> list[Tensor]:
    """Copies, floating-point ones (those of dtype `only`) in another dtype."""
    wanted = [x.is_floating_point() and only in (None, x.dtype) for x in inputs]
    return [x.to(dtype if other else None, copy=True) for x, other in zip(inputs, wanted, strict=True)]


def flat(outputs: Any) -> list[Tensor]:
    """Floating-point outputs that hold something."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def close(output: Any, expected: Any) -> str | None:
    """Why an output is not what plain torch gives, up to bf16; peers may return a part of the outputs."""
    for got, want in zip(flat(output), flat(expected), strict=False):
        if got.shape != want.shape:
            continue
        error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
        if not error <= 2e-2:
            return f"relative error {error:.2g}, at most 0.02 was expected"
    return None


def correct(cell: Cell, device: str = "cuda") -> dict[str, Any]:
    """Errors against fp64, ours and plain torch's, for each dtype and output; and whether two runs have the same bits."""
    problem = PROBLEMS[cell.op](SHAPES[cell.shape], cell.tokens)
    originals, rows, same = problem.inputs(device), [], True
    for dtype in problem.dtypes:
        inputs = clones(originals, dtype, only=BF16)
        truth = outputs_of(problem, clones(inputs, torch.float64), "reference")
        plain = outputs_of(problem, clones(inputs), "reference")
        ours, again = raced(partial(_by_triton, problem, inputs), device)
        same = same and all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        for true, expected, got in zip(truth, plain, ours, strict=True):
            worst, allowed = ((x.double() - true).abs().max().item() for x in (got, expected))
            bound = max(2 * allowed, torch.finfo(got.dtype).eps * true.abs().max().item())
            row = {"error": worst, "plain": allowed, "allowed": bound, "right": worst <= bound}
            rows.append({"dtype": str(dtype).removeprefix("torch."), **row})
    right = all(row["right"] for row in rows) and (same or not problem.deterministic)
    return {"outputs": rows, "same_bits": same, "right": right}


def _by_triton(problem: Problem, inputs: Inputs) -> list[Tensor]:
    return outputs_of(problem, clones(inputs), "triton")


def outputs_of(problem: Problem, inputs: Inputs, backend: str) -> list[Tensor]:
    """What ours, or plain torch, makes of inputs that it may write to."""
    with use(backend):
        return flat((problem.reference or problem.call)(*inputs) if backend == "reference" else problem.call(*inputs))


def raced(call: Callable[[], list[Tensor]], device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Two runs, on a GPU at one time on two streams: their programs fall on its multiprocessors in another order."""
    if torch.device(device).type != "cuda":
        return call(), call()
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        again = call()
    ours = call()
    torch.cuda.synchronize()
    return ours, again


def memory(cell: Cell) -> dict[str, int]:
    """Bytes that one call of ours takes beyond its inputs at its peak, and what of it are outputs."""
    problem = PROBLEMS[cell.op](SHAPES[cell.shape], cell.tokens)
    call = timed(problem.call, problem.inputs("cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    kept = torch.cuda.memory_allocated() - before
    del outputs
    return {"peak": peak, "outputs": kept, "workspace": peak - before - kept}


def measure(cell: Cell) -> dict[str, Any]:
    """What a cell finds out on this GPU."""
    if cell.mode == "correct":
        return {"correct": correct(cell)}
    try:
        result = run(case_of(cell), device="cuda", rounds=11, clock=CudaClock(), **MODES[cell.mode])
        return {"speed": result, "memory": memory(cell), "clocks": environment("cuda")["clocks"]}
    finally:
        torch.cuda.empty_cache()


def work(
    path: Path, about: Mapping[str, Any], minutes: float, find_out: Callable[[Cell], dict[str, Any]],
    order: Sequence[Cell] | None = None, now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:  # fmt: skip
    """Work through the cells that `path` does not have yet, writing it after each; returns the document.

    A cell that raises is kept with its reason. `about` is what figures depend on: another one is refused.
    """
    document: dict[str, Any] = {"schema": SCHEMA, "environment": dict(about), "cells": {}}
    if path.exists():
        document = read_json(path)
        known = document.get("environment", {})
        if document.get("schema") != SCHEMA or any(known.get(name) != about[name] for name in about):
            raise HyperLlamaError(f"{path} is from another GPU, commit or version: name another file with --out")
    began = now()
    for cell in cells() if order is None else order:
        if cell.key in document["cells"]:
            continue
        if now() - began >= 60 * minutes:
            break
        try:
            found = find_out(cell)
        except Exception as error:  # one op that fails on this GPU must not hide the others
            found = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        document["cells"][cell.key] = found
        write_json(path, document)
    return document


def unfinished(document: Mapping[str, Any], order: Sequence[Cell] | None = None) -> list[str]:
    """Cells that are still to be done."""
    return [cell.key for cell in (cells() if order is None else order) if cell.key not in document["cells"]]


def missing(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Packages of peers that are not installed."""
    reasons = [found["reason"] or "" for result in results for found in result["providers"].values()]
    return sorted({reason.split("'")[1] for reason in reasons if reason.startswith("ModuleNotFoundError: No module")})


def faults(document: Mapping[str, Any]) -> list[str]:
    """Wrong results, failed cells and missed targets."""
    wrong = []
    for key, found in document["cells"].items():
        if "reason" in found:
            wrong.append(f"{key}: {found['reason']}")
        elif "correct" in found and not found["correct"]["right"]:
            wrong.append(f"{key}: {found['correct']}")
        elif "speed" in found and missed([found["speed"]]):
            wrong.append(f"{key}: a target is missed")
    return wrong


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Every op on this GPU: correctness, then speed, by priority.")
    parser.add_argument("--minutes", type=float, default=9, help="stop starting cells after so long (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"), help="%(default)s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise HyperLlamaError("bench.gpu needs a GPU, and torch sees none")
    about = {name: environment("cuda")[name] for name in ("device", "torch", "triton", "git")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = work(arguments.out, about, arguments.minutes, measure)
    results = [found["speed"] for found in document["cells"].values() if "speed" in found]
    print(table(results))
    print(judgement(results))
    left, wrong = unfinished(document), faults(document)
    print(f"peers not installed: {', '.join(missing(results)) or 'none'}")
    print(f"{len(document['cells'])} cells done, {len(left)} unfinished{': ' + ', '.join(left) if left else ''}")
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    try:
        main()
    except HyperLlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
