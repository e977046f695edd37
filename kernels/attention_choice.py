"""Which attention is fastest here: every backend that is installed, timed on the run's own shape and checked against fp64.

A backend passes when the errors of its output and its gradient are at most twice those of plain torch in the same dtype. Timed are
eager calls, forward with what it saves and backward, medians of interleaved rounds: about a second in all.
"""

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import attention_libraries as libraries
from hyperllama.kernels.attention import BACKENDS, attention, forward_reference, obstacle

ROUNDS, WARM_UP = 7, 2
LONGEST_CHECK = 4096  # tokens: the truth has scores of T^2 in fp64
# Same bits every time. Of torch's kernels on a GPU only some, and only under torch.use_deterministic_algorithms; they are left out.
DETERMINISTIC = ("flash_attn_3", "flash_attn_2", "flash_attn_4", "triton", "csrc", "reference")


@dataclass(frozen=True)
class Problem:
    """What is measured: windows of tokens, heads, dtype and device; `documents` cuts every window into ragged ones."""

    windows: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    documents: bool

    def inputs(self, windows: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """qkv, the output's gradient and the documents' borders: random, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        heads, kv_heads, head = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = torch.randn(windows, seq_len, (heads + 2 * kv_heads) * head, generator=generator)
        dy = torch.randn(windows, seq_len, heads * head, generator=generator)
        borders = None
        if self.documents:
            inside = torch.randint(0, seq_len, (windows, 3), generator=generator)
            starts = torch.arange(windows)[:, None] * seq_len
            ends = torch.tensor([windows * seq_len])
            borders = torch.cat([starts.flatten(), (starts + inside).flatten(), ends]).unique().to(torch.int32)
            borders = borders.to(self.device)
        return qkv.to(self.device, self.dtype), dy.to(self.device, self.dtype), borders


@dataclass(frozen=True)
class Measured:
    """One backend. `error`: times plain torch's in the same dtype; `problem`: why it was not measured or may not be used."""

    backend: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    error: float | None = None
    problem: str | None = None

    @property
    def milliseconds(self) -> float:
        """Forward and backward; infinite for one that may not be used."""
        usable = self.problem is None and self.forward_ms is not None and self.backward_ms is not None
        return self.forward_ms + self.backward_ms if usable else float("inf")  # type: ignore[operator]

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def measure(problem: Problem, backends: tuple[str, ...] | None = None) -> list[Measured]:
    """Check and time `backends` (default: all that could run on the device but the reference), fastest first."""
    if backends is None:
        backends = ("csrc", "sdpa") if problem.device.type == "cpu" else BACKENDS[3:]
    qkv, dy, borders = problem.inputs(problem.windows, problem.seq_len)
    rows, errors = [], {}
    check = _Check(problem)
    for backend in backends:
        reason = obstacle(backend, qkv, problem.num_heads, problem.num_kv_heads, borders)
        try:
            if reason is None and backend in libraries.LIBRARIES:
                libraries.load(backend)
            if reason is None:
                errors[backend] = check.error(backend)
        except HyperLlamaError as error:
            reason = str(error).removeprefix(f"attention backend {backend} ")
        except Exception as error:  # another library's, of any kind: then it is not used
            reason = f"failed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        if reason is not None:
            rows.append(Measured(backend, problem=reason))
    times = _times(problem, tuple(errors), qkv, dy, borders)
    for backend, worst in errors.items():
        reason = None if worst <= 2 else f"its error is {worst:.1f} times that of plain torch; 2 is allowed"
        rows.append(Measured(backend, *times[backend], worst, reason))
    return sorted(rows, key=lambda row: (row.milliseconds, row.backend))


def pick(rows: list[Measured], *, deterministic: bool) -> str:
    """The fastest of `rows`; where the same bits are wanted the first of DETERMINISTIC, so that no clock decides.

    Raises HyperLlamaError when none may be used.
    """
    usable = [row.backend for row in rows if row.milliseconds < float("inf")]
    if deterministic:
        usable = [backend for backend in DETERMINISTIC if backend in usable]
    if not usable:
        reasons = "; ".join(f"{row.backend} {row.problem}" for row in rows if row.problem)
        raise HyperLlamaError(f"attention: auto found no {'deterministic ' * deterministic}backend: {reasons}")
    return usable[0]


def table(rows: list[Measured], chosen: str) -> str:
    """The measurements for people."""
    lines = [f"{'attention':<16}{'forward ms':>12}{'backward ms':>13}{'error':>8}"]
    for row in rows:
        figures = "".join(
            f"{'' if value is None else format(value, digits):>{width}}"
            for value, digits, width in (
                (row.forward_ms, ".3f", 12),
                (row.backward_ms, ".3f", 13),
                (row.error, ".2f", 8),
            )
        )
        note = "chosen" if row.backend == chosen else row.problem or ""
        lines.append(f"{row.backend:<16}{figures}  {note}".rstrip())
    return "\n".join(lines)


class _Check:
    """One window: output and gradient in fp64, and the errors that plain torch makes in the run's dtype."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.qkv, self.dy, self.borders = problem.inputs(1, min(problem.seq_len, LONGEST_CHECK))
        self.truth = self._by_group(torch.float64)
        self.allowed = [
            max(_distance(plain, true), torch.finfo(problem.dtype).eps * float(true.abs().max()) / 2)
            for plain, true in zip(self._by_group(problem.dtype), self.truth, strict=True)
        ]

    def error(self, backend: str) -> float:
        """The larger of the errors of output and gradient, as multiples of plain torch's."""
        p = self.problem
        qkv = self.qkv.clone().requires_grad_()
        out = attention(qkv, p.num_heads, p.num_kv_heads, cu_seqlens=self.borders, backend=backend)
        result = (out.detach(), *torch.autograd.grad(out, qkv, self.dy))
        worst = [_distance(got, true) / own for got, true, own in zip(result, self.truth, self.allowed, strict=True)]
        return max(worst) if all(bool(torch.isfinite(got).all()) for got in result) else float("inf")

    def _by_group(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and gradient of the reference, one kv head and its queries at a time: the scores of all need not fit."""
        n, k = self.problem.num_heads, self.problem.num_kv_heads
        heads = self.qkv.to(dtype).unflatten(2, (n + 2 * k, -1))
        dy = self.dy.to(dtype).unflatten(2, (k, -1))
        outs, grad = [], torch.empty_like(heads)
        for group in range(k):
            members = [*range(group * n // k, (group + 1) * n // k), n + group, n + k + group]
            packed = heads[:, :, members].flatten(2).requires_grad_()
            out = forward_reference(packed, n // k, 1, self.borders)[0]
            grad[:, :, members] = torch.autograd.grad(out, packed, dy[:, :, group])[0].unflatten(2, (n // k + 2, -1))
            outs.append(out.detach())
        return torch.cat(outs, 2), grad.flatten(2)


def _distance(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).abs().max())


def _times(
    problem: Problem, backends: tuple[str, ...], qkv: Tensor, dy: Tensor, borders: Tensor | None
) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward and backward; the backends take turns, so that a clock that drifts hits all of them."""
    rounds: dict[str, list[tuple[float, float]]] = {backend: [] for backend in backends}
    leaf = qkv.requires_grad_()
    for number in range(WARM_UP + ROUNDS):
        for backend in backends:
            marks = [_mark(problem.device)]
            out = attention(leaf, problem.num_heads, problem.num_kv_heads, cu_seqlens=borders, backend=backend)
            marks.append(_mark(problem.device))
            torch.autograd.grad(out, leaf, dy)
            marks.append(_mark(problem.device))
            if number >= WARM_UP:
                rounds[backend].append((_between(*marks[:2]), _between(*marks[1:])))
    return {
        backend: (round(median(f for f, _ in pairs), 4), round(median(b for _, b in pairs), 4))
        for backend, pairs in rounds.items()
    }


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Milliseconds between two marks."""
    if isinstance(start, float):
        return (end - start) * 1e3
    end.synchronize()
    return float(start.elapsed_time(end))
