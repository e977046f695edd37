"""Merge methods on one study's models, over several seeds: the paper's five, tuned, language-aware, against joint training.

    python -m bench.merging recipes/merging.yaml --seeds 42 43 44 --out bench/results/merging.json [KEY=VALUE ...]

The development part of each language is cut by whole documents into text to choose by, text to learn on and text that is only
measured: every figure is of the last. `spent` are the FLOPs of a merge itself (dense): choosing, learning; elementwise work is 0.
`gap closed` is the share of the way from the best of the five, at the paper's settings, to joint training. Models and figures are
kept under the recipe's `out`, a folder a seed, so that an interrupted comparison goes on.
"""

import argparse
import datetime
import json
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from hyperllama.config import RunConfig, validated
from hyperllama.data.build import build_shards
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.experiment.recipe import ExperimentConfig, budgets, grid, load_experiment
from hyperllama.experiment.run import Study, _lines, part_file, window_cost
from hyperllama.files import read_json, write_json
from hyperllama.merge import parse_recipe, plan
from hyperllama.merge.executor import run as run_merge
from hyperllama.merge.learned import learn
from hyperllama.merge.recipe import with_extensions
from hyperllama.merge.regmean import regmean
from hyperllama.merge.search import PAPERS, Candidate, Development, search
from hyperllama.train.loop import train

from .environment import environment, without_paths

PARTS = {"choose": 8_000, "learn": 26_000, "test": 42_000}  # bytes of text up to which a part takes documents
STEPS, WINDOWS = 24, 24  # of learning
TUNING = 8  # evaluations of the tuned baseline
FINE_TUNING = (1e-3,)  # learning rates of the control


def cut(config: ExperimentConfig, out: Path) -> dict[str, list[str]]:
    """The parts of every language's development text as files: part -> one file a language."""
    assert config.corpus is not None
    files: dict[str, list[str]] = {part: [] for part in PARTS}
    for language in config.languages:
        lines: dict[str, list[str]] = {part: [] for part in PARTS}
        seen = 0
        for line in _lines(part_file(Path(config.corpus), language, "dev")):
            part = next((part for part, end in PARTS.items() if seen < end), None)
            if part is None:
                break
            lines[part].append(line)
            seen += len(json.loads(line)["text"].encode())
        for part in PARTS:
            file = out / "parts" / part / f"{language}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(lines[part]), encoding="utf-8")
            files[part].append(str(file))
    return files


def merges(learn_texts: list[str]) -> dict[str, Candidate]:
    """What is compared, by name."""
    counts, moments = ("token_counts", 1.0), ("adam_v", 1.0)

    def learnt(by: str) -> tuple[tuple[str, Any], ...]:
        return (("texts", tuple(learn_texts)), ("by", by), ("steps", STEPS), ("windows", WINDOWS))

    arithmetic = "task_arithmetic"
    return {method: Candidate(method) for method in PAPERS} | {
        "token_counts": Candidate(arithmetic, importance=(counts,)),
        "adam_v": Candidate(arithmetic, importance=(moments,)),
        "token_counts + adam_v": Candidate(arithmetic, importance=(counts, moments)),
        "learnt by row": Candidate(arithmetic, learn=learnt("row")),
        "adam_v, learnt by tensor": Candidate(arithmetic, importance=(moments,), learn=learnt("tensor")),
        "adam_v, learnt by row": Candidate(arithmetic, importance=(moments,), learn=learnt("row")),
    }


def compare(study: Study, family: str) -> dict[str, dict[str, Any]]:
    """Bits per byte on the test part and FLOPs spent, by what was done, for one family of one seed."""
    c, base = study.config, str(study.folder(f"{study.config.base_language}-{family}"))
    parts = cut(c, study.out)
    models = [{"model": str(study.folder(f"{tag}-{family}")), "parameters": {"weight": 1.0}} for tag in c.targets]
    value = {"merge_method": "task_arithmetic", "base_model": base, "models": models, "parameters": {"normalize": True}}
    given = parse_recipe(yaml.safe_dump(value), "the comparison")
    test = Development(parts["test"], plan(given))
    rows: dict[str, dict[str, Any]] = {}

    def note(name: str, bits: dict[str, float], spent: int, **more: Any) -> None:
        rows[name] = {"mean": mean(bits.values())} | dict(zip(c.languages, bits.values(), strict=True))
        rows[name] |= {"spent": spent, **more}
        print(f"{study.out.name} {family:10} {name:32} {rows[name]['mean']:.4f}", flush=True)

    for name, model in {"before adaptation": base, "joint training": str(study.folder(f"joint-{family}"))}.items():
        alone = {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": 1.0}}]}
        note(name, test.measure(plan(parse_recipe(yaml.safe_dump(alone), name))), 0)
    for name, candidate in merges(parts["learn"]).items():
        planned = plan(candidate.recipe(given))
        learned = learn(planned) if candidate.learn else None
        note(name, test.measure(planned, learned), learned.flops if learned else 0)
    texts = [next(file for file in parts["learn"] if Path(file).stem == tag) for tag in c.targets]
    planned = plan(with_extensions(merges([])["linear"].recipe(given), regmean={"texts": texts}))
    solved = regmean(planned)
    note("regmean", test.measure(planned, solved), solved.flops)
    found = search(given, parts["choose"], TUNING, shares=False)
    note("best of the five, scale tuned", test.measure(found.plan), found.flops, chosen=found.rows[0]["merge"])

    # the control: the same FLOPs on the same text, but all weights free, from the best merge by shares
    start = study.out / "merges" / f"start-{family}"
    if not start.is_dir():
        run_merge(plan(merges([])["adam_v"].recipe(given)), start)
    sources = []
    for file in parts["learn"]:
        shards = study.out / "parts" / "shards" / Path(file).stem
        if not shards.is_dir():
            build_shards([file], Tokenizer.load(study.tokenizer_file), shards, language=shards.name)
        sources.append({"path": str(shards), "weight": 1.0})
    for rate in FINE_TUNING:
        name = f"adam_v, fine-tuned at {rate:g}"
        out = study.out / "runs" / f"fine-tuned-{rate:g}-{family}"
        settings = {
            "name": out.name, "out": str(out), "seed": c.seed, "tokenizer": str(study.tokenizer_file), "precision": "fp32",
            "init_from": str(start), "data": {"sources": sources, "seq_len": c.seq_len}, "global_batch": WINDOWS,
            "micro_batch": WINDOWS, "budget": {"steps": STEPS}, "optimizer": c.optimizer.model_dump() | {"lr": rate},
            "schedule": {"kind": "paper", "warmup_steps": 2, "decay_fraction": 0.5},
        }  # fmt: skip
        record = train(validated(RunConfig, settings, name), quiet=True)
        alone = {"merge_method": "linear", "models": [{"model": str(out / "model"), "parameters": {"weight": 1.0}}]}
        note(name, test.measure(plan(parse_recipe(yaml.safe_dump(alone), name))), record["ledger"]["spent"])
    return rows


def run_seed(recipe: str, overrides: list[str], seed: int, first: Path | None) -> dict[str, Any]:
    """Train what is not trained yet, compare what is not compared yet: family -> rows, and the FLOPs of all models of a merge."""
    out = Path(load_experiment(recipe, overrides).out) / f"s{seed}"
    study = Study(load_experiment(recipe, [*overrides, f"seed={seed}", f"out={out}"]))
    c = study.config
    if first is not None and not study.tokenizer_file.is_file():  # one tokenizer for all seeds
        out.mkdir(parents=True, exist_ok=True)
        shutil.copytree(first / "shards", out / "shards")
        shutil.copy(first / "tokenizer.model", study.tokenizer_file)
    study.claim()
    study.prepare()
    model = c.model.resolve(c.vocab, c.seq_len)
    spend = budgets(c, model)
    for arm in grid(c, spend):
        study.run_arm(arm, window_cost(c, model, arm), arm.id)
    families = {}
    for family in c.adapted:
        file = out / f"merging-{family}.json"
        if not file.is_file():
            write_json(file, compare(study, family))
        families[family] = read_json(file)
    training = spend.english + len(c.targets) * spend.adapt
    return {"families": families, "training_flops": training}


def _sd(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def summary(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """family -> what -> the mean bits per byte of every seed, their mean and standard deviation, the gap each closed."""
    result: dict[str, Any] = {}
    for family in next(iter(seeds.values()))["families"]:
        tables = [seed["families"][family] for seed in seeds.values()]
        result[family] = {}
        for name in tables[0]:
            closed = []
            for table in tables:
                best, joint = min(table[method]["mean"] for method in PAPERS), table["joint training"]["mean"]
                closed.append((best - table[name]["mean"]) / (best - joint))
            means = {str(seed): table[name]["mean"] for seed, table in zip(seeds, tables, strict=True)}
            result[family][name] = {
                "seeds": means, "mean": mean(means.values()), "sd": _sd(list(means.values())), "gap_closed": closed,
                "spent": mean(table[name]["spent"] for table in tables),
            }  # fmt: skip
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_intermixed_args()
    seeds: dict[int, dict[str, Any]] = {}
    first: Path | None = None
    for seed in arguments.seeds:
        seeds[seed] = run_seed(arguments.recipe, arguments.overrides, seed, first)
        first = first or Path(load_experiment(arguments.recipe, arguments.overrides).out) / f"s{seed}"
    found = summary(seeds)
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": ["bench.merging", *map(without_paths, sys.argv[1:])],
    }
    about |= {"environment": environment("cpu"), "recipe": Path(arguments.recipe).read_text()}
    write_json(arguments.out, {**about, "summary": found, "seeds": seeds})
    for family, table in found.items():
        print(f"\n| {family} | bits per byte | gap closed | spent, % of training |\n| --- | --- | --- | --- |")
        training = next(iter(seeds.values()))["training_flops"]
        for name, row in table.items():
            closed = row["gap_closed"]
            print(
                f"| {name} | {row['mean']:.3f} ± {row['sd'] or 0:.3f} | {100 * mean(closed):.0f} % "
                f"± {100 * (_sd(closed) or 0):.0f} | {100 * row['spent'] / training:.1f} |"
            )


if __name__ == "__main__":
    main()
