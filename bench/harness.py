"""The one timer and the one results file of every benchmark here.

Providers of a case are timed in turns, in an order that rotates every round, so that drift (clocks, heat, neighbours)
meets all alike. A provider's time is the median over rounds; its ratio is the median of the rounds' own ratios,
reference time / provider time, so above 1 is faster than the reference. Intervals are binomial (order-statistic) 95 %
intervals of those medians: nothing is assumed about the distribution. Only a provider whose output passed the case's
check has a ratio.

Roofs (a copy, the bare matrix products) take turns with the providers, so that a share of a roof is a paired ratio like any
other. Targets say how fast a provider has to be against another provider or a roof; they are judged on those medians.

    python -m bench.harness [--quick] [--device cuda] [--cold] [--graph] [--out bench/results]
"""

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from hyperllama.files import write_json

from .environment import device_slug, environment, without_paths

SCHEMA = 2
FLUSH_BYTES = 256 << 20  # over three times a GPU's L2 (H200: 50 MB) and above the L3 of most CPUs

Thunk = Callable[[], Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Roof:
    """Work that bounds a case. `scale` times its seconds is the least time of the case, which is what is recorded."""

    setup: Callable[[], Thunk]
    scale: float = 1.0


@dataclass(frozen=True)
class Target:
    """A provider is at least `least` times as fast as `against`, another provider or a roof; None: only told, not judged."""

    provider: str
    against: str
    least: float | None


@dataclass(frozen=True)
class Case:
    """One problem, the same for all providers.

    `flops` and `bytes` are what the problem needs (FLOPs of its matrix products; least traffic), whatever a provider
    does. `providers` maps a name to a set-up that returns the thunk to time; the first one is the reference. A thunk
    returns its output, and `check(output, reference's output)` says why it is wrong, or None. `roofs` are timed in the
    same turns, but do other work: they are not checked and have no ratio.
    """

    name: str
    params: dict[str, int | float | str]
    flops: int
    bytes: int
    providers: dict[str, Callable[[], Thunk]]
    check: Callable[[Any, Any], str | None] | None = None
    roofs: dict[str, Roof] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    calls: int = 1  # that a provider's thunk makes, each with its own copy of the inputs; its time is that of one

    @property
    def reference(self) -> str:
        """The provider that ratios are against."""
        return next(iter(self.providers))


class Clock(Protocol):
    """What measures. A thunk's attribute `before`, where it has one, is called before every call, untimed."""

    def seconds(self, thunk: Thunk, repeats: int) -> float:
        """Seconds that `repeats` calls take."""


@dataclass
class CpuClock:
    """Wall time; `now=time.process_time` counts CPU time of all threads. `flush` runs before every call, untimed."""

    flush: Thunk | None = None
    now: Callable[[], float] = time.perf_counter

    def seconds(self, thunk: Thunk, repeats: int) -> float:
        """Seconds that `repeats` calls take."""
        untimed = _untimed(thunk, self.flush)
        total, (pieces, calls) = 0.0, (repeats, 1) if untimed else (1, repeats)
        for _ in range(pieces):
            for call in untimed:
                call()
            begin = self.now()
            for _ in range(calls):
                thunk()
            total += self.now() - begin
        return total


@dataclass
class CudaClock:
    """Time on the current CUDA device, between events. `flush` runs before every call, untimed."""

    flush: Thunk | None = None

    def seconds(self, thunk: Thunk, repeats: int) -> float:
        """Seconds that `repeats` calls take."""
        untimed = _untimed(thunk, self.flush)
        pieces, calls = (repeats, 1) if untimed else (1, repeats)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(pieces)]
        for begin, end in events:
            for call in untimed:
                call()
            begin.record()
            for _ in range(calls):
                thunk()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / 1000


def _untimed(thunk: Thunk, flush: Thunk | None) -> list[Thunk]:
    return [call for call in (getattr(thunk, "before", None), flush) if call]


def make_clock(device: str = "cpu", *, cold: bool = False, cpu_time: bool = False) -> Clock:
    """The clock of a device. `cold` sweeps the caches before every call; `cpu_time` counts CPU time, not wall time."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_ if cold else None
    if torch.device(device).type == "cuda":
        return CudaClock(flush)
    return CpuClock(flush, time.process_time if cpu_time else time.perf_counter)


@cache
def _capture_stream() -> Any:
    return torch.cuda.Stream()


@contextmanager
def on_capture_stream() -> Iterator[None]:
    """Forwards whose backward alone may be captured: autograd runs a backward on the stream that its forward ran on."""
    if not torch.cuda.is_available():
        yield
        return
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def graphed(thunk: Thunk) -> Thunk:
    """The thunk captured as a CUDA graph: no launch time of the host is left in it."""
    with on_capture_stream():
        thunk()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_capture_stream()):
        thunk()
    replay = partial(graph.replay)
    vars(replay).update(vars(thunk))  # `before`, `figures`
    return replay


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> dict[str, float | None]:
    """Median of samples and its interval: order statistics k and n+1-k, with the largest k that covers `confidence`.

    The distribution's median is below the k-th of n samples with probability P(Binomial(n, 1/2) < k). Fewer than six
    samples have no 95 % interval: None.
    """
    ordered, n = sorted(samples), len(samples)
    k, below = 0, 0.0
    while k < n and 2 * (below + math.comb(n, k) / 2**n) <= 1 - confidence:
        below += math.comb(n, k) / 2**n
        k += 1
    low, high = (ordered[k - 1], ordered[n - k]) if k else (None, None)
    return {"median": median(ordered), "low": low, "high": high}


def run(
    case: Case,
    *,
    rounds: int = 15,
    warmup: int = 2,
    device: str = "cpu",
    cold: bool = False,
    graph: bool = False,
    cpu_time: bool = False,
    min_sample: float = 2e-3,
    clock: Clock | None = None,
) -> Result:
    """Time the providers of a case in turns; one entry of `results` in the results file.

    A sample is the mean of as many calls as last `min_sample` seconds (0: one call). `warmup` rounds are not kept. A provider
    that raises is left out, with its reason; one that fails the check is timed but has no ratio. A case without a check has
    no ratios. What a thunk has as `figures` after its last call (memory, say) is kept. A target is met or missed where both
    its sides ran; a provider that ran and failed the check misses it.
    """
    clock = clock or make_clock(device, cold=cold, cpu_time=cpu_time)
    thunks, reasons = _prepare(case, graph)
    repeats: dict[str, int] = {}
    samples: dict[str, dict[int, float]] = {name: {} for name in thunks}
    for turn in range(-warmup, rounds):
        for name in rotated(list(thunks), turn):
            try:
                if name not in repeats:
                    repeats[name] = _repeats(clock, thunks[name], min_sample)
                took = clock.seconds(thunks[name], repeats[name]) / repeats[name]
            except Exception as error:  # a provider that cannot run here is a result, not the end of the benchmark
                reasons[name] = _reason(error)
                del thunks[name], samples[name]
                continue
            if turn >= 0:
                samples[name][turn] = took * (case.roofs[name].scale if name in case.roofs else 1 / case.calls)
    base = samples.get(case.reference)
    providers: dict[str, Any] = {}
    for name in (*case.providers, *case.roofs):
        reason, ratio = reasons.get(name), None
        if name in samples and name not in case.roofs and reason is None and base is None:
            reason = f"no ratio: the reference {case.reference} did not run"
        if name in samples and name not in case.roofs and reason is None and base is not None:
            ratio = median_interval([base[turn] / took for turn, took in samples[name].items()])
        providers[name] = {
            "reason": reason,
            "repeats": repeats.get(name) if name in samples else None,
            "samples": list(samples[name].values()) if name in samples else [],
            "seconds": median_interval(list(samples[name].values())) if name in samples else None,
            "ratio": ratio,
            "figures": getattr(thunks.get(name), "figures", None),
        }
    return {
        "case": case.name, "params": case.params, "flops": case.flops, "bytes": case.bytes, "reference": case.reference,
        "device": device, "cold": cold, "graph": graph, "cpu_time": cpu_time, "rounds": rounds, "providers": providers,
        "targets": [_judged(target, providers, base is not None) for target in case.targets],
    }  # fmt: skip


def limit(provider: str, what: str, most: float, samples: Sequence[float]) -> Result:
    """A target of a result against a number: the median of `samples` is at most `most`, whose name is `what`."""
    measured = median_interval([most / sample for sample in samples])
    target = Target(provider, what, 1.0)
    return {**asdict(target), "measured": measured, "met": measured["median"] >= 1.0}  # type: ignore[operator]


def outcome(
    case: str, params: dict[str, int | float | str], provider: str, what: str, least: float, value: float
) -> Result:
    """An entry of `results` that is no time: something counted, that is at least `least`."""
    measured: dict[str, float | None] = {"median": value, "low": None, "high": None}
    target = {**asdict(Target(provider, what, least)), "measured": measured, "met": value >= least}
    return {"case": case, "params": params, "providers": {}, "targets": [target]}


def _judged(target: Target, providers: dict[str, Any], comparable: bool) -> Result:
    """A target with what was measured of it: the median of the rounds' own ratios, and whether that is enough."""
    ours, theirs = providers[target.provider], providers[target.against]
    measured, met = None, None
    if ours["reason"] is None and theirs["reason"] is None:
        pairs = zip(theirs["samples"], ours["samples"], strict=True)
        ratios = [other / own for other, own in pairs]
        measured = median_interval(ratios)
        met = None if target.least is None else median(ratios) >= target.least
    elif ours["samples"] and ours["reason"] and comparable and target.least is not None:
        met = False  # it ran and its output is wrong
    return {**asdict(target), "measured": measured, "met": met}


def rotated(names: list[str], turn: int) -> list[str]:
    """The order of a round: every provider goes first, second, ... equally often."""
    start = turn % len(names) if names else 0
    return names[start:] + names[:start]


def _prepare(case: Case, graph: bool) -> tuple[dict[str, Thunk], dict[str, str]]:
    """Set up and check every provider: (thunks of those that run, reasons against a ratio)."""
    thunks: dict[str, Thunk] = {}
    reasons: dict[str, str] = {}
    expected: Any = None
    for name, setup in case.providers.items():
        try:
            thunk = setup()
            output = thunk()
            if name == case.reference:
                expected = output
            elif case.reference in thunks:
                wrong = case.check(output, expected) if case.check else "the case has no check"
                if wrong:
                    reasons[name] = f"no ratio: {wrong}"
            thunks[name] = thunk
        except Exception as error:
            reasons[name] = _reason(error)
    for name, thunk in list(thunks.items()) if graph else []:  # now: it calls them, and some write to what was compared
        try:
            thunks[name] = graphed(thunk)
        except Exception as error:
            reasons[name] = _reason(error)
            del thunks[name]
    for name, roof in case.roofs.items():
        try:
            thunks[name] = graphed(roof.setup()) if graph else roof.setup()
        except Exception as error:  # no room for it beside the providers, say: their times are still worth having
            reasons[name] = _reason(error)
    return thunks, reasons


def _repeats(clock: Clock, thunk: Thunk, min_sample: float) -> int:
    """How many calls last `min_sample` seconds; doubles until a measurement is long enough to tell. 0: one, without a trial."""
    if not min_sample:
        return 1
    count = 1
    while (took := clock.seconds(thunk, count)) < min_sample and count < 1 << 20:
        count *= 2 if took <= 0 else min(16, max(2, math.ceil(min_sample / took)))
    return count


def _reason(error: Exception) -> str:
    """The error's first line, without the paths of this machine."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {without_paths(first)}"


def copy_roof(traffic: int, device: str = "cpu") -> Roof:
    """A plain copy with `traffic` bytes read and written: the roof of anything memory-bound."""

    def setup() -> Thunk:
        # written, or every page of it would be the kernel's one page of zeros, which is read from the cache
        source = torch.ones(traffic // 2, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return Roof(setup)


def matmul_roof(flops: int, dtype: torch.dtype, size: int, device: str = "cpu") -> Roof:
    """torch's square matrix product, scaled to `flops`: the roof of anything compute-bound."""

    def setup() -> Thunk:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    return Roof(setup, flops / (2 * size**3))


def copy_bandwidth(device: str = "cpu", size: int = FLUSH_BYTES, rounds: int = 9) -> dict[str, Any]:
    """Bytes per second of a plain copy on a device, reads and writes counted."""
    case = Case("copy", {}, 0, 2 * size, {"copy": copy_roof(2 * size, device).setup})
    seconds = run(case, rounds=rounds, device=device)["providers"]["copy"]["seconds"]["median"]
    return {"bytes": 2 * size, "seconds": seconds, "bytes_per_second": 2 * size / seconds}


def matmul_rate(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, rounds: int = 9
) -> dict[str, Any]:
    """FLOPs per second of torch's square matrix product on a device."""
    flops = 2 * size**3
    case = Case("matmul", {}, flops, 0, {"matmul": matmul_roof(flops, dtype, size, device).setup})
    seconds = run(case, rounds=rounds, device=device)["providers"]["matmul"]["seconds"]["median"]
    kind = str(dtype).removeprefix("torch.")
    return {"dtype": kind, "size": size, "flops": flops, "seconds": seconds, "flops_per_second": flops / seconds}


def write_results(path: str | Path, results: list[Result], roofs: dict[str, Any] | None = None) -> None:
    """Write a results file, whole or not at all; `roofs` are rates of the device, measured in the same run."""
    path, program = Path(path), Path(sys.argv[0]).name
    document = {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "command": [program, *map(without_paths, sys.argv[1:])],
        "environment": environment(results[0]["device"] if results else "cpu"),
        "roofs": roofs or {},
        "results": results,
    }
    write_json(path, document)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a results file.

    Raises ValueError when it has another schema.
    """
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {document.get('schema')}, {SCHEMA} was expected")
    return document


def table(results: list[Result]) -> str:
    """The results for a person: time, rates and ratio, each with its interval."""
    lines = [["", "time", "95 % interval", "GB/s", "GFLOP/s", "tokens/s", "ratio", "95 % interval", ""]]
    for result in results:
        marks = [mark for mark in ("cold", "graph", "cpu_time") if result[mark]]
        lines.append([" ".join([title(result), *marks])])
        work = [result["bytes"] / 1e9, result["flops"] / 1e9, result["params"].get("tokens", 0)]
        for name, found in result["providers"].items():
            took, ratio = found["seconds"], found["ratio"]
            cells = ["-"] * 7
            if took:
                rates = [amount / took["median"] for amount in work]
                span = f"{_time(took['low'])} - {_time(took['high'])}" if took["low"] is not None else "-"
                cells[:5] = [_time(took["median"]), span, *(f"{rate:.4g}" if rate else "-" for rate in rates)]
            if ratio:
                span = f"{ratio['low']:.3f} - {ratio['high']:.3f}" if ratio["low"] is not None else "-"
                cells[5:] = [f"{ratio['median']:.3f}", span]
            lines.append([f"  {name}", *cells, found["reason"] or ""])
    return _aligned(lines)


def judgement(results: list[Result]) -> str:
    """Every target for a person: target, what was measured, and whether it is met."""
    lines = [["target", "measured", "95 % interval", "met"]]
    for result in results:
        for target in result["targets"]:
            measured, least, span = target["measured"], target["least"], "-"
            if measured and measured["low"] is not None:
                span = f"{measured['low']:.3f} - {measured['high']:.3f}"
            lines.append([
                f"{title(result)}: {target['provider']}{f' >= {least:.3g} x' if least else ' /'} {target['against']}",
                f"{measured['median']:.3f}" if measured else "-",
                span,
                {True: "yes", False: "NO", None: "-"}[target["met"]],
            ])  # fmt: skip
    return _aligned(lines)


def missed(results: list[Result]) -> int:
    """How many targets were measured and missed."""
    return sum(target["met"] is False for result in results for target in result["targets"])


def title(result: Result) -> str:
    """A case and its parameters on one line."""
    return " ".join([result["case"], *(f"{key}={value}" for key, value in result["params"].items())])


def _aligned(lines: list[list[str]]) -> str:
    """Lines of one cell as they are, the others in columns: the first to the left, the last free, the rest to the right."""
    width = len(lines[0])
    widths = [max(len(line[i]) for line in lines if len(line) == width) for i in range(width - 1)]
    return "\n".join(
        line[0] if len(line) == 1 else
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:]), line[-1]]).rstrip()
        for line in lines
    )  # fmt: skip


def _time(seconds: float) -> str:
    scale, unit = next((item for item in ((1, "s"), (1e3, "ms")) if seconds * item[0] >= 1), (1e6, "us"))
    return f"{seconds * scale:.4g} {unit}"


def rms_norm_case(device: str, rows: int = 4096, hidden: int = 576) -> Case:
    """RMS norm of (rows, hidden): the plain-torch reference against the device's own kernel."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    x, weight = torch.randn(rows, hidden, device=device).to(dtype), torch.ones(hidden, device=device, dtype=dtype)

    def provider(backend: str) -> Callable[[], Thunk]:
        def setup() -> Thunk:
            from hyperllama.kernels.backend import use
            from hyperllama.kernels.rms_norm import rms_norm

            def thunk() -> Any:
                with use(backend):
                    return rms_norm(x, weight, 1e-5)

            return thunk

        return setup

    def check(output: torch.Tensor, expected: torch.Tensor) -> str | None:
        error = (output.double() - expected.double()).norm() / expected.double().norm()
        limit = 4 * torch.finfo(dtype).eps
        return None if error <= limit else f"relative error {error:.2g}, at most {limit:.2g} was expected"

    own = "triton" if device.startswith("cuda") else "csrc"
    traffic = (2 * rows * hidden + hidden) * dtype.itemsize
    params: dict[str, int | float | str] = {"rows": rows, "hidden": hidden, "dtype": str(dtype).removeprefix("torch.")}
    return Case("rms_norm", params, 0, traffic, {name: provider(name) for name in ("reference", own)}, check)


def main() -> None:
    """Demonstrate the harness on rms_norm."""
    parser = argparse.ArgumentParser(description="Time rms_norm against its reference, with the roofs of this device.")
    parser.add_argument("--quick", action="store_true", help="15 rounds instead of 51")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cold", action="store_true", help="sweep the caches before every call")
    parser.add_argument("--graph", action="store_true", help="time CUDA graphs")
    parser.add_argument("--out", type=Path, help="write <out>/<device>/harness.json")
    arguments = parser.parse_args()
    device, cuda = arguments.device, arguments.device.startswith("cuda")
    dtype, size = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
    roofs = {"copy": copy_bandwidth(device), "matmul": matmul_rate(device, dtype, size)}
    rounds = 15 if arguments.quick else 51
    results = [run(rms_norm_case(device), rounds=rounds, device=device, cold=arguments.cold, graph=arguments.graph)]
    print(table(results))
    print(
        f"copy {roofs['copy']['bytes_per_second'] / 1e9:.4g} GB/s, "
        f"{roofs['matmul']['dtype']} matmul {roofs['matmul']['flops_per_second'] / 1e9:.4g} GFLOP/s"
    )
    if arguments.out:
        path = arguments.out / device_slug(environment(device)["device"]) / "harness.json"
        write_results(path, results, roofs)
        print(path)


if __name__ == "__main__":
    main()
