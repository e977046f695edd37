"""What a run tells: metrics.jsonl, a progress line, and speed against the device's peak.

metrics.jsonl has one line a step. Every field but those under "time" is a pure function of the run; integers are integers.
"""

import json
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from hyperllama.files import write_text

# Dense bf16 tensor-core peak in FLOP/s, without sparsity, from the vendors' data sheets.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 SXM": 989.4e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "GH200": 989.4e12,
}


def device_name(device: torch.device) -> str:
    """The device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(name: str, devices: int, dtype: torch.dtype) -> float | None:
    """bf16 peak of `devices` devices by name, in FLOP/s; None when unknown: no MFU is better than a guessed one."""
    matches = [key for key in PEAK_FLOPS if key in name and "NVL" not in name]
    return PEAK_FLOPS[max(matches, key=len)] * devices if matches and dtype == torch.bfloat16 else None


class Metrics:
    """Collects steps on the device, writes them when asked to: one host sync a flush, not a step."""

    def __init__(self, path: Path, resumed_step: int, *, write: bool):
        self.pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.file: TextIO | None = None
        self.last: dict[str, Any] = {}
        if write:
            lines = path.read_text().splitlines(keepends=True)[:resumed_step] if path.is_file() else []
            write_text(path, "".join(lines))
            self.file = path.open("a")
        self.started = time.perf_counter()

    def add(self, fields: dict[str, Any], values: torch.Tensor) -> None:
        """Note a step: host `fields`, and `values` = (loss, gradient norm) still on the device."""
        self.pending.append((fields, values))

    def flush(self, tokens: int, flops: int, peak: float | None) -> dict[str, Any]:
        """Write the pending steps; the last of them carries the speed since the previous flush. Returns that last step."""
        if not self.pending:
            return self.last
        rows = torch.stack([values for _, values in self.pending]).tolist()
        seconds = time.perf_counter() - self.started
        for i, ((fields, _), (loss, norm)) in enumerate(zip(self.pending, rows, strict=True)):
            line: dict[str, Any] = {**fields, "loss": loss, "grad_norm": norm}
            if i == len(self.pending) - 1:
                speed = {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}
                line["time"] = {**speed, "flops_per_second": flops / seconds} | (
                    {"mfu": flops / seconds / peak} if peak else {}
                )
            if self.file:
                self.file.write(json.dumps(line) + "\n")
            self.last = line
        if self.file:
            self.file.flush()
        self.pending.clear()
        self.started = time.perf_counter()
        return self.last

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self.file:
            self.file.close()


def speed_text(line: dict[str, Any]) -> str:
    """A flushed step as the progress line shows it."""
    speed = line["time"]
    rate = f"MFU {speed['mfu']:.1%}" if "mfu" in speed else f"{speed['flops_per_second'] / 1e9:,.0f} GFLOP/s"
    return f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  {speed['tokens_per_second']:,.0f} tok/s  {rate}"
