"""Results as a study writes them, made of arithmetic instead of training: 34 models, six languages."""

import math
from typing import Any

TARGETS = ["est", "fao", "fas", "isl", "swe"]
LANGUAGES = ["eng", *TARGETS]
QUANTUM, ENGLISH, ADAPT = 7_215_003_648, 7_215_003_648 * 125, 7_215_003_648 * 31
PARAMETERS = {"1x": 213_568, "1x-cloned": 721_024, "2x": 721_024, "2x-scratch": 721_024}
LEVEL = {"eng": 2.11, "est": 2.32, "fao": 2.41, "fas": 1.21, "isl": 2.38, "swe": 2.24}
GAIN = {"1x": 0.0, "1x-cloned": -0.012, "2x": -0.031, "2x-scratch": 0.022}


def _cell(model: str, tag: str, bits: float) -> dict[str, Any]:
    wobble = (sum(map(ord, model + tag)) % 17 - 8) / 1000
    bits = LEVEL[tag] * bits * (1 + wobble)
    accuracy = round(min(0.97, max(0.44, 1.02 - 0.18 * bits)), 4)
    return {
        "documents": 40, "bytes": 20_000, "tokens": 7_000, "nll_nats": bits * math.log(2) * 20_000,
        "bits_per_byte": bits, "perplexity": math.exp(bits * math.log(2) * 20_000 / 7_000), "pairs": 120,
        "accuracy": accuracy,
        "by_phenomenon": {name: {"pairs": n, "accuracy": accuracy} for name, n in (("agreement", 80), ("case", 40))},
    }  # fmt: skip


def _row(
    name: str, family: str, kind: str, language: str | None, spent: int, inherited: int, **more: Any
) -> dict[str, Any]:
    scale = {}
    for tag in LANGUAGES:
        factor = 1.55 if tag != "eng" else 1.0
        if kind == "language":
            factor = 1.0 if tag == language else (1.12 if tag == "eng" else 1.5)
        elif kind == "joint":
            factor = 1.03
        elif kind == "merge":
            factor = {"linear": 1.27, "task_arithmetic": 1.22, "ties": 1.24}[more["method"]] if tag != "eng" else 1.04
        scale[tag] = factor * (1 + GAIN[family]) * (1.03 if name == "eng-seed" else 1.0)
    return {
        "id": name, "family": family, "kind": kind, "language": language, "method": None, "parents": [],
        "parameters": PARAMETERS[family], "spent": spent, "inherited": inherited, "total": spent + inherited,
        "path": f"runs/{name}/model", "token_counts": {"eng": 1000},
        "eval": {tag: _cell(name, tag, scale[tag]) for tag in LANGUAGES},
    } | more  # fmt: skip


def _curve(start: int, end: int, high: float, low: float) -> list[list[float]]:
    return [
        [start + (end - start) * i // 60, round(low + (high - low) * math.exp(-i / 9) + 0.02 * math.sin(2.3 * i), 6)]
        for i in range(1, 61)
    ]


def synthetic_results() -> dict[str, Any]:
    """A whole results.json."""
    seed = ENGLISH // 5 * 4
    models = [
        _row("eng-seed", "1x", "base", "eng", seed, 0),
        _row("eng-1x", "1x", "base", "eng", ENGLISH - seed, seed, parents=["eng-seed"]),
        _row("eng-seed-cloned", "2x", "clone", "eng", 0, seed, parents=["eng-seed"]),
        _row("eng-2x", "2x", "base", "eng", ENGLISH - seed, seed, parents=["eng-seed-cloned"]),
        _row("eng-1x-cloned", "1x-cloned", "clone", "eng", 0, ENGLISH, parents=["eng-1x"]),
    ]
    families = ("1x", "1x-cloned", "2x")
    for f in families:
        models += [_row(f"{tag}-{f}", f, "language", tag, ADAPT, ENGLISH, parents=[f"eng-{f}"]) for tag in TARGETS]
    models += [_row(f"joint-{f}", f, "joint", None, 5 * ADAPT, ENGLISH, parents=[f"eng-{f}"]) for f in families]
    models.append(_row("eng-2x-scratch", "2x-scratch", "base", "eng", ENGLISH, 0))
    models.append(_row("joint-2x-scratch", "2x-scratch", "joint", None, ENGLISH + 5 * ADAPT, 0))
    for f in families:
        for method in ("linear", "task_arithmetic", "ties"):
            parents = [f"{tag}-{f}" for tag in TARGETS]
            models.append(
                _row(f"merge-{method}-{f}", f, "merge", None, 0, ENGLISH + 5 * ADAPT, method=method, parents=parents)
            )
    curves = {}
    for row in models:
        if row["spent"]:
            low = 2.9 + 12 * GAIN[row["family"]] / 2 - (0.2 if row["kind"] == "base" else 0) + len(row["id"]) / 40
            curves[row["id"]] = _curve(row["inherited"], row["total"], 6.9 if not row["inherited"] else low + 1, low)
    groups = [
        ("base models after the base language", ENGLISH, ("base",)),
        ("adaptations to one language", ENGLISH + ADAPT, ("language",)),
        ("joint training, and merges of all languages", ENGLISH + 5 * ADAPT, ("joint", "merge")),
    ]
    return {
        "name": "demo", "corpus": "built-in sample sentences, which say nothing about real languages",
        "languages": LANGUAGES, "base_language": "eng", "targets": TARGETS, "seq_len": 128, "factor": 2,
        "noise_db": 10.0, "tokenizer_vocab": 1024, "models": models,
        "budgets": {"quantum": QUANTUM, "english": ENGLISH, "adapt": ADAPT},
        "equal": [
            {"what": what, "by": "total", "flops": flops,
             "ids": [row["id"] for row in models if row["kind"] in kinds and row["id"] != "eng-seed"]}
            for what, flops, kinds in groups
        ],
        "curves": curves,
    }  # fmt: skip
