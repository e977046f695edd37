"""What a run tells: metrics.jsonl, a progress line, and speed against the device's peak.

metrics.jsonl has one line a step. Every field but those under "time" is a pure function of the run; integers are integers.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from io import FileIO
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from rich.console import Console

from hyperllama.files import write_text
from hyperllama.kernels.backend import check_indices

# Dense bf16 tensor-core peak in FLOP/s, without sparsity, from the vendors' data sheets.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 SXM": 989.4e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "GH200": 989.4e12,
}
SPIKE_STEPS = 128  # losses that a new one is compared with


def device_name(device: torch.device) -> str:
    """The device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(name: str, devices: int, dtype: torch.dtype) -> float | None:
    """bf16 peak of `devices` devices by name, in FLOP/s; None when unknown: no MFU is better than a guessed one."""
    matches = [key for key in PEAK_FLOPS if key in name and "NVL" not in name]
    return PEAK_FLOPS[max(matches, key=len)] * devices if matches and dtype == torch.bfloat16 else None


class Events:
    """What happened to a run beside its steps (resumed, damaged, not saved, ...): lines of events.jsonl."""

    def __init__(self, path: Path, screen: Console, *, write: bool):
        self.path, self.screen, self.write = path, screen, write

    def __call__(self, event: str, sentence: str, **fields: Any) -> None:
        """Tell people: on the screen, and in the file with `fields` beside the sentence."""
        if self.write:
            self.screen.print(f"hyperllama: {sentence}", markup=False)
        self.note(event, sentence=sentence, **fields)

    def note(self, event: str, **fields: Any) -> None:
        """Write an event that needs nobody's attention."""
        if self.write:
            line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields}
            data = (json.dumps(line) + "\n").encode()
            with suppress(OSError), self.path.open("ab", buffering=0) as file:  # a full disk: the screen has told
                begin = file.tell()
                if file.write(data) < len(data):
                    file.truncate(begin)  # or the next line would be joined to what was written of this one


class Metrics:
    """Collects steps on the device, writes them when asked to: one host sync a flush, not a step.

    A step whose loss or gradient norm is not finite was skipped (see `clip_or_skip` in update.py): its line says so, with null for
    both, and `say` names its windows. `skipped_in_a_row` counts such steps up to the last flush. What a full disk refuses is kept
    and written with a later flush; until then `problem` says what is wrong. `log` is given every line too. A run that goes on
    keeps the lines up to its `resumed_step`, and says so where some are torn or gone.
    """

    def __init__(
        self,
        path: Path,
        resumed_step: int,
        say: Events,
        *,
        write: bool,
        log: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.path, self.say, self.log = path, say, log
        self.pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.last: dict[str, Any] = {}
        self.problem = ""
        self.skipped = self.skipped_in_a_row = 0
        self.recent: deque[float] = deque(maxlen=SPIKE_STEPS)
        self._unwritten = b""
        kept = []
        written = path.read_text(errors="replace") if path.is_file() and resumed_step else ""
        for text in written.splitlines(keepends=True):
            with suppress(ValueError):  # what a machine that failed has not brought to the disk
                line = json.loads(text)
                if line["step"] <= resumed_step:
                    self._count(line)
                    kept.append(text)
        if len(kept) < resumed_step:
            say("lost_lines", f"{path} has {len(kept)} whole lines of the {resumed_step} steps up to the checkpoint")
        if write:
            write_text(path, "".join(kept))
            self.file: FileIO | None = path.open("ab", buffering=0)
        else:
            self.file = None
        self.started = time.perf_counter()

    def add(self, fields: dict[str, Any], values: torch.Tensor) -> None:
        """Note a step: host `fields`, and `values` = (loss, gradient norm) still on the device."""
        self.pending.append((fields, values))

    def pause(self, seconds: float) -> None:
        """Leave work that is no training out of the speed."""
        self.started += seconds

    def flush(self, tokens: int, flops: int, peak: float | None, **fields: Any) -> dict[str, Any]:
        """Write the pending steps; the last of them carries `fields` and the speed since the previous flush. Returns it."""
        if not self.pending:
            return self.last
        rows = torch.stack([values for _, values in self.pending]).tolist()
        check_indices(self.pending[-1][1].device)  # the device has just been waited for
        seconds = time.perf_counter() - self.started
        for i, ((step, _), (loss, norm)) in enumerate(zip(self.pending, rows, strict=True)):
            line: dict[str, Any] = {**step, "loss": loss, "grad_norm": norm}
            if not (isfinite(loss) and isfinite(norm)):
                line |= {"loss": None, "grad_norm": None, "skipped": True}
                self._tell_skipped(line, loss, norm)
            elif (z := self._z_score(loss)) is not None:
                line["loss_z"] = z
            self._count(line)
            if i == len(self.pending) - 1:
                speed = {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}
                line |= fields | {"time": speed | {"flops_per_second": flops / seconds}}
                if peak:
                    line["time"]["mfu"] = flops / seconds / peak
            self._unwritten += json.dumps(line).encode() + b"\n"
            if self.log is not None:
                self.log(line)
            self.last = line
        self.pending.clear()
        self._write()
        self.started = time.perf_counter()
        return self.last

    def _count(self, line: dict[str, Any]) -> None:
        skipped = line.get("skipped", False)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            self.recent.append(line["loss"])

    def _z_score(self, loss: float) -> float | None:
        """How many standard deviations a loss lies above those of the last steps; None until there are enough of them."""
        if len(self.recent) < SPIKE_STEPS // 4:
            return None
        spread = pstdev(self.recent)
        return (loss - fmean(self.recent)) / spread if spread else 0.0

    def _tell_skipped(self, line: dict[str, Any], loss: float, norm: float) -> None:
        first, last = line["windows"] - line["batch"], line["windows"] - 1
        self.say(
            "skipped",
            f"step {line['step']}: loss {loss}, gradient norm {norm}: the update was skipped (windows {first} to {last})",
            step=line["step"],
            windows=[first, last],
        )

    def _write(self) -> None:
        if self.file is None:
            self._unwritten = b""
            return
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self.file.write(self._unwritten) :]
            self.problem = ""
        except OSError as error:
            if not self.problem:
                self.say(
                    "not_written", f"{self.path} can't be written ({error.strerror}): kept in memory for a later try"
                )
            self.problem = f"{self.path.name}: {error.strerror}"

    def secure(self) -> None:
        """Have the disk hold the lines that were flushed. Raises OSError when it does not."""
        if self.problem:
            raise OSError(self.problem)
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write what is left and close metrics.jsonl. Raises OSError when the disk is still full."""
        if self.file:
            while self._unwritten:
                self._unwritten = self._unwritten[self.file.write(self._unwritten) :]
            self.file.close()


def speed_text(line: dict[str, Any], budget: int) -> str:
    """A flushed step as the progress line shows it; `budget` in FLOPs."""
    speed = line["time"]
    rate = f"MFU {speed['mfu']:.1%}" if "mfu" in speed else f"{speed['flops_per_second'] / 1e9:,.0f} GFLOP/s"
    parts = [
        "loss skipped" if line["loss"] is None else f"loss {line['loss']:.3f}",
        *([f"{line['bits_per_byte']:.3f} bits/byte"] if line.get("bits_per_byte") is not None else []),
        f"lr {line['lr']:.1e}",
        f"{speed['tokens_per_second']:,.0f} tok/s",
        rate,
        f"{line['spent_flops']:.3g} of {budget:.3g} FLOPs ({line['spent_flops'] / budget:.1%})",
        *([f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"] if torch.cuda.is_initialized() else []),
    ]
    return "  ".join(parts)


class PlainProgress:
    """The progress line for a file or a pipe, which shows no bar: one in QUIET_SECONDS at most."""

    QUIET_SECONDS = 30.0

    def __init__(self, screen: Console, label: str, steps: int, *, disable: bool):
        self.screen, self.label, self.steps = screen, label, steps
        self.disable = disable or screen.is_terminal
        self.began = self.shown = time.perf_counter()
        self.first: int | None = None

    def __call__(self, step: int, text: str) -> None:
        """Show `text` for `step`, with the time that is left at the pace so far."""
        now = time.perf_counter()
        if self.first is None:
            self.first, self.began = step, now
        if self.disable or now - self.shown < self.QUIET_SECONDS:
            return
        self.shown = now
        done = step - self.first
        left = str(timedelta(seconds=round((now - self.began) / done * (self.steps - step)))) if done else "?"
        self.screen.print(f"{self.label}: step {step} of {self.steps}  {left} left  {text}", markup=False)
