"""Every target of the project that is a figure in one list, beside what was measured of it.

    hyperllama bench targets [--json] [--results bench/results]

A target is found in results files by the case's title, the provider and what it is against, as the programs write them (harness.py,
gpu.py). The newest measurement on this device counts; where there is none, the newest on another one is shown and named. Targets
of a GPU are for one H200, those of a CPU for two cores.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
CPU, GPU = "CPU", "GPU"


@dataclass(frozen=True)
class Goal:
    """`provider` is at least `least` times as fast as `against` (or below the limit that is so called) in every case whose title
    the regex finds."""

    area: str  # Triton, C++, trainer, folders, merges, data, gate
    needs: str  # CPU, GPU
    case: str
    provider: str
    against: str
    least: float


@dataclass(frozen=True)
class Measured:
    """One target of a results file."""

    title: str
    provider: str
    against: str
    median: float
    device: str
    date: str


def _triton() -> Iterator[Goal]:
    """At 65536 tokens, cold, in a CUDA graph; shares of the faster of two copies."""
    shares = {
        "rms_norm": 0.92, "rms_norm backward": 0.88, "rope": 0.90, "rope backward": 0.90, "glu": 0.93, "glu backward": 0.92,
        "softmax_gradient": 0.88, "adamw": 0.93, "grow": 0.92, "remap": 0.92, "merge_linear": 0.92, "merge_ties": 1 / 1.1,
    }  # fmt: skip

    def at(op: str, shape: str = "(180M|572M)") -> str:
        return f"^{re.escape(op)} shape={shape} tokens=65536 mode=cold"

    for op, share in shares.items():
        yield from (Goal("Triton", GPU, at(op), "triton", copy, share) for copy in ("copy", "copy_triton"))
    head = "linear_cross_entropy with backward"
    for shape, least in (("180M", 1 / 1.15), ("572M", 1 / 1.10)):
        yield Goal("Triton", GPU, at(head, shape), "triton", "products", least)
    backends = "(sdpa|sdpa_flash|sdpa_cudnn|flash_attn_[234]|xformers)"
    for op, least in (("attention", 0.80), ("attention backward", 0.75)):
        yield Goal("Triton", GPU, at(op), "triton", backends, least)
    yield Goal("Triton", GPU, at("attention with backward"), "auto", backends, 0.98)
    peers = "(compiled|liger|quack|cut_cross_entropy|torch fused|embedding_dense_backward)"
    told = ("grad_norm", "embedding backward", "embedding backward atomic", "merge_task_arithmetic", "merge_gram")
    for op in (*shares, head, *told):
        yield Goal("Triton", GPU, at(op), "triton", peers, 1.0)


def _cpp() -> Iterator[Goal]:
    """Steps against transformers and the matrix products alone; ops against a copy of their least traffic."""
    transformers, compiled, matmul = "transformers", "transformers compiled", "matmul"
    for model, dtype, floors in (
        ("tiny .*", "bfloat16", {transformers: 2.6, compiled: 1.8}),
        ("demo .*", "bfloat16", {transformers: 2.4, compiled: 1.9, matmul: 0.60}),
        ("demo .*", "float32", {transformers: 1.6, compiled: 1.4, matmul: 0.70}),
        ("180M .*T=1024 .*", "bfloat16", {transformers: 1.4, compiled: 1.15, matmul: 0.78}),
        ("180M .*T=2048 .*", "bfloat16", {transformers: 1.4, compiled: 1.15, matmul: 0.78}),
    ):
        for against, least in floors.items():
            yield Goal("C++", CPU, f"^step model={model}dtype={dtype} malloc=users", "csrc", against, least)
    both = ("float32", "bfloat16")
    for dtype in both:
        for op in ("rms_norm", "rope", "glu"):
            for way in ("forward", "backward"):
                yield Goal("C++", CPU, f"^{op} {way} shape=.* dtype={dtype}", "csrc", "copy", 0.80)
        for op, share in {
            "embedding_backward_": 0.80, "adamw": 0.80, "merge_linear": 0.75, "merge_task_arithmetic": 0.75, "merge_ties": 0.45,
            "grow": 0.75,
        }.items():  # fmt: skip
            yield Goal("C++", CPU, f"^{op} shape=.* dtype={dtype}", "csrc", "copy", share)
    yield Goal("C++", CPU, "^grad_norm shape=", "csrc", "copy", 0.80)
    for dtype in both:
        for documents in ("documents=0", "documents=[1-9]"):
            case = "^attention forward.backward .*head_dim={} " + f"{documents}.* dtype={dtype}"
            yield Goal("C++", CPU, case.format(32), "csrc", "sdpa", 2.0)
            # 1.5 where the CPU multiplies bf16, as those do that these were measured on
            yield Goal("C++", CPU, case.format(64), "csrc", "sdpa", 1.5 if dtype == "bfloat16" else 1.3)
    yield Goal("C++", CPU, "^linear_cross_entropy forward.backward .*V=128256", "csrc", "gemms", 1 / 1.15)


def _trainer() -> Iterator[Goal]:
    """throughput.py: model FLOPs utilization; memory; transformers with the same state; what of a step is not an op."""
    for model, least in (("180M", 0.43), ("572M", 0.50)):
        yield Goal("trainer", GPU, f"^train model={model}", "ours", f"seconds at {least:.0%} MFU", 1.0)
        yield Goal("trainer", GPU, f"^train model={model}", "ours", "transformers", 1.5)
    yield Goal("trainer", GPU, "^train model=572M", "ours", "50 GB", 1.0)
    yield Goal("trainer", CPU, "^overhead ", "loop", "3 % that is not an op", 1.0)
    yield Goal("trainer", CPU, r"^stall parameters=1\d{8}$", "ours", "2 % of a minute", 1.0)
    yield Goal("trainer", CPU, "^chaos ", "share", "disturbed runs equal to the undisturbed", 1.0)


def _folders() -> Iterator[Goal]:
    """Five models of 572M and their base, from the shell; start-up; inside a running process against the machine's floor."""
    for method, ratio, floors in (
        ("linear", 15, 1.5), ("task_arithmetic", 15, 1.5), ("multislerp", 20, 4), ("dare_ties", 40, 4), ("ties", 60, 4)
    ):  # fmt: skip
        case = f"method={method} models=5 size=572M"
        yield Goal("folders", CPU, f"^merge {case}", "ours", "mergekit", ratio)
        yield Goal("folders", CPU, f"^merge {case}", "ours", "0.5 GB anonymous memory", 1.0)
        yield Goal("folders", CPU, f"^merge without start-up {case}", "ours", "floor", 1 / floors)
    yield Goal("folders", CPU, "^grow method=hyperclone", "ours", "plain torch", 20)
    yield Goal("folders", CPU, "^grow method=hyperclone", "ours", "0.4 GB anonymous memory", 1.0)
    for command in ("--help", "merge --dry-run", "grow --dry-run"):
        yield Goal("folders", CPU, "^start", command, "0.5 s", 1.0)


def _rest() -> Iterator[Goal]:
    """Merges of languages against the way to joint training; data and evaluation; what the regression gate promises."""
    for family in ("1x", "1x-cloned"):
        yield Goal("merges", CPU, f"^merging family={family} ", "share", "of the gap to joint training closed", 0.5)
    yield Goal("data", CPU, "^tokenize ", "ours", "datatrove", 1.0)
    yield Goal("data", CPU, "^pairs pairs=4000", "ours", "a minute", 1.0)
    yield Goal("gate", CPU, "^gate versions=equal ", "share", "trials without an alarm", 39 / 40)
    yield Goal("gate", CPU, "^gate versions=slowed ", "share", "trials that catch it", 19 / 20)


GOALS: tuple[Goal, ...] = (*_triton(), *_cpp(), *_trainer(), *_folders(), *_rest())


def read(folder: Path) -> Iterator[Measured]:
    """Every measured target of the results files below a folder, but for files that are no results of the harness."""
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        results = document.get("results")
        if results is None:  # bench.gpu's cells
            results = [cell["speed"] for cell in document.get("cells", {}).values() if "speed" in cell]
        about = document.get("environment", {})
        for result in results:
            title = " ".join([result["case"], *(f"{key}={value}" for key, value in result["params"].items())])
            for target in result["targets"]:
                if target["least"] is not None and (
                    target["measured"] or target["met"] is False
                ):  # None: told there, not judged
                    median = target["measured"]["median"] if target["measured"] else math.nan
                    device, date = about.get("device", path.parent.name), document.get("date", "")
                    yield Measured(title, target["provider"], target["against"], median, device, date)


def _finds(goal: Goal, found: Measured) -> bool:
    return bool(
        found.provider == goal.provider
        and re.fullmatch(re.escape(goal.against) if goal.area != "Triton" else goal.against, found.against)
        and re.search(goal.case, found.title)
    )


def judged(goals: Sequence[Goal], measured: Sequence[Measured], here: Set[str]) -> list[dict[str, Any]]:
    """A row for every target and case that was measured, or one without a figure.

    Keys: those of a Goal; title, measured (times as fast, or how far below the limit), device, date (None: never measured);
    met (None: never measured); here: measured on one of the devices `here`.
    """
    rows: list[dict[str, Any]] = []
    for goal in goals:
        newest: dict[tuple[str, str], Measured] = {}
        for found in measured:
            if not _finds(goal, found):
                continue
            key = (found.title, found.against)
            known = newest.get(key)
            if known is None or (found.device in here, found.date) >= (known.device in here, known.date):
                newest[key] = found
        about = asdict(goal)
        for (title, against), found in newest.items():
            rows.append(about | {
                "title": title, "against": against, "measured": found.median, "device": found.device, "date": found.date,
                "met": found.median >= goal.least, "here": found.device in here,
            })  # fmt: skip
        if not newest:
            rows.append(about | dict.fromkeys(("title", "measured", "device", "date", "met")) | {"here": False})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a person."""
    lines = [("target", "measured", "met", "device", "date")]
    for row in rows:
        name = row["title"] or row["case"].replace("\\", "").strip("^")
        target = f"{row['area']}: {name}: {row['provider']} >= {row['least']:.3g} x {row['against']}"
        if row["measured"] is None:
            lines.append((target, "-", "-", f"not measured on this device ({row['needs']})", ""))
        else:
            elsewhere = "" if row["here"] else ", not measured on this device"
            met = "yes" if row["met"] else "NO"
            lines.append((target, f"{row['measured']:.3f}", met, f"{row['device']}{elsewhere}", row["date"]))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    known = [row for row in rows if row["measured"] is not None]
    met = sum(row["met"] for row in known)
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, f"{met} met, {len(known) - met} missed, {len(rows) - len(known)} never measured"])
