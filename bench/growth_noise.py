"""How to grow inside a run: noise, uneven shares, rates and moments after growth, by the loss after equal FLOPs.

    python -m bench.growth_noise [--seeds 1 2 3] [--windows 4800] [--out bench/results/growth_noise.json]

A model of 180,800 parameters reads a third of the windows, doubles its width, and reads the rest: generated English text, no
window twice, fp32. Seeds differ in the model's beginning, the noise, and the order of windows; all arms of a seed read the same
windows at the same cost and have one past. A loss is the training loss before the update, so of windows not seen before. `end` is
its mean over the last 20 steps, `after` over all that follow growth; differences are those of an arm to BASE, paired over
seeds, with 95 % intervals (t).
"""

import argparse
import datetime
import json
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

from hyperllama.config import RunConfig
from hyperllama.data.build import build_shards
from hyperllama.data.sample import write_corpus
from hyperllama.data.tokenizer import train_tokenizer
from hyperllama.experiment.questions import interval
from hyperllama.files import read_json, write_json
from hyperllama.settings import validated
from hyperllama.train import loop
from hyperllama.train.plan import Plan, make_plan

from .environment import environment, without_paths

BASE = "exact, carry, 10 dB"
END = 20  # steps
UNEVEN = "uneven"  # shares of heads and neurons as LEMON's, not a key of `grow`
Arm = tuple[str, str, float | str | None]  # lr_factors, optimizer, noise in dB


def _name(arm: Arm) -> str:
    factors, moments, noise = arm
    return f"{factors}, {moments}, {f'{noise:g} dB' if isinstance(noise, float) else noise or 'plain'}"


ARMS: dict[str, Arm] = {
    _name(arm): arm
    for arm in (
        *(("exact", "carry", noise) for noise in (10.0, 5.0, 4.78, None)),
        *(("none", "carry", noise) for noise in (10.0, 5.0, 4.78, None, UNEVEN)),
        *(("none", "fresh", noise) for noise in (10.0, 4.78)),
        ("exact", "fresh", 4.78),
    )
}


def prepare(work: Path, windows: int) -> None:
    """Text for `windows` windows of 128 tokens of a vocabulary of 512, a tokenizer and shards."""
    write_corpus(work / "corpus", ("eng",), 600 * windows, seed=1, dev_bytes=5_000, pairs=20)
    text = work / "corpus" / "text" / "eng" / "train.jsonl"
    tokenizer = train_tokenizer([text], work / "tokenizer.model", 512, seed=0)
    build_shards([text], tokenizer, work / "shards" / "eng", language="eng")


def recipe(work: Path, seed: int, windows: int, grow: dict[str, Any] | None = None) -> RunConfig:
    """The run of a seed; without `grow` the model stays small."""
    values = {
        "name": "growth",
        "out": str(work / "run"),
        "seed": seed,
        "tokenizer": str(work / "tokenizer.model"),
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2},
        "data": {"sources": [{"path": str(work / "shards" / "eng")}], "seq_len": 128},
        "budget": {"windows": windows},
        "global_batch": 16,
        "micro_batch": 16,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 2,
        "grow": grow,
    }
    return validated(RunConfig, values, "the benchmark's recipe")


def trained(work: Path, seed: int, windows: int, arm: str) -> dict[str, Any]:
    """Losses and asymmetry of one run."""
    factors, moments, noise = ARMS[arm]
    at_flops = windows // 3 * make_plan(recipe(work, seed, windows)).cost
    grow = {"at_flops": at_flops, "lr_factors": factors, "optimizer": moments}
    config = recipe(work, seed, windows, grow | {"noise_db": None if noise == UNEVEN else noise})

    def planned(config: RunConfig) -> Plan:
        plan = make_plan(config)
        if noise != UNEVEN:
            return plan
        assert plan.growth is not None
        return replace(plan, growth=replace(plan.growth, operator=replace(plan.growth.operator, split="uneven")))

    with tempfile.TemporaryDirectory(dir=work) as folder, mock.patch.object(loop, "make_plan", planned):
        record = loop.train(config.model_copy(update={"out": f"{folder}/run"}), quiet=True)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    return {
        "end": mean(losses[-END:]),
        "after": mean(losses[windows // 3 // config.global_batch :]),
        "asymmetry": [line["asymmetry"] for line in lines if "asymmetry" in line][-1],
        "spent_flops": record["ledger"]["spent"],
    }


def compared(rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means of every arm over the seeds that it and BASE have, and differences to it with half their intervals."""
    found = {}
    for arm, seeds in rows.items():
        both = [(row, rows[BASE][seed]) for seed, row in seeds.items() if seed in rows[BASE]]
        found[arm] = {key: mean(row[key] for row, _ in both) for key in ("end", "after", "asymmetry")}
        for key in ("end", "after"):
            found[arm][f"{key}_difference"] = interval([row[key] - base[key] for row, base in both])
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The comparison in Markdown; differences in thousandths."""
    lines = [
        f"| arm | end | - ({BASE}), 1e-3 | after growth | difference | asymmetry |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in found.items():
        cells = [arm]
        for key in ("end", "after"):
            middle, half = row[f"{key}_difference"]
            cells += [f"{row[key]:.4f}", f"{1e3 * middle:+.2f}" + ("" if half is None else f" ± {1e3 * half:.2f}")]
        lines.append("| " + " | ".join([*cells, f"{row['asymmetry']:.3f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train every arm of every seed, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--windows", type=int, default=4800, help="of a run, a multiple of 48 (%(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--out", type=Path, help="write this file after every run; what it holds is not run again")
    arguments = parser.parse_args()
    out, rows = arguments.out, dict[str, dict[str, dict[str, Any]]]()
    if out and out.is_file():
        known = read_json(out)
        if known["windows"] != arguments.windows:
            parser.error(f"{out} holds runs of {known['windows']} windows: name another file")
        rows = known["arms"]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        prepare(work, arguments.windows)
        for seed, arm in product(arguments.seeds, dict.fromkeys([BASE, *arguments.arms])):
            if str(seed) in rows.setdefault(arm, {}):
                continue
            rows[arm][str(seed)] = trained(work, seed, arguments.windows, arm)
            print(f"seed {seed}: {arm}: {rows[arm][str(seed)]['end']:.4f}", file=sys.stderr, flush=True)
            if out:
                about = {
                    "date": datetime.date.today().isoformat(),
                    "command": ["bench.growth_noise", *map(without_paths, sys.argv[1:])],
                    "environment": environment("cpu"),
                }
                write_json(out, {**about, "windows": arguments.windows, "arms": rows, "compared": compared(rows)})
    print(table(compared(rows)))


if __name__ == "__main__":
    main()
