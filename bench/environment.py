"""What a benchmark depends on: hardware, versions, threads, clocks, commit. No path of this machine, no host name."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on: hardware, versions, threads, clocks, commit. No paths, no host name."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_model(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "clocks": _clocks(device) if cuda else None,
        "git": _git(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.machine()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _output(*command: str) -> str | None:
    """What a program prints, None when it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _clocks(device: str) -> dict[str, str] | None:
    """Clocks (MHz), power limit (W) and driver of a CUDA device, as nvidia-smi tells them."""
    keys = ["clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "driver_version"]
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    told = _output("nvidia-smi", which, f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits")
    return dict(zip(keys, told.split(", "), strict=True)) if told else None


def _git() -> dict[str, str | bool] | None:
    """Commit and whether the tree, but for results, differs from it; None outside our own repository."""
    top, commit = _output("git", "rev-parse", "--show-toplevel"), _output("git", "rev-parse", "--verify", "HEAD")
    if top is None or commit is None or Path(top) != ROOT:
        return None
    return {"commit": commit, "dirty": _output("git", "status", "--porcelain", "--", ".", ":!bench/results") != ""}


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+([^\s/\\'\"]*)", r"\1", text)


def device_slug(name: str) -> str:
    """A device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
